//! What can go wrong between this crate and the GPU.

use cudarc::driver::sys::CUresult;

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the CUDA backend. Burn's tensor operations return no `Result`, so inside them these errors become the
/// message of a panic; [`crate::CudaDevice::open`] and [`crate::probe`] report them as values.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A shared library could not be found or opened.
    #[error(
        "cannot load {library}: {reason}; searched {}; {advice}",
        searched.join(", ")
    )]
    Library {
        /// File name of the library, such as `libnvrtc.so`.
        library: &'static str,
        /// What the loader said.
        reason: String,
        /// Folders looked into, the most preferred first.
        searched: Vec<String>,
        /// The command or setting that provides it.
        advice: &'static str,
    },
    /// The driver found no GPU, or fewer than asked for.
    #[error(
        "no CUDA device {ordinal}: the driver sees {found} device(s); check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// Ordinal asked for.
        ordinal: usize,
        /// Number of devices visible.
        found: usize,
    },
    /// The GPU is older than the kernels support.
    #[error(
        "device {ordinal} ({name}) has compute capability {major}.{minor}, expected 8.0 or newer (A100, RTX 30 series, \
         H100 ...); use another GPU or the CPU backend"
    )]
    Unsupported {
        /// Ordinal of the device.
        ordinal: usize,
        /// Name of the device.
        name: String,
        /// Compute capability, major part.
        major: i32,
        /// Compute capability, minor part.
        minor: i32,
    },
    /// The pool could not grow.
    #[error(
        "out of GPU memory on device {ordinal}: {requested} bytes asked for, {report}; reduce micro_batch_size or the \
         sequence length, turn on recomputation, or end other programs on this GPU"
    )]
    OutOfMemory {
        /// Ordinal of the device.
        ordinal: usize,
        /// Size of the request, in bytes.
        requested: usize,
        /// The pool's state.
        report: String,
    },
    /// A call into the driver failed.
    #[error("CUDA driver: {call} returned {code} ({text})")]
    Driver {
        /// Function called.
        call: &'static str,
        /// Name of the code.
        code: String,
        /// Its description.
        text: String,
    },
    /// A kernel did not compile: a mistake in this crate, or an NVRTC too old for the chip.
    #[error("NVRTC could not compile {kernel} for {arch}: {log}")]
    Compile {
        /// Kernel file.
        kernel: String,
        /// Target architecture.
        arch: String,
        /// Compiler's messages.
        log: String,
    },
    /// A call into cuBLASLt failed.
    #[error("cuBLASLt: {call} returned {status} for {what}")]
    Blas {
        /// Function called.
        call: &'static str,
        /// Status code.
        status: String,
        /// Shapes and types of the product.
        what: String,
    },
    /// A call into cuDNN failed.
    #[error("cuDNN: {call} returned {status}{}{detail}", if detail.is_empty() { "" } else { ": " })]
    Dnn {
        /// Step that failed.
        call: String,
        /// Status code.
        status: String,
        /// cuDNN's last error text.
        detail: String,
    },
}

/// Turns a driver status into a `Result`, naming the call.
pub(crate) fn check(call: &'static str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or leaves null for a code it does not know.
    let text = unsafe {
        cudarc::driver::sys::cuGetErrorString(code, &mut text);
        if text.is_null() {
            String::new()
        } else {
            std::ffi::CStr::from_ptr(text)
                .to_string_lossy()
                .into_owned()
        }
    };
    Err(Error::Driver {
        call,
        code: format!("{code:?}"),
        text,
    })
}

/// Unwraps inside Burn operations, which return no `Result`: the panic's message is the error's text.
pub(crate) trait OrPanic<T> {
    /// The value, or a panic with the error's text.
    fn or_panic(self) -> T;
}

impl<T> OrPanic<T> for Result<T> {
    #[track_caller]
    fn or_panic(self) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{error}"),
        }
    }
}
