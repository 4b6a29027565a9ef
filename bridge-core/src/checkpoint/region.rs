//! Boxes within a tensor, and the contiguous runs by which bytes move from one box to another.

/// A rectangular part of a tensor: per dim, where it starts and how far it goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Region {
    /// First index, per dim, in the whole tensor.
    pub offset: Vec<usize>,
    /// Extent, per dim.
    pub shape: Vec<usize>,
}

/// A stretch that is contiguous in the source and in the destination. Offsets and length are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Start in the source.
    pub src: u64,
    /// Start in the destination.
    pub dst: u64,
    /// Length.
    pub len: u64,
}

impl Region {
    /// A region at `offset` with extents `shape`.
    ///
    /// # Panics
    /// When the two have different lengths.
    pub fn new(offset: impl Into<Vec<usize>>, shape: impl Into<Vec<usize>>) -> Self {
        let (offset, shape) = (offset.into(), shape.into());
        assert_eq!(
            offset.len(),
            shape.len(),
            "offset {offset:?} and shape {shape:?} differ in their number of dims"
        );
        Self { offset, shape }
    }

    /// All of a tensor of that shape.
    pub fn whole(shape: &[usize]) -> Self {
        Self {
            offset: vec![0; shape.len()],
            shape: shape.to_vec(),
        }
    }

    /// Whether it has no elements. A scalar has one.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Number of elements; `None` when it does not fit in 64 bits.
    pub fn elements(&self) -> Option<u64> {
        if self.is_empty() {
            return Some(0);
        }
        self.shape
            .iter()
            .try_fold(1u64, |product, &dim| product.checked_mul(dim as u64))
    }

    /// Whether it lies within a tensor of shape `shape`, with the same number of dims.
    pub fn fits(&self, shape: &[usize]) -> bool {
        self.offset.len() == shape.len()
            && self.shape.len() == shape.len()
            && (0..shape.len()).all(|dim| {
                self.offset[dim]
                    .checked_add(self.shape[dim])
                    .is_some_and(|end| end <= shape[dim])
            })
    }

    /// The part that two regions of one tensor share; `None` when that has no elements.
    ///
    /// # Panics
    /// When the regions differ in their number of dims.
    pub fn intersect(&self, other: &Region) -> Option<Region> {
        assert_eq!(
            self.shape.len(),
            other.shape.len(),
            "regions of tensors with different numbers of dims"
        );
        let dims = self.shape.len();
        let mut shared = Region {
            offset: Vec::with_capacity(dims),
            shape: Vec::with_capacity(dims),
        };
        for dim in 0..dims {
            let start = self.offset[dim].max(other.offset[dim]);
            let end =
                (self.offset[dim] + self.shape[dim]).min(other.offset[dim] + other.shape[dim]);
            if end <= start {
                return None;
            }
            shared.offset.push(start);
            shared.shape.push(end - start);
        }
        Some(shared)
    }

