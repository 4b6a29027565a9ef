//! Elementwise operations on values of one shape, and dtype casts.

use burn_backend::{DType, TensorMetadata};

use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{
    Float, dims, float, matrix, reshaped, rows_and_last, tensor, to_dtype, to_f32,
};
use crate::tape::{Tape, Var};

/// `a + b`.
///
/// # Panics
/// When shapes or dtypes differ.
#[track_caller]
pub fn add<B: Ops>(tape: &Tape<B>, a: &Var<B>, b: &Var<B>) -> Var<B> {
    check_alike("add", a, b);
    let output = B::add(a.value(), b.value());
    tape.record(output, &[a, b], |dy| vec![Some(dy.clone()), Some(dy)])
}

/// `a - b`.
///
/// # Panics
/// When shapes or dtypes differ.
#[track_caller]
pub fn sub<B: Ops>(tape: &Tape<B>, a: &Var<B>, b: &Var<B>) -> Var<B> {
    check_alike("sub", a, b);
    let output = B::sub(a.value(), b.value());
    let b_tracked = b.is_tracked();
    tape.record(output, &[a, b], move |dy| {
        vec![Some(dy.clone()), b_tracked.then(|| B::scale(dy, -1.0))]
    })
}

/// `a * b`, elementwise.
///
/// # Panics
/// When shapes or dtypes differ.
#[track_caller]
pub fn mul<B: Ops>(tape: &Tape<B>, a: &Var<B>, b: &Var<B>) -> Var<B> {
    check_alike("mul", a, b);
    let output = B::mul(a.value(), b.value());
    // Each factor is kept only if the other one's gradient needs it.
    let a_value = b.is_tracked().then(|| a.value());
    let b_value = a.is_tracked().then(|| b.value());
    tape.record(output, &[a, b], move |dy| {
        let da = b_value.map(|b| B::mul(dy.clone(), b));
        let db = a_value.map(|a| B::mul(dy, a));
        vec![da, db]
    })
}

/// `factor * x`.
pub fn scale<B: Ops>(tape: &Tape<B>, x: &Var<B>, factor: f64) -> Var<B> {
    let output = B::scale(x.value(), factor);
    tape.record(output, &[x], move |dy| vec![Some(B::scale(dy, factor))])
}

/// Each row of `x` times a number of its own. x: [.., h], factors: [.., 1] -> [.., h].
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn scale_rows<B: Ops>(tape: &Tape<B>, x: &Var<B>, factors: &Var<B>) -> Var<B> {
    let (shape, factor_shape) = (x.shape(), factors.shape());
    let (rows, _) = rows_and_last(&shape);
    assert!(
        factor_shape.len() == shape.len()
            && factor_shape.last() == Some(&1)
            && factor_shape.iter().product::<usize>() == rows,
        "scale_rows: factors of shape {factor_shape:?} for rows of {shape:?}"
    );
    let (dtype, factor_dtype) = (x.dtype(), factors.dtype());
    let scaled = move |x: Float<B>, factors: Float<B>| {
        let product = matrix::<B>(to_f32::<B>(x)) * matrix::<B>(to_f32::<B>(factors));
        to_dtype::<B>(float(product), dtype)
    };
    let output = reshaped::<B>(scaled(x.value(), factors.value()), &shape);
    let (x_value, factor_value) = (factors.is_tracked().then(|| x.value()), factors.value());
    let x_tracked = x.is_tracked();
    tape.record(output, &[x, factors], move |dy| {
        let dfactors = x_value.map(|x| {
            let product = matrix::<B>(to_f32::<B>(x)) * matrix::<B>(to_f32::<B>(dy.clone()));
            let sums = float(product.sum_dim(1));
            reshaped::<B>(to_dtype::<B>(sums, factor_dtype), &factor_shape)
        });
        let dx = x_tracked.then(|| reshaped::<B>(scaled(dy, factor_value), &shape));
        vec![dx, dfactors]
    })
}

