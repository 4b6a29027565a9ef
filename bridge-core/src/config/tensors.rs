//! The canonical tensors that a [`DecoderConfig`] implies.

use super::{DecoderConfig, Ffn, Mixer, QkNorm};
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
        for index in 0..self.layers.len() {
            self.layer_tensors(index, &mut tensors);
        }
        self.norm_tensors("final_norm", &mut tensors);
        if !self.tie_word_embeddings {
            tensors.push(CanonicalTensor::new("lm_head.weight", table, vocab()));
        }
        tensors
    }

    fn layer_tensors(&self, index: usize, tensors: &mut Vec<CanonicalTensor>) {
        let prefix = format!("layers.{index}");
        self.norm_tensors(&format!("{prefix}.input_norm"), tensors);
        match &self.layers[index].mixer {
            Mixer::Attention(_) => self.attention_tensors(&format!("{prefix}.attention"), tensors),
        }
        if self.attention_output_norm {
            self.norm_tensors(&format!("{prefix}.attention_output_norm"), tensors);
        }
        self.norm_tensors(&format!("{prefix}.mlp_norm"), tensors);
        match &self.layers[index].ffn {
            Ffn::Mlp(_) => self.mlp_tensors(
                &format!("{prefix}.mlp"),
                self.mlp_intermediate_size(index),
                tensors,
            ),
        }
        if self.mlp_output_norm {
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

    fn attention_tensors(&self, name: &str, tensors: &mut Vec<CanonicalTensor>) {
        let (hidden, query, key_value) =
            (self.hidden_size, self.query_size(), self.key_value_size());
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        for (proj, rows, heads) in [
            ("q", query, heads),
            ("k", key_value, kv_heads),
            ("v", key_value, kv_heads),
        ] {
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
