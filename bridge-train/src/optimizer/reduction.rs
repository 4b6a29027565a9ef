//! The sums of one step's gradients over the ranks that hold the same weights, under way while the backward pass goes on.

use std::collections::VecDeque;

use bridge_ops::{DType, Float, GradReduction, Ops, Param, float_zeros};
use bridge_parallel::{Axis, ParallelContext, Pending, ReduceOp};

use super::buckets::{Bucket, narrow, to_dtype};
use super::placement::Placement;
use super::weights::{Parts, Weights};
use crate::engine::SegmentHooks;

/// What each rank gets of a summed bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share {
    /// All of it.
    Whole,
    /// An equal part, in the order of ranks.
    Part,
    /// An equal part, and nobody keeps the rest: a bucket is summed after every backward pass that adds to it.
    PartOfEach,
}

/// The sums of one step's gradients, under way.
pub struct Reduction<'a, B: Ops> {
    pub(super) params: &'a [Param<B>],
    pub(super) placements: &'a [Placement],
    pub(super) buckets: &'a [Bucket],
    /// By segment, the weights that it uses.
    pub(super) segments: &'a [Vec<usize>],
    pub(super) parallel: &'a ParallelContext<B>,
    /// Brings the weights that segments run with, where they are not always here.
    pub(super) weights: Option<(&'a Weights<B>, Parts<'a, B>)>,
    pub(super) share: Share,
    /// Whether sums start as soon as a bucket is full.
    pub(super) overlap: bool,
    /// By weight: segments whose backward pass is still to come.
    pub(super) uses_left: Vec<usize>,
    /// By bucket: weights whose gradients are still to come.
    pub(super) missing: Vec<usize>,
    pub(super) started: Vec<Option<Pending<B>>>,
    /// Sums of single passes on their way, with their buckets.
    pub(super) passes: VecDeque<(usize, Pending<B>)>,
    /// By bucket: what such sums come to.
    pub(super) sums: Vec<Option<Float<B>>>,
}

impl<B: Ops> SegmentHooks for Reduction<'_, B> {
    fn before_pass(&mut self, segment: usize, next: Option<usize>) {
        if let Some((weights, parts)) = self.weights {
            weights.before_pass(parts, segment, next);
        }
    }

    fn forward_done(&mut self, segment: usize, next: Option<usize>) {
        if let Some((weights, parts)) = self.weights {
            weights.after_pass(parts, segment, next);
        }
    }

    fn backward_done(&mut self, segment: usize, last: bool, next: Option<usize>) {
        if self.share == Share::PartOfEach {
            self.sum_pass(segment);
        } else if last {
            self.segment_done(segment);
        }
        if let Some((weights, parts)) = self.weights {
            weights.after_pass(parts, segment, next);
        }
    }
}

