//! The way into and out of the part of a block that ranks share.

use std::fmt;

use bridge_ops::{Ops, Tape, Var};

use crate::autodiff;
use crate::comm::Group;
use crate::context::ParallelContext;
use crate::groups::Axis;

/// The dimension of `[batch, seq, hidden]` along which sequence parallelism cuts.
pub(crate) const SEQ_DIM: usize = 1;

/// How a block reaches the other ranks of its tensor-parallel group. On one rank it does nothing and costs nothing.
pub struct TensorRegion<B: Ops> {
    /// `None` where the group has one rank.
    group: Option<Group<B>>,
    sequence_parallel: bool,
}

impl<B: Ops> TensorRegion<B> {
    /// The region of one rank.
    pub fn single() -> Self {
        Self {
            group: None,
            sequence_parallel: false,
        }
    }

    /// The tensor-parallel region of a rank.
    pub fn new(ctx: &ParallelContext<B>) -> Self {
        let shared = ctx.layout().tp > 1;
        Self {
            group: shared.then(|| ctx.group(Axis::Tp).clone()),
            sequence_parallel: shared && ctx.layout().sp,
        }
    }

    /// The ranks that share the region, if there are several.
    pub fn group(&self) -> Option<&Group<B>> {
        self.group.as_ref()
    }

    /// Number of ranks that share the region.
    pub fn size(&self) -> usize {
        self.group.as_ref().map_or(1, |group| group.size())
    }

    /// Whether each rank has its own part of the sequence outside the region.
    pub fn is_sequence_parallel(&self) -> bool {
        self.sequence_parallel
    }

    /// The input of a block, whole on every rank. x: [batch, seq or seq / tp, hidden] -> [batch, seq, hidden].
    pub fn enter(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        match &self.group {
            None => x.clone(),
            Some(group) if self.sequence_parallel => autodiff::all_gather(tape, x, group, SEQ_DIM),
            Some(group) => autodiff::copy(tape, x, group),
        }
    }

    /// The output of a block from each rank's contribution. x: [batch, seq, hidden] -> [batch, seq or seq / tp, hidden].
    pub fn leave(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        match &self.group {
            None => x.clone(),
            Some(group) if self.sequence_parallel => {
                autodiff::reduce_scatter(tape, x, group, SEQ_DIM)
            }
            Some(group) => autodiff::reduce(tape, x, group),
        }
    }

    /// The residual stream, whole on every rank, for something that all of them compute alike.
    /// x: [batch, seq or seq / tp, hidden] -> [batch, seq, hidden].
    pub fn whole(&self, tape: &Tape<B>, x: &Var<B>) -> Var<B> {
        match &self.group {
            Some(group) if self.sequence_parallel => autodiff::gather(tape, x, group, SEQ_DIM),
            _ => x.clone(),
        }
    }
}

impl<B: Ops> Clone for TensorRegion<B> {
    fn clone(&self) -> Self {
        Self {
            group: self.group.clone(),
            sequence_parallel: self.sequence_parallel,
        }
    }
}

impl<B: Ops> fmt::Debug for TensorRegion<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorRegion")
            .field("size", &self.size())
            .field("sequence_parallel", &self.sequence_parallel)
            .finish()
    }
}
