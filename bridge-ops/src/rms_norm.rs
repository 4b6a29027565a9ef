//! Root-mean-square norm (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization").
//!
//! ```text
//! r  = 1 / sqrt(mean(x^2) + eps)          per row of x: [.., h]
//! y  = x r * w                            w: [h]; w + 1 with a unit offset (Gemma)
//! dx = r (g - x r * mean(g x r))          with g = dy * w
//! dw = sum over rows of dy * x r
//! ```
//!
//! Computed in fp32 and rounded to the dtype of `x` at the end.

use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, matrix, reshaped, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// What a norm layer does besides normalizing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square (or the variance) before the root.
    pub eps: f64,
    /// Whether the weight is stored as its difference from one.
    pub unit_offset: bool,
}

impl NormSpec {
    /// A norm with a plain weight.
    pub fn new(eps: f64) -> Self {
        Self {
            eps,
            unit_offset: false,
        }
    }
}

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension. x: [.., h], weight: `[h]` -> [.., h].
///
/// # Panics
/// When the weight does not have the size of the last dimension.
#[track_caller]
pub fn rms_norm<B: Ops>(tape: &Tape<B>, x: &Var<B>, weight: &Param<B>, spec: NormSpec) -> Var<B> {
    check_shapes("rms_norm", &x.shape(), weight);
    let output = B::rms_norm_forward(x.value(), weight.value(), spec);

    let (input, param) = (x.saved(), weight.clone());
    let normed = tape.record_accumulating(output, x, &[weight], move |dy, so_far| {
        let (dx, dweight) = B::rms_norm_backward_add(input.get(), param.value(), dy, spec, so_far);
        if param.requires_grad() {
            param.accumulate_grad(dweight);
        }
        Some(dx)
    });
    let (input, param) = (x.value(), weight.clone());
    tape.cheap(normed, move || {
        B::rms_norm_forward(input.clone(), param.value(), spec)
    })
}

#[track_caller]
pub(crate) fn check_shapes<B: Ops>(op: &str, x: &[usize], param: &Param<B>) {
    let shape = param.shape();
    assert!(
        shape.len() == 1 && x.last() == Some(&shape[0]),
        "{op}: `{}` has shape {shape:?}, which does not fit an input of shape {x:?}",
        param.name()
    );
}

pub(crate) fn portable<B: Ops>(x: Float<B>, weight: Float<B>, spec: NormSpec) -> Float<B> {
    let (shape, dtype) = (dims(&x), x.dtype());
    let x = matrix::<B>(to_f32::<B>(x));
    let r = x
        .clone()
        .square()
        .mean_dim(1)
        .add_scalar(spec.eps)
        .sqrt()
        .recip(); // [rows, 1]
    let y = x * r * effective_weight::<B>(weight, spec).unsqueeze();
    reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape)
}

pub(crate) fn portable_backward<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    dy: Float<B>,
    spec: NormSpec,
) -> (Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&x), x.dtype());
    let x = matrix::<B>(to_f32::<B>(x));
    let dy = matrix::<B>(to_f32::<B>(dy));
    let hidden = x.dims()[1];

    let r = x
        .clone()
        .square()
        .mean_dim(1)
        .add_scalar(spec.eps)
        .sqrt()
        .recip(); // [rows, 1]
    let normed = x * r.clone();
    let dweight = (dy.clone() * normed.clone()).sum_dim(0); // [1, h]
    let g = dy * effective_weight::<B>(weight, spec).unsqueeze();
    let mean = (g.clone() * normed.clone()).mean_dim(1); // [rows, 1]
    let dx = (g - normed * mean) * r;
    (
        reshaped::<B>(to_dtype::<B>(float(dx), dtype), &shape),
        reshaped::<B>(float(dweight), &[hidden]),
    )
}

pub(crate) fn portable_backward_add<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    dy: Float<B>,
    spec: NormSpec,
    so_far: Option<Float<B>>,
) -> (Float<B>, Float<B>) {
    let (dx, dweight) = B::rms_norm_backward(x, weight, dy, spec);
    let dx = match so_far {
        Some(so_far) => B::add(so_far, dx),
        None => dx,
    };
    (dx, dweight)
}

/// The fp32 factor: the weight, plus one with a unit offset.
pub(crate) fn effective_weight<B: Ops>(
    weight: Float<B>,
    spec: NormSpec,
) -> burn::tensor::Tensor<B, 1> {
    let weight = tensor::<B, 1>(to_f32::<B>(weight));
    if spec.unit_offset {
        weight.add_scalar(1.0)
    } else {
        weight
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, assert_fast, check, random, random_bf16};
    use crate::{Tape, float_from_f32, to_f32_vec};

    #[test]
    fn matches_autodiff() {
        // 37 and 131 are no multiples of a vector; 5 is shorter than one.
        for (hidden, unit_offset) in [(5, false), (37, true), (131, false), (64, true)] {
            for weight in [random(&[hidden], 2), random_bf16(&[hidden], 2)] {
                check(
                    &format!("hidden {hidden}"),
                    &[random(&[3, 7, hidden], 1)],
                    &[weight],
                    |tape, x, p| {
                        rms_norm(
                            tape,
                            &x[0],
                            &p[0],
                            NormSpec {
                                eps: 1e-3,
                                unit_offset,
                            },
                        )
                    },
                    |x, p| {
                        let (x, w) = (x[0].tensor::<3>(), p[0].tensor::<1>());
                        let w = if unit_offset { w.add_scalar(1.0) } else { w };
                        let rms = x.clone().square().mean_dim(2).add_scalar(1e-3).sqrt();
                        x / rms * w.unsqueeze()
                    },
                );
                assert_fast(&["rms_norm_forward", "rms_norm_backward"]);
            }
        }
    }

    #[test]
    fn kernels_agree_with_portable_bodies() {
        let spec = NormSpec::new(1e-5);
        // Enough rows for several blocks of partial sums.
        let (x, w, dy) = (
            random(&[300, 131], 1),
            random(&[131], 2),
            random(&[300, 131], 3),
        );
        let found = Flex::rms_norm_forward(x.clone(), w.clone(), spec);
        assert_close(
            "y",
            &found,
            &portable::<Flex>(x.clone(), w.clone(), spec),
            ROUNDING,
        );
        let found = Flex::rms_norm_backward(x.clone(), w.clone(), dy.clone(), spec);
        let expected = portable_backward::<Flex>(x, w, dy, spec);
        assert_close("dx", &found.0, &expected.0, ROUNDING);
        assert_close("dw", &found.1, &expected.1, ROUNDING);
    }

    #[test]
    fn known_values() {
        let device = Default::default();
        let w = Param::<Flex>::new("w", float_from_f32::<Flex>(&[1.0, 2.0], &[2], &device));
        let tape = Tape::inference();
        let x = tape.constant(float_from_f32::<Flex>(&[3.0, 4.0], &[1, 2], &device));
        let y = to_f32_vec::<Flex>(rms_norm(&tape, &x, &w, NormSpec::new(0.0)).into_value());
        // rms(3, 4) = sqrt(12.5)
        assert!(
            (y[0] - 0.848_528_1).abs() < 1e-6 && (y[1] - 2.262_741_7).abs() < 1e-6,
            "{y:?}"
        );
    }
}
