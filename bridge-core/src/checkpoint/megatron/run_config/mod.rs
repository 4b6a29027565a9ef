//! `run_config.yaml`: the config that Megatron-Bridge keeps in a checkpoint, whose `model` section is the keywords of a
//! class of its own, named by `_target_`.
//!
//! Here names of classes and functions are text: those that are known stand for what they compute, and every other is
//! refused. Nothing is imported or called.

mod fields;
mod model;
mod read;
mod write;
mod yaml;

pub use model::RunConfig;
pub(crate) use model::differences;
pub use yaml::MAX_YAML_BYTES;

#[cfg(test)]
mod tests;
