#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Qwen3-MoE: Qwen3 with experts in place of MLPs.
///
/// Source: `Qwen3MoeForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "qwen3_moe",
    architectures: &["Qwen3MoeForCausalLM"],
    model_type: "qwen3_moe",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
