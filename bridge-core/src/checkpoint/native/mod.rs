//! The native form of a checkpoint: canonical tensors in pieces, written by many ranks, readable at any layout.
//!
//! ```text
//! CKPT/latest                                 text: iter_0000100
//! CKPT/iter_0000100/index.json                which piece of which tensor is where
//!                   model/rank_00000.safetensors
//!                   optimizer/rank_00000.safetensors
//!                   train_state.json          blobs of the trainer, opaque here
//!                   config.toml
//!                   hf/                       config and tokenizer of the source
//! ```
//!
//! An iteration is written into a hidden folder beside the others and appears by one rename when it is complete;
//! `latest` is updated after that, also by rename. A process killed at any moment leaves either no trace of the new
//! iteration under its name, or all of it, and the earlier ones as they were.

mod index;
mod reader;
mod writer;

pub use index::{
    FORMAT, Group, GroupIndex, MAX_INDEX_BYTES, NativeIndex, NativeIndexError, NativeTensor, Piece,
    VERSION,
};
pub use reader::{NativeCheckpoint, SourceRun, list_iterations};
pub use writer::{NativeWriter, PieceSpec, PieceWriter, retain};

use std::path::{Path, PathBuf};

/// Name of the file that says which iteration is the newest.
pub const LATEST_FILE: &str = "latest";
/// Name of the index within an iteration.
pub const NATIVE_INDEX_FILE: &str = "index.json";
/// Before the number in the name of an iteration's folder.
const ITERATION_PREFIX: &str = "iter_";

/// The folder of an iteration within a checkpoint's: `iter_0000100`.
pub fn iteration_dir(root: &Path, iteration: u64) -> PathBuf {
    root.join(format!("{ITERATION_PREFIX}{iteration:07}"))
}

/// The iteration that a folder's name stands for.
fn parse_iteration(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(ITERATION_PREFIX)?;
    // Seven digits, more only where they are needed, so that each number has one name.
    let canonical = digits.len() == 7 || (digits.len() > 7 && !digits.starts_with('0'));
    (canonical && digits.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests;
