//! What can go wrong with checkpoint files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::header::HeaderError;
use super::native::NativeIndexError;
use crate::dtype::DType;
use crate::error::Problems;

/// Result of reading or writing checkpoint files.
pub type Result<T, E = CheckpointError> = std::result::Result<T, E>;

/// Why a checkpoint cannot be read or written. Names that come from files are shown escaped and cut short.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb phrase: "read", "create folder".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The disk cannot hold what is to be written.
    #[error(
        "no room on the disk of {}: {needed} bytes are needed{}; free some space or choose another disk",
        path.display(), available_text(*.available)
    )]
    DiskFull {
        /// The file or folder being written.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes that were free, where known.
        available: Option<u64>,
    },

    /// A safetensors file breaks the format's rules.
    #[error("{file} is not a usable safetensors file")]
    Header {
        /// The file.
        file: String,
        /// What is wrong with it.
        #[source]
        problem: HeaderError,
    },
    /// The path is not a folder.
    #[error("{} is not a folder; give the folder that holds the safetensors files", path.display())]
    NotAFolder {
        /// The path given.
        path: PathBuf,
    },
    /// The path is a folder, a pipe or a device where a file is needed.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// The path found.
        path: PathBuf,
    },
    /// The folder holds no safetensors files.
    #[error("{} holds no safetensors weights{hint}", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// What it holds instead and what to do, or empty.
        hint: &'static str,
    },
    /// Several safetensors files and nothing that says which belong together.
    #[error(
        "{} holds several safetensors files and no model.safetensors.index.json that says which belong together: {files}",
        path.display()
    )]
    AmbiguousFiles {
        /// The folder.
        path: PathBuf,
        /// The files.
        files: Problems,
    },

    /// `model.safetensors.index.json` is too large to be one.
    #[error("{} has {found} bytes, more than the {limit} that an index may have; is it the right file?", path.display())]
    IndexTooLarge {
        /// The index file.
        path: PathBuf,
        /// Its size, in bytes.
        found: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// `model.safetensors.index.json` is not the JSON it should be.
    #[error("{} is not a valid index", path.display())]
    IndexJson {
        /// The index file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// The index points to files that are not plain names inside the folder.
    #[error("{} names files that cannot be in the folder: {problems}", path.display())]
    IndexFileNames {
        /// The index file.
        path: PathBuf,
        /// Each bad name with the reason.
        problems: Problems,
    },
    /// Files of the checkpoint are not there.
    #[error("{} lacks files of the checkpoint: {files}; fetch them again", path.display())]
    MissingShards {
        /// The folder.
        path: PathBuf,
        /// The missing files.
        files: Problems,
    },
    /// The index and the shards do not agree, or two shards hold one tensor.
    #[error("the files in {} do not fit together: {problems}; fetch the checkpoint again", path.display())]
    Inconsistent {
        /// The folder.
        path: PathBuf,
        /// Every tensor concerned, and how.
        problems: Problems,
    },

    /// No tensor of that name.
    #[error("{place} holds no tensor {}{}", quote(.name), nearest_hint(.nearest.as_deref()))]
    UnknownTensor {
        /// The checkpoint.
        place: String,
        /// The name asked for.
        name: String,
        /// The name in the checkpoint that is spelt most like it.
        nearest: Option<String>,
    },
    /// A byte range or slice that leaves its tensor, or a buffer of another size.
    #[error("tensor {}: {problem}", quote(.name))]
    BadRange {
        /// The tensor.
        name: String,
        /// What was asked and what there is.
        problem: String,
    },
    /// A slice was asked of a tensor whose elements are smaller than a byte.
    #[error("tensor {} of packed type {dtype} cannot be cut into pieces", quote(.name))]
    PackedElements {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: DType,
    },

    /// The target of a write exists and is not empty.
    #[error("{} exists already and is not empty; choose another folder, remove it, or ask to replace it", path.display())]
    OutputExists {
        /// The target.
        path: PathBuf,
    },
    /// The target should be replaced but does not look like a checkpoint.
    #[error(
        "{} is not replaced, because it does not look like a checkpoint (no config.json, no safetensors file, no \
         index.json in it); remove it by hand if that is meant",
        path.display()
    )]
    NotReplaceable {
        /// The target.
        path: PathBuf,
    },
    /// The tensors declared to a writer cannot be written.
    #[error("cannot lay out the output: {problems}")]
    BadLayout {
        /// Every finding.
        problems: Problems,
    },
    /// Bytes of a tensor were written a second time.
    #[error("bytes {start}..{end} of tensor {} are written twice", quote(.name))]
    WrittenTwice {
        /// The tensor.
        name: String,
        /// First byte of the second write, within the tensor.
        start: u64,
        /// End of the second write.
        end: u64,
    },
    /// The output was closed before every byte was there.
    #[error("the output {} is incomplete and was not published: {problems}", path.display())]
    Incomplete {
        /// The target.
        path: PathBuf,
        /// The tensors, with the bytes that are missing, or the writes that failed.
        problems: Problems,
    },

    /// A file of `torch.save` cannot be used.
    #[error("{file} is not a usable PyTorch file: {problem}")]
    Torch {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A Megatron-Core checkpoint cannot be used.
    #[error("{} is not a usable Megatron-Core checkpoint: {problem}", path.display())]
    Megatron {
        /// The folder or file concerned.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The index of a native checkpoint is wrong.
    #[error("{file} is not a usable checkpoint index")]
    NativeIndex {
        /// The index file.
        file: String,
        /// What is wrong with it.
        #[source]
        problem: NativeIndexError,
    },
    /// The folder is neither a native checkpoint nor the folder of several.
    #[error("{} holds no complete checkpoint: {problems}", path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
        /// What was looked at and why it does not serve.
        problems: Problems,
    },
}

