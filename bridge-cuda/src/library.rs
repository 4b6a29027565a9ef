//! Finds the shared libraries of CUDA at run time.
//!
//! The driver (`libcuda.so.1`) comes with the GPU. NVRTC, cuBLASLt, cuDNN and NCCL are looked for in
//! `LD_LIBRARY_PATH`, under `CUDA_HOME` and `CUDA_PATH`, in the `nvidia/*/lib` folders that pip installs, in the usual
//! toolkit folders, and last by the loader's own rules. A library found is opened once with its full path; the bindings
//! then find it by its name, since the loader knows libraries that are already open.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use crate::error::{Error, Result};

/// One of CUDA's shared libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver, `libcuda.so.1`.
    Driver,
    /// The run-time compiler.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Attention.
    Cudnn,
    /// Collectives, needed for several GPUs only.
    Nccl,
}

impl std::fmt::Display for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Library::Driver => "CUDA driver",
            Library::Nvrtc => "NVRTC",
            Library::CublasLt => "cuBLASLt",
            Library::Cudnn => "cuDNN",
            Library::Nccl => "NCCL",
        })
    }
}

impl Library {
    /// Every library, in the order `doctor` lists them.
    pub const ALL: [Library; 5] = [
        Library::Driver,
        Library::Nvrtc,
        Library::CublasLt,
        Library::Cudnn,
        Library::Nccl,
    ];

    /// File names accepted, the most preferred first.
    fn file_names(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1", "libcuda.so"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
            Library::Cudnn => &["libcudnn.so.9", "libcudnn.so"],
            Library::Nccl => &["libnccl.so.2", "libnccl.so"],
        }
    }

    /// What to do when it is missing.
    pub fn advice(self) -> &'static str {
        match self {
            Library::Driver => {
                "install the NVIDIA driver (https://www.nvidia.com/drivers) or start the container with the GPU \
                 (`--gpus all`)"
            }
            Library::Nvrtc => {
                "run `pip install nvidia-cuda-nvrtc`, or install the CUDA toolkit and set CUDA_HOME"
            }
            Library::CublasLt => {
                "run `pip install nvidia-cublas`, or install the CUDA toolkit and set CUDA_HOME"
            }
            Library::Cudnn => {
                "run `pip install nvidia-cudnn-cu13` (or -cu12, to match the other libraries)"
            }
            Library::Nccl => {
                "run `pip install nvidia-nccl-cu13` (or -cu12); it is needed for several GPUs only"
            }
        }
    }

    /// Opens the library if that has not happened yet, and says where it was found.
    pub fn load(self) -> Result<PathBuf> {
        static LOADED: OnceLock<Mutex<HashMap<Library, (PathBuf, &'static libloading::Library)>>> =
            OnceLock::new();
        let mut loaded = LOADED
            .get_or_init(Mutex::default)
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((path, _)) = loaded.get(&self) {
            return Ok(path.clone());
        }
        let folders = search_folders();
        let mut reason = String::from("no such file");
        let in_folders = folders
            .iter()
            .flat_map(|dir| self.file_names().iter().map(move |name| dir.join(name)));
        let by_loader = self.file_names().iter().map(PathBuf::from);
        for candidate in in_folders.filter(|path| path.exists()).chain(by_loader) {
            // SAFETY: running the initialisers of NVIDIA's libraries is what the caller asks for; they are never closed.
            match unsafe { libloading::Library::new(&candidate) } {
                Ok(library) => {
                    loaded.insert(self, (candidate.clone(), Box::leak(Box::new(library))));
                    return Ok(candidate);
                }
                Err(error) if candidate.is_absolute() => reason = error.to_string(),
                Err(_) => {}
            }
        }
        Err(Error::Library {
            library: self.file_names()[0],
            reason,
            searched: folders
                .iter()
                .map(|path| path.display().to_string())
                .chain(["the loader's path".into()])
                .collect(),
            advice: self.advice(),
        })
    }
}

/// Existing folders that may hold the libraries, without repeats, the most preferred first.
fn search_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    let variable = |name: &str| std::env::var_os(name).unwrap_or_default();
    folders.extend(
        std::env::split_paths(&variable("LD_LIBRARY_PATH")).filter(|path| path.is_absolute()),
    );
    for root in ["CUDA_HOME", "CUDA_PATH"]
        .map(variable)
        .iter()
        .filter(|value| !value.is_empty())
    {
        folders.extend(
            ["lib64", "lib", "targets/x86_64-linux/lib"].map(|sub| Path::new(root).join(sub)),
        );
    }
    // A Python on PATH or an active environment shows where pip put NVIDIA's packages.
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .map(variable)
        .iter()
        .filter(|v| !v.is_empty())
        .map(PathBuf::from)
        .collect();
    prefixes.extend(
        std::env::split_paths(&variable("PATH"))
            .filter(|dir| dir.join("python3").exists())
            .filter_map(|dir| dir.parent().map(Path::to_path_buf)),
    );
    if let Some(home) = std::env::home_dir() {
        prefixes.push(home.join(".local"));
    }
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    for prefix in prefixes {
        folders.extend(pip_folders(&prefix));
    }
    folders.extend(
        [
            "/usr/local/cuda/lib64",
            "/usr/local/nvidia/lib64",
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib64",
        ]
        .map(PathBuf::from),
    );
    let mut seen = std::collections::HashSet::new();
    folders.retain(|path| path.is_dir() && seen.insert(path.clone()));
    folders
}

/// The `nvidia/*/lib` folders of every Python under `prefix`.
fn pip_folders(prefix: &Path) -> Vec<PathBuf> {
    let entries = |dir: PathBuf| -> Vec<PathBuf> {
        let mut paths: Vec<_> = std::fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect();
        paths.sort();
        paths
    };
    let pythons = entries(prefix.join("lib")).into_iter().filter(|path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with("python3"))
    });
    pythons
        .flat_map(|python| {
            ["site-packages", "dist-packages"].map(|packages| python.join(packages).join("nvidia"))
        })
        .flat_map(entries)
        .map(|package| package.join("lib"))
        .filter(|lib| lib.is_dir())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_pip_packages_are_found() {
        let root = std::env::temp_dir().join(format!("bridge-cuda-library-{}", std::process::id()));
        let lib = root.join("lib/python3.12/site-packages/nvidia/cu13/lib");
        std::fs::create_dir_all(&lib).unwrap();
        std::fs::create_dir_all(root.join("lib/other")).unwrap();
        assert_eq!(pip_folders(&root), [lib]);
        std::fs::remove_dir_all(root).unwrap();
    }
}
