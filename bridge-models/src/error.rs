//! The one error type of this crate.

use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Reading a config or a checkpoint failed, or they do not fit together.
    #[error(transparent)]
    Core(#[from] bridge_core::Error),

    /// A weight source has no such weight.
    #[error("{origin} holds no weight `{name}`; the model needs it with shape {expected:?}")]
    MissingWeight {
        /// What was read.
        origin: String,
        /// Canonical name of the weight.
        name: String,
        /// Shape that the model's config leads to.
        expected: Vec<usize>,
    },

    /// A weight has another shape than the model's config leads to.
    #[error(
        "{origin}: weight `{name}` has shape {found:?}, expected {expected:?} from the model's config"
    )]
    WeightShape {
        /// What was read.
        origin: String,
        /// Canonical name of the weight.
        name: String,
        /// Shape found.
        found: Vec<usize>,
        /// Shape that the model's config leads to.
        expected: Vec<usize>,
    },

    /// A weight is stored in a dtype that is no ordinary float.
    #[error(
        "{origin}: weight `{name}` is stored as {found}, which holds no plain floating-point weights; expected F32, F16, \
         BF16 or F64"
    )]
    WeightDtype {
        /// What was read.
        origin: String,
        /// Canonical name of the weight.
        name: String,
        /// Dtype found, in the spelling of safetensors.
        found: String,
    },

    /// A config asks for a kind of layer that the decoder does not have.
    #[error("layer {layer} has a {part} of a kind that this decoder does not run: {found}")]
    UnsupportedLayer {
        /// Which layer.
        layer: usize,
        /// "mixer" or "feed-forward part".
        part: &'static str,
        /// What the config says.
        found: String,
    },

    /// A weight was asked for by a rank that has no part of it.
    #[error("rank {rank} holds no part of weight `{name}`, which the layout gives to others")]
    NotOnThisRank {
        /// Canonical name of the weight.
        name: String,
        /// Global rank.
        rank: usize,
    },

    /// Ranks could not work together.
    #[error(transparent)]
    Parallel(#[from] bridge_parallel::Error),

    /// A model cannot be run at a layout, although its weights can be divided.
    #[error("layout {layout}: {problem}")]
    Layout {
        /// The layout.
        layout: String,
        /// What does not fit, and what to do.
        problem: String,
    },

    /// What was to stand beside the layers' weights could not be attached; the text says why.
    #[error("{0}")]
    Adapter(String),

    /// A token id lies outside the vocabulary.
    #[error(
        "token id {id} at position {position} lies outside the vocabulary of {vocab_size} tokens"
    )]
    TokenOutOfVocabulary {
        /// The id.
        id: i64,
        /// Its position in the ids that were given.
        position: usize,
        /// Size of the vocabulary.
        vocab_size: usize,
    },

    /// There is nothing to continue.
    #[error("the prompt is empty; give at least one token")]
    EmptyPrompt,

    /// A prompt does not fit the model's context.
    #[error(
        "the prompt has {prompt} tokens, and the model's context is {context} tokens, one of which must be left for the \
         answer; shorten the prompt"
    )]
    PromptTooLong {
        /// Length of the prompt, in tokens.
        prompt: usize,
        /// Length of the model's context, in tokens.
        context: usize,
    },

    /// A sampling option is out of its range.
    #[error("{name} is {value}, expected {expected}")]
    SamplingOption {
        /// Name of the option.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },

    /// A model produced a number that is not finite, so that no token can be chosen.
    #[error(
        "the model's logits at position {position} hold {found}; its weights are damaged or its dtype overflows"
    )]
    NonFiniteLogits {
        /// Position of the token whose successor was to be chosen.
        position: usize,
        /// "NaN" or "inf".
        found: String,
    },

    /// A reference folder lacks something or contradicts itself.
    #[error("{}: {problem}", path.display())]
    Reference {
        /// The file.
        path: PathBuf,
        /// What was found, what was expected.
        problem: String,
    },

    /// A preset, or another thing looked up by name, is not known.
    #[error("{what} {name:?} is not known{}; known: {known}", nearest_hint(.nearest.as_deref()))]
    UnknownName {
        /// What kind of thing: "model preset".
        what: &'static str,
        /// The name asked for.
        name: String,
        /// The known name that is spelt most like it.
        nearest: Option<String>,
        /// All known names, comma separated.
        known: String,
    },
}

fn nearest_hint(nearest: Option<&str>) -> String {
    nearest
        .map(|name| format!("; did you mean {name}?"))
        .unwrap_or_default()
}

impl Error {
    /// An [`Error::Reference`].
    pub(crate) fn reference(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Error::Reference {
            path: path.into(),
            problem: problem.into(),
        }
    }

    /// Whether the fault lies in what was given (exit code 2) rather than in the run (exit code 3).
    pub fn is_input(&self) -> bool {
        match self {
            Error::Core(error) => error.is_input(),
            Error::NonFiniteLogits { .. } | Error::NotOnThisRank { .. } => false,
            Error::Parallel(error) => matches!(error, bridge_parallel::Error::Invalid(_)),
            _ => true,
        }
    }
}
