//! Moving elements between two strided views: in memory, and from a byte range into memory.

use std::cmp::Reverse;

use crate::checkpoint::RangeReader;
use crate::error::Result;
use crate::mapping::ViewPair;

/// One dimension of a pair of views: extent, and the stride on each side, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Axis {
    pub(super) extent: usize,
    pub(super) near: usize,
    pub(super) far: usize,
}

/// A pair of views with as few dimensions as describe it, longest near stride first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Paired {
    pub(super) axes: Vec<Axis>,
    pub(super) near_offset: usize,
    pub(super) far_offset: usize,
}

impl Paired {
    pub(super) fn new(pair: &ViewPair) -> Self {
        let mut axes: Vec<Axis> = (0..pair.near.shape().len())
            .map(|dim| Axis {
                extent: pair.near.shape()[dim],
                near: pair.near.strides()[dim],
                far: pair.far.strides()[dim],
            })
            .filter(|axis| axis.extent != 1)
            .collect();
        axes.sort_by_key(|axis| Reverse(axis.near));
        let mut joined: Vec<Axis> = Vec::with_capacity(axes.len());
        for axis in axes {
            match joined.last_mut() {
                Some(outer)
                    if outer.near == axis.near * axis.extent
                        && outer.far == axis.far * axis.extent =>
                {
                    *outer = Axis {
                        extent: outer.extent * axis.extent,
                        ..axis
                    };
                }
                _ => joined.push(axis),
            }
        }
        Self {
            axes: joined,
            near_offset: pair.near.offset(),
            far_offset: pair.far.offset(),
        }
    }

    pub(super) fn numel(&self) -> usize {
        self.axes.iter().map(|axis| axis.extent).product()
    }

    /// Whether the elements are contiguous and in the same order on both sides.
    pub(super) fn is_run(&self) -> bool {
        match self.axes.as_slice() {
            [] => true,
            [axis] => axis.near == 1 && axis.far == 1,
            _ => false,
        }
    }

    /// The same far elements, listed without gaps on the near side.
    pub(super) fn compact(&self) -> Paired {
        let mut axes = self.axes.clone();
        let mut stride = 1;
        for axis in axes.iter_mut().rev() {
            axis.near = stride;
            stride *= axis.extent;
        }
        Paired {
            axes,
            near_offset: 0,
            far_offset: self.far_offset,
        }
    }

    /// From the compact listing to the near positions.
    pub(super) fn scatter(&self) -> Paired {
        let mut scatter = self.compact();
        for (axis, own) in scatter.axes.iter_mut().zip(&self.axes) {
            *axis = Axis {
                extent: own.extent,
                near: own.near,
                far: axis.near,
            };
        }
        Paired {
            near_offset: self.near_offset,
            far_offset: 0,
            ..scatter
        }
    }
}

/// Copies elements of `size` bytes from `src` (far) to `dst` (near).
pub(super) fn copy(paired: &Paired, size: usize, src: &[u8], dst: &mut [u8]) {
    match size {
        1 => copy_sized::<1>(paired, src, dst),
        2 => copy_sized::<2>(paired, src, dst),
        4 => copy_sized::<4>(paired, src, dst),
        8 => copy_sized::<8>(paired, src, dst),
        _ => unreachable!("elements of {size} bytes; plans admit 1, 2, 4 and 8"),
    }
}

fn copy_sized<const N: usize>(paired: &Paired, src: &[u8], dst: &mut [u8]) {
    let (src, dst) = (src.as_chunks::<N>().0, dst.as_chunks_mut::<N>().0);
    match paired.axes.as_slice() {
        [] => dst[paired.near_offset] = src[paired.far_offset],
        axes => copy_axes(axes, src, paired.far_offset, dst, paired.near_offset),
    }
}

