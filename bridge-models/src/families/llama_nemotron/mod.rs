#![doc = include_str!("README.md")]

mod blocks;
mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::keys::plain_decoder;
use super::spec::FamilySpec;

/// Llama-Nemotron Super and Ultra: Llama whose layers were thinned out one by one by a search over architectures.
///
/// Source: the `DeciLMForCausalLM` class in the published repositories.
pub static SPEC: FamilySpec = FamilySpec {
    name: "llama_nemotron",
    architectures: &["DeciLMForCausalLM"],
    model_type: "nemotron-nas",
    base: plain_decoder,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
