//! What tells the sizes of one model generation apart.

use bridge_core::DecoderConfig;
use bridge_core::config::LayerConfig;

/// The dimensions of a decoder.
pub(super) struct Size {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Size {
    /// The dimensions in the order of a model card: width of the residual stream and of the MLP, layers, query heads,
    /// key-value heads, width of a head.
    pub(super) const fn new(
        hidden_size: usize,
        intermediate_size: usize,
        layers: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Self {
        Self {
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim,
        }
    }

    /// `generation` with these dimensions, its layers all alike.
    pub(super) fn of(self, generation: DecoderConfig) -> DecoderConfig {
        DecoderConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.layers,
            layers: vec![LayerConfig::dense(); self.layers],
            num_attention_heads: self.heads,
            num_key_value_heads: self.kv_heads,
            head_dim: self.head_dim,
            ..generation
        }
    }
}
