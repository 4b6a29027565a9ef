//! What the tape of a layer keeps of each token between its forward and its backward pass, part by part as the layers of
//! `bridge-models` record it, and what recurrences lay out beside it as the kernels of `bridge-cuda` do.

use bridge_core::DecoderConfig;
use bridge_core::config::{Ffn, LayerConfig, Mixer};
use bridge_core::layout::LayoutSpec;

use super::{MemorySpec, Recompute};

/// Bytes of an fp32 number that a tape keeps whatever the dtype of activations.
const FP32: f64 = 4.0;

/// Bytes per token of a context-parallel rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct LayerBytes {
    /// Kept until the layer's backward pass.
    pub(super) kept: f64,
    /// Needed besides while that runs.
    pub(super) working: f64,
}

/// The bytes of `layer`, which is layer number `index`.
pub(super) fn layer_bytes(
    config: &DecoderConfig,
    index: usize,
    layer: &LayerConfig,
    layout: &LayoutSpec,
    spec: &MemorySpec,
) -> LayerBytes {
    let mut count = Count::new(config, layout, spec);
    count.mixer(&layer.mixer, index);
    count.ffn(&layer.ffn, index);
    let Count {
        kept, again, scan, ..
    } = count;
    match spec.recompute {
        Recompute::None => LayerBytes {
            kept: kept + again,
            working: scan,
        },
        Recompute::Selective => LayerBytes {
            kept,
            working: again + scan,
        },
        // It runs again on a tape that makes cheap values again, too.
        Recompute::Full => {
            let input = count.residual;
            LayerBytes {
                kept: input,
                working: kept + again + scan - input,
            }
        }
    }
}

/// Bytes per token, as they add up.
struct Count<'a> {
    config: &'a DecoderConfig,
    tp: usize,
    layout: &'a LayoutSpec,
    /// Bytes of an activation.
    bytes: f64,
    /// A tensor of the residual stream: divided under sequence parallelism.
    residual: f64,
    kept: f64,
    /// Outputs of norms and of activation functions, which can be made again.
    again: f64,
    /// What the backward pass of a recurrence lays out for itself, in chunks of tokens.
    scan: f64,
}

impl<'a> Count<'a> {
    fn new(config: &'a DecoderConfig, layout: &'a LayoutSpec, spec: &MemorySpec) -> Self {
        let bytes = spec.state.weight as f64;
        let divided = if layout.sp { layout.tp } else { 1 };
        Self {
            config,
            tp: layout.tp,
            layout,
            bytes,
            residual: (config.hidden_size as f64) * bytes / divided as f64,
            kept: 0.0,
            again: 0.0,
            scan: 0.0,
        }
    }

    fn keep(&mut self, elements: usize) {
        self.kept += elements as f64 * self.bytes;
    }

    /// The norm before a block, whose output enters it.
    fn block_input(&mut self) {
        self.kept += self.residual;
        let output = self.config.hidden_size as f64 * self.bytes;
        if self.layout.sp {
            // What ranks have gathered is not made again.
            self.kept += output;
        } else {
            self.again += output;
        }
    }

    fn mixer(&mut self, mixer: &Mixer, index: usize) {
        let tp = self.tp;
        match mixer {
            Mixer::Attention(_) => {
                self.block_input();
                match self.config.mla {
                    Some(_) => self.latent_attention(),
                    None => self.attention(index),
                }
                if self.config.attention_output_norm {
                    self.kept += self.residual;
                }
            }
            Mixer::Linear => self.block_input(),
            Mixer::Mamba2 => {
                self.block_input();
                let Some(own) = &self.config.mamba2 else {
                    return;
                };
                let (inner, group) = (own.inner_size() / tp, own.group_size() / tp);
                // Before and after the convolution; what the scan gives, its gate, and both together.
                self.keep(2 * (inner + 2 * group) + 3 * inner);
                self.steps(own.num_heads / tp, 1);
                // The state before each chunk, and the gradient of the one after it.
                let state = filled(own.head_dim) * filled(own.state_size);
                self.scan = self.scanned(own.num_heads / tp, 2 * state, 0);
            }
            Mixer::GatedDeltaNet => {
                self.block_input();
                let Some(own) = &self.config.gated_delta_net else {
                    return;
                };
                let (key, value) = (own.key_size() / tp, own.value_size() / tp);
                // Before and after the convolution, queries and keys at length 1; the result, its gate, and both together.
                self.keep(3 * (2 * key) + 2 * value + 3 * value);
                self.steps(own.num_value_heads / tp, 3);
                let (key, value) = (filled(own.key_head_dim), filled(own.value_head_dim));
                // Beside the states: U, W, T, and V with its gradient.
                let rows = 3 * value + key + self.chunk_tokens();
                self.scan = self.scanned(own.num_value_heads / tp, 2 * key * value, rows);
            }
            // No mixer, or one that this count does not know of: nothing.
            _ => {}
        }
    }

