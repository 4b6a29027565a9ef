//! Whether boxes fill a larger box exactly once.

use std::collections::HashMap;

use super::region::Region;

/// Most dims along which the pieces of one tensor may be cut. The check takes 2 to that power steps for each piece.
pub(super) const MAX_CUT_DIMS: usize = 6;

/// What the pieces of a tensor do wrong.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TilingFault {
    /// Some elements are in no piece or in several.
    #[error("some of its elements are in no piece or in several")]
    NotExact,
    /// Pieces are cut along more dims than are supported.
    #[error("its pieces are cut along more than {MAX_CUT_DIMS} dims")]
    TooManyCutDims,
}

/// Checks that `pieces`, each within `shape`, hold every element of it exactly once, in time linear in their number.
///
/// A box is a product of intervals, so its indicator function is determined by its corners, taken with alternating
/// signs (its mixed difference in every dim). Those sums are additive: the pieces fill the whole exactly once if and
/// only if their signed corners add up to the corners of the whole.
pub(super) fn check(shape: &[usize], pieces: &[&Region]) -> Result<(), TilingFault> {
    if shape.contains(&0) {
        return Ok(());
    }
    let dims = 0..shape.len();
    let cut: Vec<usize> = dims
        .filter(|&dim| pieces.iter().any(|piece| piece.shape[dim] != shape[dim]))
        .collect();
    if cut.len() > MAX_CUT_DIMS {
        return Err(TilingFault::TooManyCutDims);
    }
    let mut corners: HashMap<Vec<usize>, i64> = HashMap::new();
    let mut add = |region: &Region, sign: i64| {
        for choice in 0..1u32 << cut.len() {
            let corner = |(bit, &dim): (usize, &usize)| {
                region.offset[dim]
                    + if choice >> bit & 1 == 1 {
                        region.shape[dim]
                    } else {
                        0
                    }
            };
            let parity = if choice.count_ones() % 2 == 0 {
                sign
            } else {
                -sign
            };
            *corners
                .entry(cut.iter().enumerate().map(corner).collect())
                .or_default() += parity;
        }
    };
    pieces.iter().for_each(|piece| add(piece, 1));
    add(&Region::whole(shape), -1);
    if corners.values().all(|&sum| sum == 0) {
        Ok(())
    } else {
        Err(TilingFault::NotExact)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn run(shape: &[usize], pieces: &[(&[usize], &[usize])], expected: Result<(), TilingFault>) {
        let pieces: Vec<Region> = pieces
            .iter()
            .map(|(offset, shape)| Region::new(*offset, *shape))
            .collect();
        assert_eq!(check(shape, &pieces.iter().collect::<Vec<_>>()), expected);
    }

    #[test]
    fn exact_tilings_pass_and_others_do_not() {
        run(&[], &[(&[], &[])], Ok(()));
        run(&[], &[], Err(TilingFault::NotExact));
        run(&[], &[(&[], &[]), (&[], &[])], Err(TilingFault::NotExact));
        run(&[4, 5], &[(&[0, 0], &[4, 5])], Ok(()));
        run(&[4, 5], &[(&[0, 0], &[2, 5]), (&[2, 0], &[2, 5])], Ok(()));
        // A gap, an overlap, and both so that the number of elements is right.
        run(&[4, 5], &[(&[0, 0], &[2, 5])], Err(TilingFault::NotExact));
        run(
            &[4, 5],
            &[(&[0, 0], &[4, 5]), (&[1, 1], &[1, 1])],
            Err(TilingFault::NotExact),
        );
        run(
            &[4],
            &[(&[0], &[2]), (&[1], &[2])],
            Err(TilingFault::NotExact),
        );
        // The pinwheel, which no sequence of straight cuts makes.
        let pinwheel: [(&[usize], &[usize]); 5] = [
            (&[0, 0], &[1, 2]),
            (&[0, 2], &[2, 1]),
            (&[2, 1], &[1, 2]),
            (&[1, 0], &[2, 1]),
            (&[1, 1], &[1, 1]),
        ];
        run(&[3, 3], &pinwheel, Ok(()));
        run(&[3, 3], &pinwheel[..4], Err(TilingFault::NotExact));
        // Empty pieces hold nothing; empty tensors need nothing.
        run(&[4], &[(&[0], &[4]), (&[2], &[0])], Ok(()));
        run(&[4, 0], &[], Ok(()));
        run(
            &[2; 8],
            &[(&[0; 8], &[1; 8])],
            Err(TilingFault::TooManyCutDims),
        );
    }

    proptest! {
        #[test]
        fn agrees_with_counting(boxes in proptest::collection::vec(((0usize..4, 1usize..4), (0usize..3, 1usize..4)), 0..6)) {
            let shape = [4usize, 3];
            let clip = |(offset, extent): (usize, usize), dim: usize| (offset, extent.min(shape[dim] - offset));
            let regions: Vec<Region> = boxes
                .into_iter()
                .map(|(rows, columns)| (clip(rows, 0), clip(columns, 1)))
                .map(|((r, rows), (c, columns))| Region::new([r, c], [rows, columns]))
                .collect();
            let holders = |row: usize, column: usize| {
                let holds = |region: &&Region| {
                    (region.offset[0]..region.offset[0] + region.shape[0]).contains(&row)
                        && (region.offset[1]..region.offset[1] + region.shape[1]).contains(&column)
                };
                regions.iter().filter(holds).count()
            };
            let exact = (0..shape[0]).all(|row| (0..shape[1]).all(|column| holders(row, column) == 1));
            prop_assert_eq!(check(&shape, &regions.iter().collect::<Vec<_>>()).is_ok(), exact);
        }
    }
}
