//! RMS norm and layer norm. Kernels: `kernels/rms_norm.cu`, `kernels/layer_norm.cu`.

use bridge_ops::NormSpec;
use burn_backend::{DType, TensorMetadata};

use super::{matrix, vector};
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// Threads of a block of the kernels for short rows.
const SHORT_THREADS: usize = 256;

/// Operands brought to the form the kernels take, and the launch that fits them.
struct Plan {
    gpu: &'static Gpu,
    x: CudaTensor,
    weight: CudaTensor,
    rows: usize,
    n: usize,
    vector: usize,
    threads: u32,
    offset: &'static str,
}

impl Plan {
    fn new(x: CudaTensor, weight: CudaTensor, others: &[&CudaTensor], spec: NormSpec) -> Self {
        let (x, weight) = (matrix(x), weight.packed());
        let (rows, n) = (x.dims()[0], x.dims()[1]);
        let mut operands = vec![&x, &weight];
        operands.extend(others);
        let vector = vector(n, &operands);
        let threads = n.div_ceil(vector).next_multiple_of(32).clamp(32, 512) as u32;
        let offset = if spec.unit_offset { "1.0f" } else { "0.0f" };
        Self {
            gpu: x.gpu(),
            x,
            weight,
            rows,
            n,
            vector,
            threads,
            offset,
        }
    }

    fn short_defines<'a>(
        &self,
        vector: &'a str,
        packs: &'a str,
        group: &'a str,
    ) -> [(&'static str, &'a str); 6] {
        [
            ("TYPE", type_name(self.x.dtype())),
            ("WEIGHT", type_name(self.weight.dtype())),
            ("VECTOR", vector),
            ("PACKS", packs),
            ("OFFSET", self.offset),
            ("GROUP", group),
        ]
    }

    /// Packs of a row that each thread owns.
    fn packs(&self) -> usize {
        self.n.div_ceil(self.vector * self.threads as usize)
    }

    /// For short rows: lanes of a warp that own a row, and packs of it that each has.
    fn short(&self) -> Option<(usize, usize)> {
        let packs = self.n.div_ceil(self.vector);
        let group = packs.next_power_of_two().min(32);
        // A longer row is better off with a block of its own.
        (packs.div_ceil(group) <= 2).then(|| (group, packs.div_ceil(group)))
    }

    /// Blocks of the backward pass: what the GPU holds at once, so that the partial sums stay few.
    fn blocks(&self) -> usize {
        let resident = (2048 / self.threads as usize).clamp(1, 4);
        self.rows.min(self.gpu.multiprocessors * resident)
    }
}

pub(super) fn rms_forward(x: CudaTensor, weight: CudaTensor, spec: NormSpec) -> CudaTensor {
    let shape = x.dims().to_vec();
    let plan = Plan::new(x, weight, &[], spec);
    let y = CudaTensor::empty(plan.gpu, &shape, plan.x.dtype());
    if y.count() == 0 {
        return y;
    }
    let vector = plan.vector.to_string();
    if let Some((group, packs)) = plan.short() {
        let (group_text, packs) = (group.to_string(), packs.to_string());
        let defines = plan.short_defines(&vector, &packs, &group_text);
        let kernel = plan
            .gpu
            .kernel("rms_norm", &defines, "short_forward")
            .or_panic();
        let launch = Launch::linear(
            plan.rows.div_ceil(SHORT_THREADS / group),
            SHORT_THREADS as u32,
        );
        // SAFETY: packed operands; a group of lanes per row; the weight has one element per column.
        unsafe {
            launch!(plan.gpu, kernel, launch; y.address(), plan.x.address(), plan.weight.address(), plan.rows as i64,
                plan.n as i64, spec.eps as f32)
            .or_panic();
        }
        return y;
    }
    let defines = [
        ("TYPE", type_name(plan.x.dtype())),
        ("WEIGHT", type_name(plan.weight.dtype())),
        ("VECTOR", vector.as_str()),
        ("PACKS", "1"),
        ("OFFSET", plan.offset),
    ];
    let kernel = plan.gpu.kernel("rms_norm", &defines, "forward").or_panic();
    let launch = Launch::linear(plan.rows, plan.threads);
    // SAFETY: packed operands, one block per row; the weight has one element per column.
    unsafe {
        launch!(plan.gpu, kernel, launch; y.address(), plan.x.address(), plan.weight.address(), plan.n as i64, spec.eps as f32)
            .or_panic();
    }
    y
}

