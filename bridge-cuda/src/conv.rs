//! Convolutions in two and three dimensions, as matrix products. Kernels: `kernels/conv.cu`.

use burn_backend::TensorMetadata;
use burn_backend::ops::{ConvOptions, ConvTransposeOptions};

use crate::device::{Argument, Launch, launch};
use crate::elementwise::{binary, blocks, type_name};
use crate::error::OrPanic;
use crate::matmul::matmul;
use crate::tensor::CudaTensor;

/// Sizes of a convolution, (depth, height, width) each. Mirrors `Geometry` in `kernels/conv.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Geometry {
    channels: i64,
    size: [i64; 3],
    out: [i64; 3],
    kernel: [i64; 3],
    stride: [i64; 3],
    padding: [i64; 3],
    dilation: [i64; 3],
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Geometry {}

/// Two or three values as (depth, height, width), with `missing` for an absent depth.
fn triple(values: &[usize], missing: i64) -> [i64; 3] {
    let mut out = [missing; 3];
    for (place, &value) in out[3 - values.len()..].iter_mut().zip(values) {
        *place = value as i64;
    }
    out
}

fn queue(entry: &'static str, out: &CudaTensor, input: &CudaTensor, geometry: Geometry) {
    let gpu = out.gpu();
    let total = out.count();
    if total == 0 {
        return;
    }
    let kernel = gpu
        .kernel("conv", &[("TYPE", type_name(out.dtype()))], entry)
        .or_panic();
    // SAFETY: packed operands whose sizes follow from the geometry.
    unsafe {
        launch!(gpu, kernel, Launch::linear(blocks(gpu, total, 1), 256); out.address(), input.address(), geometry, total as i64)
            .or_panic();
    }
}

/// Adds a bias `[channels]` to `[batch, channels, ..]`.
fn add_bias(out: CudaTensor, bias: Option<CudaTensor>) -> CudaTensor {
    let Some(bias) = bias else { return out };
    let mut shape = vec![1; out.dims().len()];
    shape[1] = bias.count();
    binary("AddTensor", out, bias.reshape(&shape), None)
}

/// x: `[batch, channels, spatial..]`, weight: `[out_channels, channels / groups, kernel..]` -> `[batch, out_channels, ..]`.
#[track_caller]
pub(crate) fn conv<const N: usize>(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    options: &ConvOptions<N>,
) -> CudaTensor {
    let x = x.packed();
    let (batch, channels, groups) = (x.dims()[0], x.dims()[1], options.groups);
    let (out_channels, per_group) = (weight.dims()[0], weight.dims()[1]);
    let kernel = weight.dims()[2..].to_vec();
    let spatial: Vec<usize> = (0..N)
        .map(|d| {
            let reach = options.dilation[d] * (kernel[d] - 1) + 1;
            let padded = x.dims()[2 + d] + 2 * options.padding[d];
            assert!(
                padded >= reach,
                "conv: the kernel reaches beyond the padded input in dimension {d}"
            );
            (padded - reach) / options.stride[d] + 1
        })
        .collect();
    let geometry = Geometry {
        channels: channels as i64,
        size: triple(&x.dims()[2..], 1),
        out: triple(&spatial, 1),
        kernel: triple(&kernel, 1),
        stride: triple(&options.stride, 1),
        padding: triple(&options.padding, 0),
        dilation: triple(&options.dilation, 1),
    };
    let positions: usize = spatial.iter().product();
    let taps: usize = kernel.iter().product();
    let columns = CudaTensor::empty(
        x.gpu(),
        &[batch, groups, per_group * taps, positions],
        x.dtype(),
    );
    queue("im2col", &columns, &x, geometry);
    let weight = weight
        .packed()
        .reshape(&[1, groups, out_channels / groups, per_group * taps]);
    let shape = [&[batch, out_channels], spatial.as_slice()].concat();
    add_bias(matmul(weight, columns).reshape(&shape), bias)
}

/// x: `[batch, channels, spatial..]`, weight: `[channels, out_channels / groups, kernel..]` -> `[batch, out_channels, ..]`.
#[track_caller]
pub(crate) fn conv_transpose<const N: usize>(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    options: &ConvTransposeOptions<N>,
) -> CudaTensor {
    let (batch, channels, groups) = (x.dims()[0], x.dims()[1], options.groups);
    let out_channels = weight.dims()[1] * groups;
    let kernel = weight.dims()[2..].to_vec();
    let spatial: Vec<usize> = (0..N)
        .map(|d| {
            (x.dims()[2 + d] - 1) * options.stride[d]
                + options.dilation[d] * (kernel[d] - 1)
                + options.padding_out[d]
                + 1
                - 2 * options.padding[d]
        })
        .collect();
    let geometry = Geometry {
        channels: out_channels as i64,
        size: triple(&spatial, 1),
        out: triple(&x.dims()[2..], 1),
        kernel: triple(&kernel, 1),
        stride: triple(&options.stride, 1),
        padding: triple(&options.padding, 0),
        dilation: triple(&options.dilation, 1),
    };
    let positions: usize = x.dims()[2..].iter().product();
    let taps: usize = kernel.iter().product();
    let weight = weight
        .packed()
        .reshape(&[1, groups, channels / groups, out_channels / groups * taps])
        .swap_dims(2, 3);
    let x = x
        .packed()
        .reshape(&[batch, groups, channels / groups, positions]);
    let columns = matmul(weight, x);
    let out = CudaTensor::empty(
        columns.gpu(),
        &[&[batch, out_channels], spatial.as_slice()].concat(),
        columns.dtype(),
    );
    queue("col2im", &out, &columns, geometry);
    add_bias(out, bias)
}
