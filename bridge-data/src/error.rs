//! What can go wrong with training data.

use std::path::PathBuf;

use bridge_tokenizers::TokenizerError;

/// The result of the operations of this crate.
pub type Result<T> = std::result::Result<T, DataError>;

/// An error of this crate. Each variant says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: `read`, `write`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// An `.idx` file, or the `.bin` beside it, is not what the format demands.
    #[error("{} is not a valid dataset index: {reason}", path.display())]
    BadIndex {
        /// The index file.
        path: PathBuf,
        /// What was found and expected, and where.
        reason: String,
    },
    /// One of the two files of an indexed dataset is missing.
    #[error("indexed dataset {} has no {missing}; a dataset is two files, PREFIX.bin and PREFIX.idx, and is named by its PREFIX (make one with `data preprocess`)", prefix.display())]
    MissingFile {
        /// The path without extension.
        prefix: PathBuf,
        /// The file that is not there.
        missing: String,
    },
    /// A sequence number beyond the end.
    #[error("{place} has {count} sequences; there is no number {index}")]
    NoSequence {
        /// The dataset.
        place: String,
        /// The number asked for, from 0.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// A range of tokens beyond the end of a sequence.
    #[error("sequence {index} of {place} has {len} tokens; there are none at {start}..{end}")]
    NoTokens {
        /// The dataset.
        place: String,
        /// The sequence.
        index: u64,
        /// Its length in tokens.
        len: u64,
        /// First token asked for.
        start: u64,
        /// One past the last token asked for.
        end: u64,
    },
    /// A stored value that is not a token id.
    #[error(
        "sequence {index} of {place} holds {value} at token {position}, which is not a token id{limit}; was it made with another tokenizer?"
    )]
    BadToken {
        /// The dataset.
        place: String,
        /// The sequence.
        index: u64,
        /// Place within the sequence.
        position: u64,
        /// The value found.
        value: i64,
        /// ` below 32000`, where a vocabulary size is known.
        limit: String,
    },
    /// A token or length that the format cannot store.
    #[error("cannot write {what} to {}: {reason}", path.display())]
    Unwritable {
        /// The dataset's `.bin` file.
        path: PathBuf,
        /// The value.
        what: String,
        /// Why it does not fit.
        reason: String,
    },
    /// The output of a preprocessing run is there already.
    #[error("{} exists already; choose another output or ask to overwrite it", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// An option has a value that makes no sense.
    #[error("{option} = {value}: {reason}")]
    BadOption {
        /// Name of the option.
        option: &'static str,
        /// The value given.
        value: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// Too little data for what was asked.
    #[error(
        "{what} has {documents} documents with {tokens} tokens together; at least 2 tokens are needed to predict one (give more data, or a split with a larger share)"
    )]
    TooFewTokens {
        /// The dataset and split.
        what: String,
        /// Documents in it.
        documents: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// A line of a JSONL file could not be used.
    #[error("{}:{line}: {reason}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The thread that reads ahead is gone.
    #[error("the thread that reads batches ahead ended early: {reason}")]
    Loader {
        /// What is known about it.
        reason: String,
    },
    /// A text could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl DataError {
    /// Whether what the user gave is at fault, and not the machine (a full disk, a failing one).
    pub fn is_input(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                std::io::ErrorKind::NotFound
                    | std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::NotADirectory
                    | std::io::ErrorKind::IsADirectory
            ),
            Self::Loader { .. } => false,
            Self::Tokenizer(error) => error.is_input(),
            _ => true,
        }
    }

    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}
