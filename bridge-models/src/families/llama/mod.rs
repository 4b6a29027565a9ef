#![doc = include_str!("README.md")]

mod config;
pub mod presets;
mod weights;

#[cfg(test)]
mod tests;

use super::keys::plain_decoder;
use super::spec::FamilySpec;

/// Llama 2, 3, 3.1, 3.2, 3.3, Llama-Nemotron Nano and SmolLM2: RMSNorm, rotary embeddings over the whole head, grouped
/// key-value heads, SwiGLU.
///
/// Source: `LlamaForCausalLM` of Hugging Face transformers.
pub static SPEC: FamilySpec = FamilySpec {
    name: "llama",
    architectures: &["LlamaForCausalLM"],
    model_type: "llama",
    base: plain_decoder,
    config: config::MAP,
    weights: weights::map,
    presets: presets::ALL,
};
