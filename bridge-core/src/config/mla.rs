//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one small vector
//! per token.

use serde::{Deserialize, Serialize};

use super::{RopeConfig, RopeScaling};
use crate::error::Problems;

/// Sizes of multi-head latent attention. A head's query and key are `qk_nope_head_dim` elements without and
/// `qk_rope_head_dim` elements with a rotary embedding; the latter part of the key is the same for all heads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlaConfig {
    /// Width of the vector that queries come from; `None` where they come from the hidden state directly.
    #[serde(default)]
    pub q_lora_rank: Option<usize>,
    /// Width of the vector that keys and values come from.
    pub kv_lora_rank: usize,
    /// Elements of a query or key without a rotary embedding.
    pub qk_nope_head_dim: usize,
    /// Elements with one.
    pub qk_rope_head_dim: usize,
    /// Elements of a value.
    pub v_head_dim: usize,
    /// Added to the mean square in the norms of the two vectors.
    pub norm_eps: f64,
}

impl MlaConfig {
    /// Elements of a query or key: the model's `head_dim`.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim.saturating_add(self.qk_rope_head_dim)
    }

    /// Factor on q.k before softmax where it is not 1 / sqrt(head width): it grows with YaRN's `mscale_all_dim`.
    /// Source: `yarn_apply_mscale` of transformers; Megatron-Core's `MultiLatentAttention` computes the same.
    pub fn attention_scale(&self, rope: &RopeConfig) -> Option<f64> {
        let RopeScaling::Yarn {
            factor,
            mscale_all_dim: Some(all_dim),
            ..
        } = rope.scaling
        else {
            return None;
        };
        if all_dim == 0.0 {
            return None;
        }
        let mscale = if factor > 1.0 {
            0.1 * all_dim * factor.ln() + 1.0
        } else {
            1.0
        };
        let plain = (self.qk_head_dim() as f64).powf(-0.5);
        Some(plain * mscale * mscale)
    }

    pub(super) fn problems(&self, head_dim: usize, problems: &mut Problems) {
        const MAX_WIDTH: usize = 1 << 21;
        for (key, value) in [
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
        ] {
            if value == 0 || value > MAX_WIDTH {
                problems.push(format!("{key} is {value}, expected 1 to {MAX_WIDTH}"));
            }
        }
        if !self.qk_rope_head_dim.is_multiple_of(2) {
            problems.push(format!(
                "qk_rope_head_dim is {}, expected an even number",
                self.qk_rope_head_dim
            ));
        }
        if self.qk_head_dim() != head_dim {
            problems.push(format!(
                "head_dim is {head_dim}, expected qk_nope_head_dim + qk_rope_head_dim = {}",
                self.qk_head_dim()
            ));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            problems.push(format!(
                "the latent norms' eps is {}, expected a finite number of at least 0",
                self.norm_eps
            ));
        }
    }
}
