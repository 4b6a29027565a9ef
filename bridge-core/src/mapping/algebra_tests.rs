//! Property tests of views, regions and coverage against brute force.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use proptest::prelude::*;

use super::coverage;
use super::region::ViewPair;
use super::view::View;

/// A small shape of 1 to 4 dimensions.
pub(super) fn shapes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(1usize..7, 1..5)
}

/// Applies `steps` random combinators to a view; those that do not fit are skipped.
fn wander(mut view: View, steps: &[(u8, usize, usize, usize)]) -> View {
    for &(kind, a, b, c) in steps {
        let rank = view.shape().len();
        if rank == 0 {
            break;
        }
        let dim = a % rank;
        let extent = view.shape()[dim];
        let next = match kind % 7 {
            0 => view.clone().transpose(dim, b % rank),
            1 if extent > 0 => view
                .clone()
                .slice(dim, b % extent..(b % extent + 1 + c % extent).min(extent)),
            2 if extent > 0 => view.clone().step(dim, b % extent, 1 + c % 3),
            3 if extent > 0 => view.clone().select(dim, b % extent),
            4 => {
                let inner = (1..=extent)
                    .filter(|size| extent.is_multiple_of(*size))
                    .nth(b % 2)
                    .unwrap_or(1);
                view.clone().split(dim, &[extent / inner.max(1), inner])
            }
            5 => view.clone().merge(dim..(dim + 2).min(rank)),
            _ => {
                let mut order: Vec<usize> = (0..rank).collect();
                order.rotate_left(b % rank);
                view.clone().permute(&order)
            }
        };
        if let Ok(next) = next {
            view = next;
        }
    }
    view
}

fn wanderings() -> impl Strategy<Value = Vec<(u8, usize, usize, usize)>> {
    prop::collection::vec((any::<u8>(), 0usize..64, 0usize..64, 0usize..64), 0..8)
}

/// Index of position `at` in each dimension of a tensor of `shape`.
fn unravel(shape: &[usize], mut at: usize) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for dim in (0..shape.len()).rev() {
        index[dim] = at % shape[dim];
        at /= shape[dim];
    }
    index
}

