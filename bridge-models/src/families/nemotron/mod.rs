#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Nemotron 3 and 4, Minitron: LayerNorm with bias, a plain MLP with squared ReLU, half of each head rotated.
///
/// Source: `NemotronForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "nemotron",
    architectures: &["NemotronForCausalLM"],
    model_type: "nemotron",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
