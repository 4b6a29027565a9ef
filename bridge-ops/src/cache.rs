//! The keys and values of positions already seen, for generation.
//!
//! A cache is two tensors `[batch, capacity, kv_heads, head_dim]` allocated once. Appending writes the new positions in
//! place, and attention reads the whole tensors with [`AttentionRule::kv_len`](crate::AttentionRule) saying how much of
//! them is filled, so nothing is copied from step to step:
//!
//! ```
//! use bridge_ops::{AttentionSpec, KvCache, Tape, attention, float_zeros, DType};
//! use burn_flex::Flex;
//!
//! let device = Default::default();
//! let tape = Tape::<Flex>::inference();
//! let mut cache = KvCache::<Flex>::new();
//! let token = |heads: usize| tape.constant(float_zeros::<Flex>(&[1, 1, heads, 16], DType::F32, &device));
//! for position in 0..3 {
//!     let (q, k, v) = (token(6), token(2), token(2));
//!     let (k, v) = cache.append(&tape, k, v, 64); // views of the cache: [1, 64, 2, 16]
//!     let spec = AttentionSpec::causal().with_q_offset(position).with_kv_len(cache.len());
//!     let out = attention(&tape, &q, &k, &v, &spec);
//!     assert_eq!(out.shape(), [1, 1, 6, 16]);
//! }
//! assert_eq!(cache.len(), 3);
//! ```

use burn_backend::TensorMetadata;

use crate::data::float_zeros;
use crate::ops::Ops;
use crate::primitive::{Float, dims};
use crate::shape::slices_along;
use crate::tape::{Tape, Var};

/// Keys and values of one attention layer. See the module documentation.
#[derive(Debug, Clone)]
pub struct KvCache<B: Ops> {
    /// Keys and values: [batch, capacity, kv_heads, head_dim].
    tensors: Option<(Float<B>, Float<B>)>,
    len: usize,
}

impl<B: Ops> KvCache<B> {
    /// An empty cache; memory is allocated at the first append.
    pub fn new() -> Self {
        Self {
            tensors: None,
            len: 0,
        }
    }

    /// The number of positions filled.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was appended yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of positions there is memory for.
    pub fn capacity(&self) -> usize {
        self.tensors.as_ref().map_or(0, |(k, _)| dims(k)[1])
    }

    /// Forgets positions from `len` on, keeping the memory.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Writes the keys and values of new positions, k: [batch, s, kv_heads, d], v: [batch, s, kv_heads, dv], after
    /// those in the cache, and returns the whole cache `[batch, capacity, ..]` for attention, to be used with
    /// `kv_len = cache.len()` and `q_offset = cache.len() - s`.
    ///
    /// The first append allocates `capacity` positions. A cache that is full grows to twice its size, which copies it
    /// once. Drop the returned views before the next append: while one is alive, appending has to copy.
    ///
    /// # Panics
    /// When the tape records (there is no gradient through a cache), or the shapes do not fit those before.
    #[track_caller]
    pub fn append(
        &mut self,
        tape: &Tape<B>,
        k: Var<B>,
        v: Var<B>,
        capacity: usize,
    ) -> (Var<B>, Var<B>) {
        assert!(
            !tape.is_recording(),
            "a key-value cache has no gradient; use an inference tape"
        );
        let added = k.shape()[1];
        let (keys, values) = self.tensors.take().map_or_else(
            || {
                let capacity = capacity.max(added);
                (
                    allocated::<B>(&k.value(), capacity),
                    allocated::<B>(&v.value(), capacity),
                )
            },
            |(keys, values)| (self.grown(keys, added), self.grown(values, added)),
        );
        let keys = self.written(keys, k.into_value());
        let values = self.written(values, v.into_value());
        self.len += added;
        self.tensors = Some((keys.clone(), values.clone()));
        (tape.constant(keys), tape.constant(values))
    }