fn region_of(shape: &[usize], cuts: &[(usize, usize)]) -> Vec<Range<usize>> {
    let cut = |(extent, (a, b)): (&usize, &(usize, usize))| {
        let (a, b) = (a % (extent + 1), b % (extent + 1));
        a.min(b)..a.max(b)
    };
    shape.iter().zip(cuts).map(cut).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn a_view_never_leaves_its_tensor_or_repeats_an_element(shape in shapes(), steps in wanderings()) {
        let view = wander(View::whole(&shape), &steps);
        let offsets: Vec<usize> = view.offsets().collect();
        let distinct: BTreeSet<usize> = offsets.iter().copied().collect();
        prop_assert_eq!(distinct.len(), offsets.len());
        prop_assert!(offsets.iter().all(|at| *at < shape.iter().product()));
    }

    #[test]
    fn a_region_of_a_pair_holds_exactly_its_elements(
        shape in shapes(),
        steps in wanderings(),
        cuts in prop::collection::vec((0usize..64, 0usize..64), 4),
        turn in 0usize..64,
    ) {
        let near = wander(View::whole(&shape), &steps);
        // The far side lists the same elements in another order of dimensions.
        let mut order: Vec<usize> = (0..near.shape().len()).collect();
        let turn = turn % order.len().max(1);
        order.rotate_left(turn);
        let far_shape: Vec<usize> = order.iter().map(|dim| near.shape()[*dim]).collect();
        let mut back = vec![0; order.len()];
        for (position, dim) in order.iter().enumerate() {
            back[*dim] = position;
        }
        let far = View::whole(&far_shape).permute(&back).unwrap();
        let pair = ViewPair { near, far };
        let region = region_of(&shape, &cuts);

        let mut expected = BTreeMap::new();
        for (near, far) in pair.near.offsets().zip(pair.far.offsets()) {
            let index = unravel(&shape, near);
            if index.iter().zip(&region).all(|(i, range)| range.contains(i)) {
                let local = index.iter().zip(&region).fold(0, |at, (i, range)| at * range.len() + i - range.start);
                expected.insert(local, far);
            }
        }
        let mut found = BTreeMap::new();
        for part in pair.within(&shape, &region) {
            prop_assert_eq!(part.near.shape(), part.far.shape());
            for (near, far) in part.near.offsets().zip(part.far.offsets()) {
                prop_assert_eq!(found.insert(near, far), None);
            }
        }
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn coverage_agrees_with_counting(shape in shapes(), walks in prop::collection::vec(wanderings(), 1..4)) {
        let views: Vec<View> = walks.iter().map(|steps| wander(View::whole(&shape), steps)).collect();
        let mut counts = vec![0; shape.iter().product()];
        for at in views.iter().flat_map(|view| view.offsets()) {
            counts[at] += 1;
        }
        let exact = counts.iter().all(|count| *count == 1);
        let views: Vec<&View> = views.iter().collect();
        prop_assert_eq!(coverage::check(&shape, &views).is_ok(), exact, "counts {:?}", counts);
    }

    /// Cuts a tensor into parts that do cover it, by halving views at random, and expects the check to agree; then
    /// swaps one part for another and expects it to notice.
    #[test]
    fn coverage_accepts_partitions_and_refuses_a_part_met_twice(
        shape in shapes(),
        steps in wanderings(),
        cuts in prop::collection::vec((0usize..64, 0usize..64, any::<bool>()), 1..6),
    ) {
        // Only combinators that keep every element.
        let steps: Vec<_> = steps.into_iter().filter(|(kind, ..)| !(1..=3).contains(&(kind % 7))).collect();
        let mut parts = vec![wander(View::whole(&shape), &steps)];
        for (which, at, interleave) in cuts {
            let view = parts.swap_remove(which % parts.len());
            let dim = at % view.shape().len();
            let extent = view.shape()[dim];
            if interleave && extent >= 2 {
                parts.push(view.clone().step(dim, 0, 2).unwrap());
                parts.push(view.step(dim, 1, 2).unwrap());
            } else {
                let middle = at % (extent + 1);
                parts.push(view.clone().slice(dim, 0..middle).unwrap());
                parts.push(view.slice(dim, middle..extent).unwrap());
            }
        }
        let all: Vec<&View> = parts.iter().collect();
        prop_assert_eq!(coverage::check(&shape, &all), Ok(()));
        let full: Vec<&View> = parts.iter().filter(|view| view.numel() > 0).collect();
        if let [first, .., last] = full.as_slice() {
            let mut twice = full.clone();
            *twice.last_mut().unwrap() = *first;
            prop_assert!(coverage::check(&shape, &twice).is_err(), "{:?} in place of {:?}", first, last);
            prop_assert!(coverage::check(&shape, &full[1..]).is_err());
        }
    }
}

#[test]
fn large_interleaved_and_stacked_tensors_are_checked_without_visiting_elements() {
    // 256 experts of an interleaved gate and up, [256, 7168, 4096]: seven thousand million elements.
    let shape = [256, 7168, 4096];
    let whole = View::whole(&shape);
    let parts: Vec<View> = (0..256)
        .flat_map(|expert| (0..2).map(move |part| (expert, part)))
        .map(|(expert, part)| {
            whole
                .clone()
                .select(0, expert)
                .unwrap()
                .step(1, part, 2)
                .unwrap()
        })
        .collect();
    let views: Vec<&View> = parts.iter().collect();
    assert_eq!(coverage::check(&shape, &views), Ok(()));
    assert!(
        coverage::check(&shape, &views[1..])
            .unwrap_err()
            .contains("elements are mapped")
    );
}
