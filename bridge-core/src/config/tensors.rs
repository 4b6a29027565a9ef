//! The canonical tensors that a [`DecoderConfig`] implies.

use super::{DecoderConfig, Ffn, LayerConfig, Mixer, QkNorm};
use crate::bridge::CanonicalTensor;
use crate::layout::{Place, ShardRule};

impl DecoderConfig {
    /// Every weight of the model: name, shape, shard rule and place, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<CanonicalTensor> {
        let vocab = || ShardRule::Vocab {
            dim: 0,
            multiple: 1,
        };
        let table = [self.vocab_size, self.hidden_size];
        let embedding_place = if self.tie_word_embeddings {
            Place::FirstAndLast
        } else {
            Place::First
        };
        let mut tensors =
            vec![CanonicalTensor::new("embedding.weight", table, vocab()).at(embedding_place)];
        for (index, layer) in self.layers.iter().enumerate() {
            let inner = self.mlp_intermediate_size(index);
            self.layer_tensors(&format!("layers.{index}"), layer, inner, &mut tensors);
        }
        self.norm_tensors("final_norm", &mut tensors);
        if !self.tie_word_embeddings {
            tensors.push(CanonicalTensor::new("lm_head.weight", table, vocab()));
        }
        tensors
    }

    fn layer_tensors(
        &self,
        prefix: &str,
        layer: &LayerConfig,
        inner: usize,
        tensors: &mut Vec<CanonicalTensor>,
    ) {
        let LayerConfig { mixer, ffn } = layer;
        if *mixer != Mixer::None {
            self.norm_tensors(&format!("{prefix}.input_norm"), tensors);
        }
        match mixer {
            Mixer::Attention(own) => {
                let kv_heads = own.num_key_value_heads.unwrap_or(self.num_key_value_heads);
                self.attention_tensors(&format!("{prefix}.attention"), kv_heads, tensors);
            }
            Mixer::Mamba2 => {
                if let Some(mamba2) = &self.mamba2 {
                    mamba2.tensors(&format!("{prefix}.mamba"), self.hidden_size, tensors);
                }
            }
            Mixer::GatedDeltaNet => {
                if let Some(delta_net) = &self.gated_delta_net {
                    delta_net.tensors(&format!("{prefix}.delta_net"), self.hidden_size, tensors);
                }
            }
            Mixer::Linear => self.linear_tensor(&format!("{prefix}.attention_linear"), tensors),
            Mixer::None => {}
        }
        if self.attention_output_norm && *mixer != Mixer::None {
            self.norm_tensors(&format!("{prefix}.attention_output_norm"), tensors);
        }
        if *ffn != Ffn::None {
            self.norm_tensors(&format!("{prefix}.mlp_norm"), tensors);
        }
        match ffn {
            Ffn::Mlp(_) => self.mlp_tensors(&format!("{prefix}.mlp"), inner, tensors),
            Ffn::Linear => self.linear_tensor(&format!("{prefix}.mlp_linear"), tensors),
            Ffn::None => {}
        }
        if self.mlp_output_norm && *ffn != Ffn::None {
            self.norm_tensors(&format!("{prefix}.mlp_output_norm"), tensors);
        }
    }

    fn norm_tensors(&self, name: &str, tensors: &mut Vec<CanonicalTensor>) {
        let mut push = |leaf: &str| {
            tensors.push(CanonicalTensor::new(
                format!("{name}.{leaf}"),
                [self.hidden_size],
                ShardRule::Replicated,
            ));
        };
        push("weight");
        if self.norm.bias {
            push("bias");
        }
    }

    /// A matrix that stands for a whole part of a layer. Its input is whole on every rank, and so is its output.
    fn linear_tensor(&self, name: &str, tensors: &mut Vec<CanonicalTensor>) {
        tensors.push(CanonicalTensor::new(
            format!("{name}.weight"),
            [self.hidden_size, self.hidden_size],
            ShardRule::Replicated,
        ));
    }

    fn attention_tensors(&self, name: &str, kv_heads: usize, tensors: &mut Vec<CanonicalTensor>) {
        let (hidden, query, heads) = (
            self.hidden_size,
            self.query_size(),
            self.num_attention_heads,
        );
        let key_value = kv_heads.saturating_mul(self.head_dim);
        let gate = self.attention_output_gate.then_some(("gate", query, heads));
        for (proj, rows, heads) in [
            ("q", query, heads),
            ("k", key_value, kv_heads),
            ("v", key_value, kv_heads),
        ]
        .into_iter()
        .chain(gate)
        {
            let rule = || ShardRule::Heads { dim: 0, heads };
            tensors.push(CanonicalTensor::new(
                format!("{name}.{proj}_proj.weight"),
                [rows, hidden],
                rule(),
            ));
            if self.attention_bias {
                tensors.push(CanonicalTensor::new(
                    format!("{name}.{proj}_proj.bias"),
                    [rows],
                    rule(),
                ));
            }
        }
        for (norm, rows, heads) in [("q", query, heads), ("k", key_value, kv_heads)] {
            let (size, rule) = match self.qk_norm {
                None => continue,
                Some(QkNorm::PerHead) => (self.head_dim, ShardRule::Replicated),
                Some(QkNorm::FullWidth) => (rows, ShardRule::Heads { dim: 0, heads }),
            };
            tensors.push(CanonicalTensor::new(
                format!("{name}.{norm}_norm.weight"),
                [size],
                rule,
            ));
        }
        let output = ShardRule::Heads { dim: 1, heads };
        tensors.push(CanonicalTensor::new(
            format!("{name}.o_proj.weight"),
            [hidden, query],
            output,
        ));
        if self.attention_output_bias {
            tensors.push(CanonicalTensor::new(
                format!("{name}.o_proj.bias"),
                [hidden],
                ShardRule::Replicated,
            ));
        }
    }

    fn mlp_tensors(&self, name: &str, inner: usize, tensors: &mut Vec<CanonicalTensor>) {
        let hidden = self.hidden_size;
        let mut push = |proj: &str, shape: [usize; 2], dim: usize| {
            tensors.push(CanonicalTensor::new(
                format!("{name}.{proj}_proj.weight"),
                shape,
                ShardRule::Split { dim },
            ));
            if self.mlp_bias {
                // A row-parallel bias is added once, after the sum over ranks.
                let rule = if dim == 0 {
                    ShardRule::Split { dim: 0 }
                } else {
                    ShardRule::Replicated
                };
                tensors.push(CanonicalTensor::new(
                    format!("{name}.{proj}_proj.bias"),
                    [shape[0]],
                    rule,
                ));
            }
        };
        if self.gated_mlp {
            push("gate", [inner, hidden], 0);
        }
        push("up", [inner, hidden], 0);
        push("down", [hidden, inner], 1);
    }
}
