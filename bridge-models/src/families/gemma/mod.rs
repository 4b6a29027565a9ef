#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Gemma 1: norms that scale by one plus their weight, scaled embeddings, a GELU gate.
///
/// Source: `GemmaForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "gemma",
    architectures: &["GemmaForCausalLM"],
    model_type: "gemma",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
