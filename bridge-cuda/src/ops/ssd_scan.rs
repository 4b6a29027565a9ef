//! The scan of Mamba-2. Kernels: `kernels/ssd_scan.cu`.

use bridge_ops::{ScanSpec, SsdGrads, SsdInputs, portable};
use burn_backend::{DType, TensorMetadata};

use super::activation::aligned;
use super::chunks::{Chunks, Cut, Shared, THREADS, chunk_length, filled, stages, whole_pieces};
use crate::backend::Cuda;
use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// Mirrors `Problem` in `kernels/ssd_scan.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Problem {
    chunks: Chunks,
    heads: i64,
    groups: i64,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Problem {}

/// Operands brought to the form that the kernels take.
struct Plan {
    gpu: &'static Gpu,
    x: CudaTensor,
    dt: CudaTensor,
    log_decay: CudaTensor,
    b: CudaTensor,
    c: CudaTensor,
    skip: Option<CudaTensor>,
    cut: Cut,
    problem: Problem,
    heads: usize,
    groups: usize,
    head_dim: usize,
    state: usize,
}

/// Shared memory of `forward`, `states` and `backward`.
fn shared(dtype: DType, head_dim: usize, state: usize) -> [usize; 3] {
    let (length, stages) = (chunk_length(dtype), stages(dtype));
    let (p, n) = (filled(head_dim), filled(state));
    let forward = Shared::new(dtype)
        .tiles(stages + 1, length, p)
        .tiles(2 * stages, length, n)
        .tiles(1, p, n)
        .tiles(1, length, length)
        .decays(2);
    let states = Shared::new(dtype)
        .tiles(stages + 1, length, p)
        .tiles(stages, length, n)
        .decays(2);
    let backward = Shared::new(dtype)
        .tiles(2, length, n)
        .tiles(4, length, p)
        .tiles(2, p, n)
        .tiles(2, length, length)
        .decays(1)
        .floats(2, length / 16 * length)
        .floats(2, p / 16 * length)
        .floats(1, n / 16 * length)
        .floats(2, THREADS as usize / 32);
    [forward, states, backward].map(|shared| shared.bytes)
}

/// Whether the kernels take these operands: 16- or 32-bit floats all alike, and states that fit in shared memory.
fn covers(inputs: &SsdInputs<CudaTensor>) -> bool {
    let dtype = inputs.x.dtype();
    let (head_dim, state) = (inputs.x.dims()[3], inputs.b.dims()[3]);
    let room = inputs.x.gpu().shared_per_block;
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
        && inputs.b.dtype() == dtype
        && inputs.c.dtype() == dtype
        && inputs.x.count() > 0
        && inputs.b.count() > 0
        && shared(dtype, head_dim, state)
            .iter()
            .all(|bytes| *bytes <= room)
}

impl Plan {
    fn new(inputs: SsdInputs<CudaTensor>, skip: Option<CudaTensor>, spec: &ScanSpec) -> Self {
        let gpu = inputs.x.gpu();
        let [batch, seq, heads, head_dim] = four(&inputs.x);
        let [_, _, groups, state] = four(&inputs.b);
        let length = chunk_length(inputs.x.dtype());
        let cut = Cut::new(gpu, [batch, seq], length, spec.documents.as_deref());
        let float = |x: CudaTensor| cast(x, DType::F32).into_packed();
        Self {
            gpu,
            x: aligned(inputs.x),
            dt: float(inputs.dt),
            log_decay: float(inputs.log_decay),
            b: aligned(inputs.b),
            c: aligned(inputs.c),
            skip: skip.map(float),
            problem: Problem {
                chunks: cut.chunks,
                heads: heads as i64,
                groups: groups as i64,
            },
            cut,
            heads,
            groups,
            head_dim,
            state,
        }
    }

    fn kernel(&self, entry: &'static str) -> Kernel {
        let dtype = self.x.dtype();
        let [head_dim, state, length, stages] = [
            self.head_dim,
            self.state,
            chunk_length(dtype),
            stages(dtype),
        ]
        .map(|x| x.to_string());
        let whole = whole_pieces(dtype, [self.head_dim, self.state]);
        let defines = [
            ("TYPE", type_name(dtype)),
            ("LEN", length.as_str()),
            ("ALIGNED", if whole { "1" } else { "0" }),
            ("HEAD_DIM", head_dim.as_str()),
            ("STATE", state.as_str()),
            ("STAGES", stages.as_str()),
        ];
        self.gpu.kernel("ssd_scan", &defines, entry).or_panic()
    }

