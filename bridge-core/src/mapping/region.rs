//! Cutting pairs of views along the borders of a region of one side's tensor.

use std::ops::Range;

use super::view::{View, row_major};

/// Two views of equal shape whose elements correspond.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewPair {
    /// The side whose tensor is cut.
    pub near: View,
    /// The side that follows.
    pub far: View,
}

impl ViewPair {
    /// The part of the pair whose near elements lie in `region` of the near tensor of `shape`, as a few pairs. Near
    /// views are in the coordinates of the region: a row-major tensor of its extents.
    pub fn within(&self, shape: &[usize], region: &[Range<usize>]) -> Vec<ViewPair> {
        debug_assert_eq!(shape.len(), region.len());
        if self.near.numel() == 0 || region.iter().any(Range::is_empty) {
            return Vec::new();
        }
        if region
            .iter()
            .zip(shape)
            .all(|(range, extent)| *range == (0..*extent))
        {
            return vec![self.clone()];
        }
        // Dimensions of extent 1 have no say: they are whole in every region that is not empty.
        let strides = row_major(shape);
        let local = row_major(&region.iter().map(Range::len).collect::<Vec<_>>());
        let dims: Vec<Dim> = (0..shape.len())
            .filter(|dim| shape[*dim] > 1)
            .map(|dim| Dim {
                stride: strides[dim],
                local: local[dim],
                range: region[dim].clone(),
            })
            .collect();
        let mut out = Vec::new();
        let mut todo = vec![self.clone()];
        while let Some(pair) = todo.pop() {
            match pair.across_border(&dims) {
                Some(cut) => todo.extend(cut),
                None => pair.clip(&dims, &mut out),
            }
        }
        out
    }

    /// Indices `ranges` of each dimension, on both sides.
    fn narrow(&self, ranges: &[Range<usize>]) -> ViewPair {
        ViewPair {
            near: self.near.narrow(ranges),
            far: self.far.narrow(ranges),
        }
    }

    /// If an axis of the near view runs over the end of a dimension into the one above it, cuts the pair so that it no
    /// longer does; otherwise `None`.
    fn across_border(&self, dims: &[Dim]) -> Option<Vec<ViewPair>> {
        for above in dims.windows(2).map(|pair| pair[0].stride).rev() {
            let mut axes: Vec<usize> = self
                .near
                .long_axes()
                .filter(|axis| self.near.strides()[*axis] < above)
                .collect();
            axes.sort_unstable_by_key(|axis| std::cmp::Reverse(self.near.strides()[*axis]));
            let span = |axes: &[usize]| -> usize {
                axes.iter()
                    .map(|axis| (self.near.shape()[*axis] - 1) * self.near.strides()[*axis])
                    .sum()
            };
            let cut_at = |axis: usize, index: usize| {
                let mut ranges: Vec<Range<usize>> =
                    self.near.shape().iter().map(|extent| 0..*extent).collect();
                ranges[axis] = 0..index;
                let head = self.narrow(&ranges);
                ranges[axis] = index..self.near.shape()[axis];
                Some(vec![head, self.narrow(&ranges)])
            };
            // A step that moves along two dimensions at once, as after a merge: index by index.
            if let Some(axis) = self.near.long_axes().find(|axis| {
                self.near.strides()[*axis] > above
                    && !self.near.strides()[*axis].is_multiple_of(above)
            }) {
                return cut_at(axis, 1);
            }
            let start = self.near.offset() % above;
            if start + span(&axes) < above {
                continue;
            }
            // Of several axes that run over together the longest steps are cut first; what is left is met again.
            let axis = *axes.first()?;
            let (extent, stride) = (self.near.shape()[axis], self.near.strides()[axis]);
            let inner = span(&axes[1..]);
            let steps = above / stride;
            if above % stride == 0
                && start + inner < stride
                && extent % steps == 0
                && extent > steps
            {
                let split = |view: &View| view.clone().split(axis, &[extent / steps, steps]);
                if let (Ok(near), Ok(far)) = (split(&self.near), split(&self.far)) {
                    return Some(vec![ViewPair { near, far }]);
                }
            }
            // Indices below `fitting` end before the border; at least one index is split off.
            let fitting = if start + inner < above {
                (above - start - inner - 1) / stride + 1
            } else {
                1
            };
            return cut_at(axis, fitting);
        }
        None
    }