pub(super) fn rms_backward(
    x: CudaTensor,
    weight: CudaTensor,
    dy: CudaTensor,
    spec: NormSpec,
    so_far: Option<CudaTensor>,
) -> (CudaTensor, CudaTensor) {
    let shape = x.dims().to_vec();
    let dy = matrix(cast(dy, x.dtype()));
    let so_far = so_far.map(|so_far| matrix(cast(so_far, x.dtype())));
    let others: Vec<&CudaTensor> = std::iter::once(&dy).chain(&so_far).collect();
    let plan = Plan::new(x, weight, &others, spec);
    // A thread reads the gradient so far before it writes there.
    let dx = match &so_far {
        Some(so_far) if so_far.is_unique() => so_far.clone().reshape(&shape),
        _ => CudaTensor::empty(plan.gpu, &shape, plan.x.dtype()),
    };
    if dx.count() == 0 {
        return (dx, CudaTensor::zeros(plan.gpu, &[plan.n], DType::F32));
    }
    let so_far = so_far.as_ref().map_or(0, CudaTensor::address);
    let vector = plan.vector.to_string();
    let (kernel, blocks, threads) = if let Some((group, packs)) = plan.short() {
        let (group_text, packs) = (group.to_string(), packs.to_string());
        let defines = plan.short_defines(&vector, &packs, &group_text);
        let kernel = plan
            .gpu
            .kernel("rms_norm", &defines, "short_backward")
            .or_panic();
        let blocks = plan.rows.div_ceil(SHORT_THREADS / group);
        (
            kernel,
            blocks.min(plan.gpu.multiprocessors * 8),
            SHORT_THREADS as u32,
        )
    } else {
        let packs = plan.packs().to_string();
        let defines = [
            ("TYPE", type_name(plan.x.dtype())),
            ("WEIGHT", type_name(plan.weight.dtype())),
            ("VECTOR", vector.as_str()),
            ("PACKS", packs.as_str()),
            ("OFFSET", plan.offset),
        ];
        let kernel = plan.gpu.kernel("rms_norm", &defines, "backward").or_panic();
        (kernel, plan.blocks(), plan.threads)
    };
    let partial = CudaTensor::empty(plan.gpu, &[blocks, plan.n], DType::F32);
    let launch = Launch::linear(blocks, threads);
    // SAFETY: packed operands; the blocks write one row of `partial` each.
    unsafe {
        launch!(plan.gpu, kernel, launch; dx.address(), partial.address(), plan.x.address(), plan.weight.address(),
            dy.address(), so_far, plan.rows as i64, plan.n as i64, spec.eps as f32)
        .or_panic();
    }
    (
        dx,
        reduce(Reduction::Sum, &partial, 0, DType::F32).reshape(&[plan.n]),
    )
}

pub(super) fn layer_forward(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    spec: NormSpec,
) -> CudaTensor {
    let shape = x.dims().to_vec();
    let bias = bias.map(|bias| cast(bias, weight.dtype()).packed());
    let others: Vec<&CudaTensor> = bias.iter().collect();
    let plan = Plan::new(x, weight, &others, spec);
    let y = CudaTensor::empty(plan.gpu, &shape, plan.x.dtype());
    if y.count() == 0 {
        return y;
    }
    let vector = plan.vector.to_string();
    let defines = [
        ("TYPE", type_name(plan.x.dtype())),
        ("WEIGHT", type_name(plan.weight.dtype())),
        ("VECTOR", vector.as_str()),
        ("PACKS", "1"),
        ("OFFSET", plan.offset),
        ("BIAS", if bias.is_some() { "1" } else { "0" }),
    ];
    let kernel = plan
        .gpu
        .kernel("layer_norm", &defines, "forward")
        .or_panic();
    let launch = Launch::linear(plan.rows, plan.threads);
    let bias = bias.as_ref().map_or(0, CudaTensor::address);
    // SAFETY: packed operands, one block per row; weight and bias have one element per column.
    unsafe {
        launch!(plan.gpu, kernel, launch; y.address(), plan.x.address(), plan.weight.address(), bias, plan.n as i64,
            spec.eps as f32)
        .or_panic();
    }
    y
}

pub(super) fn layer_backward(
    x: CudaTensor,
    weight: CudaTensor,
    dy: CudaTensor,
    spec: NormSpec,
) -> (CudaTensor, CudaTensor, CudaTensor) {
    let shape = x.dims().to_vec();
    let dy = matrix(cast(dy, x.dtype()));
    let plan = Plan::new(x, weight, &[&dy], spec);
    let dx = CudaTensor::empty(plan.gpu, &shape, plan.x.dtype());
    if dx.count() == 0 {
        let zeros = || CudaTensor::zeros(plan.gpu, &[plan.n], DType::F32);
        return (dx, zeros(), zeros());
    }
    let blocks = plan.blocks();
    let partial = CudaTensor::empty(plan.gpu, &[blocks, 2, plan.n], DType::F32);
    let (vector, packs) = (plan.vector.to_string(), plan.packs().to_string());
    let defines = [
        ("TYPE", type_name(plan.x.dtype())),
        ("WEIGHT", type_name(plan.weight.dtype())),
        ("VECTOR", vector.as_str()),
        ("PACKS", packs.as_str()),
        ("OFFSET", plan.offset),
        ("BIAS", "0"),
    ];
    let kernel = plan
        .gpu
        .kernel("layer_norm", &defines, "backward")
        .or_panic();
    let launch = Launch::linear(blocks, plan.threads);
    // SAFETY: packed operands; the blocks write two rows of `partial` each.
    unsafe {
        launch!(plan.gpu, kernel, launch; dx.address(), partial.address(), plan.x.address(), plan.weight.address(),
            dy.address(), plan.rows as i64, plan.n as i64, spec.eps as f32)
        .or_panic();
    }
    let sums = reduce(Reduction::Sum, &partial, 0, DType::F32).reshape(&[2, plan.n]);
    let row = |i| sums.clone().narrow(0, i, 1).copied().reshape(&[plan.n]);
    (dx, row(0), row(1))
}
