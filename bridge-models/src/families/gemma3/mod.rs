#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::spec::FamilySpec;

/// Gemma 3, text only: norms around each part and on heads, local layers with a rotary embedding of their own.
///
/// Source: `Gemma3ForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "gemma3_text",
    architectures: &["Gemma3ForCausalLM"],
    model_type: "gemma3_text",
    base: config::base,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
