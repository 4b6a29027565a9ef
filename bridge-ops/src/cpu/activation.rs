//! Activation functions. Maths: `activation.rs`.

use std::f32::consts::FRAC_1_SQRT_2;

use burn_flex::FlexTensor;

use super::elementwise::in_parts;
use super::math::{erf, exp, sigmoid, tanh};
use super::simd::{fma, vectorized};
use super::storage::{contiguous_f32, values};
use super::threads::SharedMut;
use super::{fast_path, pool};
use crate::activation::{Activation, GELU_CUBIC, GELU_LINEAR};
use crate::clamped_swiglu::SwigluClamp;
use crate::primitive::dims;

/// An activation function and its slope at a point.
trait Act {
    fn eval<const FMA: bool>(x: f32) -> (f32, f32);
}

/// Calls a generic function with the type that stands for `$activation`.
macro_rules! dispatch {
    ($activation:expr, $function:ident($($arg:expr),*)) => {
        match $activation {
            Activation::Silu => $function::<Silu>($($arg),*),
            Activation::Gelu => $function::<Gelu>($($arg),*),
            Activation::GeluTanh => $function::<GeluTanh>($($arg),*),
            Activation::QuickGelu => $function::<QuickGelu>($($arg),*),
            Activation::Relu => $function::<Relu>($($arg),*),
            Activation::Relu2 => $function::<Relu2>($($arg),*),
            Activation::Sigmoid => $function::<Sigmoid>($($arg),*),
            Activation::Tanh => $function::<Tanh>($($arg),*),
        }
    };
}

/// `None` when the dtype is not covered; so for all functions here.
pub(super) fn forward(x: &FlexTensor, activation: Activation) -> Option<FlexTensor> {
    let x = contiguous_f32(x)?;
    fast_path::took("activation_forward");
    let shape = dims(&x);
    let x = values(&x);
    Some(pool::new_f32(&shape, |y| {
        in_parts(y, |y, range| dispatch!(activation, values_of(&x[range], y)));
    }))
}

pub(super) fn backward(
    x: &FlexTensor,
    dy: &FlexTensor,
    activation: Activation,
) -> Option<FlexTensor> {
    let (x, dy) = (contiguous_f32(x)?, contiguous_f32(dy)?);
    fast_path::took("activation_backward");
    let shape = dims(&x);
    let (x, dy) = (values(&x), values(&dy));
    Some(pool::new_f32(&shape, |dx| {
        in_parts(dx, |dx, range| {
            dispatch!(activation, grads_of(&x[range.clone()], &dy[range], dx))
        });
    }))
}

pub(super) fn gated_forward(
    gate: &FlexTensor,
    up: &FlexTensor,
    activation: Activation,
) -> Option<FlexTensor> {
    let (gate, up) = (contiguous_f32(gate)?, contiguous_f32(up)?);
    fast_path::took("gated_activation_forward");
    let shape = dims(&gate);
    let (gate, up) = (values(&gate), values(&up));
    Some(pool::new_f32(&shape, |y| {
        in_parts(y, |y, range| {
            dispatch!(
                activation,
                gated_values_of(&gate[range.clone()], &up[range], y)
            )
        });
    }))
}

pub(super) fn gated_backward(
    gate: &FlexTensor,
    up: &FlexTensor,
    dy: &FlexTensor,
    activation: Activation,
) -> Option<(FlexTensor, FlexTensor)> {
    let (gate, up, dy) = (
        contiguous_f32(gate)?,
        contiguous_f32(up)?,
        contiguous_f32(dy)?,
    );
    fast_path::took("gated_activation_backward");
    let shape = dims(&gate);
    let (gate, up, dy) = (values(&gate), values(&up), values(&dy));
    let mut dup = None;
    let dgate = pool::new_f32(&shape, |dgate| {
        dup = Some(pool::new_f32(&shape, |dup| {
            let dup = SharedMut::new(dup);
            in_parts(dgate, |dgate, range| {
                // SAFETY: parts are disjoint.
                let dup = unsafe { dup.slice(range.clone()) };
                let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
                dispatch!(activation, gated_grads_of(gate, up, dy, dgate, dup));
            });
        }));
    });
    Some((dgate, dup?))
}

pub(super) fn clamped_forward(
    gate: &FlexTensor,
    up: &FlexTensor,
    clamp: SwigluClamp,
) -> Option<FlexTensor> {
    let (gate, up) = (contiguous_f32(gate)?, contiguous_f32(up)?);
    fast_path::took("clamped_swiglu_forward");
    let shape = dims(&gate);
    let (gate, up) = (values(&gate), values(&up));
    let (alpha, limit) = (clamp.alpha as f32, clamp.limit as f32);
    Some(pool::new_f32(&shape, |y| {
        in_parts(y, |y, range| {
            clamped_values_of(&gate[range.clone()], &up[range], alpha, limit, y);
        });
    }))
}