impl<B: Ops> Reduction<'_, B> {
    /// A segment's backward pass is over for the last micro-batch. Whoever passes the reduction to the engine as its hooks
    /// need not tell.
    pub fn segment_done(&mut self, segment: usize) {
        if !self.overlap {
            return;
        }
        let segments = self.segments;
        for &param in segments.get(segment).into_iter().flatten() {
            self.uses_left[param] -= 1;
            if self.uses_left[param] > 0 {
                continue;
            }
            let bucket = self
                .buckets
                .iter()
                .position(|bucket| bucket.slots.iter().any(|slot| slot.param == param));
            let Some(bucket) = bucket else { continue };
            self.missing[bucket] -= 1;
            if self.missing[bucket] == 0 && !self.buckets[bucket].kind.late {
                self.started[bucket] = Some(self.start(bucket));
            }
        }
    }

    fn start(&self, index: usize) -> Pending<B> {
        let bucket = &self.buckets[index];
        let joined = bucket.join::<B>(self.parallel.device(), DType::F32, |param| {
            let grad = self.params[param].take_grad();
            grad.map(|grad| to_dtype::<B>(grad, DType::F32))
        });
        let group = self.parallel.group(bucket.kind.replicas);
        match self.share {
            Share::Whole => group.start_all_reduce(joined, ReduceOp::Sum),
            Share::Part | Share::PartOfEach => group.start_reduce_scatter(joined, 0),
        }
    }

    /// Sums what one backward pass of a segment has left. Every rank of a bucket's group runs the same passes.
    fn sum_pass(&mut self, segment: usize) {
        let Some((weights, _)) = self.weights else {
            return;
        };
        let buckets = weights.of_segment(segment);
        // While this segment's gradients travel the next one works; those before it have arrived.
        while self.passes.len() >= buckets.len().max(1) {
            self.take_pass();
        }
        for &bucket in buckets {
            let pending = self.start(bucket);
            self.passes.push_back((bucket, pending));
            if !self.overlap {
                self.take_pass();
            }
        }
    }

    fn take_pass(&mut self) {
        let Some((bucket, pending)) = self.passes.pop_front() else {
            return;
        };
        let own = pending.wait();
        self.sums[bucket] = Some(match self.sums[bucket].take() {
            None => own,
            Some(earlier) => B::add(earlier, own),
        });
    }

    /// Starts what has not been started and waits for everything. Returns each bucket's sum, or this rank's part of it.
    pub(super) fn finish(mut self) -> Vec<Float<B>> {
        if self.share == Share::PartOfEach {
            return self.finish_passes();
        }
        for index in 0..self.buckets.len() {
            if self.started[index].is_none() {
                self.started[index] = Some(self.start(index));
            }
        }
        self.started
            .into_iter()
            .map(|pending| pending.expect("every bucket was started").wait())
            .collect()
    }

    /// This rank's parts of the sums, completed where tensor-parallel ranks or another stage have the same weights.
    fn finish_passes(mut self) -> Vec<Float<B>> {
        while !self.passes.is_empty() {
            self.take_pass();
        }
        let sums = std::mem::take(&mut self.sums);
        let complete = |(bucket, sum): (&Bucket, Option<Float<B>>)| {
            let share = bucket.len / self.parallel.group(bucket.kind.replicas).size();
            let device = self.parallel.device();
            let sum = sum.unwrap_or_else(|| float_zeros::<B>(&[share], DType::F32, device));
            self.completed(bucket, sum)
        };
        self.buckets.iter().zip(sums).map(complete).collect()
    }

    /// All ranks of a tensor-parallel group, and both stages that hold a tied embedding, cut their buckets alike: the same
    /// elements are in the same part.
    fn completed(&self, bucket: &Bucket, sum: Float<B>) -> Float<B> {
        let Some(first) = bucket.slots.first() else {
            return sum;
        };
        let reduction = self.params[first.param]
            .shard()
            .map_or(GradReduction::None, |s| s.reduction);
        let over =
            |axis: Axis, sum: Float<B>| self.parallel.group(axis).all_reduce(sum, ReduceOp::Sum);
        let sum = match reduction {
            GradReduction::None | GradReduction::Expert => sum,
            GradReduction::TensorParallel => over(Axis::Tp, sum),
            GradReduction::ExpertTensorParallel => over(Axis::Etp, sum),
            GradReduction::TensorParallelCopies(copies) => {
                // Runs of neighbours are no group of their own: each has its place in a sum over all ranks.
                let group = self.parallel.group(Axis::Tp);
                let (parts, mine) = (group.size() / copies, group.rank() / copies);
                let share = bucket.len / self.parallel.group(bucket.kind.replicas).size();
                let zeros = |parts: usize| {
                    float_zeros::<B>(&[parts * share], DType::F32, self.parallel.device())
                };
                let mut all = Vec::with_capacity(3);
                if mine > 0 {
                    all.push(zeros(mine));
                }
                all.push(sum);
                if mine + 1 < parts {
                    all.push(zeros(parts - mine - 1));
                }
                let summed = over(Axis::Tp, B::float_cat(all, 0));
                narrow::<B>(summed, mine * share, share)
            }
        };
        if self.placements[first.param].tied_across_stages {
            over(Axis::Embedding, sum)
        } else {
            sum
        }
    }
}
