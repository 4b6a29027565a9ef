#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// GLM-4.5: experts behind DeepSeek-V3's router, plain attention, multi-token prediction.
///
/// Source: `Glm4MoeForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "glm4_moe",
    architectures: &["Glm4MoeForCausalLM"],
    model_type: "glm4_moe",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
