//! RMS norm with a gate, and vectors of length one. Kernels: `kernels/gated_rms_norm.cu`, `kernels/l2_norm.cu`.

use bridge_ops::{GatedNormGrads, GatedNormSpec};
use burn_backend::{DType, TensorMetadata};

use super::{matrix, vector};
use crate::backend::Cuda;
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// How threads share runs of channels that are normalized together.
#[derive(Debug, Clone, Copy)]
struct Team {
    /// Channels that move at once.
    vector: usize,
    /// Threads of a team: part of a warp, or a block.
    threads: usize,
    /// Packs of each thread.
    packs: usize,
}

impl Team {
    fn new(size: usize, operands: &[&CudaTensor]) -> Self {
        let vector = vector(size, operands);
        let packs = size.div_ceil(vector);
        // Up to four packs a thread stay in registers.
        let threads = if packs <= 4 * 32 {
            packs.next_power_of_two().min(32)
        } else {
            packs.div_ceil(4).next_multiple_of(32).clamp(64, 512)
        };
        Self {
            vector,
            threads,
            packs: packs.div_ceil(threads),
        }
    }

    fn block(self) -> u32 {
        if self.threads > 32 {
            self.threads as u32
        } else {
            256
        }
    }

    /// Blocks that hold a team for each of `rows`.
    fn blocks(self, rows: usize) -> usize {
        rows.div_ceil(self.block() as usize / self.threads)
    }

    fn defines(self) -> [(&'static str, String); 3] {
        [
            ("VECTOR", self.vector.to_string()),
            ("TEAM", self.threads.to_string()),
            ("PACKS", self.packs.to_string()),
        ]
    }
}

fn kernel(
    gpu: &Gpu,
    file: &'static str,
    types: &[(&'static str, &'static str)],
    team: Team,
    entry: &'static str,
) -> Kernel {
    let team = team.defines();
    let mut defines = types.to_vec();
    defines.extend(team.iter().map(|(name, value)| (*name, value.as_str())));
    gpu.kernel(file, &defines, entry).or_panic()
}

fn gated_types(
    x: &CudaTensor,
    weight: &CudaTensor,
    spec: GatedNormSpec,
) -> [(&'static str, &'static str); 3] {
    [
        ("TYPE", type_name(x.dtype())),
        ("WEIGHT", type_name(weight.dtype())),
        ("GATE_FIRST", if spec.gate_first { "1" } else { "0" }),
    ]
}

pub(super) fn gated_forward(
    x: CudaTensor,
    gate: CudaTensor,
    weight: CudaTensor,
    spec: GatedNormSpec,
) -> CudaTensor {
    let shape = x.dims().to_vec();
    let gate = matrix(cast(gate, x.dtype()));
    let (x, weight) = (matrix(x), weight.into_packed());
    let (gpu, rows, h) = (x.gpu(), x.dims()[0], x.dims()[1]);
    let y = CudaTensor::empty(gpu, &shape, x.dtype());
    if y.count() == 0 {
        return y;
    }
    let team = Team::new(spec.group_size, &[&x, &gate, &weight]);
    let types = gated_types(&x, &weight, spec);
    let kernel = kernel(gpu, "gated_rms_norm", &types, team, "forward");
    let shape = Launch::grid([team.blocks(rows), h / spec.group_size, 1], team.block());
    // SAFETY: packed operands; a team for each group of each row; the weight has one element per column.
    unsafe {
        launch!(gpu, kernel, shape; y.address(), x.address(), gate.address(), weight.address(), rows as i64, h as i64,
            spec.group_size as i64, spec.eps as f32)
        .or_panic();
    }
    y
}

pub(super) fn gated_backward(
    x: CudaTensor,
    gate: CudaTensor,
    weight: CudaTensor,
    dy: CudaTensor,
    spec: GatedNormSpec,
) -> GatedNormGrads<Cuda> {
    let (shape, gate_dtype) = (x.dims().to_vec(), gate.dtype());
    let gate = matrix(cast(gate, x.dtype()));
    let dy = matrix(cast(dy, x.dtype()));
    let (x, weight) = (matrix(x), weight.into_packed());
    let (gpu, rows, h) = (x.gpu(), x.dims()[0], x.dims()[1]);
    let dx = CudaTensor::empty(gpu, &shape, x.dtype());
    let dgate = CudaTensor::empty(gpu, &shape, x.dtype());
    if dx.count() == 0 {
        return GatedNormGrads {
            dx,
            dgate: cast(dgate, gate_dtype),
            dweight: CudaTensor::zeros(gpu, &[h], DType::F32),
        };
    }
    let team = Team::new(spec.group_size, &[&x, &gate, &weight, &dy]);
    let types = gated_types(&x, &weight, spec);
    let kernel = kernel(gpu, "gated_rms_norm", &types, team, "backward");
    let groups = h / spec.group_size;
    // What the GPU holds at once, so that the partial sums stay few.
    let resident = (512 / team.block() as usize).max(1);
    let blocks = (gpu.multiprocessors * resident)
        .div_ceil(groups)
        .min(team.blocks(rows));
    let parts = CudaTensor::empty(gpu, &[blocks, h], DType::F32);
    let shape = Launch::grid([blocks, groups, 1], team.block());
    // SAFETY: packed operands; each block walks rows of its group and writes its own row of parts.
    unsafe {
        launch!(gpu, kernel, shape; dx.address(), dgate.address(), parts.address(), x.address(), gate.address(),
            weight.address(), dy.address(), rows as i64, h as i64, spec.group_size as i64, spec.eps as f32)
        .or_panic();
    }
    GatedNormGrads {
        dx,
        dgate: cast(dgate, gate_dtype),
        dweight: reduce(Reduction::Sum, &parts, 0, DType::F32).reshape(&[h]),
    }
}

pub(super) fn l2_forward(x: CudaTensor, eps: f64) -> CudaTensor {
    let shape = x.dims().to_vec();
    let x = matrix(x);
    let (gpu, rows, n) = (x.gpu(), x.dims()[0], x.dims()[1]);
    let y = CudaTensor::empty(gpu, &shape, x.dtype());
    if y.count() == 0 {
        return y;
    }
    let team = Team::new(n, &[&x]);
    let types = [("TYPE", type_name(x.dtype()))];
    let kernel = kernel(gpu, "l2_norm", &types, team, "forward");
    let shape = Launch::linear(team.blocks(rows), team.block());
    // SAFETY: packed operands; a team for each row.
    unsafe {
        launch!(gpu, kernel, shape; y.address(), x.address(), rows as i64, n as i64, eps as f32)
            .or_panic();
    }
    y
}

pub(super) fn l2_backward(x: CudaTensor, dy: CudaTensor, eps: f64) -> CudaTensor {
    let shape = x.dims().to_vec();
    let dy = matrix(cast(dy, x.dtype()));
    let x = matrix(x);
    let (gpu, rows, n) = (x.gpu(), x.dims()[0], x.dims()[1]);
    let dx = CudaTensor::empty(gpu, &shape, x.dtype());
    if dx.count() == 0 {
        return dx;
    }
    let team = Team::new(n, &[&x, &dy]);
    let types = [("TYPE", type_name(x.dtype()))];
    let kernel = kernel(gpu, "l2_norm", &types, team, "backward");
    let shape = Launch::linear(team.blocks(rows), team.block());
    // SAFETY: packed operands; a team for each row.
    unsafe {
        launch!(gpu, kernel, shape; dx.address(), x.address(), dy.address(), rows as i64, n as i64, eps as f32)
            .or_panic();
    }
    dx
}
