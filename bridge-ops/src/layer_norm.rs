//! Layer norm (Ba, Kiros and Hinton 2016).
//!
//! ```text
//! n  = (x - mean(x)) r,  r = 1 / sqrt(mean((x - mean(x))^2) + eps)     per row of x: [.., h]
//! y  = n * w + b                                                        w, b: [h]
//! dx = r (g - mean(g) - n * mean(g n))                                  with g = dy * w
//! dw = sum over rows of dy * n,  db = sum over rows of dy
//! ```
//!
//! Computed in fp32 and rounded to the dtype of `x` at the end.

use burn::tensor::Tensor;
use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, matrix, reshaped, tensor, to_dtype, to_f32};
use crate::rms_norm::{NormSpec, check_shapes, effective_weight};
use crate::tape::{Tape, Var};

/// Normalizes the last dimension to mean 0 and variance 1, then scales and shifts. x: [.., h], weight, bias: `[h]`
/// -> [.., h].
///
/// # Panics
/// When weight or bias do not have the size of the last dimension.
#[track_caller]
pub fn layer_norm<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
    spec: NormSpec,
) -> Var<B> {
    check_shapes("layer_norm", &x.shape(), weight);
    if let Some(bias) = bias {
        check_shapes("layer_norm", &x.shape(), bias);
    }
    let output = B::layer_norm_forward(x.value(), weight.value(), bias.map(Param::value), spec);

    let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
    let (weight, bias) = (weight.clone(), bias.cloned());
    let again = {
        let (input, weight, bias) = (x.value(), weight.clone(), bias.clone());
        move || {
            let bias = bias.as_ref().map(Param::value);
            B::layer_norm_forward(input.clone(), weight.value(), bias, spec)
        }
    };
    let input = x.saved();
    let normed = tape.record_with_params(output, &[x], &params, move |dy| {
        let (dx, dweight, dbias) = B::layer_norm_backward(input.get(), weight.value(), dy, spec);
        if weight.requires_grad() {
            weight.accumulate_grad(dweight);
        }
        if let Some(bias) = bias.filter(|bias| bias.requires_grad()) {
            bias.accumulate_grad(dbias);
        }
        vec![Some(dx)]
    });
    tape.cheap(normed, again)
}

pub(crate) fn portable<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    bias: Option<Float<B>>,
    spec: NormSpec,
) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let (normed, _) = normalize(matrix::<B>(to_f32::<B>(x)), spec);
    let mut y = normed * effective_weight::<B>(weight, spec).unsqueeze();
    if let Some(bias) = bias {
        y = y + tensor::<B, 1>(to_f32::<B>(bias)).unsqueeze();
    }
    reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape)
}

pub(crate) fn portable_backward<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    dy: Float<B>,
    spec: NormSpec,
) -> (Float<B>, Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&x), x.dtype());
    let (normed, r) = normalize(matrix::<B>(to_f32::<B>(x)), spec);
    let dy = matrix::<B>(to_f32::<B>(dy));
    let hidden = dy.dims()[1];

    let dbias = dy.clone().sum_dim(0); // [1, h]
    let dweight = (dy.clone() * normed.clone()).sum_dim(0); // [1, h]
    let g = dy * effective_weight::<B>(weight, spec).unsqueeze();
    let dx = (g.clone() - g.clone().mean_dim(1) - normed.clone() * (g * normed).mean_dim(1)) * r;
    (
        reshaped::<B>(to_dtype::<B>(float(dx), dtype), &shape),
        reshaped::<B>(float(dweight), &[hidden]),
        reshaped::<B>(float(dbias), &[hidden]),
    )
}

/// x: [rows, h] -> normalized rows, and the factor r: [rows, 1].
fn normalize<B: Ops>(x: Tensor<B, 2>, spec: NormSpec) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let centred = x.clone() - x.mean_dim(1);
    let r = centred
        .clone()
        .square()
        .mean_dim(1)
        .add_scalar(spec.eps)
        .sqrt()
        .recip();
    (centred * r.clone(), r)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, assert_fast, check, random, random_bf16};

    #[test]
    fn matches_autodiff() {
        for hidden in [5, 37, 64, 131] {
            for weight in [random(&[hidden], 2), random_bf16(&[hidden], 2)] {
                check(
                    &format!("hidden {hidden}"),
                    &[random(&[2, 7, hidden], 1)],
                    &[weight, random(&[hidden], 3)],
                    |tape, x, p| layer_norm(tape, &x[0], &p[0], Some(&p[1]), NormSpec::new(1e-3)),
                    |x, p| {
                        let (x, w, b) =
                            (x[0].tensor::<3>(), p[0].tensor::<1>(), p[1].tensor::<1>());
                        let centred = x.clone() - x.mean_dim(2);
                        let deviation =
                            centred.clone().square().mean_dim(2).add_scalar(1e-3).sqrt();
                        centred / deviation * w.unsqueeze() + b.unsqueeze()
                    },
                );
                assert_fast(&["layer_norm_forward", "layer_norm_backward"]);
            }
        }
    }

    #[test]
    fn kernels_agree_with_portable_bodies() {
        let spec = NormSpec {
            eps: 1e-5,
            unit_offset: true,
        };
        let (x, w, dy) = (
            random(&[300, 131], 1),
            random(&[131], 2),
            random(&[300, 131], 3),
        );
        let found = Flex::layer_norm_forward(x.clone(), w.clone(), None, spec);
        assert_close(
            "y",
            &found,
            &portable::<Flex>(x.clone(), w.clone(), None, spec),
            ROUNDING,
        );
        let found = Flex::layer_norm_backward(x.clone(), w.clone(), dy.clone(), spec);
        let expected = portable_backward::<Flex>(x, w, dy, spec);
        assert_close("dx", &found.0, &expected.0, ROUNDING);
        assert_close("dw", &found.1, &expected.1, ROUNDING);
        assert_close("db", &found.2, &expected.2, ROUNDING);
    }
}
