//! RMSNorm over a width that ranks divide (OLMoE normalises all query heads at once).
//!
//! ```text
//! r    = 1 / sqrt(mean(x^2) + eps)                  the mean over the whole width: one all-reduce of a number per row
//! y    = r x w
//! dx   = r (w dy - x r^2 mean(w dy x))              one more all-reduce
//! dw   = sum over rows of r x dy
//! ```
//!
//! Where several ranks hold copies of a part (more ranks than key-value heads), the means run over the copies too. That
//! leaves the forward pass as it is, and makes each copy's gradient its share of the whole one.

use bridge_ops::{DType, Float, NormSpec, Ops, Param, Tape, Var, rms_norm};
use burn::tensor::Tensor;
use burn_backend::TensorMetadata;

use super::TensorRegion;
use crate::comm::ReduceOp;
use crate::tensors::{dims, float, matrix, reshaped, tensor, to_dtype};

/// x: local [.., width / tp], weight: local `[width / tp]` -> like x.
pub fn rms_norm_across<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    spec: NormSpec,
    region: &TensorRegion<B>,
) -> Var<B> {
    let Some(group) = region.group() else {
        return rms_norm(tape, x, weight, spec);
    };
    let (shape, dtype) = (x.shape(), x.value().dtype());
    let wide = |x: Float<B>| matrix::<B>(to_dtype::<B>(x, DType::F32));
    let width = (weight.numel() * group.size()) as f64;
    let mean = {
        let group = group.clone();
        move |products: Tensor<B, 2>| {
            let sums = float(products.sum_dim(1));
            tensor::<B, 2>(group.all_reduce(sums, ReduceOp::Sum)).div_scalar(width)
        }
    };
    let scale_of = move |weight: &Param<B>| {
        let scale = tensor::<B, 1>(to_dtype::<B>(weight.value(), DType::F32));
        let scale = if spec.unit_offset {
            scale.add_scalar(1.0)
        } else {
            scale
        };
        scale.unsqueeze::<2>() // [1, width / tp]
    };

    let rows = wide(x.value());
    let r = mean(rows.clone().square())
        .add_scalar(spec.eps)
        .sqrt()
        .recip(); // [rows, 1]
    let y = rows.clone() * r.clone() * scale_of(weight);
    let output = reshaped::<B>(to_dtype::<B>(float(y), dtype), &shape);

    let param = weight.clone();
    tape.record_with_params(output, &[x], &[weight], move |dy| {
        let dy = wide(dy);
        let normed = rows * r.clone(); // r x
        if param.requires_grad() {
            let dw = (dy.clone() * normed.clone()).sum_dim(0);
            let dw = reshaped::<B>(float(dw), &param.shape());
            param.accumulate_grad(dw);
        }
        let g = dy * scale_of(&param);
        let dot = mean(g.clone() * normed.clone());
        let dx = (g - normed * dot) * r;
        let dx = to_dtype::<B>(float(dx), dtype);
        debug_assert_eq!(dims(&dx)[1], shape[shape.len() - 1]);
        vec![Some(reshaped::<B>(dx, &shape))]
    })
}
