//! Strided operands of a kernel, brought to as few dimensions as possible.

use crate::device::Argument;
use crate::tensor::CudaTensor;

/// Most dimensions, after merging, that kernels on strided operands take.
pub(crate) const MAX_RANK: usize = 8;
/// Most operands.
const MAX_VIEWS: usize = 4;

/// Shape and strides of up to four operands of equal shape. Mirrors `Views` in `kernels/common.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Views {
    rank: i32,
    unused: i32,
    shape: [i64; MAX_RANK],
    strides: [[i64; MAX_RANK]; MAX_VIEWS],
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Views {}

impl Views {
    /// Merges dimensions that step evenly in every operand.
    #[track_caller]
    pub(crate) fn new(shape: &[usize], operands: &[&[i64]]) -> Self {
        assert!(operands.len() <= MAX_VIEWS, "at most {MAX_VIEWS} operands");
        let mut dims: Vec<(usize, Vec<i64>)> = Vec::new();
        for (d, &size) in shape.iter().enumerate() {
            if size == 1 {
                continue;
            }
            let strides: Vec<i64> = operands.iter().map(|strides| strides[d]).collect();
            match dims.last_mut() {
                Some((run, steps))
                    if steps
                        .iter()
                        .zip(&strides)
                        .all(|(step, stride)| *step == stride * size as i64) =>
                {
                    (*run, *steps) = (*run * size, strides);
                }
                _ => dims.push((size, strides)),
            }
        }
        assert!(
            dims.len() <= MAX_RANK,
            "not supported on cuda: a view of {} dimensions that cannot be merged to {MAX_RANK}",
            dims.len()
        );
        let mut views = Self {
            rank: dims.len() as i32,
            unused: 0,
            shape: [1; MAX_RANK],
            strides: [[0; MAX_RANK]; MAX_VIEWS],
        };
        for (d, (size, strides)) in dims.iter().enumerate() {
            views.shape[d] = *size as i64;
            for (v, stride) in strides.iter().enumerate() {
                views.strides[v][d] = *stride;
            }
        }
        views
    }

    /// The views of tensors, which must have equal shapes.
    #[track_caller]
    pub(crate) fn of(tensors: &[&CudaTensor]) -> Self {
        let strides: Vec<&[i64]> = tensors.iter().map(|tensor| tensor.strides()).collect();
        Self::new(tensors[0].dims(), &strides)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_merge_where_all_operands_allow() {
        let views = Views::new(&[2, 3, 1, 4], &[&[12, 4, 4, 1], &[0, 4, 9, 1]]);
        assert_eq!(views.rank, 2);
        assert_eq!(views.shape[..2], [2, 12]);
        assert_eq!(views.strides[0][..2], [12, 1]);
        assert_eq!(views.strides[1][..2], [0, 1]);
    }

    #[test]
    fn a_single_element_has_no_dimensions() {
        assert_eq!(Views::new(&[1, 1], &[&[5, 7]]).rank, 0);
    }
}
