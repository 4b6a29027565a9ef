//! Changes of shape, and the batched matrix product.

use std::ops::Range;

use burn_backend::{Slice, TensorMetadata};

use crate::ops::Ops;
use crate::primitive::{Float, dims, reshaped};
use crate::tape::{Tape, Var};

/// The same elements in row-major order in another shape.
///
/// # Panics
/// When the number of elements differs.
#[track_caller]
pub fn reshape<B: Ops>(tape: &Tape<B>, x: &Var<B>, shape: &[usize]) -> Var<B> {
    let from = x.shape();
    assert_eq!(
        from.iter().product::<usize>(),
        shape.iter().product::<usize>(),
        "reshape: {from:?} and {shape:?} differ in size"
    );
    let output = reshaped::<B>(x.value(), shape);
    tape.record(output, &[x], move |dy| vec![Some(reshaped::<B>(dy, &from))])
}

/// The part of `x` whose index along `dim` is in `range`.
///
/// # Panics
/// When the range is empty or leaves the dimension.
#[track_caller]
pub fn slice<B: Ops>(tape: &Tape<B>, x: &Var<B>, dim: usize, range: Range<usize>) -> Var<B> {
    let shape = x.shape();
    assert!(
        dim < shape.len() && range.start < range.end && range.end <= shape[dim],
        "slice: {range:?} along dim {dim} of shape {shape:?}"
    );
    let slices = slices_along(shape.len(), dim, range);
    let input = x.value();
    let device = B::float_device(&input);
    let dtype = input.dtype();
    let output = B::float_slice(input, &slices);
    tape.record(output, &[x], move |dy| {
        let zeros = B::float_zeros(shape.into(), &device, dtype.into());
        vec![Some(B::float_slice_assign(zeros, &slices, dy))]
    })
}

/// Joins values along `dim`; they must agree in the other dimensions.
///
/// # Panics
/// When there are no values or their shapes do not fit.
#[track_caller]
pub fn concat<B: Ops>(tape: &Tape<B>, parts: &[Var<B>], dim: usize) -> Var<B> {
    let shapes: Vec<Vec<usize>> = parts.iter().map(Var::shape).collect();
    assert!(!shapes.is_empty(), "concat: no values");
    let rank = shapes[0].len();
    let fits = |shape: &Vec<usize>| {
        shape.len() == rank && (0..rank).all(|d| d == dim || shape[d] == shapes[0][d])
    };
    assert!(
        dim < rank && shapes.iter().all(fits),
        "concat along dim {dim}: shapes {shapes:?} do not fit"
    );

    let output = B::float_cat(parts.iter().map(Var::value).collect(), dim);
    let parents: Vec<&Var<B>> = parts.iter().collect();
    let tracked: Vec<bool> = parts.iter().map(Var::is_tracked).collect();
    tape.record(output, &parents, move |dy| {
        let mut start = 0;
        let mut grads = Vec::with_capacity(shapes.len());
        for (shape, tracked) in shapes.iter().zip(tracked) {
            let range = start..start + shape[dim];
            start = range.end;
            grads
                .push(tracked.then(|| B::float_slice(dy.clone(), &slices_along(rank, dim, range))));
        }
        grads
    })
}

/// `x` repeated `times` along `dim`, whose extent is 1.
///
/// # Panics
/// When the dimension does not exist or is longer.
#[track_caller]
pub fn repeat<B: Ops>(tape: &Tape<B>, x: &Var<B>, dim: usize, times: usize) -> Var<B> {
    let shape = x.shape();
    assert!(
        shape.get(dim) == Some(&1),
        "repeat: dim {dim} of shape {shape:?} must have extent 1"
    );
    let mut repeated = shape;
    repeated[dim] = times;
    let output = B::float_expand(x.value(), repeated.into());
    tape.record(output, &[x], move |dy| {
        vec![Some(B::float_sum_dim(dy, dim))]
    })
}

