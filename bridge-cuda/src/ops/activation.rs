//! Activations, plain and gated. Kernels: `kernels/gated_activation.cu`.

use bridge_ops::{Activation, SwigluClamp};
use burn_backend::TensorMetadata;

use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{blocks, cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Name of an activation in the kernel file.
fn name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "Silu",
        Activation::Gelu => "Gelu",
        Activation::GeluTanh => "GeluTanh",
        Activation::QuickGelu => "QuickGelu",
        Activation::Relu => "Relu",
        Activation::Relu2 => "Relu2",
        Activation::Sigmoid => "Sigmoid",
        Activation::Tanh => "Tanh",
    }
}

fn kernel(
    x: &CudaTensor,
    activation: Activation,
    entry: &'static str,
) -> (&'static Gpu, Kernel, Launch, i64) {
    let defines = [("TYPE", type_name(x.dtype())), ("ACT", name(activation))];
    let gpu = x.gpu();
    let count = x.count();
    let shape = Launch::linear(blocks(gpu, count, 16 / x.dtype().size()), 256);
    (
        gpu,
        gpu.kernel("gated_activation", &defines, entry).or_panic(),
        shape,
        count as i64,
    )
}

/// Packed and aligned for 16-byte packs.
pub(super) fn aligned(x: CudaTensor) -> CudaTensor {
    let x = x.into_packed();
    if x.address().is_multiple_of(16) {
        x
    } else {
        x.copied()
    }
}

fn like(x: &CudaTensor) -> CudaTensor {
    CudaTensor::empty(x.gpu(), x.dims(), x.dtype())
}

pub(super) fn forward(x: CudaTensor, activation: Activation) -> CudaTensor {
    let x = aligned(x);
    let y = like(&x);
    if y.count() > 0 {
        let (gpu, kernel, shape, count) = kernel(&x, activation, "forward");
        // SAFETY: packed operands of `count` elements.
        unsafe { launch!(gpu, kernel, shape; y.address(), x.address(), count).or_panic() };
    }
    y
}

pub(super) fn backward(x: CudaTensor, dy: CudaTensor, activation: Activation) -> CudaTensor {
    let (dy, x) = (aligned(cast(dy, x.dtype())), aligned(x));
    let dx = like(&x);
    if dx.count() > 0 {
        let (gpu, kernel, shape, count) = kernel(&x, activation, "backward");
        // SAFETY: packed operands of `count` elements.
        unsafe {
            launch!(gpu, kernel, shape; dx.address(), x.address(), dy.address(), count).or_panic()
        };
    }
    dx
}

pub(super) fn gated_forward(
    gate: CudaTensor,
    up: CudaTensor,
    activation: Activation,
) -> CudaTensor {
    let (gate, up) = (aligned(gate), aligned(up));
    let y = like(&gate);
    if y.count() > 0 {
        let (gpu, kernel, shape, count) = kernel(&gate, activation, "gated_forward");
        // SAFETY: packed operands of `count` elements.
        unsafe {
            launch!(gpu, kernel, shape; y.address(), gate.address(), up.address(), count).or_panic()
        };
    }
    y
}

/// Returns (dgate, dup) and, if asked for, the result of the forward pass.
pub(super) fn gated_backward(
    gate: CudaTensor,
    up: CudaTensor,
    dy: CudaTensor,
    activation: Activation,
    with_output: bool,
) -> (CudaTensor, CudaTensor, Option<CudaTensor>) {
    let dy = aligned(cast(dy, gate.dtype()));
    let (gate, up) = (aligned(gate), aligned(up));
    // Each thread reads an element of every operand before it writes any, so what is written may take the place of what
    // nobody else needs.
    let place = |x: &CudaTensor| if x.is_unique() { x.clone() } else { like(x) };
    let (dgate, dup) = (place(&gate), place(&up));
    let y = with_output.then(|| place(&dy));
    if dgate.count() > 0 {
        let (gpu, kernel, shape, count) = kernel(&gate, activation, "gated_backward");
        let to = y.as_ref().map_or(0, CudaTensor::address);
        // SAFETY: packed operands of `count` elements.
        unsafe {
            launch!(gpu, kernel, shape; dgate.address(), dup.address(), to, gate.address(), up.address(), dy.address(), count)
                .or_panic();
        }
    }
    (dgate, dup, y)
}

/// Any activation: the clamped kernels do not look at it, but the file is compiled for one.
const UNUSED: Activation = Activation::Silu;

pub(super) fn clamped_forward(gate: CudaTensor, up: CudaTensor, clamp: SwigluClamp) -> CudaTensor {
    let (up, gate) = (aligned(cast(up, gate.dtype())), aligned(gate));
    let y = like(&gate);
    if y.count() > 0 {
        let (gpu, kernel, shape, count) = kernel(&gate, UNUSED, "clamped_forward");
        let (alpha, limit) = (clamp.alpha as f32, clamp.limit as f32);
        // SAFETY: packed operands of `count` elements.
        unsafe {
            launch!(gpu, kernel, shape; y.address(), gate.address(), up.address(), count, alpha, limit).or_panic();
        }
    }
    y
}

/// Returns (dgate, dup).
pub(super) fn clamped_backward(
    gate: CudaTensor,
    up: CudaTensor,
    dy: CudaTensor,
    clamp: SwigluClamp,
) -> (CudaTensor, CudaTensor) {
    let [up, dy] = [up, dy].map(|x| aligned(cast(x, gate.dtype())));
    let gate = aligned(gate);
    let (dgate, dup) = (like(&gate), like(&gate));
    if dgate.count() > 0 {
        let (gpu, kernel, shape, count) = kernel(&gate, UNUSED, "clamped_backward");
        let (alpha, limit) = (clamp.alpha as f32, clamp.limit as f32);
        // SAFETY: packed operands of `count` elements.
        unsafe {
            launch!(gpu, kernel, shape; dgate.address(), dup.address(), gate.address(), up.address(), dy.address(), count,
                alpha, limit)
            .or_panic();
        }
    }
    (dgate, dup)
}
