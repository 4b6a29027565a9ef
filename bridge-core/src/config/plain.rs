//! The decoder that most families differ from in a few fields.

use super::{Activation, DecoderConfig, NormConfig, NormKind, RopeConfig, RopeStyle};

impl DecoderConfig {
    /// A decoder of no size, with the traits that most families share: RMSNorm, SwiGLU, no biases, an untied head. What
    /// a config is started from, so that a family states only what sets it apart:
    ///
    /// ```
    /// use bridge_core::DecoderConfig;
    /// let config = DecoderConfig { embedding_scale: Some(8.0), ..DecoderConfig::plain() };
    /// assert!(config.gated_mlp && config.layers.is_empty());
    /// ```
    pub fn plain() -> Self {
        Self {
            hidden_size: 0,
            intermediate_size: 0,
            num_hidden_layers: 0,
            num_attention_heads: 0,
            num_key_value_heads: 0,
            head_dim: 0,
            vocab_size: 0,
            max_position_embeddings: 2048,
            norm: NormConfig {
                kind: NormKind::RmsNorm,
                eps: 1e-6,
                unit_offset: false,
                bias: false,
            },
            activation: Activation::Silu,
            gated_mlp: true,
            attention_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            qk_norm: None,
            attention_sinks: false,
            mla: None,
            moe: None,
            rope: Some(RopeConfig::new(10_000.0)),
            rope_local: None,
            partial_rotary_factor: 1.0,
            rope_style: RopeStyle::Halves,
            layers: Vec::new(),
            num_mtp_layers: 0,
            tie_word_embeddings: false,
            embedding_scale: None,
            attention_scale: None,
            attention_softcap: None,
            final_logit_softcap: None,
            attention_output_gate: false,
            mamba2: None,
            gated_delta_net: None,
            attention_output_norm: false,
            mlp_output_norm: false,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }
}
