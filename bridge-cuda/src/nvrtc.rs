//! Compiles the kernels for the chip at hand and keeps the machine code on disk.
//!
//! A kernel file is a template over types and functions that arrive as preprocessor definitions. Each combination is
//! compiled once per chip; the result is stored under a hash of everything that went into it (source, headers, options,
//! compiler version), so a changed kernel never meets stale code, and a second start compiles nothing.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys as driver;
use cudarc::nvrtc::sys;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result, check};
use crate::library::Library;

/// A preprocessor definition: name and value.
pub(crate) type Define<'a> = (&'a str, &'a str);

/// A loaded kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel(pub(crate) driver::CUfunction);

/// The kernel files, by name.
pub const SOURCES: &[(&str, &str)] = &[
    ("adamw", include_str!("../kernels/adamw.cu")),
    ("arange", include_str!("../kernels/arange.cu")),
    ("attention", include_str!("../kernels/attention.cu")),
    (
        "attention_generic",
        include_str!("../kernels/attention_generic.cu"),
    ),
    ("causal_conv1d", include_str!("../kernels/causal_conv1d.cu")),
    ("conv", include_str!("../kernels/conv.cu")),
    ("cross_entropy", include_str!("../kernels/cross_entropy.cu")),
    ("elementwise", include_str!("../kernels/elementwise.cu")),
    ("embedding", include_str!("../kernels/embedding.cu")),
    (
        "gated_activation",
        include_str!("../kernels/gated_activation.cu"),
    ),
    ("expert_order", include_str!("../kernels/expert_order.cu")),
    (
        "gated_delta_rule",
        include_str!("../kernels/gated_delta_rule.cu"),
    ),
    (
        "gated_rms_norm",
        include_str!("../kernels/gated_rms_norm.cu"),
    ),
    (
        "grouped_linear",
        include_str!("../kernels/grouped_linear.cu"),
    ),
    (
        "grouped_linear_generic",
        include_str!("../kernels/grouped_linear_generic.cu"),
    ),
    (
        "grouped_linear_hopper",
        include_str!("../kernels/grouped_linear_hopper.cu"),
    ),
    ("index", include_str!("../kernels/index.cu")),
    ("l2_norm", include_str!("../kernels/l2_norm.cu")),
    ("latent_heads", include_str!("../kernels/latent_heads.cu")),
    ("layer_norm", include_str!("../kernels/layer_norm.cu")),
    ("matmul_int", include_str!("../kernels/matmul_int.cu")),
    ("normal_region", include_str!("../kernels/normal_region.cu")),
    ("permute_rows", include_str!("../kernels/permute_rows.cu")),
    ("random", include_str!("../kernels/random.cu")),
    ("reduce", include_str!("../kernels/reduce.cu")),
    ("rms_norm", include_str!("../kernels/rms_norm.cu")),
    ("rotary", include_str!("../kernels/rotary.cu")),
    ("router", include_str!("../kernels/router.cu")),
    ("scan", include_str!("../kernels/scan.cu")),
    ("softmax", include_str!("../kernels/softmax.cu")),
    ("sort", include_str!("../kernels/sort.cu")),
    ("ssd_scan", include_str!("../kernels/ssd_scan.cu")),
    ("time_step", include_str!("../kernels/time_step.cu")),
];

/// What the kernel files include, by name.
const HEADERS: [(&CStr, &str); 5] = [
    (
        c"chunk_tiles.cuh",
        include_str!("../kernels/chunk_tiles.cuh"),
    ),
    (c"common.cuh", include_str!("../kernels/common.cuh")),
    (c"grouped.cuh", include_str!("../kernels/grouped.cuh")),
    (c"hopper.cuh", include_str!("../kernels/hopper.cuh")),
    (
        c"tensor_core.cuh",
        include_str!("../kernels/tensor_core.cuh"),
    ),
];

/// Kernels of one device, by file, definitions and entry.
pub(crate) struct Kernels {
    arch: String,
    modules: Mutex<HashMap<(&'static str, String), Arc<Module>>>,
}

struct Module {
    handle: driver::CUmodule,
    functions: Mutex<HashMap<&'static str, Kernel>>,
}

// SAFETY: modules and functions of the driver may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}
// SAFETY: as above.
unsafe impl Send for Kernel {}

impl Kernels {
    pub(crate) fn new(capability: (i32, i32)) -> Self {
        Self {
            // The matrix instructions of a warp group exist only in the chip's own instruction set.
            arch: match capability {
                (9, 0) => "sm_90a".into(),
                (major, minor) => format!("sm_{major}{minor}"),
            },
            modules: Mutex::default(),
        }
    }

