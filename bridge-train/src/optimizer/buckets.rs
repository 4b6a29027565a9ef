//! Weights and their gradients gathered in buckets, each of which travels between the ranks that hold the same weights.

use bridge_ops::{DType, Float, Ops, Param, float_zeros};
use bridge_parallel::{Axis, ParallelContext};
use burn::tensor::{FloatDType, Slice};

use super::adamw::splits;
use super::placement::Placement;

/// Elements that the start of a weight in a bucket is a multiple of, so that its part of a gathered bucket is aligned for
/// any kernel.
const ALIGNMENT: usize = 64;

/// Weights whose gradients travel together: alike in everything that is decided for a whole bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    /// What holds for all of its weights.
    pub(super) kind: BucketKind,
    /// Its weights, in order.
    pub(super) slots: Vec<Slot>,
    /// Elements, a multiple of the number of replicas.
    pub(super) len: usize,
}

/// What holds for all weights of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BucketKind {
    /// The ranks that hold the same elements.
    pub(super) replicas: Axis,
    /// Whether norms count them here.
    pub(super) counts: bool,
    /// Whether weight decay applies.
    pub(super) decayed: bool,
    /// Whether their gradients are complete only after the whole backward pass.
    pub(super) late: bool,
    /// Dtype of the weights.
    pub(super) dtype: DType,
}

/// A weight's place in a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// Which weight.
    pub(super) param: usize,
    /// First element.
    pub(super) offset: usize,
    /// Number of elements.
    pub(super) numel: usize,
}

/// Cuts weights into buckets of about `bucket_size` elements, in the order in which `order` lists them. All ranks of a
/// replica group get the same buckets. Weights that `apart` tells from each other go into different ones.
pub(super) fn plan_buckets<B: Ops, K: PartialEq>(
    params: &[Param<B>],
    placements: &[Placement],
    decayed: &[bool],
    order: &[usize],
    bucket_size: usize,
    apart: impl Fn(usize) -> K,
    parallel: &ParallelContext<B>,
) -> Vec<Bucket> {
    let mut done: Vec<Bucket> = Vec::new();
    let mut open: Vec<(K, Bucket)> = Vec::new();
    for &param in order {
        let placement = &placements[param];
        let kind = BucketKind {
            replicas: placement.replicas,
            counts: placement.counts,
            decayed: decayed[param],
            late: placement.incomplete,
            dtype: params[param].dtype(),
        };
        let key = apart(param);
        let found = (open.iter()).position(|(known, bucket)| bucket.kind == kind && *known == key);
        let index = found.unwrap_or_else(|| {
            let bucket = Bucket {
                kind,
                slots: Vec::new(),
                len: 0,
            };
            open.push((key, bucket));
            open.len() - 1
        });
        let bucket = &mut open[index].1;
        let numel = params[param].numel();
        bucket.slots.push(Slot {
            param,
            offset: bucket.len,
            numel,
        });
        bucket.len += numel.next_multiple_of(ALIGNMENT);
        if bucket.len >= bucket_size {
            done.push(open.remove(index).1);
        }
    }
    done.extend(open.into_iter().map(|(_, bucket)| bucket));
    for bucket in &mut done {
        let replicas = parallel.group(bucket.kind.replicas).size();
        bucket.len = bucket.len.next_multiple_of(ALIGNMENT * replicas);
    }
    done
}

impl Bucket {
    /// The bucket as one fp32 or narrower vector `[len]`, zeros between the weights. `part` gives each weight's elements.
    pub(super) fn join<B: Ops>(
        &self,
        device: &B::Device,
        dtype: DType,
        mut part: impl FnMut(usize) -> Option<Float<B>>,
    ) -> Float<B> {
        let zeros = |len: usize| float_zeros::<B>(&[len], dtype, device);
        let mut parts = Vec::with_capacity(2 * self.slots.len() + 1);
        let mut end = 0;
        for slot in &self.slots {
            if slot.offset > end {
                parts.push(zeros(slot.offset - end));
            }
            parts.push(match part(slot.param) {
                Some(values) => flat::<B>(values, slot.numel),
                None => zeros(slot.numel),
            });
            end = slot.offset + slot.numel;
        }
        if self.len > end {
            parts.push(zeros(self.len - end));
        }
        B::float_cat(parts, 0)
    }

    /// Cuts a vector `[len]` back into the weights' shapes.
    pub(super) fn split<B: Ops>(
        &self,
        joined: &Float<B>,
        params: &[Param<B>],
        mut give: impl FnMut(&Param<B>, Float<B>),
    ) {
        for slot in &self.slots {
            let param = &params[slot.param];
            let values = narrow::<B>(joined.clone(), slot.offset, slot.numel);
            give(param, B::float_reshape(values, param.shape().into()));
        }
    }
}

pub(super) fn flat<B: Ops>(x: Float<B>, numel: usize) -> Float<B> {
    B::float_reshape(x, vec![numel].into())
}

/// fp32 weights as the model computes with them, rounded as [`super::AdamW`] rounds them.
pub(super) fn model_weights<B: Ops>(masters: Float<B>, dtype: DType) -> Float<B> {
    if splits::<B>(dtype) {
        B::split_halves(masters).0
    } else {
        to_dtype::<B>(masters, dtype)
    }
}

/// Elements `start..start + len` of a vector.
pub(super) fn narrow<B: Ops>(x: Float<B>, start: usize, len: usize) -> Float<B> {
    B::float_slice(x, &[Slice::from(start..start + len)])
}

pub(super) fn to_dtype<B: Ops>(x: Float<B>, dtype: DType) -> Float<B> {
    use burn::tensor::TensorMetadata;
    if x.dtype() == dtype {
        x
    } else {
        B::float_cast(x, FloatDType::from(dtype))
    }
}
