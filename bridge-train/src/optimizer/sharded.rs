//! AdamW whose state is divided among the ranks that hold the same weights (ZeRO-1; Rajbhandari et al. 2020). Each rank
//! keeps fp32 weights and moments of its part of every bucket, updates them from its part of the summed gradients, and
//! all gather the new weights.

use bridge_ops::{AdamWStep, DType, Float, Ops, Param, float_zeros, to_f32_vec};
use bridge_parallel::ParallelContext;
use burn::tensor::TensorMetadata;

use super::buckets::{Bucket, flat, narrow, to_dtype};

/// This rank's part of a bucket, with its state; all `[len / replicas]` and fp32, except for the mean of gradients.
pub(super) struct BucketState<B: Ops> {
    weight: Option<Float<B>>,
    moments: Option<(Float<B>, Float<B>)>,
}

/// A stretch of a weight whose state this rank keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    /// Which weight.
    pub(super) param: usize,
    /// First of its elements here, in row-major order.
    pub(super) start: usize,
    /// One past the last.
    pub(super) end: usize,
    /// Where it begins in the rank's part of the bucket.
    pub(super) at: usize,
}

/// The part of `bucket` that rank `rank` of `replicas` keeps, weight by weight.
pub(super) fn stretches(bucket: &Bucket, replicas: usize, rank: usize) -> Vec<Stretch> {
    let share = bucket.len / replicas;
    let (first, end) = (rank * share, (rank + 1) * share);
    let overlap = |slot: &super::buckets::Slot| {
        let start = slot.offset.max(first);
        let end = (slot.offset + slot.numel).min(end);
        (start < end).then(|| Stretch {
            param: slot.param,
            start: start - slot.offset,
            end: end - slot.offset,
            at: start - first,
        })
    };
    bucket.slots.iter().filter_map(overlap).collect()
}

impl<B: Ops> BucketState<B> {
    /// The state of fresh weights.
    pub(super) fn new(
        bucket: &Bucket,
        params: &[Param<B>],
        parallel: &ParallelContext<B>,
        exp_avg_dtype: DType,
    ) -> Self {
        let group = parallel.group(bucket.kind.replicas);
        let share = bucket.len / group.size();
        let device = parallel.device();
        let mut parts = Vec::new();
        let mut end = 0;
        for s in stretches(bucket, group.size(), group.rank()) {
            if s.at > end {
                parts.push(float_zeros::<B>(&[s.at - end], DType::F32, device));
            }
            let param = &params[s.param];
            let whole = flat::<B>(param.value(), param.numel());
            let own = narrow::<B>(whole, s.start, s.end - s.start);
            parts.push(to_dtype::<B>(own, DType::F32));
            end = s.at + s.end - s.start;
        }
        if end < share {
            parts.push(float_zeros::<B>(&[share - end], DType::F32, device));
        }
        let zeros = |dtype| float_zeros::<B>(&[share], dtype, device);
        Self {
            // A product with one is a buffer of its own, also where the part is a view of a whole weight.
            weight: Some(B::scale(B::float_cat(parts, 0), 1.0)),
            moments: Some((zeros(exp_avg_dtype), zeros(DType::F32))),
        }
    }

    /// One update. grad: as the state.
    pub(super) fn update(&mut self, grad: Float<B>, step: &AdamWStep) {
        // Moved out and back, so that the kernel owns its buffers and can work in place.
        let (m, v) = self
            .moments
            .take()
            .expect("moments are back after an update");
        let weight = self
            .weight
            .take()
            .expect("weights are back after an update");
        let (weight, m, v) = B::adamw_step(weight, grad, m, v, step);
        self.moments = Some((m, v));
        self.weight = Some(weight);
    }

    /// The fp32 weights, the mean of gradients and that of their squares, as they are kept; share the buffers.
    pub(super) fn parts(&self) -> [Float<B>; 3] {
        let (m, v) = self
            .moments
            .as_ref()
            .expect("moments are back after an update");
        let weight = self
            .weight
            .as_ref()
            .expect("weights are back after an update");
        [weight.clone(), m.clone(), v.clone()]
    }

    /// Restores what [`parts`](Self::parts) gives.
    pub(super) fn set_parts(&mut self, [weight, m, v]: [Float<B>; 3]) {
        let [_, m_now, v_now] = self.parts();
        self.weight = Some(weight);
        self.moments = Some((
            to_dtype::<B>(m, m_now.dtype()),
            to_dtype::<B>(v, v_now.dtype()),
        ));
    }
}

/// The names of weights whose stretch of a summed gradient holds a NaN or an infinity.
pub(super) fn non_finite<B: Ops>(
    grad: &Float<B>,
    stretches: &[Stretch],
    params: &[Param<B>],
) -> Vec<String> {
    let values = to_f32_vec::<B>(grad.clone());
    stretches
        .iter()
        .filter(|s| {
            values[s.at..s.at + s.end - s.start]
                .iter()
                .any(|x| !x.is_finite())
        })
        .map(|s| params[s.param].name().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use bridge_parallel::Axis;

    use super::*;
    use crate::optimizer::buckets::{BucketKind, Slot};

    #[test]
    fn stretches_of_all_ranks_cover_every_weight_once() {
        let kind = BucketKind {
            replicas: Axis::DpCp,
            counts: true,
            decayed: true,
            late: false,
            dtype: DType::F32,
        };
        let slot = |param, offset, numel| Slot {
            param,
            offset,
            numel,
        };
        let bucket = Bucket {
            kind,
            slots: vec![slot(0, 0, 100), slot(1, 128, 7), slot(2, 192, 300)],
            len: 768,
        };
        for replicas in [1, 2, 3, 4] {
            let mut found = [0, 0, 0];
            for rank in 0..replicas {
                for stretch in stretches(&bucket, replicas, rank) {
                    // In order, without gaps.
                    assert_eq!(stretch.start, found[stretch.param]);
                    assert!(stretch.at + stretch.end - stretch.start <= bucket.len / replicas);
                    found[stretch.param] = stretch.end;
                }
            }
            assert_eq!(found, [100, 7, 300]);
        }
    }
}
