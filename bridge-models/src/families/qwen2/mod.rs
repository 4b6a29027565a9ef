#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.
///
/// Source: `Qwen2ForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "qwen2",
    architectures: &["Qwen2ForCausalLM"],
    model_type: "qwen2",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