impl CheckpointError {
    /// A [`CheckpointError::Io`], or [`CheckpointError::DiskFull`] where that is what the system said.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        CheckpointError::Io {
            action,
            path: path.into(),
            source,
        }
    }

    /// For a failed write of `needed` bytes.
    pub(crate) fn write(path: impl Into<PathBuf>, needed: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => CheckpointError::DiskFull {
                path: path.into(),
                needed,
                available: None,
            },
            _ => CheckpointError::Io {
                action: "write",
                path: path.into(),
                source,
            },
        }
    }

    /// Whether the fault lies in what was given (exit code 2) rather than in the run (exit code 3).
    ///
    /// A missing or unreadable file counts as input; a full disk, a failing device or a write out of order does not.
    pub fn is_input(&self) -> bool {
        match self {
            CheckpointError::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::InvalidInput
                    | io::ErrorKind::InvalidFilename
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::UnexpectedEof
            ),
            CheckpointError::DiskFull { .. }
            | CheckpointError::WrittenTwice { .. }
            | CheckpointError::Incomplete { .. } => false,
            _ => true,
        }
    }
}

fn available_text(available: Option<u64>) -> String {
    available
        .map(|bytes| format!(", {bytes} are free"))
        .unwrap_or_default()
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest
        .map(|name| format!("; did you mean {}?", quote(name)))
        .unwrap_or_default()
}

/// Adds "what failed, on which path" to the errors of the standard library.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|error| CheckpointError::io(action, path, error.into()))
    }
}

/// Characters of a stranger's text that a message shows.
const MAX_SHOWN_CHARS: usize = 120;

/// `text` in back quotes, with control characters escaped and cut short, so that a hostile name can neither flood
/// nor forge a terminal.
pub(crate) fn quote(text: &str) -> String {
    let mut shown = String::from("`");
    for (position, character) in text.chars().enumerate() {
        if position == MAX_SHOWN_CHARS {
            shown.push_str(&format!("...` ({} bytes)", text.len()));
            return shown;
        }
        if character.is_control() {
            shown.extend(character.escape_default());
        } else {
            shown.push(character);
        }
    }
    shown.push('`');
    shown
}

/// A shape as `[2, 3]`, cut short when it has many dims.
pub(crate) struct Shape<'a, T>(pub(crate) &'a [T]);

impl<T: fmt::Display> fmt::Display for Shape<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        f.write_str("[")?;
        for (position, dim) in self.0.iter().take(SHOWN).enumerate() {
            let comma = if position == 0 { "" } else { ", " };
            write!(f, "{comma}{dim}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => f.write_str("]"),
            more => write!(f, ", and {more} more]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_names_are_escaped_and_cut() {
        assert_eq!(quote("a\0b\u{1b}[31m"), "`a\\u{0}b\\u{1b}[31m`");
        assert_eq!(
            quote(&"x".repeat(1000)),
            format!("`{}...` (1000 bytes)", "x".repeat(120))
        );
    }

    #[test]
    fn shapes_of_many_dims_are_cut() {
        assert_eq!(Shape(&[2, 3]).to_string(), "[2, 3]");
        assert_eq!(Shape::<usize>(&[]).to_string(), "[]");
        assert_eq!(
            Shape(&[1; 10]).to_string(),
            "[1, 1, 1, 1, 1, 1, 1, 1, and 2 more]"
        );
    }
}
