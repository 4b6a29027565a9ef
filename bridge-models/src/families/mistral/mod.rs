#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Mistral 7B, Nemo and Small: Llama with an optional sliding window in every layer.
///
/// Source: `MistralForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "mistral",
    architectures: &["MistralForCausalLM"],
    model_type: "mistral",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
