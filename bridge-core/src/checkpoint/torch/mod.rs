//! What PyTorch writes: pickles and the zip archives of `torch.save`, read as inert data.
//!
//! A pickle is a program for a small machine that may import and call anything. Here that machine has no callables at
//! all: [`Pickle::parse`] builds a table of plain nodes in which an import is a pair of names and a call a note of what
//! would have been called with what. Whoever reads the table looks for the few names it knows and refuses everything
//! else, so nothing in a file is ever run. Sizes are bounded before anything is allocated.

mod archive;
mod pickle;
mod state_dict;
mod write;
mod zip;

pub use archive::{TorchArchive, TorchTensor};
pub use pickle::{Call, Limits, Node, NodeId, Pickle};
pub use state_dict::{BIN_FILE, BIN_INDEX_FILE, TorchWeights};
pub(super) use write::{PickleWriter, TensorBlob, archive_bytes};

use crate::dtype::DType;

/// The dtypes of PyTorch that have a safetensors name: name in `torch`, legacy storage class, dtype.
const DTYPES: [(&str, &str, DType); 14] = [
    ("float32", "FloatStorage", DType::F32),
    ("float64", "DoubleStorage", DType::F64),
    ("float16", "HalfStorage", DType::F16),
    ("bfloat16", "BFloat16Storage", DType::BF16),
    ("uint8", "ByteStorage", DType::U8),
    ("int8", "CharStorage", DType::I8),
    ("int16", "ShortStorage", DType::I16),
    ("int32", "IntStorage", DType::I32),
    ("int64", "LongStorage", DType::I64),
    ("bool", "BoolStorage", DType::Bool),
    ("float8_e4m3fn", "", DType::F8E4M3),
    ("float8_e5m2", "", DType::F8E5M2),
    ("float8_e4m3fnuz", "", DType::F8E4M3Fnuz),
    ("float8_e5m2fnuz", "", DType::F8E5M2Fnuz),
];

/// The dtype called `torch.<name>`.
pub(super) fn dtype_named(name: &str) -> Option<DType> {
    let found = DTYPES.iter().find(|(torch, ..)| *torch == name);
    found.map(|(.., dtype)| *dtype)
}

/// The name in `torch` of a dtype, and the legacy storage class that holds it, if PyTorch has them.
pub(super) fn torch_name(dtype: DType) -> Option<(&'static str, &'static str)> {
    let found = DTYPES.iter().find(|(.., known)| *known == dtype);
    found.map(|(name, storage, _)| (*name, *storage))
}

/// The dtype of a legacy storage class.
fn dtype_of_storage(class: &str) -> Option<DType> {
    let found = DTYPES
        .iter()
        .find(|(_, storage, _)| !storage.is_empty() && *storage == class);
    found.map(|(.., dtype)| *dtype)
}
