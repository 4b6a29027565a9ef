//! RMSNorm with a gate, as recurrent layers have it before their output projection, over groups of neighbouring
//! channels.
//!
//! ```text
//! gate first (Mamba-2):        y = norm(x silu(z)) w
//! norm first (Qwen3-Next):     y = norm(x) w silu(z)
//!
//! norm(u) = u r,  r = 1 / sqrt(mean(u^2) + eps)     per group of a row of x, z: [.., h]; w: [h]
//! ```
//!
//! With `n = norm(u)` and `g = dn`: `du = r (g - n mean(g n))` per group. Computed in fp32 and rounded to the dtype of
//! `x` at the end.

use burn::tensor::{Tensor, activation::sigmoid};
use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, matrix, reshaped, tensor, to_dtype, to_f32};
use crate::rms_norm::check_shapes;
use crate::tape::{Tape, Var};

/// What a gated norm does besides normalizing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatedNormSpec {
    /// Added to the mean square before the root.
    pub eps: f64,
    /// Channels that are normalized together; divides the number of channels.
    pub group_size: usize,
    /// Whether the gate is applied before the norm rather than after it.
    pub gate_first: bool,
}

/// What the backward kernel returns.
#[derive(Debug, Clone)]
pub struct GatedNormGrads<B: Ops> {
    /// Like x.
    pub dx: Float<B>,
    /// Like the gate.
    pub dgate: Float<B>,
    /// `[h]` fp32.
    pub dweight: Float<B>,
}

/// RMSNorm of `x` with SiLU of `gate` as a factor. x, gate: [.., h], weight: `[h]` -> like x.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn gated_rms_norm<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    gate: &Var<B>,
    weight: &Param<B>,
    spec: GatedNormSpec,
) -> Var<B> {
    check_shapes("gated_rms_norm", &x.shape(), weight);
    let (shape, gate_shape) = (x.shape(), gate.shape());
    assert_eq!(
        shape, gate_shape,
        "gated_rms_norm: shapes {shape:?} and {gate_shape:?} differ"
    );
    assert!(
        spec.group_size > 0 && weight.shape()[0].is_multiple_of(spec.group_size),
        "gated_rms_norm: groups of {} do not divide the {} channels of `{}`",
        spec.group_size,
        weight.shape()[0],
        weight.name()
    );
    let output = B::gated_rms_norm_forward(x.value(), gate.value(), weight.value(), spec);
    let (input, gate_value, param) = (x.value(), gate.value(), weight.clone());
    let y = tape.record_with_params(output, &[x, gate], &[weight], move |dy| {
        let grads = B::gated_rms_norm_backward(input, gate_value, param.value(), dy, spec);
        if param.requires_grad() {
            param.accumulate_grad(grads.dweight);
        }
        vec![Some(grads.dx), Some(grads.dgate)]
    });
    let (x, gate, weight) = (x.value(), gate.value(), weight.clone());
    tape.cheap(y, move || {
        B::gated_rms_norm_forward(x.clone(), gate.clone(), weight.value(), spec)
    })
}

pub(crate) fn portable<B: Ops>(
    x: Float<B>,
    gate: Float<B>,
    weight: Float<B>,
    spec: GatedNormSpec,
) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let (x, gate) = (matrix::<B>(to_f32::<B>(x)), matrix::<B>(to_f32::<B>(gate)));
    let weight = tensor::<B, 1>(to_f32::<B>(weight)).unsqueeze::<2>();
    let factor = gate.clone() * sigmoid(gate);
    let y = if spec.gate_first {
        normed(x * factor, spec).0 * weight
    } else {
        normed(x, spec).0 * weight * factor
    };
    reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape)
}

