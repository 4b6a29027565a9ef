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

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension. x: [.., h], weight: [h] -> [.., h].
///
/// # Panics
/// When the weight does not have the size of the last dimension.
#[track_caller]
pub fn rms_norm<B: Ops>(tape: &Tape<B>, x: &Var<B>, weight: &Param<B>, spec: NormSpec) -> Var<B> {
    check_shapes("rms_norm", &x.shape(), weight);
    let output = B::rms_norm_forward(x.value(), weight.value(), spec);

    let input = x.value();
    let param = weight.clone();
    tape.record_with_params(output, &[x], &[weight], move |dy| {
        let (dx, dweight) = B::rms_norm_backward(input, param.value(), dy, spec);
        if param.requires_grad() {
            param.accumulate_grad(dweight);
        }
        vec![Some(dx)]
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
