//! A limit on how many tokens an expert takes.
//!
//! ```text
//! capacity = ceil(factor tokens k / E)
//! ```
//!
//! Assignments beyond it are dropped: the token goes on without that expert, its other weights unchanged. Without a limit
//! ("dropless") no token loses an expert, and the experts' products are as uneven as the routing. Sources: GShard
//! (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).

use burn::tensor::{IndexingUpdateOp, Int as IntKind, Tensor};
use burn_backend::DType;

use super::permute::SortedExperts;
use crate::ops::Ops;
use crate::primitive::{Float, Int, dims, reshaped, tensor, to_dtype};

/// Which assignments stay when an expert has too many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropPolicy {
    /// The first ones, in the order of the tokens.
    Position,
    /// Those with the largest weights.
    Weight,
}

/// Most tokens that an expert takes of `tokens` with `top_k` experts each: `factor` times its equal share, rounded up.
pub fn expert_capacity(factor: f64, tokens: usize, top_k: usize, num_experts: usize) -> usize {
    (factor * (tokens * top_k) as f64 / num_experts.max(1) as f64).ceil() as usize
}

/// The assignments with `num_experts` (no expert) in the place of those beyond `capacity`. experts, weights: [tokens, k].
/// Equal weights stay in the order of the tokens. Nothing is read on the host.
pub fn drop_over_capacity<B: Ops>(
    experts: Int<B>,
    weights: Float<B>,
    num_experts: usize,
    capacity: usize,
    policy: DropPolicy,
) -> Int<B> {
    let shape: [usize; 2] = dims(&experts).try_into().expect("a matrix of experts");
    let count = shape[0] * shape[1];
    if count == 0 {
        return experts;
    }
    let experts = Tensor::<B, 2, IntKind>::from_primitive(experts).reshape([count]);
    // Assignments in the order in which they are taken, and which ones these are.
    let (in_turn, at) = match policy {
        DropPolicy::Position => (experts.clone(), None),
        DropPolicy::Weight => {
            let at = by_weight::<B>(tensor(reshaped::<B>(weights, &[count])));
            (experts.clone().select(0, at.clone()), Some(at))
        }
    };
    // The sort keeps that order within an expert, so an assignment's rank is its distance from the expert's first.
    let SortedExperts {
        inverse, offsets, ..
    } = sort::<B>(in_turn.clone(), num_experts);
    let inverse = Tensor::<B, 2, IntKind>::from_primitive(inverse).reshape([count]);
    let offsets = Tensor::<B, 1, IntKind>::from_primitive(offsets);
    let none = num_experts as i64;
    let first = offsets.select(0, in_turn.clone().clamp(0, none));
    let over = (inverse - first)
        .greater_equal_elem(i64::try_from(capacity.min(count)).unwrap_or(i64::MAX))
        .bool_and(in_turn.clone().greater_equal_elem(0))
        .bool_and(in_turn.clone().lower_elem(none));
    let kept = in_turn.clone().mask_fill(over, none);
    let kept = match at {
        None => kept,
        Some(at) => experts.select_assign(0, at, kept - in_turn, IndexingUpdateOp::Add),
    };
    kept.reshape(shape).into_primitive()
}

/// The stable counting sort of numbers: `[n]`.
fn sort<B: Ops>(numbers: Tensor<B, 1, IntKind>, buckets: usize) -> SortedExperts<B> {
    let count = numbers.dims()[0];
    B::sort_by_expert(numbers.reshape([count, 1]).into_primitive(), buckets)
}