/// `cap * tanh(x / cap)`, which keeps values within `-cap..cap` (Gemma 2).
pub fn softcap<B: Ops>(tape: &Tape<B>, x: &Var<B>, cap: f64) -> Var<B> {
    let output = B::softcap_forward(x.value(), cap);
    let input = x.value();
    tape.record(output, &[x], move |dy| {
        vec![Some(B::softcap_backward(input, dy, cap))]
    })
}

/// `x + bias`, the bias repeated for every row: for a bias that is added after something else than its own product (see
/// [`linear`](crate::linear) for that). x: [.., out], bias: `[out]`.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn add_bias<B: Ops>(tape: &Tape<B>, x: &Var<B>, bias: &Param<B>) -> Var<B> {
    let (shape, size) = (x.shape(), bias.shape());
    assert!(
        size.len() == 1 && shape.last() == size.last(),
        "add_bias: `{}` of shape {size:?} does not fit a value of shape {shape:?}",
        bias.name()
    );
    let row = to_dtype::<B>(bias.value(), x.value().dtype());
    let rows = tensor::<B, 2>(matrix_of::<B>(x.value())) + tensor::<B, 1>(row).unsqueeze();
    let output = reshaped::<B>(float(rows), &shape);
    let param = bias.clone();
    tape.record_with_params(output, &[x], &[bias], move |dy| {
        if param.requires_grad() {
            param.accumulate_with(|slot| B::linear_accumulate_bias_grad(dy.clone(), slot));
        }
        vec![Some(dy)]
    })
}

fn matrix_of<B: Ops>(x: Float<B>) -> Float<B> {
    let (rows, last) = rows_and_last(&dims(&x));
    reshaped::<B>(x, &[rows, last])
}

/// Converts to another float dtype; the gradient is converted back.
pub fn cast<B: Ops>(tape: &Tape<B>, x: &Var<B>, dtype: DType) -> Var<B> {
    let from = x.value().dtype();
    if from == dtype {
        return x.clone();
    }
    let output = B::cast(x.value(), dtype);
    tape.record(output, &[x], move |dy| vec![Some(B::cast(dy, from))])
}

#[track_caller]
pub(crate) fn check_alike<B: Ops>(op: &str, a: &Var<B>, b: &Var<B>) {
    let (shape_a, shape_b) = (a.shape(), b.shape());
    assert_eq!(
        shape_a, shape_b,
        "{op}: shapes {shape_a:?} and {shape_b:?} differ"
    );
    let (dtype_a, dtype_b) = (a.value().dtype(), b.value().dtype());
    assert_eq!(
        dtype_a, dtype_b,
        "{op}: dtypes {dtype_a:?} and {dtype_b:?} differ"
    );
}

pub(crate) fn portable_add<B: Ops>(a: Float<B>, b: Float<B>) -> Float<B> {
    B::float_add(a, b)
}

pub(crate) fn portable_sub<B: Ops>(a: Float<B>, b: Float<B>) -> Float<B> {
    B::float_sub(a, b)
}

pub(crate) fn portable_mul<B: Ops>(a: Float<B>, b: Float<B>) -> Float<B> {
    B::float_mul(a, b)
}

pub(crate) fn portable_scale<B: Ops>(x: Float<B>, factor: f64) -> Float<B> {
    B::float_mul_scalar(x, factor.into())
}

pub(crate) fn portable_softcap<B: Ops>(x: Float<B>, cap: f64) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let count = shape.iter().product();
    let x = tensor::<B, 1>(reshaped::<B>(to_f32::<B>(x), &[count]));
    let y = x.div_scalar(cap).tanh().mul_scalar(cap);
    reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape)
}

