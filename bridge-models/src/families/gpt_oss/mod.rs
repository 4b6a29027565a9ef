#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// gpt-oss: attention sinks, alternating windows, biased experts with a clamped SwiGLU.
///
/// Source: `GptOssForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "gpt_oss",
    architectures: &["GptOssForCausalLM"],
    model_type: "gpt_oss",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