fn copy_axes<const N: usize>(
    axes: &[Axis],
    src: &[[u8; N]],
    from: usize,
    dst: &mut [[u8; N]],
    to: usize,
) {
    match *axes {
        [] => {}
        [
            Axis {
                extent,
                near: 1,
                far: 1,
            },
        ] => dst[to..to + extent].copy_from_slice(&src[from..from + extent]),
        [Axis { extent, near, far }] => {
            for index in 0..extent {
                dst[to + index * near] = src[from + index * far];
            }
        }
        [outer, inner] if inner.far != 1 => copy_tiles(outer, inner, src, from, dst, to),
        [Axis { extent, near, far }, ref inner @ ..] => {
            for index in 0..extent {
                copy_axes(inner, src, from + index * far, dst, to + index * near);
            }
        }
    }
}

/// A transposed plane, in tiles that fit the first-level cache on both sides.
fn copy_tiles<const N: usize>(
    outer: Axis,
    inner: Axis,
    src: &[[u8; N]],
    from: usize,
    dst: &mut [[u8; N]],
    to: usize,
) {
    const TILE: usize = 32;
    for outer_start in (0..outer.extent).step_by(TILE) {
        for inner_start in (0..inner.extent).step_by(TILE) {
            for i in outer_start..outer.extent.min(outer_start + TILE) {
                let (from, to) = (from + i * outer.far, to + i * outer.near);
                for j in inner_start..inner.extent.min(inner_start + TILE) {
                    dst[to + j * inner.near] = src[from + j * inner.far];
                }
            }
        }
    }
}

/// What one read costs beyond its bytes, as bytes: a system call takes about as long as copying this much.
const READ_COST: usize = 4096;

