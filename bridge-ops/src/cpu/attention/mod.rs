//! Attention in tiles. Maths: `attention/mod.rs`; scheme: Dao 2023, "FlashAttention-2".
//!
//! Keys and values are packed once, in blocks of [`KEYS`]. A job takes one key-value head and a run of queries; the
//! heads that share the key-value head are stacked as further rows, so each block of keys serves all of them. The score
//! matrix exists only as one tile per job. Tensors stay `[batch, seq, heads, d]` throughout: rows are gathered and
//! results scattered, never transposed.
//!
//! A few queries over a cache (generation) take another way, without packing: see [`decode`].

mod backward;
mod decode;
mod forward;

use std::ops::Range;

use burn_flex::{Flex, FlexTensor};

use super::fast_path;
use super::linear::widened;
use super::pool::Buffer;
use super::storage::{contiguous_f32, values};
use crate::attention::{AttentionDims, AttentionGrads, AttentionOutput, AttentionRule};
use crate::primitive::dims;

/// Keys per block.
const KEYS: usize = 128;

/// `None` when the dtypes are not covered.
pub(super) fn attention(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    sinks: Option<&FlexTensor>,
    rule: &AttentionRule,
) -> Option<AttentionOutput<Flex>> {
    let (q, k, v) = (contiguous_f32(q)?, contiguous_f32(k)?, contiguous_f32(v)?);
    let sinks = match sinks {
        Some(sinks) => Some(widened(sinks)?),
        None => None,
    };
    let problem = Problem::new(&q, &k, &v, sinks, rule);
    if decode::suits(&problem.dims) {
        fast_path::took("attention_decode");
        Some(decode::run(&problem))
    } else {
        fast_path::took("attention_forward");
        Some(forward::run(&problem))
    }
}

/// `None` when the dtypes are not covered.
pub(super) fn attention_backward(
    q: &FlexTensor,
    k: &FlexTensor,
    v: &FlexTensor,
    sinks: Option<&FlexTensor>,
    output: &AttentionOutput<Flex>,
    dout: &FlexTensor,
    rule: &AttentionRule,
) -> Option<AttentionGrads<Flex>> {
    let (q, k, v) = (contiguous_f32(q)?, contiguous_f32(k)?, contiguous_f32(v)?);
    let (out, lse, dout) = (
        contiguous_f32(&output.output)?,
        contiguous_f32(&output.lse)?,
        contiguous_f32(dout)?,
    );
    let sinks = match sinks {
        Some(sinks) => Some(widened(sinks)?),
        None => None,
    };
    fast_path::took("attention_backward");
    let problem = Problem::new(&q, &k, &v, sinks, rule);
    Some(backward::run(
        &problem,
        values(&out),
        values(&lse),
        values(&dout),
    ))
}

/// The inputs of one call.
struct Problem<'a> {
    dims: AttentionDims,
    rule: &'a AttentionRule,
    scale: f32,
    softcap: Option<f32>,
    /// [batch, s, heads, d]
    q: &'a [f32],
    /// [batch, t, kv_heads, d]
    k: &'a [f32],
    /// [batch, t, kv_heads, dv]
    v: &'a [f32],
    /// `[heads]`
    sinks: Option<Vec<f32>>,
}

impl<'a> Problem<'a> {
    fn new(
        q: &'a FlexTensor,
        k: &'a FlexTensor,
        v: &'a FlexTensor,
        sinks: Option<Vec<f32>>,
        rule: &'a AttentionRule,
    ) -> Self {
        let dims = AttentionDims::check(&dims(q), &dims(k), &dims(v), rule);
        Self {
            dims,
            rule,
            scale: rule.scale_for(dims.d) as f32,
            softcap: rule.softcap.map(|cap| cap as f32),
            q: values(q),
            k: values(k),
            v: values(v),
            sinks,
        }
    }

    /// The keys that at least one of the queries sees.
    fn visible_to(&self, b: usize, queries: Range<usize>) -> Range<usize> {
        let AttentionDims { s, kv_len, .. } = self.dims;
        let each = queries
            .map(|i| self.rule.visible(b, i, s, kv_len))
            .filter(|keys| !keys.is_empty());
        each.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))
            .unwrap_or(0..0)
    }

    /// Where the vector of query head `head` of token (b, i) starts in a tensor whose vectors are `width` long.
    fn query_index(&self, b: usize, i: usize, head: usize, width: usize) -> usize {
        ((b * self.dims.s + i) * self.dims.heads + head) * width
    }

    /// As [`query_index`](Self::query_index) for key-value heads.
    fn key_index(&self, b: usize, j: usize, kv_head: usize, width: usize) -> usize {
        ((b * self.dims.t + j) * self.dims.kv_heads + kv_head) * width
    }

    /// Where a row's log-sum-exp is: [batch, heads, s].
    fn lse_index(&self, b: usize, i: usize, head: usize) -> usize {
        (b * self.dims.heads + head) * self.dims.s + i
    }

    /// Calls `f(row, i, head)` for the stacked rows of some queries and the heads of a group.
    fn for_rows(
        &self,
        queries: Range<usize>,
        kv_head: usize,
        mut f: impl FnMut(usize, usize, usize),
    ) {
        let group = self.dims.group();
        for (n, i) in queries.enumerate() {
            for g in 0..group {
                f(n * group + g, i, kv_head * group + g);
            }
        }
    }
}

/// A block of keys, as far as it is used.
struct KeyBlock {
    number: usize,
    /// First key of the block.
    first: usize,
    /// Keys of the block that are packed.
    packed: usize,
    /// Keys of the block up to the last one that is seen.
    len: usize,
}

/// The blocks that hold `keys`.
fn key_blocks(keys: Range<usize>, kv_len: usize) -> impl Iterator<Item = KeyBlock> {
    (keys.start / KEYS..keys.end.div_ceil(KEYS)).map(move |number| {
        let first = number * KEYS;
        let len = KEYS.min(keys.end - first);
        KeyBlock {
            number,
            first,
            packed: KEYS.min(kv_len - first),
            len,
        }
    })
}

impl KeyBlock {
    /// The columns of this block that `keys` takes up.
    fn columns(&self, keys: &Range<usize>) -> Range<usize> {
        let column = |key: usize| key.clamp(self.first, self.first + self.len) - self.first;
        column(keys.start).min(column(keys.end))..column(keys.end)
    }
}

/// Lends parts of one buffer.
struct Scratch {
    buffer: Buffer,
}

impl Scratch {
    fn new(lens: &[usize]) -> Self {
        Self {
            buffer: Buffer::new(lens.iter().sum::<usize>().max(1) * size_of::<f32>()),
        }
    }

    fn split<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let mut rest = self.buffer.as_f32_mut();
        lens.map(|len| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            part
        })
    }
}