    /// Step lengths and decays of recurrent heads, fp32, and `projected` numbers that they come from.
    fn steps(&mut self, heads: usize, projected: usize) {
        self.keep(projected * heads);
        self.kept += 2.0 * heads as f64 * FP32;
    }

    /// Bytes per token of what a scan's kernels pass to each other: `per_chunk` and `per_token` numbers of each head.
    fn scanned(&self, heads: usize, per_chunk: usize, per_token: usize) -> f64 {
        let numbers = per_chunk as f64 / self.chunk_tokens() as f64 + per_token as f64;
        heads as f64 * numbers * self.bytes
    }

    /// Tokens of a chunk, as `bridge-cuda` cuts them for this dtype whatever the model says.
    fn chunk_tokens(&self) -> usize {
        if self.bytes < FP32 { 64 } else { 32 }
    }

    fn attention(&mut self, index: usize) {
        let config = self.config;
        let heads = config.num_attention_heads / self.tp;
        let kv_heads = (config.layer_key_value_heads(index) / self.tp).max(1);
        let (query, kv) = (heads * config.head_dim, kv_heads * config.head_dim);
        // Queries, keys and values as attention takes them, and what it gives.
        self.keep(2 * query + 2 * kv);
        self.kept += heads as f64 * FP32;
        if config.qk_norm.is_some() {
            self.keep(query + kv);
        }
        if config.attention_output_gate {
            self.keep(query);
            self.again += query as f64 * self.bytes;
        }
    }

    fn latent_attention(&mut self) {
        let Some(mla) = &self.config.mla else { return };
        let heads = self.config.num_attention_heads / self.tp;
        let (nope, rotated, value) = (mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim);
        // Queries and keys put together from their two parts, values as a part of what the latent was expanded to.
        self.keep(heads * (2 * (nope + rotated) + (nope + value) + value));
        self.kept += heads as f64 * FP32;
        self.keep(mla.kv_lora_rank + rotated);
        let mut normed = mla.kv_lora_rank;
        if let Some(rank) = mla.q_lora_rank {
            self.keep(rank);
            normed += rank;
        }
        self.again += normed as f64 * self.bytes;
    }

    fn ffn(&mut self, ffn: &Ffn, index: usize) {
        match ffn {
            Ffn::Mlp(_) => {
                self.block_input();
                self.mlp(self.config.mlp_intermediate_size(index) / self.tp);
            }
            Ffn::Linear => self.block_input(),
            Ffn::Moe => self.moe(),
            _ => return,
        }
        if self.config.mlp_output_norm {
            self.kept += self.residual;
        }
    }

    fn mlp(&mut self, inner: usize) {
        self.keep(inner * if self.config.gated_mlp { 2 } else { 1 });
        self.again += inner as f64 * self.bytes;
    }

    fn moe(&mut self) {
        let config = self.config;
        let Some(moe) = &config.moe else { return };
        match moe.shared_intermediate_size {
            // The shared expert's matrices take the norm's output in as well.
            Some(inner) => {
                self.block_input();
                self.mlp(inner / self.tp);
                if moe.shared_expert_gate {
                    self.kept += self.residual;
                }
            }
            None => self.kept += self.residual,
        }
        let divided = if self.layout.sp { self.tp } else { 1 } as f64;
        // The router's input and logits, fp32.
        self.kept += (config.hidden_size + moe.num_experts) as f64 * FP32 / divided;
        // Each rank of a stage sees its even share of the assignments, each etp group's ranks the same ones.
        let rows = moe.num_experts_per_tok as f64 * self.layout.etp as f64 / self.tp as f64;
        let inner = moe.intermediate_size / self.layout.etp;
        let projections = if config.gated_mlp { 3 } else { 2 };
        // Rows sorted by expert, what the experts' matrices give, and rows on their way back.
        let row = (2 * config.hidden_size + projections * inner) as f64 * self.bytes;
        self.kept += rows * row;
    }
}

/// A size filled up to whole tiles of the tensor cores.
fn filled(size: usize) -> usize {
    size.next_multiple_of(16)
}
