//! The one error type of this crate.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading or writing a checkpoint failed.
    #[error(transparent)]
    Core(#[from] bridge_core::Error),

    /// A model could not be loaded.
    #[error(transparent)]
    Model(#[from] bridge_models::Error),

    /// A setting of an adapter makes no sense.
    #[error("adapter setting `{key}` = {value}: {problem}")]
    Setting {
        /// The setting.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what would be right.
        problem: String,
    },

    /// A pattern names no linear layer of the model.
    #[error("`{pattern}` in {key} matches no linear layer of the model{hint}")]
    NoMatch {
        /// The setting that the pattern is in.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// The nearest name, and what may be named.
        hint: String,
    },

    /// A file of an adapter is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },

    /// An adapter does not fit the model.
    #[error("the adapter does not fit the model:\n{}", .0.join("\n"))]
    DoesNotFit(Vec<String>),

    /// A layer has no module of its own in the family's Hugging Face form.
    #[error(
        "`{name}` is part of the fused module `{fused}` in Hugging Face's form of this model, for which PEFT has one adapter \
         over all of its parts; merge the adapter instead of exporting it, or leave such layers out of target_modules"
    )]
    Fused {
        /// Canonical name of the layer.
        name: String,
        /// The foreign tensor that holds it.
        fused: String,
    },
}

impl From<bridge_core::checkpoint::CheckpointError> for Error {
    fn from(error: bridge_core::checkpoint::CheckpointError) -> Self {
        Self::Core(error.into())
    }
}

impl Error {
    /// Whether what the user gave is at fault, and not the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Core(error) => error.is_input(),
            Self::Model(error) => error.is_input(),
            _ => true,
        }
    }
}
