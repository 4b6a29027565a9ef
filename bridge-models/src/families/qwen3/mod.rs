#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Qwen3, dense: Llama with an RMSNorm on each query and key head.
///
/// Source: `Qwen3ForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "qwen3",
    architectures: &["Qwen3ForCausalLM"],
    model_type: "qwen3",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
