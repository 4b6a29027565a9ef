//! What attention computes besides the plain softmax.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

use crate::ops::Ops;
use crate::param::Param;

/// Scale, softcap, and which keys a query sees. Plain data, the same for every backend.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionRule {
    /// Multiplies the scores; `None` is `1 / sqrt(d)`.
    pub scale: Option<f64>,
    /// A query sees no key of a later position.
    pub causal: bool,
    /// A query at position `p` sees only keys whose position is more than `p - window` (and, when not causal, less
    /// than `p + window`).
    pub window: Option<usize>,
    /// Caps the scores to `-cap..cap` by a tanh.
    pub softcap: Option<f64>,
    /// Position of the first query, counted from the first key: not 0 when decoding with a cache, or when these keys
    /// are but a block of all. Queries may lie beyond the last key; one that sees no key at all gets output 0 and the
    /// log-sum-exp of nothing.
    pub q_offset: usize,
    /// How many keys are filled when k and v are a cache with room to spare; `None` is all.
    pub kv_len: Option<usize>,
    /// Packed documents: offsets `[0, l1, l1 + l2, .., batch * span]` into the batch's tokens in row-major order, where a
    /// row spans the positions `0..q_offset + s` from the first key to the last query. A query sees only keys of its own
    /// document; a document does not cross from one row of the batch to the next.
    pub cu_seqlens: Option<Arc<[usize]>>,
}

impl AttentionRule {
    /// The factor of the scores for heads of size `head_dim`.
    pub fn scale_for(&self, head_dim: usize) -> f64 {
        self.scale
            .unwrap_or_else(|| (head_dim as f64).sqrt().recip())
    }

    /// The keys that query `i` of row `b` of the batch sees, a range of `0..kv_len`. `s`: queries per row.
    pub(crate) fn visible(&self, b: usize, i: usize, s: usize, kv_len: usize) -> Range<usize> {
        let position = self.q_offset + i;
        let (mut start, mut end) = (0, kv_len);
        if self.causal {
            end = end.min(position + 1);
        }
        if let Some(window) = self.window {
            start = start.max((position + 1).saturating_sub(window));
            end = end.min(position + window);
        }
        if let Some(offsets) = &self.cu_seqlens {
            let row = b * (self.q_offset + s);
            let next = offsets.partition_point(|&offset| offset <= row + position);
            start = start.max(offsets[next - 1].saturating_sub(row));
            end = end.min(offsets[next] - row);
        }
        start.min(end)..end
    }
}

/// The rule and the sinks of one attention layer.
///
/// Starts as [`causal`](Self::causal) or [`bidirectional`](Self::bidirectional), and is refined by its `with_` methods;
/// the fields of the rule can be read and set directly.
#[derive(Debug, Clone)]
pub struct AttentionSpec<B: Ops> {
    /// Everything but the sinks.
    pub rule: AttentionRule,
    /// A logit per query head, `[heads]`, that takes part in the softmax.
    pub sinks: Option<Param<B>>,
}

impl<B: Ops> AttentionSpec<B> {
    /// Causal attention over all earlier keys, scaled by `1 / sqrt(d)`.
    pub fn causal() -> Self {
        let rule = AttentionRule {
            scale: None,
            causal: true,
            window: None,
            softcap: None,
            q_offset: 0,
            kv_len: None,
            cu_seqlens: None,
        };
        Self { rule, sinks: None }
    }

    /// Attention over all keys, scaled by `1 / sqrt(d)`.
    pub fn bidirectional() -> Self {
        let mut spec = Self::causal();
        spec.causal = false;
        spec
    }

    /// Sets the factor of the scores.
    pub fn with_scale(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Sets the sliding window, in positions; `None` is unlimited.
    pub fn with_window(mut self, window: Option<usize>) -> Self {
        self.window = window;
        self
    }

    /// Sets the cap of the scores.
    pub fn with_softcap(mut self, softcap: Option<f64>) -> Self {
        self.softcap = softcap;
        self
    }

    /// Sets the sinks.
    pub fn with_sinks(mut self, sinks: Option<Param<B>>) -> Self {
        self.sinks = sinks;
        self
    }

    /// Sets the position of the first query among the keys.
    pub fn with_q_offset(mut self, q_offset: usize) -> Self {
        self.q_offset = q_offset;
        self
    }

    /// Sets how many keys are filled.
    pub fn with_kv_len(mut self, kv_len: usize) -> Self {
        self.kv_len = Some(kv_len);
        self
    }

    /// Sets the documents of a packed batch.
    pub fn with_cu_seqlens(mut self, cu_seqlens: Option<Arc<[usize]>>) -> Self {
        self.cu_seqlens = cu_seqlens;
        self
    }
}

impl<B: Ops> Default for AttentionSpec<B> {
    fn default() -> Self {
        Self::causal()
    }
}

impl<B: Ops> Deref for AttentionSpec<B> {
    type Target = AttentionRule;

    fn deref(&self) -> &AttentionRule {
        &self.rule
    }
}

impl<B: Ops> DerefMut for AttentionSpec<B> {
    fn deref_mut(&mut self) -> &mut AttentionRule {
        &mut self.rule
    }
}

/// The sizes of one call, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AttentionDims {
    pub(crate) batch: usize,
    /// Queries per row.
    pub(crate) s: usize,
    /// Keys per row in memory.
    pub(crate) t: usize,
    /// Keys per row that are filled.
    pub(crate) kv_len: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d: usize,
    pub(crate) dv: usize,
}

impl AttentionDims {
    #[track_caller]
    pub(crate) fn check(q: &[usize], k: &[usize], v: &[usize], rule: &AttentionRule) -> Self {
        let (&[batch, s, heads, d], &[kb, t, kv_heads, kd], &[vb, vt, v_heads, dv]) = (q, k, v)
        else {
            panic!("attention: q {q:?}, k {k:?}, v {v:?} must have shapes [batch, seq, heads, d]");
        };
        assert!(
            kb == batch && vb == batch && kd == d && vt == t && v_heads == kv_heads,
            "attention: q {q:?}, k {k:?}, v {v:?} do not fit"
        );
        assert!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "attention: {heads} query heads cannot share {kv_heads} key-value heads equally"
        );
        let kv_len = rule.kv_len.unwrap_or(t);
        assert!(
            kv_len <= t,
            "attention: kv_len {kv_len} exceeds the {t} keys"
        );
        assert!(
            rule.window != Some(0),
            "attention: a window of 0 sees nothing"
        );
        if let Some(offsets) = &rule.cu_seqlens {
            let span = rule.q_offset + s;
            assert!(
                kv_len <= span && t == kv_len,
                "attention: packed documents of {span} positions need at most as many keys ({kv_len} of {t}) and no cache"
            );
            let rows_kept = (0..=batch).all(|row| offsets.binary_search(&(row * span)).is_ok());
            assert!(
                offsets.is_sorted()
                    && offsets.first() == Some(&0)
                    && offsets.last() == Some(&(batch * span))
                    && rows_kept,
                "attention: cu_seqlens {offsets:?} must rise from 0 to {batch} * {span} and hold every multiple of {span}"
            );
        }
        Self {
            batch,
            s,
            t,
            kv_len,
            heads,
            kv_heads,
            d,
            dv,
        }
    }

    /// Query heads per key-value head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}