    /// Clips a pair whose near axes each stay within one dimension.
    fn clip(&self, dims: &[Dim], out: &mut Vec<ViewPair>) {
        let whole: Vec<Range<usize>> = self.near.shape().iter().map(|extent| 0..*extent).collect();
        let mut kept = vec![whole];
        let mut limit = usize::MAX;
        for dim in dims {
            let mut axes: Vec<usize> = self
                .near
                .long_axes()
                .filter(|axis| (dim.stride..limit).contains(&self.near.strides()[*axis]))
                .collect();
            axes.sort_unstable_by_key(|axis| std::cmp::Reverse(self.near.strides()[*axis]));
            let steps: Vec<(usize, usize)> = axes
                .iter()
                .map(|axis| {
                    (
                        self.near.shape()[*axis],
                        self.near.strides()[*axis] / dim.stride,
                    )
                })
                .collect();
            let start = self.near.offset() % limit / dim.stride;
            let mut clipped = Vec::new();
            clip_axes(&steps, start, &dim.range, &mut Vec::new(), &mut clipped);
            kept = kept
                .iter()
                .flat_map(|ranges| {
                    clipped.iter().map(|own| {
                        let mut ranges = ranges.clone();
                        for (axis, range) in axes.iter().zip(own) {
                            ranges[*axis] = range.clone();
                        }
                        ranges
                    })
                })
                .collect();
            limit = dim.stride;
        }
        out.extend(kept.iter().map(|ranges| self.narrow(ranges).relocate(dims)));
    }

    /// Rewrites the near view from positions in the tensor to positions in the region.
    fn relocate(mut self, dims: &[Dim]) -> ViewPair {
        let mut strides = self.near.strides().to_vec();
        for (axis, stride) in strides.iter_mut().enumerate() {
            if self.near.shape()[axis] == 1 {
                *stride = 0;
            } else if let Some(dim) = dims.iter().find(|dim| dim.stride <= *stride) {
                *stride = *stride / dim.stride * dim.local;
            }
        }
        let (mut rest, mut offset) = (self.near.offset(), 0);
        for dim in dims {
            offset += (rest / dim.stride - dim.range.start) * dim.local;
            rest %= dim.stride;
        }
        self.near = View::from_parts(self.near.shape().to_vec(), strides, offset);
        self
    }
}

/// A dimension of the near tensor with more than one index.
struct Dim {
    /// Its stride in the tensor.
    stride: usize,
    /// Its stride in the region.
    local: usize,
    /// The region's indices.
    range: Range<usize>,
}

/// All sets of index ranges for `axes` (extent, stride; longest stride first) such that
/// `start + sum(index * stride)` is in `range`. Sets are disjoint and together complete.
fn clip_axes(
    axes: &[(usize, usize)],
    start: usize,
    range: &Range<usize>,
    chosen: &mut Vec<Range<usize>>,
    out: &mut Vec<Vec<Range<usize>>>,
) {
    let span: usize = axes
        .iter()
        .map(|(extent, stride)| (extent - 1) * stride)
        .sum();
    if start >= range.end || start + span < range.start {
        return;
    }
    if range.start <= start && start + span < range.end {
        let mut ranges = chosen.clone();
        ranges.extend(axes.iter().map(|(extent, _)| 0..*extent));
        out.push(ranges);
        return;
    }
    let Some(((extent, stride), inner)) = axes.split_first() else {
        return;
    };
    let inner_span: usize = inner
        .iter()
        .map(|(extent, stride)| (extent - 1) * stride)
        .sum();
    // Indices whose inner positions are all inside, then the few at either side that are partly inside.
    let first_whole = range
        .start
        .saturating_sub(start)
        .div_ceil(*stride)
        .min(*extent);
    let end_whole = match range.end.checked_sub(start + inner_span) {
        Some(room) if room > 0 => ((room - 1) / stride + 1).min(*extent),
        _ => 0,
    };
    let (before, after) = if first_whole < end_whole {
        (0..first_whole, end_whole..*extent)
    } else {
        (0..*extent, 0..0)
    };
    let partial = |index: &usize| {
        let at = start + index * stride;
        at < range.end && at + inner_span >= range.start
    };
    let one = |index: usize, chosen: &mut Vec<Range<usize>>, out: &mut Vec<Vec<Range<usize>>>| {
        chosen.push(index..index + 1);
        clip_axes(inner, start + index * stride, range, chosen, out);
        chosen.pop();
    };
    // Only indices near the ends can be partly inside; the rest are skipped without a look at each.
    let reach = inner_span / stride + 1;
    let low = first_whole.min(before.end);
    for index in (low.saturating_sub(reach)..before.end)
        .take_while(|index| start + index * stride < range.end)
    {
        if partial(&index) {
            one(index, chosen, out);
        }
    }
    if first_whole < end_whole {
        chosen.push(first_whole..end_whole);
        let mut ranges = chosen.clone();
        ranges.extend(inner.iter().map(|(extent, _)| 0..*extent));
        out.push(ranges);
        chosen.pop();
    }
    for index in after
        .take_while(|index| start + index * stride < range.end)
        .filter(|index| partial(index))
    {
        one(index, chosen, out);
    }
}
