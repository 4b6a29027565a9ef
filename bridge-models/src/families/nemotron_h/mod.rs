#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Nemotron-H and Nemotron Nano v2: layers of one part each, most of them Mamba-2 or MLP, a few attention.
///
/// Source: `NemotronHForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "nemotron_h",
    architectures: &["NemotronHForCausalLM"],
    model_type: "nemotron_h",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