    fn grown(&self, cache: Float<B>, added: usize) -> Float<B> {
        let capacity = dims(&cache)[1];
        if self.len + added <= capacity {
            return cache;
        }
        let larger = allocated::<B>(&cache, (2 * capacity).max(self.len + added));
        let filled = B::float_slice(cache, &slices_along(4, 1, 0..self.len.max(1)));
        B::cache_write(larger, filled, 0)
    }

    #[track_caller]
    fn written(&self, cache: Float<B>, x: Float<B>) -> Float<B> {
        let (c, s) = (dims(&cache), dims(&x));
        assert!(
            s.len() == 4 && s[0] == c[0] && s[2..] == c[2..] && cache.dtype() == x.dtype(),
            "a cache of shape {c:?} ({:?}) cannot take positions of shape {s:?} ({:?})",
            cache.dtype(),
            x.dtype()
        );
        B::cache_write(cache, x, self.len)
    }
}

impl<B: Ops> Default for KvCache<B> {
    fn default() -> Self {
        Self::new()
    }
}

fn allocated<B: Ops>(like: &Float<B>, capacity: usize) -> Float<B> {
    let mut shape = dims(like);
    shape[1] = capacity;
    float_zeros::<B>(&shape, like.dtype(), &B::float_device(like))
}

pub(crate) fn portable_write<B: Ops>(cache: Float<B>, x: Float<B>, start: usize) -> Float<B> {
    let end = start + dims(&x)[1];
    B::float_slice_assign(cache, &slices_along(4, 1, start..end), x)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{assert_close, assert_fast, random};
    use crate::to_f32_vec;

    fn part(x: &Float<Flex>, range: std::ops::Range<usize>) -> Float<Flex> {
        Flex::float_slice(x.clone(), &slices_along(4, 1, range))
    }

    use burn_backend::ops::FloatTensorOps;

    #[test]
    fn appends_in_place_and_grows() {
        let (k, v) = (random(&[2, 9, 3, 4], 1), random(&[2, 9, 3, 5], 2));
        let tape = Tape::<Flex>::inference();
        let mut cache = KvCache::new();
        let mut address = None;
        // Six positions at first, then one at a time; the capacity of eight is exceeded at the last.
        for range in [0..6, 6..7, 7..8, 8..9] {
            let (new_k, new_v) = (
                tape.constant(part(&k, range.clone())),
                tape.constant(part(&v, range.clone())),
            );
            let (keys, _) = cache.append(&tape, new_k, new_v, 8);
            assert_fast(&["cache_write"]);
            if range.end <= 8 {
                let at = keys.value().bytes().as_ptr();
                assert_eq!(
                    *address.get_or_insert(at),
                    at,
                    "positions {range:?} were written in place"
                );
            }
        }
        assert_eq!(
            (cache.len(), cache.capacity(), cache.is_empty()),
            (9, 16, false)
        );
        let (keys, values) = cache.tensors.clone().unwrap();
        assert_close("keys", &part(&keys, 0..9), &k, 0.0);
        assert_close("values", &part(&values, 0..9), &v, 0.0);
    }

    #[test]
    fn a_view_that_is_alive_keeps_its_content() {
        let tape = Tape::<Flex>::inference();
        let token = |seed| tape.constant(random(&[1, 1, 2, 4], seed));
        let mut cache = KvCache::new();
        let (before, _) = cache.append(&tape, token(1), token(2), 4);
        let content = to_f32_vec::<Flex>(before.value());
        cache.append(&tape, token(3), token(4), 4);
        assert_eq!(to_f32_vec::<Flex>(before.value()), content);
    }

    #[test]
    fn positions_can_be_taken_back() {
        let tape = Tape::<Flex>::inference();
        let token = |seed| tape.constant(random(&[1, 1, 2, 4], seed));
        let mut cache = KvCache::new();
        cache.append(&tape, token(1), token(2), 4);
        cache.append(&tape, token(3), token(4), 4);
        cache.truncate(1);
        let (keys, _) = cache.append(&tape, token(5), token(6), 4);
        assert_close(
            "second key",
            &part(&keys.value(), 1..2),
            &random(&[1, 1, 2, 4], 5),
            0.0,
        );
    }
}
