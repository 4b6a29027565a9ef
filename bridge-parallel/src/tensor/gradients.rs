//! Completing the gradients of weights that several ranks of a tensor-parallel group hold.

use bridge_ops::{DType, Float, GradReduction, Ops, Param};

use crate::comm::{Group, ReduceOp};
use crate::context::ParallelContext;
use crate::groups::Axis;
use crate::tensors::{narrow, replaced, reshaped, zeros};

/// Sums the gradients of the weights whose [`GradReduction`] says so over the tensor-parallel group, all in one
/// all-reduce. Once a step, after the last backward pass and before gradients are summed over data.
///
/// Every rank of the group calls this with the same weights. Frozen weights have no part in it.
pub fn complete_gradients<B: Ops>(params: &[Param<B>], ctx: &ParallelContext<B>) {
    for (axis, wanted) in [
        (
            Axis::Tp,
            &(|reduction| {
                matches!(
                    reduction,
                    GradReduction::TensorParallel | GradReduction::TensorParallelCopies(_)
                )
            }) as &dyn Fn(GradReduction) -> bool,
        ),
        (
            Axis::Etp,
            &(|reduction| reduction == GradReduction::ExpertTensorParallel),
        ),
    ] {
        let group = ctx.group(axis);
        let incomplete: Vec<(&Param<B>, GradReduction)> = params
            .iter()
            .filter(|param| param.requires_grad())
            .filter_map(|param| Some((param, param.shard()?.reduction)))
            .filter(|(_, reduction)| wanted(*reduction))
            .collect();
        if group.size() > 1 && !incomplete.is_empty() {
            sum(&incomplete, group);
        }
    }
}

fn sum<B: Ops>(params: &[(&Param<B>, GradReduction)], group: &Group<B>) {
    let flat: Vec<Float<B>> = params
        .iter()
        .map(|(param, reduction)| {
            let numel = param.numel();
            let own = match param.take_grad() {
                Some(grad) => reshaped::<B>(grad, &[numel]),
                // Nothing flowed here on this rank, but it may have on another.
                None => zeros::<B>(&[numel], &param.device(), DType::F32),
            };
            let (parts, mine) = parts(*reduction, group);
            if parts == 1 {
                return own;
            }
            let all = zeros::<B>(&[parts * numel], &param.device(), DType::F32);
            replaced::<B>(all, 0, mine * numel..(mine + 1) * numel, own)
        })
        .collect();
    let summed = group.all_reduce(B::float_cat(flat, 0), ReduceOp::Sum);
    let mut start = 0;
    for (param, reduction) in params {
        let numel = param.numel();
        let (parts, mine) = parts(*reduction, group);
        let at = start + mine * numel;
        let grad = narrow::<B>(summed.clone(), 0, at..at + numel);
        param.set_grad(Some(reshaped::<B>(grad, &param.shape())));
        start += parts * numel;
    }
}

/// How many different parts of a weight the group holds, and which of them this rank has. Runs of neighbours that hold
/// copies are no group of their own: each part gets a place of its own in what is summed over all ranks.
fn parts<B: Ops>(reduction: GradReduction, group: &Group<B>) -> (usize, usize) {
    match reduction {
        GradReduction::TensorParallelCopies(copies) => {
            (group.size() / copies, group.rank() / copies)
        }
        _ => (1, 0),
    }
}