/// Positions by falling weight, equal weights in their order: `[n]` -> `[n]`.
///
/// Backends' sorts need not keep the order of equals. So theirs only tells how many different weights are larger than each
/// one, and counting sorts, which do keep it, go by the digits of that number.
fn by_weight<B: Ops>(weights: Tensor<B, 1>) -> Tensor<B, 1, IntKind> {
    const RADIX: usize = 1024;
    let [count] = weights.dims();
    let weights = tensor::<B, 1>(to_dtype::<B>(weights.into_primitive().tensor(), DType::F32));
    // What is no weight at all ties with zero.
    let (sorted, at) = weights.clamp_min(0.0).sort_descending_with_indices(0);
    let device = sorted.device();
    if count < 2 {
        return Tensor::zeros([count], &device);
    }
    let [before, after] = [0..count - 1, 1..count].map(|range| sorted.clone().slice([range]));
    let smaller = Tensor::cat(
        vec![Tensor::zeros([1], &device), after.lower(before).int()],
        0,
    );
    let rank = Tensor::<B, 1, IntKind>::zeros([count], &device).select_assign(
        0,
        at,
        smaller.cumsum(0),
        IndexingUpdateOp::Add,
    );
    let mut order: Option<Tensor<B, 1, IntKind>> = None;
    let mut unit = 1;
    while unit < count {
        let digit = (rank.clone() / unit as i64).remainder_scalar(RADIX as i64);
        let digit = match &order {
            None => digit,
            Some(order) => digit.select(0, order.clone()),
        };
        let next = Tensor::from_primitive(sort::<B>(digit, RADIX).order);
        order = Some(match order {
            None => next,
            Some(order) => order.select(0, next),
        });
        unit *= RADIX;
    }
    order.expect("more than one position has a digit")
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{DEVICE, numbers};
    use crate::{float_from_f32, int_from_i64, to_i64_vec};

    #[test]
    fn what_is_beyond_an_experts_capacity_is_dropped() {
        let ids = [0, 1, 0, 2, 0, 1, 3, 0];
        let weights = [0.1, 0.9, 0.4, 0.6, 0.3, 0.7, 0.5, 0.5];
        let dropped = |capacity, policy| {
            let ids = int_from_i64::<Flex>(&ids, &[4, 2], &DEVICE);
            let weights = float_from_f32::<Flex>(&weights, &[4, 2], &DEVICE);
            let kept = drop_over_capacity::<Flex>(ids, weights, 3, capacity, policy);
            assert_eq!(dims(&kept), [4, 2]);
            to_i64_vec::<Flex>(kept)
        };
        // 3 was no expert to begin with.
        let position = dropped(2, DropPolicy::Position);
        assert_eq!(position, [0, 1, 0, 2, 3, 1, 3, 3]);
        assert_eq!(dropped(2, DropPolicy::Weight), [3, 1, 0, 2, 3, 1, 3, 0]);
        assert_eq!(dropped(4, DropPolicy::Weight), ids);
        assert_eq!(dropped(0, DropPolicy::Position), [3; 8]);
        assert_eq!(expert_capacity(1.0, 4, 2, 3), 3);
        assert_eq!(expert_capacity(1.25, 4096, 8, 128), 320);
    }

    /// The definition, one assignment after the other.
    fn plain(
        ids: &[i64],
        weights: &[f32],
        experts: usize,
        capacity: usize,
        policy: DropPolicy,
    ) -> Vec<i64> {
        let mut order: Vec<usize> = (0..ids.len()).collect();
        if policy == DropPolicy::Weight {
            order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
        }
        let (mut taken, mut kept) = (vec![0; experts], ids.to_vec());
        for at in order {
            let expert = ids[at] as usize;
            if expert < experts {
                taken[expert] += 1;
                if taken[expert] > capacity {
                    kept[at] = experts as i64;
                }
            }
        }
        kept
    }

    #[test]
    fn any_number_of_assignments_is_dropped_as_one_by_one() {
        // Numbers of assignments on both sides of a digit of the sort; weights that are all different, and few different ones.
        for (tokens, k, experts, capacity) in [
            (1, 1, 1, 0),
            (2, 1, 2, 1),
            (341, 3, 7, 100),
            (683, 3, 40, 50),
            (900, 2, 3, 5000),
        ] {
            let count = tokens * k;
            let random = numbers(count, 3);
            let ids: Vec<i64> = random
                .iter()
                .map(|x| (x.abs() * 1e5) as i64 % (experts + 1))
                .collect();
            for steps in [4.0, 1e7] {
                let weights: Vec<f32> = numbers(count, 4)
                    .iter()
                    .map(|x| (x.abs() * steps).floor() / steps)
                    .collect();
                for policy in [DropPolicy::Position, DropPolicy::Weight] {
                    let found = drop_over_capacity::<Flex>(
                        int_from_i64::<Flex>(&ids, &[tokens, k], &DEVICE),
                        float_from_f32::<Flex>(&weights, &[tokens, k], &DEVICE),
                        experts as usize,
                        capacity,
                        policy,
                    );
                    let expected = plain(&ids, &weights, experts as usize, capacity, policy);
                    assert_eq!(
                        to_i64_vec::<Flex>(found),
                        expected,
                        "{count} {policy:?} {steps}"
                    );
                }
            }
        }
    }
}