/// Swaps two dimensions.
///
/// # Panics
/// When a dimension does not exist.
#[track_caller]
pub fn transpose<B: Ops>(tape: &Tape<B>, x: &Var<B>, dim0: usize, dim1: usize) -> Var<B> {
    let shape = x.shape();
    assert!(
        dim0 < shape.len() && dim1 < shape.len(),
        "transpose: dims {dim0}, {dim1} of shape {shape:?}"
    );
    let output = B::float_swap_dims(x.value(), dim0, dim1);
    tape.record(output, &[x], move |dy| {
        vec![Some(B::float_swap_dims(dy, dim0, dim1))]
    })
}

/// Batched matrix product. a: [.., m, k], b: [.., k, n] with equal leading dimensions -> [.., m, n].
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn matmul<B: Ops>(tape: &Tape<B>, a: &Var<B>, b: &Var<B>) -> Var<B> {
    let (shape_a, shape_b) = (a.shape(), b.shape());
    let rank = shape_a.len();
    assert!(
        rank >= 2
            && shape_b.len() == rank
            && shape_a[..rank - 2] == shape_b[..rank - 2]
            && shape_a[rank - 1] == shape_b[rank - 2],
        "matmul: shapes {shape_a:?} and {shape_b:?} do not fit"
    );
    let output = B::float_matmul(a.value(), b.value());
    let a_value = b.is_tracked().then(|| a.value());
    let b_value = a.is_tracked().then(|| b.value());
    tape.record(output, &[a, b], move |dy| {
        let da = b_value.map(|b| B::float_matmul(dy.clone(), last_two_swapped::<B>(b)));
        let db = a_value.map(|a| B::float_matmul(last_two_swapped::<B>(a), dy));
        vec![da, db]
    })
}

fn last_two_swapped<B: Ops>(x: Float<B>) -> Float<B> {
    let rank = dims(&x).len();
    B::float_swap_dims(x, rank - 2, rank - 1)
}

/// Everything along the other dimensions, `range` along `dim`.
pub(crate) fn slices_along(rank: usize, dim: usize, range: Range<usize>) -> Vec<Slice> {
    let mut slices = vec![Slice::full(); rank];
    slices[dim] = range.into();
    slices
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::testing::{check, random};

    #[test]
    fn operations_match_autodiff() {
        let x = [random(&[3, 4, 5], 1)];
        check(
            "reshape",
            &x,
            &[],
            |t, x, _| reshape(t, &x[0], &[6, 10]),
            |x, _| x[0].tensor::<3>().reshape([6, 10]),
        );
        check(
            "slice",
            &x,
            &[],
            |t, x, _| slice(t, &x[0], 1, 1..3),
            |x, _| x[0].tensor::<3>().narrow(1, 1, 2),
        );
        check(
            "transpose",
            &x,
            &[],
            |t, x, _| transpose(t, &x[0], 0, 2),
            |x, _| x[0].tensor::<3>().swap_dims(0, 2),
        );
        check(
            "repeat",
            &[random(&[3, 1, 5], 1)],
            &[],
            |t, x, _| repeat(t, &x[0], 1, 4),
            |x, _| x[0].tensor::<3>().expand([3, 4, 5]),
        );
        let parts = [random(&[3, 4], 1), random(&[3, 2], 2), random(&[3, 1], 3)];
        check(
            "concat",
            &parts,
            &[],
            |t, x, _| concat(t, x, 1),
            |x, _| Tensor::cat(x.iter().map(|x| x.tensor::<2>()).collect(), 1),
        );
        let factors = [random(&[2, 3, 4], 1), random(&[2, 4, 5], 2)];
        check(
            "matmul",
            &factors,
            &[],
            |t, x, _| matmul(t, &x[0], &x[1]),
            |x, _| x[0].tensor::<3>().matmul(x[1].tensor()),
        );
    }

    #[test]
    fn slices_of_one_value_add_up() {
        check(
            "halves swapped",
            &[random(&[2, 6], 1)],
            &[],
            |t, x, _| concat(t, &[slice(t, &x[0], 1, 3..6), slice(t, &x[0], 1, 0..3)], 1),
            |x, _| {
                let x = x[0].tensor::<2>();
                Tensor::cat(vec![x.clone().narrow(1, 3, 3), x.narrow(1, 0, 3)], 1)
            },
        );
    }
}
