//! bridge-cuda
