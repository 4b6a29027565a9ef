//! Elementwise operations on values of one shape, and dtype casts.

use burn_backend::{DType, TensorMetadata};

use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};
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

/// `cap * tanh(x / cap)`, which keeps values within `-cap..cap` (Gemma 2).
pub fn softcap<B: Ops>(tape: &Tape<B>, x: &Var<B>, cap: f64) -> Var<B> {
    let output = B::softcap_forward(x.value(), cap);
    let input = x.value();
    tape.record(output, &[x], move |dy| {
        vec![Some(B::softcap_backward(input, dy, cap))]
    })
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
