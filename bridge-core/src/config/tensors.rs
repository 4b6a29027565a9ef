//! The canonical tensors that a [`DecoderConfig`] implies.

use super::{DecoderConfig, Ffn, LayerConfig, Mixer, MlaConfig, MoeConfig, QkNorm};
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
        // Multi-token prediction embeds tokens beside the head.
        let embedding_place = if self.tie_word_embeddings || self.num_mtp_layers > 0 {
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
        for index in 0..self.num_mtp_layers {
            self.mtp_tensors(&format!("mtp.{index}"), &mut tensors);
        }
        if !self.tie_word_embeddings {
            tensors.push(CanonicalTensor::new("lm_head.weight", table, vocab()));
        }
        tensors
    }

    /// What a multi-token prediction module's own layer is made of: the same as the last one.
    pub fn mtp_layer(&self) -> LayerConfig {
        self.layers
            .last()
            .cloned()
            .unwrap_or_else(LayerConfig::dense)
    }

    fn mtp_tensors(&self, prefix: &str, tensors: &mut Vec<CanonicalTensor>) {
        let hidden = self.hidden_size;
        for norm in ["embedding_norm", "hidden_norm"] {
            self.norm_tensors(&format!("{prefix}.{norm}"), tensors);
        }
        tensors.push(CanonicalTensor::new(
            format!("{prefix}.proj.weight"),
            [hidden, 2 * hidden],
            ShardRule::Replicated,
        ));
        let inner = self.mlp_intermediate_size(self.layers.len().saturating_sub(1));
        self.layer_tensors(
            &format!("{prefix}.layer"),
            &self.mtp_layer(),
            inner,
            tensors,
        );
        self.norm_tensors(&format!("{prefix}.final_norm"), tensors);
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
                let (name, kv_heads) = (
                    format!("{prefix}.attention"),
                    own.num_key_value_heads.unwrap_or(self.num_key_value_heads),
                );
                match &self.mla {
                    None => self.attention_tensors(&name, kv_heads, tensors),
                    Some(mla) => self.mla_tensors(&name, mla, tensors),
                }
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
            Ffn::Moe => {
                if let Some(moe) = &self.moe {
                    self.moe_tensors(&format!("{prefix}.mlp"), moe, tensors);
                }
            }
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
        if self.attention_sinks {
            tensors.push(CanonicalTensor::new(
                format!("{name}.sinks"),
                [heads],
                ShardRule::Heads { dim: 0, heads },
            ));
        }
        self.attention_output_tensors(name, tensors);
    }

    fn attention_output_tensors(&self, name: &str, tensors: &mut Vec<CanonicalTensor>) {
        let hidden = self.hidden_size;
        let output = ShardRule::Heads {
            dim: 1,
            heads: self.num_attention_heads,
        };
        tensors.push(CanonicalTensor::new(
            format!("{name}.o_proj.weight"),
            [hidden, self.attention_output_size()],
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

    /// The projections into a latent vector are whole on every rank, those out of it cut by heads.
    fn mla_tensors(&self, name: &str, mla: &MlaConfig, tensors: &mut Vec<CanonicalTensor>) {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        let mut push = |part: &str, shape: &[usize], rule: ShardRule| {
            tensors.push(CanonicalTensor::new(format!("{name}.{part}"), shape, rule));
        };
        let by_head = || ShardRule::Heads { dim: 0, heads };
        let into_latent = |push: &mut dyn FnMut(&str, &[usize], ShardRule), part: &str, rows| {
            push(
                &format!("{part}.weight"),
                &[rows, hidden],
                ShardRule::Replicated,
            );
            if self.attention_bias {
                push(&format!("{part}.bias"), &[rows], ShardRule::Replicated);
            }
        };
        match mla.q_lora_rank {
            None => push("q_proj.weight", &[self.query_size(), hidden], by_head()),
            Some(rank) => {
                into_latent(&mut push, "q_a_proj", rank);
                push("q_a_norm.weight", &[rank], ShardRule::Replicated);
                push("q_b_proj.weight", &[self.query_size(), rank], by_head());
            }
        }
        let rank = mla.kv_lora_rank;
        into_latent(&mut push, "kv_a_proj", rank + mla.qk_rope_head_dim);
        push("kv_a_norm.weight", &[rank], ShardRule::Replicated);
        let rows = heads * (mla.qk_nope_head_dim + mla.v_head_dim);
        push("kv_b_proj.weight", &[rows, rank], by_head());
        self.attention_output_tensors(name, tensors);
    }

    /// The experts' matrices are stacked: one tensor for all of a layer's `gate_proj`s, and so on.
    fn moe_tensors(&self, name: &str, moe: &MoeConfig, tensors: &mut Vec<CanonicalTensor>) {
        let (hidden, experts, inner) = (self.hidden_size, moe.num_experts, moe.intermediate_size);
        let mut push = |part: &str, shape: &[usize], rule: ShardRule| {
            tensors.push(CanonicalTensor::new(format!("{name}.{part}"), shape, rule));
        };
        push("router.weight", &[experts, hidden], ShardRule::Replicated);
        if moe.router.bias {
            push("router.bias", &[experts], ShardRule::Replicated);
        }
        if moe.router.correction_bias {
            push("router.correction_bias", &[experts], ShardRule::Replicated);
        }
        // Expert tensor parallelism cuts the inner width: rows of gate and up, columns of down, whose bias is added
        // once, after the sum.
        let stacked = |inner| ShardRule::StackedExperts { inner };
        let mut projection = |proj: &str, rows: usize, cols: usize, cut: usize| {
            push(
                &format!("experts.{proj}_proj.weight"),
                &[experts, rows, cols],
                stacked(Some(cut)),
            );
            if moe.expert_projection_bias {
                let cut = (cut == 1).then_some(1);
                push(
                    &format!("experts.{proj}_proj.bias"),
                    &[experts, rows],
                    stacked(cut),
                );
            }
        };
        if self.gated_mlp {
            projection("gate", inner, hidden, 1);
        }
        projection("up", inner, hidden, 1);
        projection("down", hidden, inner, 2);
        if let Some(shared) = moe.shared_intermediate_size {
            self.mlp_tensors(&format!("{name}.shared_expert"), shared, tensors);
            if moe.shared_expert_gate {
                tensors.push(CanonicalTensor::new(
                    format!("{name}.shared_expert_gate.weight"),
                    [1, hidden],
                    ShardRule::Replicated,
                ));
            }
        }
    }
}
