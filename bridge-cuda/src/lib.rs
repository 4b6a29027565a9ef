//! A CUDA backend for Burn, and the kernels of `bridge_ops` for it.
//!
//! - [`Cuda`] is the backend, [`CudaDevice`] a GPU, [`CudaTensor`] a strided view into its memory. Work is queued on one
//!   stream per device; the host waits only where values are read.
//! - Kernels are the CUDA C++ files under `kernels/`, compiled by NVRTC for the chip at hand when first used and kept on
//!   disk. Matrix products are cuBLASLt's. Nothing of CUDA is needed to build; at run time the driver, NVRTC and cuBLASLt
//!   are, and [`probe`] says what is missing and how to get it.
//! - What has no kernel panics with "not supported on cuda" and the operation's name.
//!
//! ```no_run
//! use bridge_cuda::{Cuda, CudaDevice};
//! use burn::tensor::Tensor;
//!
//! let device = CudaDevice::open(0)?;
//! let x = Tensor::<Cuda, 2>::from_floats([[1.0, 2.0], [3.0, 4.0]], &device);
//! println!("{}", x.clone().matmul(x.transpose()));
//! println!("{} bytes at most", device.memory()?.peak);
//! # Ok::<(), bridge_cuda::Error>(())
//! ```

mod backend;
mod conv;
mod cublaslt;
mod cudnn;
mod cudnn_attention;
mod cudnn_graph;
mod device;
mod elementwise;
mod error;
mod index;
mod library;
mod mark;
mod matmul;
mod nvrtc;
mod ops;
mod pool;
mod probe;
mod random;
mod reduce;
mod scan;
mod sort;
mod span;
mod staging;
mod stream;
mod tensor;
mod tensor_map;
mod tuned;
mod view;

pub use backend::{Cuda, CudaQTensor};
pub use device::CudaDevice;
pub use error::{Error, Result};
pub use library::Library;
pub use mark::Mark;
pub use matmul::{allow_tf32, allow_tuning};
pub use nvrtc::{SOURCES, compile};
pub use ops::{
    AttentionCalls, AttentionPath, GroupedPath, attention_calls, attention_refusals,
    force_attention_path, force_grouped_path, set_deterministic_attention,
};
pub use pool::MemoryStats;
pub use probe::{GpuInfo, LibraryInfo, Report, probe};
pub use span::Span;
pub use stream::SideStream;
pub use tensor::CudaTensor;
