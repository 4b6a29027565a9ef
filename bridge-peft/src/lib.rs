//! Parameter-efficient fine-tuning: a small trained part beside the frozen matrices of a decoder's linear layers.
//!
//! ```text
//! LoRA    y = W x + s B A x                         s = alpha / dim, or alpha / sqrt(dim)      (arXiv 2106.09685)
//! DoRA    y = (m / ||W + s B A||) (W + s B A) x     norm of each row, no gradient through it   (arXiv 2402.09353)
//! ```
//!
//! [`attach`] freezes a model and puts adapters on the layers that an [`AdapterConfig`] names; [`attach_with`] does so
//! with adapters of one's own (see [`Adapter`]). On several ranks an adapter is divided as its layer is. What was trained
//! is an [`AdapterWeights`], which goes to and from Hugging Face PEFT folders ([`hf`]) and is merged into the weights of a
//! checkpoint ([`merge`]).
//!
//! ```
//! use bridge_models::families::llama::presets;
//! use bridge_models::{Decoder, Init, RandomInit};
//! use bridge_peft::{AdapterConfig, attach};
//! use burn_flex::Flex;
//!
//! let config = presets::tiny();
//! let mut fresh = RandomInit::new(&Init::default(), &config);
//! let mut model = Decoder::<Flex>::build(config, &mut fresh, &Default::default())?;
//! let adapters = AdapterConfig {
//!     dim: 4,
//!     target_modules: vec!["q_proj".into(), "layers.*.mlp.*".into()],
//!     ..AdapterConfig::default()
//! };
//! let attached = attach(&mut model, &adapters)?;
//! assert_eq!(attached.len(), 3 * 4);
//! assert!(model.params().iter().all(|param| param.requires_grad() == param.name().contains(".lora_")));
//! # Ok::<(), bridge_peft::Error>(())
//! ```

mod attach;
mod config;
mod error;
pub mod hf;
mod low_rank;
pub mod merge;
mod target;
mod weights;

pub use attach::{Adapter, attach, attach_weights, attach_with};
pub use config::{AdapterConfig, AdapterKind, DropoutPosition, InitA};
pub use error::{Error, Result};
pub use target::{linear_names, select};
pub use weights::{ADAPTER_FILE, AdapterWeights, Factors, base_fingerprint};
