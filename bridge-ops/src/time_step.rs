//! How fast a recurrent layer forgets: step sizes from a projection, and decays from step sizes (Gu and Dao 2023,
//! "Mamba", section 3.6; shared by Mamba-2 and the gated delta net).
//!
//! ```text
//! dt = max(softplus(x + bias), min)          d(x + bias) = sigmoid(x + bias) ddt, 0 where the maximum is min
//! a  = - exp(a_log) dt                       ddt = - exp(a_log) da,   da_log = sum over tokens of a da
//! ```
//!
//! Both are fp32 whatever the dtype of `x`: a decay is an exponential of sums of `a` over many tokens.

use burn::tensor::{Tensor, activation::sigmoid};
use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, matrix, reshaped, tensor, to_dtype, to_f32};
use crate::rms_norm::check_shapes;
use crate::tape::{Tape, Var};

/// Step sizes. x: [.., heads], bias: `[heads]` -> [.., heads] fp32, at least `min`.
///
/// # Panics
/// When the bias does not have the size of the last dimension.
#[track_caller]
pub fn time_step<B: Ops>(tape: &Tape<B>, x: &Var<B>, bias: &Param<B>, min: f64) -> Var<B> {
    check_shapes("time_step", &x.shape(), bias);
    let output = B::time_step_forward(x.value(), bias.value(), min);
    let (input, param) = (x.value(), bias.clone());
    tape.record_with_params(output, &[x], &[bias], move |dy| {
        let (dx, dbias) = B::time_step_backward(input, param.value(), dy, min);
        if param.requires_grad() {
            param.accumulate_grad(dbias);
        }
        vec![Some(dx)]
    })
}

/// Logarithms of decays: `-exp(a_log) dt`. dt: [.., heads] fp32, a_log: `[heads]` -> like dt.
///
/// # Panics
/// When `a_log` does not have the size of the last dimension.
#[track_caller]
pub fn log_decay<B: Ops>(tape: &Tape<B>, dt: &Var<B>, a_log: &Param<B>) -> Var<B> {
    check_shapes("log_decay", &dt.shape(), a_log);
    let output = B::log_decay_forward(dt.value(), a_log.value());
    let (input, param) = (dt.value(), a_log.clone());
    tape.record_with_params(output, &[dt], &[a_log], move |dy| {
        let (ddt, da_log) = B::log_decay_backward(input, param.value(), dy);
        if param.requires_grad() {
            param.accumulate_grad(da_log);
        }
        vec![Some(ddt)]
    })
}

pub(crate) fn portable_step<B: Ops>(x: Float<B>, bias: Float<B>, min: f64) -> Float<B> {
    let shape = dims(&x);
    let steps = softplus(biased::<B>(x, bias)).clamp_min(min);
    reshaped::<B>(float(steps), &shape)
}

pub(crate) fn portable_step_backward<B: Ops>(
    x: Float<B>,
    bias: Float<B>,
    dy: Float<B>,
    min: f64,
) -> (Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&x), x.dtype());
    let heads = *shape.last().expect("x has at least one dimension");
    let x = biased::<B>(x, bias);
    let clamped = softplus(x.clone()).lower_elem(min);
    let dx = (matrix::<B>(to_f32::<B>(dy)) * sigmoid(x)).mask_fill(clamped, 0.0);
    let dbias = dx.clone().sum_dim(0);
    (
        reshaped::<B>(to_dtype::<B>(float(dx), dtype), &shape),
        reshaped::<B>(float(dbias), &[heads]),
    )
}

pub(crate) fn portable_decay<B: Ops>(dt: Float<B>, a_log: Float<B>) -> Float<B> {
    let shape = dims(&dt);
    let decay = matrix::<B>(to_f32::<B>(dt)) * rate::<B>(a_log);
    reshaped::<B>(float(decay), &shape)
}

pub(crate) fn portable_decay_backward<B: Ops>(
    dt: Float<B>,
    a_log: Float<B>,
    dy: Float<B>,
) -> (Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&dt), dt.dtype());
    let heads = *shape.last().expect("dt has at least one dimension");
    let dy = matrix::<B>(to_f32::<B>(dy));
    let rate = rate::<B>(a_log);
    let ddt = dy.clone() * rate.clone();
    let da_log = (dy * matrix::<B>(to_f32::<B>(dt)) * rate).sum_dim(0);
    (
        reshaped::<B>(to_dtype::<B>(float(ddt), dtype), &shape),
        reshaped::<B>(float(da_log), &[heads]),
    )
}

fn biased<B: Ops>(x: Float<B>, bias: Float<B>) -> Tensor<B, 2> {
    matrix::<B>(to_f32::<B>(x)) + tensor::<B, 1>(to_f32::<B>(bias)).unsqueeze()
}

/// `-exp(a_log)`: [1, heads].
fn rate<B: Ops>(a_log: Float<B>) -> Tensor<B, 2> {
    tensor::<B, 1>(to_f32::<B>(a_log)).exp().neg().unsqueeze()
}

/// `log(1 + exp(x))` without overflow: `max(x, 0) + log(1 + exp(-|x|))`.
fn softplus<B: Ops>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    x.clone().clamp_min(0.0) + x.abs().neg().exp().log1p()
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{assert_close, check, random};
    use crate::{float_from_f32, to_f32_vec};

    #[test]
    fn matches_autodiff() {
        check(
            "time_step",
            &[random(&[3, 7, 5], 1)],
            &[random(&[5], 2)],
            |tape, x, p| time_step(tape, &x[0], &p[0], 0.6),
            |x, p| {
                let x = x[0].tensor::<3>() + p[0].tensor::<1>().unsqueeze();
                let steps = (x.exp() + 1.0).log();
                assert!(steps.clone().lower_elem(0.6).any().into_scalar());
                steps.clamp_min(0.6)
            },
        );
        check(
            "log_decay",
            &[random(&[3, 7, 5], 1)],
            &[random(&[5], 2)],
            |tape, x, p| log_decay(tape, &x[0], &p[0]),
            |x, p| x[0].tensor::<3>() * p[0].tensor::<1>().exp().neg().unsqueeze(),
        );
    }

    #[test]
    fn large_and_small_arguments_are_exact() {
        let device = Default::default();
        let x = float_from_f32::<Flex>(&[200.0, -20.0, -200.0], &[1, 3], &device);
        let bias = float_from_f32::<Flex>(&[0.0; 3], &[3], &device);
        let steps = to_f32_vec::<Flex>(Flex::time_step_forward(x.clone(), bias.clone(), 0.0));
        assert_eq!(steps[0], 200.0);
        assert!((steps[1] / (-20.0f32).exp() - 1.0).abs() < 1e-5 && steps[2] == 0.0);
        let (dx, dbias) = Flex::time_step_backward(x, bias, random(&[1, 3], 1), 0.0);
        assert_close("one row", &reshaped::<Flex>(dx, &[3]), &dbias, 0.0);
    }
}
