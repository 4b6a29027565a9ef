//! The gated delta rule. Kernels: `kernels/gated_delta_rule.cu`.

use bridge_ops::{DeltaRuleInputs, ScanSpec, portable};
use burn_backend::{DType, TensorMetadata};

use super::activation::aligned;
use super::chunks::{Chunks, Cut, Shared, THREADS, chunk_length, filled, stages, whole_pieces};
use crate::backend::Cuda;
use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Mirrors `Problem` in `kernels/gated_delta_rule.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Problem {
    chunks: Chunks,
    heads: i64,
    key_heads: i64,
    scale: f32,
}

// SAFETY: the same fields in the same order as the kernels' structure; what pads it is not read.
unsafe impl Argument for Problem {}

/// Operands brought to the form that the kernels take.
struct Plan {
    gpu: &'static Gpu,
    q: CudaTensor,
    k: CudaTensor,
    v: CudaTensor,
    log_decay: CudaTensor,
    beta: CudaTensor,
    cut: Cut,
    problem: Problem,
    sizes: Sizes,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    heads: usize,
    key_heads: usize,
    key_dim: usize,
    value_dim: usize,
}

/// Bytes of shared memory.
struct Needs {
    prepare: usize,
    states: usize,
    output: usize,
    inside: usize,
    states_back: usize,
    backward: usize,
}

impl Sizes {
    fn of(inputs: &DeltaRuleInputs<CudaTensor>) -> Self {
        let (k, v) = (inputs.k.dims(), inputs.v.dims());
        Self {
            heads: v[2],
            key_heads: k[2],
            key_dim: k[3],
            value_dim: v[3],
        }
    }

    /// Columns of the state that a block walks the chunks with: few, since few sequences have to fill a GPU.
    fn slice(self) -> usize {
        if filled(self.value_dim).is_multiple_of(32) {
            32
        } else {
            16
        }
    }

    fn shared(self, dtype: DType) -> Needs {
        let (length, stages) = (chunk_length(dtype), stages(dtype));
        let (k, v, slice) = (filled(self.key_dim), filled(self.value_dim), self.slice());
        let new = || Shared::new(dtype);
        let warps = THREADS as usize / 32;
        let inside = new()
            .tiles(2, length, k)
            .tiles(1, length, v)
            .tiles(1, length, length)
            .decays(1);
        Needs {
            prepare: new()
                .tiles(1, length, k)
                .tiles(1, length, v)
                .tiles(2, length, length)
                .floats(2, length * (length + 1))
                .floats(1, length * length / 2)
                .decays(1)
                .bytes,
            states: new()
                .tiles(2 * stages, length, k)
                .tiles(stages + 1, length, slice)
                .tiles(1, k, slice)
                .decays(2)
                .bytes,
            output: inside.tiles(1, k, v).bytes,
            inside: inside.bytes,
            states_back: new()
                .tiles(3 * stages, length, k)
                .tiles(2 * stages + 2, length, slice)
                .tiles(1, k, slice)
                .decays(2)
                .bytes,
            backward: new()
                .tiles(3, length, k)
                .tiles(1, k, v)
                .tiles(2, length, v)
                .tiles(1, length, k.max(v))
                .tiles(3, length, length)
                .decays(1)
                .floats(5, length / 16 * length)
                .floats(1, v / 16 * length)
                .floats(3, k / 16 * length)
                .floats(1, warps)
                .bytes,
        }
    }
}

/// Whether the kernels take these operands: 16- or 32-bit floats all alike, and states that fit in shared memory.
fn covers(inputs: &DeltaRuleInputs<CudaTensor>) -> bool {
    let dtype = inputs.v.dtype();
    let needs = Sizes::of(inputs).shared(dtype);
    let room = inputs.v.gpu().shared_per_block;
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
        && inputs.q.dtype() == dtype
        && inputs.k.dtype() == dtype
        && inputs.v.count() > 0
        && inputs.k.count() > 0
        && needs.backward.max(needs.states_back).max(needs.output) <= room
        && needs.prepare.max(needs.states) <= room
}

impl Plan {
    fn new(inputs: DeltaRuleInputs<CudaTensor>, scale: f64, spec: &ScanSpec) -> Self {
        let gpu = inputs.v.gpu();
        let sizes = Sizes::of(&inputs);
        let length = chunk_length(inputs.v.dtype());
        let tokens = [inputs.v.dims()[0], inputs.v.dims()[1]];
        let cut = Cut::new(gpu, tokens, length, spec.documents.as_deref());
        let float = |x: CudaTensor| cast(x, DType::F32).into_packed();
        Self {
            gpu,
            q: aligned(inputs.q),
            k: aligned(inputs.k),
            v: aligned(inputs.v),
            log_decay: float(inputs.log_decay),
            beta: float(inputs.beta),
            problem: Problem {
                chunks: cut.chunks,
                heads: sizes.heads as i64,
                key_heads: sizes.key_heads as i64,
                scale: scale as f32,
            },
            cut,
            sizes,
        }
    }

    fn kernel(&self, entry: &'static str) -> Kernel {
        let dtype = self.v.dtype();
        let Sizes {
            key_dim, value_dim, ..
        } = self.sizes;
        let slice = self.sizes.slice();
        let [key, value, slice, length, stages] = [
            key_dim,
            value_dim,
            slice,
            chunk_length(dtype),
            stages(dtype),
        ]
        .map(|x| x.to_string());
        let whole = whole_pieces(dtype, [key_dim, value_dim]);
        let defines = [
            ("TYPE", type_name(dtype)),
            ("LEN", length.as_str()),
            ("ALIGNED", if whole { "1" } else { "0" }),
            ("KEY_DIM", key.as_str()),
            ("VALUE_DIM", value.as_str()),
            ("SLICE", slice.as_str()),
            ("STAGES", stages.as_str()),
        ];
        self.gpu
            .kernel("gated_delta_rule", &defines, entry)
            .or_panic()
    }

    /// A tensor between kernels: `[chunks, heads, rows, columns]`, sizes filled up.
    fn between(&self, rows: usize, columns: usize) -> CudaTensor {
        let shape = [
            self.cut.count,
            self.sizes.heads,
            filled(rows),
            filled(columns),
        ];
        CudaTensor::empty(self.gpu, &shape, self.v.dtype())
    }

    fn length(&self) -> usize {
        chunk_length(self.v.dtype())
    }

    /// One block for each head of each chunk.
    fn by_chunk(&self) -> Launch {
        Launch::grid([self.cut.count, self.sizes.heads, 1], THREADS)
    }

    /// One block for each slice of each head's state in each sequence.
    fn by_sequence(&self) -> Launch {
        let slices = filled(self.sizes.value_dim) / self.sizes.slice();
        Launch::grid([self.cut.sequences, self.sizes.heads, slices], THREADS)
    }

    /// U, W and, if asked for, T of each chunk.
    fn prepare(
        &self,
        needs: &Needs,
        inverse: bool,
    ) -> (CudaTensor, CudaTensor, Option<CudaTensor>) {
        let length = self.length();
        let u = self.between(length, self.sizes.value_dim);
        let w = self.between(length, self.sizes.key_dim);
        let inverse = inverse.then(|| self.between(length, length));
        let shape = self.by_chunk().shared(needs.prepare);
        // SAFETY: packed operands of the problem's sizes; results of a chunk's, filled up.
        unsafe {
            launch!(self.gpu, self.kernel("prepare"), shape; u.address(), w.address(),
                inverse.as_ref().map_or(0, CudaTensor::address), self.k.address(), self.v.address(),
                self.log_decay.address(), self.beta.address(), self.problem)
            .or_panic();
        }
        (u, w, inverse)
    }

    /// The state before each chunk, and the last one of each sequence. `v` becomes V, and may be `u`.
    fn states(
        &self,
        needs: &Needs,
        v: &CudaTensor,
        u: &CudaTensor,
        w: &CudaTensor,
        first: Option<&CudaTensor>,
    ) -> (CudaTensor, CudaTensor) {
        let Sizes {
            heads,
            key_dim,
            value_dim,
            ..
        } = self.sizes;
        let entering = self.between(key_dim, value_dim);
        let shape = [self.cut.sequences, heads, key_dim, value_dim];
        let last = CudaTensor::empty(self.gpu, &shape, DType::F32);
        let shape = self.by_sequence().shared(needs.states);
        // SAFETY: operands as `prepare` made them, each block's slice of V its own; a state for each head of each sequence.
        unsafe {
            launch!(self.gpu, self.kernel("states"), shape; entering.address(), last.address(), v.address(), u.address(), w.address(),
                self.k.address(), self.log_decay.address(), first.map_or(0, CudaTensor::address), self.problem)
            .or_panic();
        }
        (entering, last)
    }
}

pub(super) fn forward(
    inputs: DeltaRuleInputs<CudaTensor>,
    state: Option<CudaTensor>,
    scale: f64,
    spec: &ScanSpec,
) -> (CudaTensor, CudaTensor) {
    if !covers(&inputs) {
        return portable::gated_delta_rule::<Cuda>(inputs, state, scale, spec);
    }
    let plan = Plan::new(inputs, scale, spec);
    let needs = plan.sizes.shared(plan.v.dtype());
    // Documents start anew, whatever came before the batch.
    let first = state
        .filter(|_| spec.documents.is_none())
        .map(|state| cast(state, DType::F32).into_packed());
    let (v_new, w, _) = plan.prepare(&needs, false);
    let (entering, last) = plan.states(&needs, &v_new, &v_new, &w, first.as_ref());
    let output = CudaTensor::empty(plan.gpu, plan.v.dims(), plan.v.dtype());
    let shape = plan.by_chunk().shared(needs.output);
    // SAFETY: packed operands of the problem's sizes, and what the kernels before left.
    unsafe {
        launch!(plan.gpu, plan.kernel("output"), shape; output.address(), plan.q.address(), plan.k.address(),
            v_new.address(), entering.address(), plan.log_decay.address(), plan.problem)
        .or_panic();
    }
    let last = match spec.documents {
        None => last,
        Some(_) => last.narrow(0, plan.cut.sequences - 1, 1),
    };
    (output, last)
}

pub(super) fn backward(
    inputs: DeltaRuleInputs<CudaTensor>,
    dout: CudaTensor,
    scale: f64,
    spec: &ScanSpec,
) -> DeltaRuleInputs<CudaTensor> {
    if !covers(&inputs) {
        return portable::gated_delta_rule_backward::<Cuda>(inputs, dout, scale, spec);
    }
    let (decay_dtype, beta_dtype) = (inputs.log_decay.dtype(), inputs.beta.dtype());
    let plan = Plan::new(inputs, scale, spec);
    let (gpu, dtype) = (plan.gpu, plan.v.dtype());
    let needs = plan.sizes.shared(dtype);
    let dout = aligned(cast(dout, dtype));
    let (u, w, inverse) = plan.prepare(&needs, true);
    let inverse = inverse.expect("asked for");
    let v_new = plan.between(plan.length(), plan.sizes.value_dim);
    let (entering, _) = plan.states(&needs, &v_new, &u, &w, None);

    let dv_new = plan.between(plan.length(), plan.sizes.value_dim);
    let leaving = plan.between(plan.sizes.key_dim, plan.sizes.value_dim);
    let like = |x: &CudaTensor| CudaTensor::empty(gpu, x.dims(), x.dtype());
    let (dq, dk, dv) = (like(&plan.q), like(&plan.k), like(&plan.v));
    let (dlog_decay, dbeta) = (like(&plan.log_decay), like(&plan.beta));
    let by_key_head = Launch::grid([plan.cut.count, plan.sizes.key_heads, 1], THREADS);
    // SAFETY: packed operands and results of the problem's sizes, and what the kernels before left.
    unsafe {
        launch!(gpu, plan.kernel("inside"), plan.by_chunk().shared(needs.inside); dv_new.address(), plan.q.address(),
            plan.k.address(), dout.address(), plan.log_decay.address(), plan.problem)
        .or_panic();
        launch!(gpu, plan.kernel("states_back"), plan.by_sequence().shared(needs.states_back); leaving.address(),
            dv_new.address(), w.address(), plan.q.address(), plan.k.address(), dout.address(), plan.log_decay.address(),
            plan.problem)
        .or_panic();
        launch!(gpu, plan.kernel("backward"), by_key_head.shared(needs.backward); dq.address(), dk.address(), dv.address(),
            dlog_decay.address(), dbeta.address(), plan.q.address(), plan.k.address(), plan.v.address(),
            plan.log_decay.address(), plan.beta.address(), dout.address(), u.address(), w.address(), inverse.address(),
            v_new.address(), dv_new.address(), entering.address(), leaving.address(), plan.problem)
        .or_panic();
    }
    DeltaRuleInputs {
        q: dq,
        k: dk,
        v: dv,
        log_decay: cast(dlog_decay, decay_dtype),
        beta: cast(dbeta, beta_dtype),
    }
}
