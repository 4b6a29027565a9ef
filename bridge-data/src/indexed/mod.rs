//! Megatron-Core's indexed dataset: two files, read and written.
//!
//! `PREFIX.bin` is nothing but tokens, little-endian, one sequence after another. `PREFIX.idx` says where they are:
//!
//! | offset | field | type |
//! | --- | --- | --- |
//! | 0 | magic `MMIDIDX\0\0` | 9 bytes |
//! | 9 | version, 1 | u64 |
//! | 17 | [dtype code](TokenDtype) | u8 |
//! | 18 | number of sequences, n | u64 |
//! | 26 | number of document borders, d (documents + 1) | u64 |
//! | 34 | length of each sequence, in tokens | i32 × n |
//! | .. | offset of each sequence in `.bin`, in bytes | i64 × n |
//! | .. | first sequence of each document, and n at the end | i64 × d |
//! | .. | mode of each sequence (multimodal data only) | i8 × n |
//!
//! Source: `megatron/core/datasets/indexed_dataset.py`; checked against its reader and writer in
//! `tests/interop/indexed_dataset.py`.

mod index;
mod positional;
mod reader;
mod writer;

use std::path::{Path, PathBuf};

pub use index::Index;
pub use reader::IndexedDataset;
pub use writer::{IndexedWriter, WrittenDataset};

/// How a token is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenDtype {
    /// Code 1.
    U8,
    /// Code 2.
    I8,
    /// Code 3.
    I16,
    /// Code 4.
    I32,
    /// Code 5.
    I64,
    /// Code 6: no token ids, but part of the format.
    F64,
    /// Code 7: no token ids, but part of the format.
    F32,
    /// Code 8.
    U16,
}

impl TokenDtype {
    const CODES: [(u8, Self); 8] = [
        (1, Self::U8),
        (2, Self::I8),
        (3, Self::I16),
        (4, Self::I32),
        (5, Self::I64),
        (6, Self::F64),
        (7, Self::F32),
        (8, Self::U16),
    ];

    /// The dtype of a code in the file.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::CODES
            .iter()
            .find(|(known, _)| *known == code)
            .map(|(_, dtype)| *dtype)
    }

    /// The code in the file.
    pub fn code(self) -> u8 {
        Self::CODES
            .iter()
            .find(|(_, dtype)| *dtype == self)
            .map_or(0, |(code, _)| *code)
    }

    /// Bytes a token takes.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 | Self::U16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::I64 | Self::F64 => 8,
        }
    }

    /// The dtype that Megatron-Core would choose for a vocabulary: two bytes if all ids fit with some to spare.
    pub fn for_vocab(vocab_size: usize) -> Self {
        if vocab_size < 65_500 {
            Self::U16
        } else {
            Self::I32
        }
    }

    /// The largest id it can hold; `None` for dtypes that hold no ids.
    pub fn max_id(self) -> Option<u32> {
        match self {
            Self::U8 => Some(u8::MAX.into()),
            Self::I8 => Some(i8::MAX as u32),
            Self::I16 => Some(i16::MAX as u32),
            Self::U16 => Some(u16::MAX.into()),
            Self::I32 => Some(i32::MAX as u32),
            Self::I64 => Some(u32::MAX),
            Self::F32 | Self::F64 => None,
        }
    }

    /// Name as in NumPy.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::I16 => "int16",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::U16 => "uint16",
        }
    }
}

/// `PREFIX.idx`. A prefix may hold dots, so nothing of it is replaced.
pub fn index_path(prefix: &Path) -> PathBuf {
    with_suffix(prefix, ".idx")
}

/// `PREFIX.bin`.
pub fn tokens_path(prefix: &Path) -> PathBuf {
    with_suffix(prefix, ".bin")
}

fn with_suffix(prefix: &Path, suffix: &str) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";
const VERSION: u64 = 1;
const HEADER_LEN: usize = 34;

#[cfg(test)]
mod tests;
