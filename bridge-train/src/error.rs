//! The one error type of this crate.

use std::path::PathBuf;

use crate::config::Problem;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model was to be trained one of whose weights has no value.
    #[error(
        "parameter `{name}` has no value; give the optimizer a way to load weights (`Optimizer::with_weights`), or build the \
         model with them"
    )]
    WeightNotThere {
        /// Canonical name.
        name: String,
    },
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

    /// Adapters could not be made or read.
    #[error(transparent)]
    Peft(#[from] bridge_peft::Error),

    /// A model could not be built or loaded.
    #[error(transparent)]
    Model(#[from] bridge_models::Error),

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

    /// `train_state.json` of a checkpoint is broken.
    #[error("{origin}: {problem}")]
    TrainState {
        /// The file.
        origin: String,
        /// What is wrong with it.
        problem: String,
    },

    /// A checkpoint lacks what continuing a run needs.
    #[error(
        "{} holds no {missing}, so no run can be continued from it; to start from its weights, set \
         checkpoint.pretrained to it and checkpoint.dir to another folder",
        path.display()
    )]
    NotARun {
        /// The checkpoint.
        path: PathBuf,
        /// What it lacks.
        missing: &'static str,
    },

    /// The checkpoint to continue from is of another model.
    #[error(
        "{} is of another model: {}; set checkpoint.dir to another folder, or give the model it was made with",
        path.display(), first_few(.differences)
    )]
    ModelDiffers {
        /// The checkpoint.
        path: PathBuf,
        /// Where the two differ.
        differences: Vec<String>,
    },

    /// A setting needs something that was not given.
    #[error("{key}: {problem}")]
    Setting {
        /// `section.key`.
        key: &'static str,
        /// What is wrong, and what to do.
        problem: String,
    },

    /// Two parameters of a model have one name.
    #[error(
        "the model lists parameter `{name}` twice; list a weight that is used in two places once"
    )]
    DuplicateParameter {
        /// The name.
        name: String,
    },

    /// Ranks that train one model do not fit together.
    #[error("{0}")]
    Parallel(String),

    /// Another rank failed at what all ranks do together.
    #[error("rank {rank} failed: {reason}")]
    OtherRank {
        /// The rank.
        rank: usize,
        /// What it said.
        reason: String,
    },

    /// A rank died, hung or failed.
    #[error(transparent)]
    Ranks(#[from] bridge_parallel::Error),

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

fn first_few(items: &[String]) -> String {
    const SHOWN: usize = 6;
    let more = items.len().saturating_sub(SHOWN);
    let shown = items[..items.len() - more].join(", ");
    if more > 0 {
        format!("{shown}, and {more} more")
    } else {
        shown
    }
}

/// Whether the operating system refused since a path was wrong, rather than since a disk was full or broken.
fn names_something_wrong(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound, PermissionDenied};
    matches!(
        error.kind(),
        NotFound | PermissionDenied | NotADirectory | IsADirectory
    )
}

impl Error {
    /// Whether the fault lies in what was given (exit code 2) rather than in the run (exit code 3).
    pub fn is_input(&self) -> bool {
        match self {
            Error::ConfigSyntax { .. }
            | Error::Config(_)
            | Error::VocabularyTooSmall { .. }
            | Error::TrainState { .. }
            | Error::NotARun { .. }
            | Error::ModelDiffers { .. }
            | Error::Setting { .. }
            | Error::DuplicateParameter { .. }
            | Error::WeightNotThere { .. }
            | Error::Parallel(_)
            | Error::Ranks(bridge_parallel::Error::Invalid(_)) => true,
            Error::Peft(error) => error.is_input(),
            Error::Io { source, .. } => names_something_wrong(source),
            Error::NonFinite { .. }
            | Error::Plot { .. }
            | Error::OtherRank { .. }
            | Error::Ranks(_) => false,
            Error::Core(error) => error.is_input(),
            Error::Model(error) => error.is_input(),
            Error::Data(error) => error.is_input(),
            Error::Tokenizer(error) => error.is_input(),
        }
    }

    /// An [`Error::Io`].
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io {
            action,
            path: path.into(),
            source,
        }
    }
}
