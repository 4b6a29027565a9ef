//! Training: a configuration, an engine that runs any segmented model, an optimizer, schedules, checkpoints, metrics.
//!
//! Each part stands alone. A program that has a model and a dataset needs [`Trainer`]; one that wants a whole run from a
//! configuration, as `cargo xtask pretrain` does, resolves a [`config`] and calls [`pretrain()`].
//!
//! | part | what it does |
//! | --- | --- |
//! | [`config`] | TOML layers and `key=value` overrides to a checked [`config::ResolvedConfig`] |
//! | [`engine`], [`step`] | forward and backward segment by segment; one optimizer step from micro-batches |
//! | [`optimizer`], [`lr_schedule`] | AdamW with fp32 state, clipping; learning rate and weight decay over the samples |
//! | [`trainer`] | the loop: steps, evaluations, saves, graceful stops |
//! | [`checkpoint`] | saving and exact resuming |
//! | [`callback`], [`metrics`] | hooks; progress bar, `metrics.jsonl`, TensorBoard, a picture of the loss |
//! | [`verify`] | a model at any layout against reference numbers, through all of the above but the update |
//! | [`pretrain()`] | all of it from a resolved configuration |

mod agree;
pub mod batch;
pub mod callback;
pub mod checkpoint;
pub mod config;
pub mod engine;
pub mod error;
pub mod flops;
pub mod lr_schedule;
pub mod metrics;
pub mod optimizer;
mod pretrain;
pub mod signals;
mod sources;
pub mod step;
pub mod trainer;
pub mod verify;

pub use error::{Error, Result};
pub use pretrain::{PretrainContext, PretrainOutcome, pretrain};
pub use sources::{load_tokenizer, load_training_data};
pub use trainer::{Trainer, TrainerOptions};
