//! A CUDA backend for Burn.

mod backend;
mod conv;
mod cublaslt;
mod device;
mod elementwise;
mod error;
mod index;
mod library;
mod matmul;
mod nvrtc;
mod pool;
mod random;
mod reduce;
mod scan;
mod sort;
mod staging;
mod tensor;
mod view;

pub use backend::{Cuda, CudaQTensor};
pub use device::CudaDevice;
pub use error::{Error, Result};
pub use library::Library;
pub use matmul::{allow_tf32, tune};
pub use nvrtc::{SOURCES, compile};
pub use pool::MemoryStats;
pub use tensor::CudaTensor;