    fn skip(&self) -> u64 {
        self.skip.as_ref().map_or(0, CudaTensor::address)
    }
}

fn four(x: &CudaTensor) -> [usize; 4] {
    x.dims()
        .try_into()
        .expect("operands of a scan have four dimensions")
}

pub(super) fn forward(
    inputs: SsdInputs<CudaTensor>,
    skip: Option<CudaTensor>,
    state: Option<CudaTensor>,
    spec: &ScanSpec,
) -> (CudaTensor, CudaTensor) {
    if !covers(&inputs) {
        return portable::ssd_scan::<Cuda>(inputs, skip, state, spec);
    }
    let plan = Plan::new(inputs, skip, spec);
    let (gpu, dtype) = (plan.gpu, plan.x.dtype());
    // Documents start anew, whatever came before the batch.
    let first = state
        .filter(|_| spec.documents.is_none())
        .map(|state| cast(state, DType::F32).into_packed());
    let y = CudaTensor::empty(gpu, plan.x.dims(), dtype);
    let shape = [plan.cut.sequences, plan.heads, plan.head_dim, plan.state];
    let last = CudaTensor::empty(gpu, &shape, DType::F32);
    let [shared, _, _] = shared(dtype, plan.head_dim, plan.state);
    let shape = Launch::grid([plan.cut.sequences, plan.heads, 1], THREADS).shared(shared);
    // SAFETY: packed operands of the problem's sizes; a state for each head of each sequence.
    unsafe {
        launch!(gpu, plan.kernel("forward"), shape; y.address(), last.address(), plan.x.address(), plan.dt.address(),
            plan.log_decay.address(), plan.b.address(), plan.c.address(), plan.skip(),
            first.as_ref().map_or(0, CudaTensor::address), plan.problem)
        .or_panic();
    }
    let last = match spec.documents {
        None => last,
        Some(_) => last.narrow(0, plan.cut.sequences - 1, 1),
    };
    (y, last)
}

pub(super) fn backward(
    inputs: SsdInputs<CudaTensor>,
    skip: Option<CudaTensor>,
    dy: CudaTensor,
    spec: &ScanSpec,
) -> SsdGrads<Cuda> {
    if !covers(&inputs) {
        return portable::ssd_scan_backward::<Cuda>(inputs, skip, dy, spec);
    }
    let (dt_dtype, decay_dtype) = (inputs.dt.dtype(), inputs.log_decay.dtype());
    let plan = Plan::new(inputs, skip, spec);
    let (gpu, dtype, count) = (plan.gpu, plan.x.dtype(), plan.cut.count);
    let dy = aligned(cast(dy, dtype));
    let shape = [
        2,
        count,
        plan.heads,
        filled(plan.head_dim),
        filled(plan.state),
    ];
    let states = CudaTensor::empty(gpu, &shape, dtype);
    let like = |x: &CudaTensor| CudaTensor::empty(gpu, x.dims(), x.dtype());
    let grads = SsdInputs {
        x: like(&plan.x),
        dt: like(&plan.dt),
        log_decay: like(&plan.log_decay),
        b: like(&plan.b),
        c: like(&plan.c),
    };
    let dskip = CudaTensor::empty(gpu, &[count, plan.heads], DType::F32);
    let [_, walk, main] = shared(dtype, plan.head_dim, plan.state);
    let walk = Launch::grid([plan.cut.sequences, plan.heads, 2], THREADS).shared(walk);
    let main = Launch::grid([count, plan.groups, 1], THREADS).shared(main);
    // SAFETY: packed operands and results of the problem's sizes; both states of each head of each chunk.
    unsafe {
        launch!(gpu, plan.kernel("states"), walk; states.address(), plan.x.address(), dy.address(), plan.dt.address(),
            plan.log_decay.address(), plan.b.address(), plan.c.address(), plan.problem)
        .or_panic();
        launch!(gpu, plan.kernel("backward"), main; grads.x.address(), grads.dt.address(), grads.log_decay.address(),
            grads.b.address(), grads.c.address(), dskip.address(), plan.x.address(), plan.dt.address(),
            plan.log_decay.address(), plan.b.address(), plan.c.address(), plan.skip(), dy.address(), states.address(),
            plan.problem)
        .or_panic();
    }
    let dskip = plan
        .skip
        .as_ref()
        .map(|_| reduce(Reduction::Sum, &dskip, 0, DType::F32).reshape(&[plan.heads]));
    let grads = SsdInputs {
        dt: cast(grads.dt, dt_dtype),
        log_decay: cast(grads.log_decay, decay_dtype),
        ..grads
    };
    (grads, dskip)
}
