//! Distributed checkpoints of Megatron-Core (`torch_dist`), without Python.
//!
//! ```text
//! CKPT/latest_checkpointed_iteration.txt      text: 100
//! CKPT/iter_0000100/.metadata                 pickle: which box of which tensor is where
//!                   __0_0.distcp              archives of torch.save, one after the other, one per box
//!                   metadata.json             names the format
//!                   common.pt                 what is no tensor (before 0.19; later an object in the files)
//!                   run_config.yaml           the model's config (Megatron-Bridge only)
//! ```
//!
//! The rank layout that wrote a checkpoint shows nowhere but in how its tensors are cut into boxes, so reading needs
//! no layout: a tensor is what its boxes add up to.

mod extra_states;
mod layer;
mod metadata;
mod reader;
mod run_config;
mod weights;
mod writer;

pub(crate) use extra_states::{extra_states, stacked_dims};
pub use reader::{MegatronCheckpoint, TRACKER_FILE};
pub(crate) use reader::{RUN_CONFIG_FILE, iteration_dir};
pub(crate) use run_config::differences;
pub use run_config::{MAX_YAML_BYTES, RunConfig};
pub use weights::{MegatronBridge, MegatronForm, layers_are_alike, megatron_weights};
pub use writer::{MegatronTensor, MegatronWriter, MegatronWriterOptions};

#[cfg(test)]
mod tests;
