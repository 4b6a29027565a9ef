//! Heads of multi-head latent attention. Kernels: `kernels/latent_heads.cu`.

use bridge_ops::{RotaryDirection, RotaryStyle, portable};
use burn_backend::{DType, TensorMetadata};

use crate::backend::Cuda;
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{blocks, cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Channels that move at once where `parts` are channel counts and steps of rows on 16-byte boundaries: 16 bytes of them, or
/// two, or one.
fn vector(dtype: DType, parts: &[usize], addresses: &[u64]) -> usize {
    let fits = |width: usize| {
        let bytes = (width * dtype.size()) as u64;
        parts.iter().all(|part| part.is_multiple_of(width))
            && addresses.iter().all(|at| at.is_multiple_of(bytes))
    };
    let widest = 16 / dtype.size();
    [widest, 2]
        .into_iter()
        .find(|&width| fits(width))
        .unwrap_or(1)
}

fn kernel(
    gpu: &Gpu,
    dtype: DType,
    vector: usize,
    style: RotaryStyle,
    entry: &'static str,
) -> Kernel {
    let vector = vector.to_string();
    let defines = [
        ("TYPE", type_name(dtype)),
        ("VECTOR", vector.as_str()),
        (
            "PAIRS",
            if style == RotaryStyle::Pairs {
                "1"
            } else {
                "0"
            },
        ),
    ];
    gpu.kernel("latent_heads", &defines, entry).or_panic()
}

pub(super) fn rotary_tail(
    x: CudaTensor,
    cos: CudaTensor,
    sin: CudaTensor,
    style: RotaryStyle,
    direction: RotaryDirection,
    start: usize,
) -> CudaTensor {
    let &[batch, seq, heads, d] = x.dims() else {
        panic!("rotary: x is [batch, seq, heads, d], found {x:?}")
    };
    let half = cos.dims()[2];
    let x = if x.strides()[3] == 1 && x.strides()[..3].iter().all(|&step| step >= 0) {
        x
    } else {
        x.packed()
    };
    let steps = [0, 1, 2].map(|axis| x.strides()[axis] as usize);
    let y = CudaTensor::empty(x.gpu(), x.dims(), x.dtype());
    let mut parts = vec![d, start];
    parts.extend(steps);
    parts.push(match style {
        RotaryStyle::Halves => half,
        RotaryStyle::Pairs => 2 * half,
    });
    let vector = vector(x.dtype(), &parts, &[x.address(), y.address()]);
    if start + 2 * half != d || (style == RotaryStyle::Pairs && vector == 1) {
        return portable::rotary_tail::<Cuda>(x, cos, sin, style, direction, start);
    }
    if y.count() == 0 {
        return y;
    }
    let [cos, sin] = [cos, sin].map(|table| cast(table, DType::F32).into_packed());
    let gpu = x.gpu();
    let kernel = kernel(gpu, x.dtype(), vector, style, "rotary_tail");
    let total = batch * seq * heads * (d / vector);
    let launch = Launch::linear(blocks(gpu, total, 1), 256);
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
        launch!(gpu, kernel, launch; y.address(), x.address(), cos.address(), sin.address(), total as i64, seq as i64,
            heads as i64, d as i64, start as i64, half as i64, x.strides()[0], x.strides()[1], x.strides()[2], table_batch,
            sign)
        .or_panic();
    }
    y
}

pub(super) fn keys(kv: CudaTensor, rotated: CudaTensor, nope: usize) -> CudaTensor {
    let (kv, rotated) = (kv.into_packed(), rotated.into_packed());
    let &[batch, seq, heads, width] = kv.dims() else {
        panic!("latent keys: kv is [batch, seq, heads, nope + value], found {kv:?}")
    };
    let (r, value) = (rotated.dims()[3], width - nope);
    let gpu = kv.gpu();
    let k = CudaTensor::empty(gpu, &[batch, seq, heads, nope + r], kv.dtype());
    if k.count() == 0 {
        return k;
    }
    let addresses = [kv.address(), rotated.address(), k.address()];
    let vector = vector(kv.dtype(), &[nope, r, value], &addresses);
    let kernel = kernel(gpu, kv.dtype(), vector, RotaryStyle::Halves, "keys");
    let total = k.count() / vector;
    let launch = Launch::linear(blocks(gpu, total, 1), 256);
    // SAFETY: packed operands of the sizes given.
    unsafe {
        launch!(gpu, kernel, launch; k.address(), kv.address(), rotated.address(), total as i64, heads as i64, nope as i64,
            r as i64, value as i64)
        .or_panic();
    }
    k
}

pub(super) fn keys_backward(
    dk: CudaTensor,
    dv: CudaTensor,
    nope: usize,
) -> (CudaTensor, CudaTensor) {
    let (dk, dv) = (dk.clone().into_packed(), cast(dv, dk.dtype()).into_packed());
    let (&[batch, seq, heads, width], &[.., value]) = (dk.dims(), dv.dims()) else {
        panic!("latent keys: dk is [batch, seq, heads, nope + r], found {dk:?}")
    };
    let r = width - nope;
    let gpu = dk.gpu();
    let dkv = CudaTensor::empty(gpu, &[batch, seq, heads, nope + value], dk.dtype());
    let drotated = CudaTensor::empty(gpu, &[batch, seq, 1, r], dk.dtype());
    let addresses = [dk.address(), dv.address(), dkv.address()];
    let vector = vector(dk.dtype(), &[nope, r, value], &addresses);
    let kernel = kernel(
        gpu,
        dk.dtype(),
        vector,
        RotaryStyle::Halves,
        "keys_backward",
    );
    let launch = Launch::linear(batch * seq, 256);
    // SAFETY: packed operands of the sizes given, one block per token.
    unsafe {
        launch!(gpu, kernel, launch; dkv.address(), drotated.address(), dk.address(), dv.address(), heads as i64,
            nope as i64, r as i64, value as i64)
        .or_panic();
    }
    (dkv, drotated)
}
