//! Decoder-only language models: shared layers, the one decoder, and a folder per model family.
//!
//! - [`families`]: what differs between families, as data: config map, weight map, named sizes. [`registry`] lists them.
//! - [`Decoder`]: the model that a [`bridge_core::DecoderConfig`] describes, generic over the backend.
//! - [`SegmentedModel`]: what the training engine needs; implement it to train a model of your own.
//! - [`weights`]: fresh, from a Hugging Face folder or from a native checkpoint, one tensor at a time.
//! - [`generate`]: text from a model, with a cache of keys and values.
//! - [`verify`]: comparison with reference numbers.
//!
//! ```
//! use bridge_models::generate::{GenerateOptions, generate};
//! use bridge_models::{Decoder, Init, RandomInit, families::llama};
//! use burn_flex::Flex;
//!
//! let config = llama::presets::tiny();
//! let mut weights = RandomInit::new(&Init::default(), &config);
//! let model = Decoder::<Flex>::build(config, &mut weights, &Default::default())?;
//! let text = generate(&model, &[1, 2, 3], &GenerateOptions { max_new_tokens: 4, ..Default::default() })?;
//! assert_eq!(text.token_ids.len(), 4);
//! # Ok::<(), bridge_models::Error>(())
//! ```

mod auxiliary;
mod context;
mod decoder;
mod error;
mod expert_choices;
pub mod families;
pub mod generate;
pub mod layers;
mod parallel;
pub mod run;
mod segmented;
pub mod verify;
pub mod weights;

pub use auxiliary::{
    AuxiliaryLosses, AuxiliaryOptions, AuxiliaryReport, BalanceScope, Capacity, ExpertLoad,
    MtpLoss, is_correction_bias, load_with_correction_bias, update_correction_biases,
};
pub use context::{
    DecoderCache, ForwardContext, IGNORED_TARGET, Positions, RecurrentState, Targets,
};
pub use decoder::Decoder;
pub use error::{Error, Result};
pub use expert_choices::ExpertChoices;
pub use families::registry;
pub use layers::DecoderLayer;
pub use parallel::{ParallelOptions, check_layout};
pub use segmented::{Boundary, SegmentedModel};
pub use weights::{DtypePolicy, Init, ParamRole, RandomInit, WeightSource};

/// `docs/add_a_model.md`, whose code is run with the other documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/add_a_model.md")]
pub struct AddAModel;