pub(crate) fn portable_backward<B: Ops>(
    x: Float<B>,
    gate: Float<B>,
    weight: Float<B>,
    dy: Float<B>,
    spec: GatedNormSpec,
) -> GatedNormGrads<B> {
    let (shape, x_dtype, gate_dtype) = (dims(&x), x.dtype(), gate.dtype());
    let [x, z, dy] = [x, gate, dy].map(|x| matrix::<B>(to_f32::<B>(x)));
    let weight = tensor::<B, 1>(to_f32::<B>(weight)).unsqueeze::<2>();
    let channels = x.dims()[1];
    let s = sigmoid(z.clone());
    let factor = z.clone() * s.clone();
    // silu' = s + z s (1 - s)
    let slope = s.clone() + factor.clone() * s.neg().add_scalar(1.0);

    let (dx, dfactor, dweight) = if spec.gate_first {
        let (n, r) = normed(x.clone() * factor.clone(), spec);
        let dweight = (dy.clone() * n.clone()).sum_dim(0);
        let du = through_norm(dy * weight, n, r, spec);
        (du.clone() * factor, du * x, dweight)
    } else {
        let (n, r) = normed(x, spec);
        let gated = dy.clone() * factor;
        let dweight = (gated.clone() * n.clone()).sum_dim(0);
        let dfactor = dy * n.clone() * weight.clone();
        (through_norm(gated * weight, n, r, spec), dfactor, dweight)
    };
    let restored = |x: Tensor<B, 2>, dtype| reshaped::<B>(to_dtype::<B>(float(x), dtype), &shape);
    GatedNormGrads {
        dx: restored(dx, x_dtype),
        dgate: restored(dfactor * slope, gate_dtype),
        dweight: reshaped::<B>(float(dweight), &[channels]),
    }
}

/// The norm without a weight, and the factor of each group: [rows, h], [rows * groups, 1].
fn normed<B: Ops>(x: Tensor<B, 2>, spec: GatedNormSpec) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let shape = x.dims();
    let x = grouped(x, spec);
    let r = x
        .clone()
        .square()
        .mean_dim(1)
        .add_scalar(spec.eps)
        .sqrt()
        .recip();
    ((x * r.clone()).reshape(shape), r)
}

/// From the gradient of the norm's output to that of its input.
fn through_norm<B: Ops>(
    g: Tensor<B, 2>,
    n: Tensor<B, 2>,
    r: Tensor<B, 2>,
    spec: GatedNormSpec,
) -> Tensor<B, 2> {
    let shape = g.dims();
    let (g, n) = (grouped(g, spec), grouped(n, spec));
    let mean = (g.clone() * n.clone()).mean_dim(1);
    ((g - n * mean) * r).reshape(shape)
}

/// [rows, h] -> [rows * groups, group_size].
fn grouped<B: Ops>(x: Tensor<B, 2>, spec: GatedNormSpec) -> Tensor<B, 2> {
    let [rows, channels] = x.dims();
    x.reshape([rows * (channels / spec.group_size), spec.group_size])
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{check, random};

    #[test]
    fn matches_autodiff() {
        for (channels, group_size, gate_first) in
            [(12, 12, true), (21, 7, true), (12, 3, false), (5, 5, false)]
        {
            let spec = GatedNormSpec {
                eps: 1e-3,
                group_size,
                gate_first,
            };
            check(
                &format!("{spec:?}"),
                &[random(&[2, 3, channels], 1), random(&[2, 3, channels], 2)],
                &[random(&[channels], 3)],
                |tape, x, p| gated_rms_norm(tape, &x[0], &x[1], &p[0], spec),
                |x, p| {
                    let (x, z) = (x[0].tensor::<3>(), x[1].tensor::<3>());
                    let factor = z.clone() * sigmoid(z);
                    let u = if gate_first { x * factor.clone() } else { x };
                    let shape = [2, 3, channels / group_size, group_size];
                    let u = u.reshape(shape);
                    let rms = u.clone().square().mean_dim(3).add_scalar(1e-3).sqrt();
                    let y = (u / rms).reshape([2, 3, channels]) * p[0].tensor::<1>().unsqueeze();
                    if gate_first { y } else { y * factor }
                },
            );
        }
    }

    #[test]
    #[should_panic(expected = "groups of 4 do not divide the 6 channels of `w`")]
    fn groups_are_checked() {
        let weight = Param::<Flex>::new("w", random(&[6], 2));
        let spec = GatedNormSpec {
            eps: 1e-3,
            group_size: 4,
            gate_first: true,
        };
        let tape = Tape::inference();
        let x = tape.constant(random(&[2, 6], 1));
        gated_rms_norm(&tape, &x, &x, &weight, spec);
    }
}
