#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Qwen3-Next: three layers with a gated delta net to one with gated attention, and experts in all of them.
///
/// Source: `Qwen3NextForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "qwen3_next",
    architectures: &["Qwen3NextForCausalLM"],
    model_type: "qwen3_next",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
