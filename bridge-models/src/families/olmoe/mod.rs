#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// OLMoE: experts behind a softmax router, and a norm over the whole width of queries and of keys.
///
/// Source: `OlmoeForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "olmoe",
    architectures: &["OlmoeForCausalLM"],
    model_type: "olmoe",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
