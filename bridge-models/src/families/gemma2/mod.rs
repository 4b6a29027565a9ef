#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Gemma 2: Gemma with norms around each part, soft caps, and a sliding window in every second layer.
///
/// Source: `Gemma2ForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "gemma2",
    architectures: &["Gemma2ForCausalLM"],
    model_type: "gemma2",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
