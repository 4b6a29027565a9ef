#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// DeepSeek-V3: latent attention, experts behind a sigmoid router with a correction bias, multi-token prediction.
///
/// Source: `DeepseekV3ForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "deepseek_v3",
    architectures: &["DeepseekV3ForCausalLM"],
    model_type: "deepseek_v3",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
