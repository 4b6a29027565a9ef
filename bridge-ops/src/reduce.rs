//! Reductions to one number.

use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_f32};
use crate::tape::{Tape, Var};

/// The sum of all elements, `[1]`, in the dtype of `x`.
pub fn sum<B: Ops>(tape: &Tape<B>, x: &Var<B>) -> Var<B> {
    let shape = x.shape();
    let output = reshaped::<B>(B::float_sum(x.value()), &[1]);
    tape.record(output, &[x], move |dy| {
        let ones = reshaped::<B>(dy, &vec![1; shape.len()]);
        vec![Some(B::float_expand(ones, shape.into()))]
    })
}

pub(crate) fn portable_sum_squares_many<B: Ops>(tensors: Vec<Float<B>>) -> Float<B> {
    assert!(!tensors.is_empty(), "a sum over at least one tensor");
    B::float_cat(tensors.into_iter().map(B::sum_squares).collect(), 0)
}

pub(crate) fn portable_sum_squares<B: Ops>(x: Float<B>) -> Float<B> {
    let count = x.shape().num_elements();
    debug_assert_eq!(count, dims(&x).iter().product::<usize>());
    let x = tensor::<B, 1>(reshaped::<B>(to_f32::<B>(x), &[count]));
    float(x.square().sum())
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{assert_fast, check, random};
    use crate::{to_f32_vec, to_scalar};

    #[test]
    fn sum_matches_autodiff() {
        check(
            "sum",
            &[random(&[3, 4, 5], 1)],
            &[],
            |t, x, _| sum(t, &x[0]),
            |x, _| x[0].tensor::<3>().sum(),
        );
    }

    #[test]
    fn sum_of_squares_is_that_of_f64() {
        for len in [1, 31, 1000, 200_003] {
            let x = random(&[len], 1);
            let exact: f64 = to_f32_vec::<Flex>(x.clone())
                .iter()
                .map(|&x| f64::from(x).powi(2))
                .sum();
            let found = f64::from(to_scalar::<Flex>(Flex::sum_squares(x.clone())));
            assert_fast(&["sum_squares"]);
            assert!(
                (found - exact).abs() <= 1e-6 * exact,
                "{len}: {found}, expected {exact}"
            );
            let portable = f64::from(to_scalar::<Flex>(portable_sum_squares::<Flex>(x)));
            assert!(
                (portable - exact).abs() <= 1e-4 * exact,
                "{len}: {portable}, expected {exact}"
            );
        }
    }
}
