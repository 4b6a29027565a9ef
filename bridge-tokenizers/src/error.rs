//! What can go wrong with a tokenizer or a chat template.

use std::path::PathBuf;

/// The result of the operations of this crate.
pub type Result<T> = std::result::Result<T, TokenizerError>;

/// An error of this crate. Each variant says what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The folder has no `tokenizer.json`.
    #[error("no tokenizer.json in {}: {found}; {advice}", folder.display())]
    NoTokenizerFile {
        /// The folder looked into.
        folder: PathBuf,
        /// What the folder holds instead.
        found: String,
        /// What to do.
        advice: String,
    },
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, `list`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A file is larger than a tokenizer file can sensibly be.
    #[error("{} has {size} bytes, more than the {limit} that a tokenizer file may have; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The largest size accepted, in bytes.
        limit: u64,
    },
    /// `tokenizer.json` could not be understood.
    #[error("{} is not a tokenizer this program can load: {reason}; save it again with a current `transformers` or `tokenizers`", path.display())]
    BadTokenizer {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// A JSON side file (`tokenizer_config.json`, `special_tokens_map.json`) is malformed.
    #[error("{} is malformed: {reason}", path.display())]
    BadJson {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A special token is named that the vocabulary lacks or stores under another id.
    #[error("{} names `{token}` as {role}, {reason}", path.display())]
    BadSpecialToken {
        /// The file that names the token.
        path: PathBuf,
        /// The token's text.
        token: String,
        /// What it is meant to be, such as `eos_token`.
        role: String,
        /// What does not fit.
        reason: String,
    },
    /// A token id outside the vocabulary.
    #[error(
        "token id {id} is outside the vocabulary of {vocab_size} tokens; was the text tokenized with another tokenizer?"
    )]
    UnknownId {
        /// The id.
        id: u32,
        /// Number of ids in the vocabulary.
        vocab_size: usize,
    },
    /// Text given to the null tokenizer is not a list of ids.
    #[error(
        "`{word}` (word {position}) is not a token id below {limit}; the null tokenizer reads ids separated by spaces"
    )]
    NotAnId {
        /// The word.
        word: String,
        /// Its place, counted from 1.
        position: usize,
        /// Ids must be below this.
        limit: u32,
    },
    /// The library that runs the vocabulary failed.
    #[error("cannot {action}: {reason}")]
    Failed {
        /// `encode the text`, `decode the tokens`.
        action: &'static str,
        /// What it said.
        reason: String,
    },
    /// A tokenizer source that is not `bytes`, `null:SIZE` or a folder.
    #[error(
        "tokenizer `{text}` is not `bytes`, `null:VOCAB_SIZE` or a folder with a tokenizer.json: {reason}"
    )]
    BadSource {
        /// The text given.
        text: String,
        /// Why it does not fit.
        reason: String,
    },
    /// Training was asked for something impossible.
    #[error("cannot train a vocabulary of {vocab_size} tokens: {reason}")]
    BadTraining {
        /// The size asked for.
        vocab_size: usize,
        /// Why it cannot be.
        reason: String,
    },
    /// A conversation without a message, of which most templates would make nothing at all.
    #[error("the conversation is empty; a chat template needs at least one message")]
    EmptyConversation,
    /// The tokenizer has no chat template.
    #[error(
        "the tokenizer in {place} has no chat template{named}; add a chat_template.jinja to its folder or pass a template"
    )]
    NoChatTemplate {
        /// The folder or kind of the tokenizer.
        place: String,
        /// ` named X (there are Y)` where a name was asked for.
        named: String,
    },
    /// A chat template has a syntax error or failed while it ran.
    #[error("chat template {place}: {reason}")]
    Template {
        /// The template's file or name.
        place: String,
        /// What the engine or the template itself said.
        reason: String,
    },
}

impl TokenizerError {
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
