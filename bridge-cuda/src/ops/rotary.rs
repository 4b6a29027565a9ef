//! Rotary position embedding. Kernel: `kernels/rotary.cu`.

use bridge_ops::{RotaryDirection, RotaryStyle};
use burn_backend::{DType, TensorMetadata};

use crate::device::{Launch, launch};
use crate::elementwise::{blocks, cast, type_name};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

pub(super) fn rotary(
    x: CudaTensor,
    cos: CudaTensor,
    sin: CudaTensor,
    style: RotaryStyle,
    direction: RotaryDirection,
) -> CudaTensor {
    let &[batch, seq, heads, d] = x.dims() else {
        panic!("rotary: x is [batch, seq, heads, d]")
    };
    let x = if x.strides()[3] == 1 { x } else { x.packed() };
    let (cos, sin) = (
        cast(cos, DType::F32).packed(),
        cast(sin, DType::F32).packed(),
    );
    let half = cos.dims()[2];
    let gpu = x.gpu();
    let y = CudaTensor::empty(gpu, x.dims(), x.dtype());
    if y.count() == 0 {
        return y;
    }
    let pairs = style == RotaryStyle::Pairs;
    let vector = 16 / x.dtype().size();
    let whole = [
        half,
        x.strides()[0] as usize,
        x.strides()[1] as usize,
        x.strides()[2] as usize,
    ]
    .iter()
    .all(|step| step.is_multiple_of(vector));
    let packs = !pairs && 2 * half == d && whole && x.address().is_multiple_of(16) && half > 0;
    let (entry, per_head) = if packs {
        ("rotary_packs", half / vector)
    } else {
        ("rotary", d - half)
    };
    let defines = [
        ("TYPE", type_name(x.dtype())),
        ("PAIRS", if pairs { "1" } else { "0" }),
    ];
    let kernel = gpu.kernel("rotary", &defines, entry).or_panic();
    let total = batch * seq * heads * per_head;
    let shape = Launch::linear(blocks(gpu, total, 1), 256);
    let table_batch = if cos.dims()[0] == 1 {
        0
    } else {
        (seq * half) as i64
    };
    let sign = match direction {
        RotaryDirection::Forward => 1.0f32,
        RotaryDirection::Backward => -1.0,
    };
    // SAFETY: x with its own strides and packed channels, y packed, tables packed of [batch or 1, seq, half].
    unsafe {
        launch!(gpu, kernel, shape; y.address(), x.address(), cos.address(), sin.address(), total as i64, seq as i64,
            heads as i64, d as i64, half as i64, x.strides()[0], x.strides()[1], x.strides()[2], table_batch, sign)
        .or_panic();
    }
    y
}
