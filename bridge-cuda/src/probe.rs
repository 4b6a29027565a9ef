//! What this machine offers: for `doctor`, and for a clear message before a long run.

use std::path::PathBuf;

use crate::device::{describe, device_count};
use crate::error::Error;
use crate::library::Library;

/// A GPU as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuInfo {
    /// The driver's ordinal.
    pub ordinal: usize,
    /// Marketing name.
    pub name: String,
    /// Compute capability, (major, minor).
    pub capability: (i32, i32),
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Whether the kernels run on it.
    pub supported: bool,
}

/// A library: where it was found, or why not.
#[derive(Debug, Clone)]
pub struct LibraryInfo {
    /// Which library.
    pub library: Library,
    /// Its file, or the error that says how to get it.
    pub path: Result<PathBuf, Error>,
}

/// What [`probe`] found.
#[derive(Debug, Clone)]
pub struct Report {
    /// The CUDA version the driver supports, (major, minor), if there is a driver.
    pub driver_version: Option<(i32, i32)>,
    /// The GPUs, or the error that kept them from being listed.
    pub gpus: Result<Vec<GpuInfo>, Error>,
    /// Every library.
    pub libraries: Vec<LibraryInfo>,
}

impl Report {
    /// Whether training and generation can run on device 0 (cuDNN and NCCL are not needed for that).
    pub fn is_ready(&self) -> bool {
        let gpu = self
            .gpus
            .as_ref()
            .is_ok_and(|gpus| gpus.iter().any(|gpu| gpu.supported));
        let needed = |info: &LibraryInfo| !matches!(info.library, Library::Cudnn | Library::Nccl);
        gpu && self
            .libraries
            .iter()
            .filter(|info| needed(info))
            .all(|info| info.path.is_ok())
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.driver_version {
            Some((major, minor)) => writeln!(f, "driver: for CUDA {major}.{minor}")?,
            None => writeln!(f, "driver: none")?,
        }
        match &self.gpus {
            Ok(gpus) if gpus.is_empty() => writeln!(f, "gpus: none")?,
            Ok(gpus) => {
                for gpu in gpus {
                    let (major, minor) = gpu.capability;
                    let note = if gpu.supported {
                        ""
                    } else {
                        ", too old: 8.0 is needed"
                    };
                    let gib = gpu.memory_bytes as f64 / f64::from(1 << 30);
                    writeln!(
                        f,
                        "gpu {}: {}, compute capability {major}.{minor}, {gib:.1} GiB{note}",
                        gpu.ordinal, gpu.name
                    )?;
                }
            }
            Err(error) => writeln!(f, "gpus: {error}")?,
        }
        for info in &self.libraries {
            match &info.path {
                Ok(path) => writeln!(f, "{:?}: {}", info.library, path.display())?,
                Err(_) => writeln!(f, "{:?}: missing; {}", info.library, info.library.advice())?,
            }
        }
        Ok(())
    }
}

/// Looks for GPUs and libraries. Touches no GPU memory.
pub fn probe() -> Report {
    let libraries = Library::ALL
        .map(|library| LibraryInfo {
            library,
            path: library.load(),
        })
        .into_iter()
        .collect();
    let gpus = device_count().and_then(|count| {
        (0..count)
            .map(|ordinal| {
                let (_, name, capability, memory_bytes) = describe(ordinal)?;
                Ok(GpuInfo {
                    ordinal,
                    name,
                    capability,
                    memory_bytes,
                    supported: capability >= crate::device::OLDEST,
                })
            })
            .collect()
    });
    let driver_version = gpus.is_ok().then(|| {
        let mut version = 0;
        // SAFETY: the driver is open; the call writes to a local.
        unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut version) };
        (version / 1000, version % 1000 / 10)
    });
    Report {
        driver_version,
        gpus,
        libraries,
    }
}
