//! The weight map.

use bridge_core::{DecoderConfig, WeightMap};

pub(super) fn map(config: &DecoderConfig) -> WeightMap {
    WeightMap::new()
        .copy("embedding.weight", "model.embed_tokens.weight")
        .copy(
            "layers.{l}.input_norm.weight",
            "model.layers.{l}.input_layernorm.weight",
        )
        .copy(
            "layers.{l}.attention.{p}_proj.{leaf}",
            "model.layers.{l}.self_attn.{p}_proj.{leaf}",
        )
        .copy(
            "layers.{l}.mlp_norm.weight",
            "model.layers.{l}.post_attention_layernorm.weight",
        )
        .copy(
            "layers.{l}.mlp.{p}_proj.{leaf}",
            "model.layers.{l}.mlp.{p}_proj.{leaf}",
        )
        .copy("final_norm.weight", "model.norm.weight")
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