pub(crate) fn portable_softcap_backward<B: Ops>(x: Float<B>, dy: Float<B>, cap: f64) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let count = shape.iter().product();
    let x = tensor::<B, 1>(reshaped::<B>(to_f32::<B>(x), &[count]));
    let dy = tensor::<B, 1>(reshaped::<B>(to_f32::<B>(dy), &[count]));
    let slope = x.div_scalar(cap).tanh().square().neg().add_scalar(1.0);
    reshaped::<B>(to_dtype::<B>(float(dy * slope), dtype), &shape)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, assert_fast, check, random, run};
    use crate::to_f32_vec;

    #[test]
    fn operations_match_autodiff() {
        let (a, b) = (random(&[3, 5, 7], 1), random(&[3, 5, 7], 2));
        let both = [a.clone(), b];
        check(
            "add",
            &both,
            &[],
            |t, x, _| add(t, &x[0], &x[1]),
            |x, _| x[0].tensor::<3>() + x[1].tensor(),
        );
        check(
            "sub",
            &both,
            &[],
            |t, x, _| sub(t, &x[0], &x[1]),
            |x, _| x[0].tensor::<3>() - x[1].tensor(),
        );
        check(
            "mul",
            &both,
            &[],
            |t, x, _| mul(t, &x[0], &x[1]),
            |x, _| x[0].tensor::<3>() * x[1].tensor(),
        );
        let one = [a];
        check(
            "scale",
            &one,
            &[],
            |t, x, _| scale(t, &x[0], -2.5),
            |x, _| x[0].tensor::<3>().mul_scalar(-2.5),
        );
        check(
            "softcap",
            &one,
            &[],
            |t, x, _| softcap(t, &x[0], 0.7),
            |x, _| x[0].tensor::<3>().div_scalar(0.7).tanh().mul_scalar(0.7),
        );
        assert_fast(&["binary", "scale", "softcap_forward", "softcap_backward"]);
    }

    #[test]
    fn a_value_used_twice_gets_both_gradients() {
        check(
            "x x + x",
            &[random(&[4, 3], 1)],
            &[],
            |t, x, _| add(t, &mul(t, &x[0], &x[0]), &x[0]),
            |x, _| x[0].tensor::<2>().square() + x[0].tensor(),
        );
    }

    #[test]
    fn operands_are_left_alone_when_shared_and_reused_when_not() {
        let (a, b) = (random(&[50], 1), random(&[50], 2));
        let before = to_f32_vec::<Flex>(a.clone());
        let sum = Flex::add(a.clone(), b.clone());
        assert_eq!(to_f32_vec::<Flex>(a.clone()), before);
        let address = a.bytes().as_ptr();
        let in_place = Flex::add(a, b);
        assert_eq!(in_place.bytes().as_ptr(), address);
        assert_eq!(to_f32_vec::<Flex>(in_place), to_f32_vec::<Flex>(sum));
    }

    #[test]
    fn operands_that_are_not_contiguous_are_covered() {
        use burn_backend::ops::FloatTensorOps;
        let (a, b) = (random(&[4, 6], 1), random(&[6, 4], 2));
        let a = Flex::float_swap_dims(a, 0, 1);
        let found = Flex::sub(a.clone(), b.clone());
        assert_fast(&["binary"]);
        assert_close("a^T - b", &found, &portable_sub::<Flex>(a, b), 0.0);
    }

    #[test]
    fn softcap_agrees_with_its_portable_body() {
        let (x, dy) = (Flex::scale(random(&[311], 1), 90.0), random(&[311], 2));
        assert_close(
            "y",
            &Flex::softcap_forward(x.clone(), 30.0),
            &portable_softcap::<Flex>(x.clone(), 30.0),
            ROUNDING,
        );
        let found = Flex::softcap_backward(x.clone(), dy.clone(), 30.0);
        assert_close(
            "dx",
            &found,
            &portable_softcap_backward::<Flex>(x, dy, 30.0),
            ROUNDING,
        );
    }

    #[test]
    fn casts_go_there_and_back() {
        let outcome = run(&[random(&[3, 4], 1)], &[], |tape, x, _| {
            let narrow = cast(tape, &x[0], DType::BF16);
            assert_eq!(narrow.value().dtype(), DType::BF16);
            cast(tape, &narrow, DType::F32)
        });
        assert_eq!(outcome.input_grads[0].dtype(), DType::F32);
        assert_close(
            "round trip",
            &outcome.output,
            &random(&[3, 4], 1),
            1.0 / 256.0,
        );
    }
}