/// Reads elements of `size` bytes from a byte range, whose element 0 is at byte `base` of `reader`, into `dst` (near).
///
/// Neighbouring elements are read together with what lies between them where that is cheaper than reading them one by
/// one, in spans of at most `limit` bytes, which pass through `scratch`.
pub(super) fn gather(
    paired: &Paired,
    size: usize,
    reader: &dyn RangeReader,
    base: u64,
    dst: &mut [u8],
    scratch: &mut Vec<u8>,
    limit: usize,
) -> Result<()> {
    if paired.numel() == 0 {
        return Ok(());
    }
    let mut outer = paired.axes.clone();
    outer.sort_by_key(|axis| Reverse(axis.far));
    let mut inner: Vec<Axis> = Vec::new();
    let mut span = 1;
    while let Some(axis) = outer.last().copied() {
        let longer = (axis.extent - 1)
            .saturating_mul(axis.far)
            .saturating_add(span);
        let apart = axis
            .extent
            .saturating_mul(span.saturating_mul(size).saturating_add(READ_COST));
        // What lies without gaps on both sides is read straight to its place, so no buffer limits it.
        let unbroken = inner.is_empty() && axis.near == 1 && axis.far == 1;
        if !unbroken
            && (longer.saturating_mul(size) > limit.max(size)
                || longer.saturating_mul(size) > apart)
        {
            break;
        }
        span = longer;
        inner.push(axis);
        outer.pop();
    }
    inner.sort_by_key(|axis| Reverse(axis.near));
    let mut part = Paired {
        axes: inner,
        near_offset: 0,
        far_offset: 0,
    };
    let direct = part.is_run();
    let bytes = span * size;
    if !direct && scratch.len() < bytes {
        scratch.resize(bytes, 0);
    }
    for index in 0..outer.iter().map(|axis| axis.extent).product() {
        let (mut near, mut far, mut rest) = (paired.near_offset, paired.far_offset, index);
        for axis in outer.iter().rev() {
            near += rest % axis.extent * axis.near;
            far += rest % axis.extent * axis.far;
            rest /= axis.extent;
        }
        let at = base + far as u64 * size as u64;
        if direct {
            reader.read_exact_at(at, &mut dst[near * size..near * size + bytes])?;
        } else {
            reader.read_exact_at(at, &mut scratch[..bytes])?;
            part.near_offset = near;
            copy(&part, size, &scratch[..bytes], dst);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::MemoryReader;
    use crate::mapping::View;

    proptest! {
        /// Any order of dimensions, any sub-box, any read limit: the elements that the views name arrive.
        #[test]
        fn gathered_elements_are_those_of_the_views(
            shape in prop::collection::vec(1usize..9, 1..4),
            turn in 0usize..4,
            step in 1usize..4,
            size in prop::sample::select(vec![1usize, 2, 4, 8]),
            limit in 1usize..200,
            base in 0u64..5,
        ) {
            let numel: usize = shape.iter().product();
            let far = View::whole(&shape).step(0, shape[0] / 2, step).unwrap();
            let mut order: Vec<usize> = (0..shape.len()).collect();
            order.rotate_left(turn % shape.len());
            let near_shape: Vec<usize> = order.iter().map(|dim| far.shape()[*dim]).collect();
            let near = View::whole(&near_shape);
            let pair = ViewPair { near, far: far.permute(&order).unwrap() };
            let element = |at: usize| (0..size).map(move |byte| (at * 7 + byte * 31 + 1) as u8);
            let stored: Vec<u8> = (0..base as u8).chain((0..numel).flat_map(element)).collect();
            let expected: Vec<u8> = pair.far.offsets().flat_map(element).collect();
            let paired = Paired::new(&pair);
            let mut found = vec![0; expected.len()];
            let reader = MemoryReader::new("memory", stored);
            gather(&paired, size, &reader, base, &mut found, &mut Vec::new(), limit).unwrap();
            prop_assert_eq!(&found, &expected);

            // The detour through a compact listing, as casts take it.
            let mut compact = vec![0; expected.len()];
            gather(&paired.compact(), size, &reader, base, &mut compact, &mut Vec::new(), limit).unwrap();
            let mut found = vec![0; expected.len()];
            copy(&paired.scatter(), size, &compact, &mut found);
            prop_assert_eq!(&found, &expected);
        }
    }

    /// Counts how often it is read.
    struct Counting(MemoryReader, std::sync::atomic::AtomicUsize);

    impl RangeReader for Counting {
        fn len(&self) -> u64 {
            self.0.len()
        }

        fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> crate::checkpoint::Result<()> {
            self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            self.0.read_exact_at(offset, buf)
        }

        fn describe(&self) -> String {
            self.0.describe()
        }
    }

    #[test]
    fn a_contiguous_tensor_is_one_read_however_large() {
        let pair = ViewPair {
            near: View::whole(&[40, 50]),
            far: View::whole(&[40, 50]),
        };
        let reader = Counting(
            MemoryReader::new("memory", vec![7; 4000]),
            Default::default(),
        );
        let mut found = vec![0; 4000];
        gather(
            &Paired::new(&pair),
            2,
            &reader,
            0,
            &mut found,
            &mut Vec::new(),
            64,
        )
        .unwrap();
        assert_eq!((reader.1.into_inner(), found), (1, vec![7; 4000]));
    }

    #[test]
    fn contiguous_pairs_are_runs() {
        let whole = View::whole(&[4, 1, 6]);
        let run = |near: &View, far: &View| {
            Paired::new(&ViewPair {
                near: near.clone(),
                far: far.clone(),
            })
            .is_run()
        };
        assert!(run(
            &whole,
            &View::whole(&[8, 1, 6]).slice(0, 2..6).unwrap()
        ));
        assert!(run(
            &View::whole(&[1]),
            &View::whole(&[9]).slice(0, 4..5).unwrap()
        ));
        assert!(!run(
            &whole,
            &View::whole(&[4, 1, 7]).slice(2, 0..6).unwrap()
        ));
        assert!(!run(
            &View::whole(&[4, 6]),
            &View::whole(&[6, 4]).transpose(0, 1).unwrap()
        ));
    }
}