    /// The runs that carry this region from a row-major buffer that holds region `src` to one that holds region
    /// `dst`, for elements of `element_bytes`. In ascending order of both, as long as possible.
    ///
    /// # Panics
    /// When this region does not lie within both.
    pub fn runs(
        &self,
        src: &Region,
        dst: &Region,
        element_bytes: usize,
    ) -> impl Iterator<Item = Run> + use<> {
        let dims = self.shape.len();
        for outer in [src, dst] {
            let inside = (0..dims).all(|dim| {
                self.offset[dim] >= outer.offset[dim]
                    && self.offset[dim] + self.shape[dim] <= outer.offset[dim] + outer.shape[dim]
            });
            assert!(
                outer.shape.len() == dims && inside,
                "{self:?} is not within {outer:?}"
            );
        }
        // From the innermost dim outwards, dims that are taken whole on both sides join the run; the next one too,
        // in part.
        let full =
            |dim: usize| self.shape[dim] == src.shape[dim] && self.shape[dim] == dst.shape[dim];
        let mut inner = dims;
        while inner > 0 && full(inner - 1) {
            inner -= 1;
        }
        let outer_dims = inner.saturating_sub(1);
        let element_bytes = element_bytes as u64;
        let run_len = self.shape[outer_dims..]
            .iter()
            .map(|&dim| dim as u64)
            .product::<u64>()
            * element_bytes;
        let (src_strides, dst_strides) = (
            strides(&src.shape, element_bytes),
            strides(&dst.shape, element_bytes),
        );
        let start = |outer: &Region, strides: &[u64]| -> u64 {
            (0..dims)
                .map(|dim| (self.offset[dim] - outer.offset[dim]) as u64 * strides[dim])
                .sum()
        };
        let (src_start, dst_start) = (start(src, &src_strides), start(dst, &dst_strides));
        let counts = self.shape[..outer_dims].to_vec();
        let mut index = vec![0usize; outer_dims];
        let mut done = self.is_empty();
        std::iter::from_fn(move || {
            if done {
                return None;
            }
            let at = |strides: &[u64]| {
                index
                    .iter()
                    .zip(strides)
                    .map(|(&i, &stride)| i as u64 * stride)
                    .sum::<u64>()
            };
            let run = Run {
                src: src_start + at(&src_strides),
                dst: dst_start + at(&dst_strides),
                len: run_len,
            };
            done = true;
            for dim in (0..outer_dims).rev() {
                index[dim] += 1;
                if index[dim] < counts[dim] {
                    done = false;
                    break;
                }
                index[dim] = 0;
            }
            Some(run)
        })
    }

    /// The regions that together hold the elements `start..end` of a tensor of shape `shape`, counted in row-major
    /// order; each is contiguous in that order, and they come in that order. At most `2 * dims - 1` of them.
    ///
    /// This is how a share of a flattened tensor, as a sharded optimizer owns it, becomes pieces.
    ///
    /// # Panics
    /// When the range does not lie within the tensor.
    pub fn of_flat_range(shape: &[usize], start: u64, end: u64) -> Vec<Region> {
        let elements = Region::whole(shape).elements();
        assert!(
            start <= end && elements.is_some_and(|all| end <= all),
            "{start}..{end} of a tensor of shape {shape:?}"
        );
        let strides = strides(shape, 1);
        let mut regions = Vec::new();
        let mut at = start;
        while at < end {
            // The outermost dim at whose boundary `at` stands and of which at least one whole slice is left.
            let fits = |&dim: &usize| at.is_multiple_of(strides[dim]) && at + strides[dim] <= end;
            let dim = (0..shape.len()).find(fits);
            let mut region = Region {
                offset: Vec::with_capacity(shape.len()),
                shape: vec![1; shape.len()],
            };
            let mut rest = at;
            for stride in &strides {
                region.offset.push((rest / stride) as usize);
                rest %= stride;
            }
            match dim {
                // A scalar: its one element.
                None => at += 1,
                Some(dim) => {
                    let left = (shape[dim] - region.offset[dim]) as u64;
                    let slices = ((end - at) / strides[dim]).min(left);
                    region.shape[dim] = slices as usize;
                    region.shape[dim + 1..].copy_from_slice(&shape[dim + 1..]);
                    at += slices * strides[dim];
                }
            }
            regions.push(region);
        }
        regions
    }
}

