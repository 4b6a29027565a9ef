#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// DeepSeek-V2: latent attention, and experts behind a softmax router that may be limited to groups.
///
/// Source: `DeepseekV2ForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "deepseek_v2",
    architectures: &["DeepseekV2ForCausalLM"],
    model_type: "deepseek_v2",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
