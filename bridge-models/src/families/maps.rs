//! The weight names that most families share.

use bridge_core::mapping::{View, ViewError};
use bridge_core::{DecoderConfig, WeightMap};

/// Everything but the norms around the MLP, which families place differently.
pub(super) fn plain_weights(config: &DecoderConfig) -> WeightMap {
    WeightMap::new()
        .copy("embedding.weight", "model.embed_tokens.weight")
        .copy(
            "layers.{l}.input_norm.{leaf}",
            "model.layers.{l}.input_layernorm.{leaf}",
        )
        .copy(
            "layers.{l}.attention.{part}.{leaf}",
            "model.layers.{l}.self_attn.{part}.{leaf}",
        )
        .copy(
            "layers.{l}.mlp.{part}.{leaf}",
            "model.layers.{l}.mlp.{part}.{leaf}",
        )
        .copy("final_norm.{leaf}", "model.norm.{leaf}")
        .copy("lm_head.weight", "lm_head.weight")
        .tied(
            "lm_head.weight",
            "embedding.weight",
            config.tie_word_embeddings,
        )
        .ignore(
            "model.layers.{l}.self_attn.rotary_emb.inv_freq",
            "recomputed from rope_theta",
        )
        .ignore("model.rotary_emb.inv_freq", "recomputed from rope_theta")
}

/// [`plain_weights`] with one norm before each part of a layer, named as Llama names them.
pub(super) fn pre_norm_weights(config: &DecoderConfig) -> WeightMap {
    plain_weights(config).copy(
        "layers.{l}.mlp_norm.{leaf}",
        "model.layers.{l}.post_attention_layernorm.{leaf}",
    )
}

/// [`plain_weights`] with norms before and after each part of a layer, as Gemma 2 and 3 have them.
pub(super) fn sandwich_norm_weights(config: &DecoderConfig) -> WeightMap {
    plain_weights(config)
        .copy(
            "layers.{l}.attention_output_norm.{leaf}",
            "model.layers.{l}.post_attention_layernorm.{leaf}",
        )
        .copy(
            "layers.{l}.mlp_norm.{leaf}",
            "model.layers.{l}.pre_feedforward_layernorm.{leaf}",
        )
        .copy(
            "layers.{l}.mlp_output_norm.{leaf}",
            "model.layers.{l}.post_feedforward_layernorm.{leaf}",
        )
}

/// Filters `[channels, taps]` as the weight `[channels, 1, taps]` of a convolution with one filter per channel.
pub(super) fn one_input_channel(filters: View) -> Result<View, ViewError> {
    let channels = filters.shape().first().copied().unwrap_or(0);
    filters.split(0, &[channels, 1])
}
