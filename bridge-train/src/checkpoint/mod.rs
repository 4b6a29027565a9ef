//! Checkpoints of a run: saving, keeping the newest few, and continuing exactly where a run stopped.
//!
//! A checkpoint is in the native form of [`bridge_core::checkpoint::native`]: weights under their canonical names in the
//! `model` group, optimizer state under `exp_avg/NAME`, `exp_avg_sq/NAME` and (where the model's weights are narrower
//! than fp32) `master/NAME` in the `optimizer` group, then `train_state.json`, the resolved `config.toml`, and in `hf/`
//! the model's `config.json` and tokenizer, so that it can be exported.
//!
//! With several ranks each writes the pieces that it is the one to write into a file of its own, and reads the slices that
//! it holds; the index says where the pieces belong in the whole tensors. So a run saved at one layout continues at any
//! other. The folder must be on a file system that all ranks see.

mod local;
mod state;
mod store;
mod weights;

pub use state::{TRAIN_STATE_FILE, TrainState};
pub use store::{CONFIG_FILE, CheckpointStore};
pub use weights::ZeroSource;
