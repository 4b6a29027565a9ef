//! The gated activation of gpt-oss.
//!
//! ```text
//! g = min(gate, limit)          u = clamp(up, -limit, limit)
//! y = g sigmoid(alpha g) (u + 1)
//! ```
//!
//! Where a value is clamped its gradient is zero. Source: `GptOssExperts` of Hugging Face transformers.

use burn::tensor::{Tensor, activation as burn_activation};
use burn_backend::TensorMetadata;

use crate::elementwise::check_alike;
use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// The numbers of a clamped SwiGLU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SwigluClamp {
    /// Gain inside the sigmoid (gpt-oss: 1.702).
    pub alpha: f64,
    /// Largest gate, and largest magnitude of `up` (gpt-oss: 7).
    pub limit: f64,
}

/// `y = g sigmoid(alpha g) (u + 1)` of the clamped gate and up, elementwise.
///
/// # Panics
/// When shapes or dtypes of gate and up differ.
#[track_caller]
pub fn clamped_swiglu<B: Ops>(
    tape: &Tape<B>,
    gate: &Var<B>,
    up: &Var<B>,
    clamp: SwigluClamp,
) -> Var<B> {
    check_alike("clamped_swiglu", gate, up);
    let output = B::clamped_swiglu_forward(gate.value(), up.value(), clamp);
    let (gate_value, up_value) = (gate.value(), up.value());
    tape.record(output, &[gate, up], move |dy| {
        let (dgate, dup) = B::clamped_swiglu_backward(gate_value, up_value, dy, clamp);
        vec![Some(dgate), Some(dup)]
    })
}

pub(crate) fn portable<B: Ops>(gate: Float<B>, up: Float<B>, clamp: SwigluClamp) -> Float<B> {
    let (shape, dtype) = (dims(&gate), gate.dtype());
    let g = flat::<B>(gate).clamp_max(clamp.limit);
    let u = flat::<B>(up).clamp(-clamp.limit, clamp.limit);
    let y = burn_activation::sigmoid(g.clone().mul_scalar(clamp.alpha)) * g * u.add_scalar(1.0);
    reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape)
}

pub(crate) fn portable_backward<B: Ops>(
    gate: Float<B>,
    up: Float<B>,
    dy: Float<B>,
    clamp: SwigluClamp,
) -> (Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&gate), gate.dtype());
    let (gate, up, dy) = (flat::<B>(gate), flat::<B>(up), flat::<B>(dy));
    let gate_passes = gate.clone().lower_equal_elem(clamp.limit).float();
    let up_passes = up.clone().abs().lower_equal_elem(clamp.limit).float();
    let g = gate.clamp_max(clamp.limit);
    let u = up.clamp(-clamp.limit, clamp.limit).add_scalar(1.0);
    let s = burn_activation::sigmoid(g.clone().mul_scalar(clamp.alpha));
    // The slope of g sigmoid(alpha g): s (1 + alpha g (1 - s)).
    let inner = g.clone().mul_scalar(clamp.alpha) * s.clone().neg().add_scalar(1.0);
    let slope = s.clone() * inner.add_scalar(1.0);
    let finish = |x: Tensor<B, 1>| reshaped::<B>(to_dtype::<B>(float(x), dtype), &shape);
    (
        finish(slope * u * dy.clone() * gate_passes),
        finish(s * g * dy * up_passes),
    )
}

fn flat<B: Ops>(x: Float<B>) -> Tensor<B, 1> {
    let count = x.shape().num_elements();
    tensor(reshaped::<B>(to_f32::<B>(x), &[count]))
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, assert_fast, check, random};

    const CLAMP: SwigluClamp = SwigluClamp {
        alpha: 1.702,
        limit: 1.5,
    };

    fn wide(seed: u64) -> Float<Flex> {
        Flex::scale(random(&[5, 7, 13], seed), 4.0)
    }

    #[test]
    fn value_and_slope_match_autodiff() {
        check(
            "clamped swiglu",
            &[wide(1), wide(2)],
            &[],
            |tape, x, _| clamped_swiglu(tape, &x[0], &x[1], CLAMP),
            |x, _| {
                let g = x[0].tensor::<3>().clamp_max(1.5);
                let u = x[1].tensor::<3>().clamp(-1.5, 1.5);
                g.clone() * burn_activation::sigmoid(g.mul_scalar(1.702)) * u.add_scalar(1.0)
            },
        );
        assert_fast(&["clamped_swiglu_forward", "clamped_swiglu_backward"]);
    }

    #[test]
    fn kernels_agree_with_portable_bodies() {
        let (gate, up, dy) = (wide(1), wide(2), random(&[5, 7, 13], 3));
        let found = Flex::clamped_swiglu_forward(gate.clone(), up.clone(), CLAMP);
        let expected = portable::<Flex>(gate.clone(), up.clone(), CLAMP);
        assert_close("y", &found, &expected, ROUNDING);
        let found = Flex::clamped_swiglu_backward(gate.clone(), up.clone(), dy.clone(), CLAMP);
        let expected = portable_backward::<Flex>(gate, up, dy, CLAMP);
        assert_close("dgate", &found.0, &expected.0, ROUNDING);
        assert_close("dup", &found.1, &expected.1, ROUNDING);
    }
}