    /// The kernel `entry` of a file under the given definitions. The device's context must be current.
    pub(crate) fn get(
        &self,
        file: &'static str,
        defines: &[Define],
        entry: &'static str,
    ) -> Result<Kernel> {
        let key = (
            file,
            defines
                .iter()
                .map(|(name, value)| format!("-D{name}={value}\n"))
                .collect::<String>(),
        );
        let module = {
            let mut modules = self
                .modules
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            match modules.get(&key) {
                Some(module) => module.clone(),
                None => {
                    let module = Arc::new(Module::load(file, defines, &self.arch)?);
                    modules.insert(key, module.clone());
                    module
                }
            }
        };
        let mut functions = module
            .functions
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(kernel) = functions.get(entry) {
            return Ok(*kernel);
        }
        let name = CString::new(entry).expect("entry names are plain identifiers");
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded in the current context; the name ends with a zero byte.
        unsafe {
            check(
                "cuModuleGetFunction",
                driver::cuModuleGetFunction(&mut function, module.handle, name.as_ptr()),
            )?
        };
        functions.insert(entry, Kernel(function));
        Ok(Kernel(function))
    }
}

impl Module {
    fn load(file: &'static str, defines: &[Define], arch: &str) -> Result<Self> {
        let cubin = cubin(file, defines, arch)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the image is a complete cubin for this chip, made by NVRTC.
        unsafe {
            check(
                "cuModuleLoadData",
                driver::cuModuleLoadData(&mut handle, cubin.as_ptr().cast()),
            )?
        };
        Ok(Self {
            handle,
            functions: Mutex::default(),
        })
    }
}

/// Machine code of a kernel file for a chip, from the disk cache or compiled.
fn cubin(file: &'static str, defines: &[Define], arch: &str) -> Result<Vec<u8>> {
    let source = source(file);
    let options = options(defines, arch);
    let path = version().ok().zip(cache_folder()).map(|(version, folder)| {
        let mut hash = Sha256::new();
        for part in [source, arch, &format!("{version:?}")]
            .into_iter()
            .chain(HEADERS.iter().map(|(_, text)| *text))
            .chain(options.iter().map(String::as_str))
        {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let digest: String = hash
            .finalize()
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        folder.join(format!("{file}-{arch}-{digest}.cubin"))
    });
    if let Some(bytes) = path.as_ref().and_then(|path| std::fs::read(path).ok())
        && bytes.starts_with(b"\x7fELF")
    {
        return Ok(bytes);
    }
    let bytes = compile(file, defines, arch)?;
    // The cache is a convenience: where it cannot be written, the next start compiles again.
    if let Some(path) = path {
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = path
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::write(&temporary, &bytes));
        if written
            .and_then(|()| std::fs::rename(&temporary, &path))
            .is_err()
        {
            std::fs::remove_file(&temporary).ok();
        }
    }
    Ok(bytes)
}

fn source(file: &str) -> &'static str {
    SOURCES
        .iter()
        .find(|(name, _)| *name == file)
        .unwrap_or_else(|| panic!("no kernel file {file}.cu"))
        .1
}

fn options(defines: &[Define], arch: &str) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={arch}"), "--std=c++17".into()];
    options.extend(
        defines
            .iter()
            .map(|(name, value)| format!("-D{name}={value}")),
    );
    options
}

/// Version of the compiler, as (major, minor).
pub(crate) fn version() -> Result<(i32, i32)> {
    Library::Nvrtc.load()?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is open; the call writes to locals.
    let code = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    if code == sys::nvrtcResult::NVRTC_SUCCESS {
        Ok((major, minor))
    } else {
        Err(failure("nvrtcVersion", "", code))
    }
}

fn failure(kernel: &str, arch: &str, code: sys::nvrtcResult) -> Error {
    Error::Compile {
        kernel: kernel.into(),
        arch: arch.into(),
        log: format!("{code:?}"),
    }
}

/// Compiles `kernels/<file>.cu` for a chip such as `sm_90`. Needs NVRTC but no GPU.
///
/// # Errors
/// NVRTC is missing, or it rejects the source.
pub fn compile(file: &'static str, defines: &[(&str, &str)], arch: &str) -> Result<Vec<u8>> {
    Library::Nvrtc.load()?;
    let fail = |code| failure(file, arch, code);
    let text = |text: &str| CString::new(text).expect("kernel sources hold no zero byte");
    let (program_text, name) = (text(source(file)), text(&format!("{file}.cu")));
    let headers = HEADERS.map(|(_, header)| text(header));
    let header_pointers = headers.each_ref().map(|header| header.as_ptr());
    let header_names = HEADERS.map(|(name, _)| name.as_ptr());
    let options: Vec<CString> = options(defines, arch)
        .iter()
        .map(|option| text(option))
        .collect();
    let option_pointers: Vec<*const c_char> =
        options.iter().map(|option| option.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    let ok = sys::nvrtcResult::NVRTC_SUCCESS;
    // SAFETY: all strings end with a zero byte and outlive the program; sizes come from the library.
    unsafe {
        let code = sys::nvrtcCreateProgram(
            &mut program,
            program_text.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            header_pointers.as_ptr(),
            header_names.as_ptr(),
        );
        if code != ok {
            return Err(fail(code));
        }
        let code = sys::nvrtcCompileProgram(
            program,
            option_pointers.len() as i32,
            option_pointers.as_ptr(),
        );
        let result = if code == ok {
            let mut size = 0;
            let mut code = sys::nvrtcGetCUBINSize(program, &mut size);
            let mut bytes = vec![0u8; size];
            if code == ok {
                code = sys::nvrtcGetCUBIN(program, bytes.as_mut_ptr().cast());
            }
            if code == ok {
                Ok(bytes)
            } else {
                Err(fail(code))
            }
        } else {
            let mut size = 0;
            sys::nvrtcGetProgramLogSize(program, &mut size);
            let mut log = vec![0u8; size.max(1)];
            sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
            let log = String::from_utf8_lossy(&log)
                .trim_end_matches('\0')
                .trim()
                .to_owned();
            let defines: String = defines
                .iter()
                .map(|(name, value)| format!(" {name}={value}"))
                .collect();
            Err(Error::Compile {
                kernel: format!("{file}.cu{defines}"),
                arch: arch.into(),
                log: format!("{code:?}: {log}"),
            })
        };
        sys::nvrtcDestroyProgram(&mut program);
        result
    }
}

/// Where compiled kernels are kept: `$XDG_CACHE_HOME` or `~/.cache`, then `bridge-cuda`.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
    Some(base.join("bridge-cuda"))
}
