//! The short causal convolution. Kernels: `kernels/causal_conv1d.cu`.

use bridge_ops::{ConvGrads, ConvSpec, portable};
use burn_backend::{DType, TensorMetadata};

use crate::backend::Cuda;
use crate::device::{Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Threads of a block, and tokens that each walks: `RUN` of the kernel file.
const THREADS: usize = 128;
const RUN: usize = 64;
/// Taps beyond which what a thread keeps in registers no longer fits there.
const MOST_TAPS: usize = 8;

/// Operands brought to the form that the kernels take.
struct Plan {
    gpu: &'static Gpu,
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    reach: Option<CudaTensor>,
    batch: usize,
    seq: usize,
    channels: usize,
    taps: usize,
    vector: usize,
    silu: bool,
}

fn covers(x: &CudaTensor, weight: &CudaTensor) -> bool {
    let float = |x: &CudaTensor| matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    float(x) && float(weight) && x.count() > 0 && weight.dims()[1] <= MOST_TAPS
}

impl Plan {
    fn new(
        x: CudaTensor,
        weight: CudaTensor,
        bias: Option<CudaTensor>,
        others: &[&CudaTensor],
        spec: &ConvSpec,
    ) -> Self {
        let (gpu, x, weight) = (x.gpu(), x.into_packed(), weight.into_packed());
        let (batch, seq, channels) = (x.dims()[0], x.dims()[1], x.dims()[2]);
        let bias = bias.map(|bias| cast(bias, weight.dtype()).into_packed());
        let fits = |x: &&CudaTensor| x.address().is_multiple_of(4 * x.dtype().size() as u64);
        let whole = channels.is_multiple_of(4) && fits(&&x) && others.iter().all(fits);
        let reach = spec.documents.as_deref().map(|documents| {
            let reach = reach(documents, batch, seq);
            CudaTensor::from_bytes(gpu, bytemuck::cast_slice(&reach), &[batch, seq], DType::I32)
        });
        Self {
            gpu,
            taps: weight.dims()[1],
            x,
            weight,
            bias,
            reach,
            batch,
            seq,
            channels,
            vector: if whole { 4 } else { 1 },
            silu: spec.silu,
        }
    }

    fn kernel(&self, entry: &'static str) -> Kernel {
        let (taps, vector) = (self.taps.to_string(), self.vector.to_string());
        let defines = [
            ("TYPE", type_name(self.x.dtype())),
            ("WEIGHT", type_name(self.weight.dtype())),
            ("TAPS", taps.as_str()),
            ("SILU", if self.silu { "1" } else { "0" }),
            ("VECTOR", vector.as_str()),
        ];
        self.gpu.kernel("causal_conv1d", &defines, entry).or_panic()
    }

    fn launch(&self) -> Launch {
        let columns = self.channels.div_ceil(self.vector * THREADS);
        Launch::grid(
            [columns, self.seq.div_ceil(RUN), self.batch],
            THREADS as u32,
        )
    }
}

fn address(x: &Option<CudaTensor>) -> u64 {
    x.as_ref().map_or(0, CudaTensor::address)
}

/// How far each token is from the start of its document within its row.
fn reach(documents: &[usize], batch: usize, seq: usize) -> Vec<i32> {
    let mut reach = vec![0; batch * seq];
    for document in documents.windows(2) {
        for (token, reach) in (document[0]..document[1]).zip(&mut reach[document[0]..document[1]]) {
            *reach = (token - document[0].max(token / seq * seq)) as i32;
        }
    }
    reach
}

pub(super) fn forward(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    history: Option<CudaTensor>,
    spec: &ConvSpec,
) -> CudaTensor {
    if !covers(&x, &weight) {
        return portable::causal_conv1d::<Cuda>(x, weight, bias, history, spec);
    }
    let history = history.map(|history| cast(history, x.dtype()).into_packed());
    let others: Vec<&CudaTensor> = history.iter().collect();
    let plan = Plan::new(x, weight, bias, &others, spec);
    let y = CudaTensor::empty(plan.gpu, plan.x.dims(), plan.x.dtype());
    // SAFETY: packed operands of the sizes given, aligned for packs of `vector` channels.
    unsafe {
        launch!(plan.gpu, plan.kernel("forward"), plan.launch(); y.address(), plan.x.address(), plan.weight.address(),
            address(&plan.bias), address(&history), address(&plan.reach), plan.seq as i64, plan.channels as i64)
        .or_panic();
    }
    y
}

pub(super) fn backward(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    dy: CudaTensor,
    spec: &ConvSpec,
) -> ConvGrads<Cuda> {
    if !covers(&x, &weight) {
        return portable::causal_conv1d_backward::<Cuda>(x, weight, bias, dy, spec);
    }
    let dy = cast(dy, x.dtype()).into_packed();
    let plan = Plan::new(x, weight, bias, &[&dy], spec);
    let (gpu, channels, taps) = (plan.gpu, plan.channels, plan.taps);
    let runs = plan.batch * plan.seq.div_ceil(RUN);
    let dx = CudaTensor::empty(gpu, plan.x.dims(), plan.x.dtype());
    let parts = CudaTensor::empty(gpu, &[runs, taps + 1, channels], DType::F32);
    let dweight = CudaTensor::empty(gpu, &[channels, taps], DType::F32);
    let dbias = CudaTensor::empty(gpu, &[channels], DType::F32);
    let sum = Launch::grid([channels.div_ceil(256), taps + 1, 1], 256);
    // SAFETY: packed operands of the sizes given, aligned for packs of `vector` channels; a part for each run.
    unsafe {
        launch!(gpu, plan.kernel("backward"), plan.launch(); dx.address(), parts.address(), plan.x.address(),
            plan.weight.address(), address(&plan.bias), dy.address(), address(&plan.reach), plan.seq as i64, channels as i64)
        .or_panic();
        launch!(gpu, plan.kernel("finish"), sum; dweight.address(), dbias.address(), parts.address(), runs as i64,
            channels as i64)
        .or_panic();
    }
    ConvGrads { dx, dweight, dbias }
}

#[cfg(test)]
mod tests {
    use super::reach;

    #[test]
    fn documents_reach_back_to_their_start_or_their_row() {
        assert_eq!(reach(&[0, 2, 2, 7, 8], 2, 4), [0, 1, 0, 1, 0, 1, 2, 0]);
    }
}