/// Row-major strides, in units of `unit`.
fn strides(shape: &[usize], unit: u64) -> Vec<u64> {
    let mut strides = vec![unit; shape.len()];
    for dim in (1..shape.len()).rev() {
        strides[dim - 1] = strides[dim].saturating_mul(shape[dim] as u64);
    }
    strides
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(region: &Region, src: &Region, dst: &Region, expected: &[(u64, u64, u64)]) {
        let runs: Vec<_> = region
            .runs(src, dst, 1)
            .map(|run| (run.src, run.dst, run.len))
            .collect();
        assert_eq!(runs, expected);
    }

    #[test]
    fn runs_are_as_long_as_both_sides_allow() {
        let whole = Region::whole(&[4, 3, 5]);
        check(&whole, &whole, &whole, &[(0, 0, 60)]);
        let rows = Region::new([1, 0, 0], [2, 3, 5]);
        check(&rows, &whole, &rows, &[(15, 0, 30)]);
        let columns = Region::new([0, 1, 0], [4, 1, 5]);
        check(
            &columns,
            &whole,
            &columns,
            &[(5, 0, 5), (20, 5, 5), (35, 10, 5), (50, 15, 5)],
        );
        let corner = Region::new([3, 2, 3], [1, 1, 2]);
        check(&corner, &whole, &columns_of(&corner), &[(58, 0, 2)]);
    }

    fn columns_of(region: &Region) -> Region {
        region.clone()
    }

    #[test]
    fn scalars_are_one_run_and_empty_regions_none() {
        let scalar = Region::whole(&[]);
        assert_eq!(scalar.elements(), Some(1));
        check(&scalar, &scalar, &scalar, &[(0, 0, 1)]);
        let empty = Region::whole(&[3, 0]);
        check(&empty, &empty, &empty, &[]);
        assert!(empty.intersect(&empty).is_none());
        assert_eq!(Region::of_flat_range(&[], 0, 1), [scalar]);
        assert_eq!(Region::of_flat_range(&[3, 0], 0, 0), []);
    }

    #[test]
    fn bounds_are_checked_without_overflow() {
        assert!(Region::new([1], [2]).fits(&[3]));
        assert!(!Region::new([2], [2]).fits(&[3]));
        assert!(!Region::new([usize::MAX], [2]).fits(&[3]));
        assert!(!Region::new([0], [1]).fits(&[1, 1]));
    }

    fn shape_and_regions() -> impl Strategy<Value = (Vec<usize>, Region, Region)> {
        proptest::collection::vec(1usize..6, 0..5).prop_flat_map(|shape| {
            let region = |shape: &[usize]| {
                let dims: Vec<_> = shape
                    .iter()
                    .map(|&dim| (0..dim).prop_flat_map(move |o| (Just(o), 1..=dim - o)))
                    .collect();
                dims.prop_map(|dims| {
                    let (offset, shape): (Vec<_>, Vec<_>) = dims.into_iter().unzip();
                    Region { offset, shape }
                })
            };
            (Just(shape.clone()), region(&shape), region(&shape))
        })
    }

    /// Row-major position of every element of `region` within `outer`.
    fn positions(region: &Region, outer: &Region) -> Vec<u64> {
        let strides = strides(&outer.shape, 1);
        let mut positions = vec![0];
        for dim in 0..region.shape.len() {
            positions = positions
                .iter()
                .flat_map(|base| {
                    let (strides, outer) = (&strides, &outer);
                    (0..region.shape[dim]).map(move |i| {
                        base + (region.offset[dim] + i - outer.offset[dim]) as u64 * strides[dim]
                    })
                })
                .collect();
        }
        positions
    }

    proptest! {
        #[test]
        fn runs_name_every_element_once_in_order((_shape, a, b) in shape_and_regions()) {
            let Some(shared) = a.intersect(&b) else { return Ok(()) };
            let expand = |pick: fn(&Run) -> u64| -> Vec<u64> {
                shared.runs(&a, &b, 1).flat_map(|run| pick(&run)..pick(&run) + run.len).collect()
            };
            prop_assert_eq!(expand(|run| run.src), positions(&shared, &a));
            prop_assert_eq!(expand(|run| run.dst), positions(&shared, &b));
        }

        #[test]
        fn flat_ranges_become_contiguous_regions((shape, _a, _b) in shape_and_regions(), cuts in (any::<u16>(), any::<u16>())) {
            let whole = Region::whole(&shape);
            let all = whole.elements().unwrap();
            let (x, y) = (u64::from(cuts.0) % (all + 1), u64::from(cuts.1) % (all + 1));
            let (start, end) = (x.min(y), x.max(y));
            let regions = Region::of_flat_range(&shape, start, end);
            prop_assert!(regions.len() < (2 * shape.len()).max(2));
            let found: Vec<u64> = regions.iter().flat_map(|region| positions(region, &whole)).collect();
            prop_assert_eq!(found, (start..end).collect::<Vec<_>>());
        }
    }
}
