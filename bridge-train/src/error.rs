//! The one error type of this crate.

use std::path::PathBuf;

use crate::config::Problem;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A layer of the configuration is not TOML.
    #[error("{origin} is not valid TOML: {source}")]
    ConfigSyntax {
        /// The file, or a name of the layer.
        origin: String,
        /// Where and why.
        #[source]
        source: toml::de::Error,
    },

    /// Keys of the configuration that are unknown, missing or wrong; all of them.
    #[error("{}", list_problems(.0))]
    Config(Vec<Problem>),

    /// The operating system refused to read or write.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb phrase.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },

    /// Training data could not be read.
    #[error(transparent)]
    Data(#[from] bridge_data::DataError),

    /// A tokenizer could not be loaded or used.
    #[error(transparent)]
    Tokenizer(#[from] bridge_tokenizers::TokenizerError),

    /// A model could not be built or loaded.
    #[error(transparent)]
    Model(#[from] bridge_models::Error),

    /// A sample holds a token that the model does not know.
    #[error(
        "sample {sample} of {dataset} holds token {id}, but the model's vocabulary has {vocab_size}; \
         was the data made with another tokenizer?"
    )]
    TokenOutOfVocabulary {
        /// The token.
        id: i64,
        /// Global index of the sample.
        sample: u64,
        /// The dataset.
        dataset: String,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },

    /// The tokenizer has more tokens than the model's embedding has rows.
    #[error(
        "the tokenizer ({tokenizer}) has {tokens} tokens, but model.vocab_size is {vocab_size}; \
         set model.vocab_size={tokens} or more"
    )]
    VocabularyTooSmall {
        /// Which tokenizer.
        tokenizer: String,
        /// One more than its highest id.
        tokens: usize,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },

    /// The loss or a gradient is NaN or infinite, and the run may not go on. The weights are as before the step.
    #[error(
        "step {iteration}: {what}; the weights were left as they were before this step. lower optimizer.lr or check \
         the data, or set train.on_non_finite=skip to pass over such steps"
    )]
    NonFinite {
        /// The step, counted from 1.
        iteration: u64,
        /// What is not finite.
        what: String,
    },

    /// Two parameters of a model have one name.
    #[error("the model lists parameter `{name}` twice; list a weight that is used in two places once")]
    DuplicateParameter {
        /// The name.
        name: String,
    },

    /// The picture of the loss could not be drawn.
    #[error("cannot draw {}: {reason}", path.display())]
    Plot {
        /// The picture.
        path: PathBuf,
        /// What the drawing library said.
        reason: String,
    },

    /// A checkpoint could not be read or written, or a model config not understood.
    #[error(transparent)]
    Core(#[from] bridge_core::Error),
}

fn list_problems(problems: &[Problem]) -> String {
    match problems {
        [only] => format!("configuration: {only}"),
        many => {
            let mut text = format!("the configuration has {} problems", many.len());
            for problem in many {
                text.push_str(&format!("\n  - {problem}"));
            }
            text
        }
    }
}

impl Error {
    /// An [`Error::Io`].
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { action, path: path.into(), source }
    }
}