pub(super) fn clamped_backward(
    gate: &FlexTensor,
    up: &FlexTensor,
    dy: &FlexTensor,
    clamp: SwigluClamp,
) -> Option<(FlexTensor, FlexTensor)> {
    let (gate, up, dy) = (
        contiguous_f32(gate)?,
        contiguous_f32(up)?,
        contiguous_f32(dy)?,
    );
    fast_path::took("clamped_swiglu_backward");
    let shape = dims(&gate);
    let (gate, up, dy) = (values(&gate), values(&up), values(&dy));
    let (alpha, limit) = (clamp.alpha as f32, clamp.limit as f32);
    let mut dup = None;
    let dgate = pool::new_f32(&shape, |dgate| {
        dup = Some(pool::new_f32(&shape, |dup| {
            let dup = SharedMut::new(dup);
            in_parts(dgate, |dgate, range| {
                // SAFETY: parts are disjoint.
                let dup = unsafe { dup.slice(range.clone()) };
                let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
                clamped_grads_of(gate, up, dy, alpha, limit, dgate, dup);
            });
        }));
    });
    Some((dgate, dup?))
}

vectorized! {
    fn clamped_values_of(gate: &[f32], up: &[f32], alpha: f32, limit: f32, y: &mut [f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            let glu = sigmoid_gated::<FMA>(gate.min(limit), alpha).0;
            *y = glu * (up.max(-limit).min(limit) + 1.0);
        }
    }
}

vectorized! {
    fn clamped_grads_of(
        gate: &[f32], up: &[f32], dy: &[f32], alpha: f32, limit: f32, dgate: &mut [f32], dup: &mut [f32],
    ) {
        let outputs = dgate.iter_mut().zip(dup);
        for (((dgate, dup), gate), (up, dy)) in outputs.zip(gate).zip(up.iter().zip(dy)) {
            let (glu, slope) = sigmoid_gated::<FMA>(gate.min(limit), alpha);
            let passes = |through: bool| if through { 1.0 } else { 0.0 };
            *dgate = slope * (up.max(-limit).min(limit) + 1.0) * dy * passes(*gate <= limit);
            *dup = glu * dy * passes(up.abs() <= limit);
        }
    }
}

vectorized! {
    fn values_of[A: Act](x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = A::eval::<FMA>(*x).0;
        }
    }
}

vectorized! {
    fn grads_of[A: Act](x: &[f32], dy: &[f32], dx: &mut [f32]) {
        for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = A::eval::<FMA>(*x).1 * dy;
        }
    }
}

vectorized! {
    fn gated_values_of[A: Act](gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = A::eval::<FMA>(*gate).0 * up;
        }
    }
}

vectorized! {
    fn gated_grads_of[A: Act](gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let outputs = dgate.iter_mut().zip(dup);
        for (((dgate, dup), gate), (up, dy)) in outputs.zip(gate).zip(up.iter().zip(dy)) {
            let (value, slope) = A::eval::<FMA>(*gate);
            *dgate = slope * up * dy;
            *dup = value * dy;
        }
    }
}

/// `x sigmoid(scale x)`.
#[inline(always)]
fn sigmoid_gated<const FMA: bool>(x: f32, scale: f32) -> (f32, f32) {
    let s = sigmoid::<FMA>(scale * x);
    (x * s, s * fma::<FMA>(scale * x, 1.0 - s, 1.0))
}

struct Silu;
impl Act for Silu {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        sigmoid_gated::<FMA>(x, 1.0)
    }
}

struct QuickGelu;
impl Act for QuickGelu {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        sigmoid_gated::<FMA>(x, 1.702)
    }
}

struct Gelu;
impl Act for Gelu {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        const INVERSE_SQRT_TAU: f32 = 0.398_942_3;
        let cdf = 0.5 * (1.0 + erf::<FMA>(x * FRAC_1_SQRT_2));
        let pdf = INVERSE_SQRT_TAU * exp::<FMA>(-0.5 * x * x);
        (x * cdf, fma::<FMA>(x, pdf, cdf))
    }
}

struct GeluTanh;
impl Act for GeluTanh {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        const LINEAR: f32 = GELU_LINEAR as f32;
        const CUBIC: f32 = GELU_CUBIC as f32;
        let square = x * x;
        let t = tanh::<FMA>(LINEAR * x * fma::<FMA>(CUBIC, square, 1.0));
        let half = 0.5 * (1.0 + t);
        let inner_slope = LINEAR * fma::<FMA>(3.0 * CUBIC, square, 1.0);
        (
            x * half,
            fma::<FMA>(0.5 * x * inner_slope, fma::<FMA>(-t, t, 1.0), half),
        )
    }
}

struct Relu;
impl Act for Relu {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) }
    }
}

struct Relu2;
impl Act for Relu2 {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        let positive = if x > 0.0 { x } else { 0.0 };
        (positive * positive, 2.0 * positive)
    }
}

struct Sigmoid;
impl Act for Sigmoid {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        let s = sigmoid::<FMA>(x);
        (s, s * (1.0 - s))
    }
}

struct Tanh;
impl Act for Tanh {
    #[inline(always)]
    fn eval<const FMA: bool>(x: f32) -> (f32, f32) {
        let t = tanh::<FMA>(x);
        (t, fma::<FMA>(-t, t, 1.0))
    }
}
