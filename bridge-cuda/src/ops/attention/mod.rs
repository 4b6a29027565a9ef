//! Attention: cuDNN's engines where they serve the problem, this crate's own kernels elsewhere.

mod fused;
mod own;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use bridge_ops::{AttentionGrads, AttentionOutput, AttentionRule};
use burn_backend::{DType, TensorMetadata};

use crate::backend::Cuda;
use crate::elementwise::{binary, cast, scalar, unary};
use crate::error::OrPanic;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// Which kernels compute an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum AttentionPath {
    /// cuDNN's fused attention: bf16 or f16, head sizes that are multiples of 8 up to 256.
    Cudnn = 1,
    /// Our own kernel for the tensor cores: bf16 or f16, head size 64 or 128.
    TensorCores = 2,
    /// One thread per score: any dtype, head size up to 512.
    Generic = 3,
}

impl AttentionPath {
    /// The crate's own kernels for heads of `d` channels (`dv` for values) of `dtype`.
    fn own(dtype: DType, d: usize, dv: usize) -> Self {
        let half = matches!(dtype, DType::BF16 | DType::F16);
        if half && d == dv && (d == 64 || d == 128) {
            Self::TensorCores
        } else {
            Self::Generic
        }
    }
}

/// How many attentions each path has computed since the program started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AttentionCalls {
    /// Forward passes, by path: cuDNN, tensor cores, generic.
    pub forward: [u64; 3],
    /// Backward passes, by path.
    pub backward: [u64; 3],
}

static FORCED: AtomicU8 = AtomicU8::new(0);
static DETERMINISTIC: AtomicBool = AtomicBool::new(false);
static CALLS: [[AtomicU64; 3]; 2] = [const { [const { AtomicU64::new(0) }; 3] }; 2];
static REFUSALS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Most reasons kept for [`attention_refusals`].
const REFUSALS_KEPT: usize = 32;

/// Makes every attention of the program take one path, for tests and comparisons; `None` chooses by the problem again.
/// An attention that the path cannot compute panics and says why.
pub fn force_attention_path(path: Option<AttentionPath>) {
    FORCED.store(path.map_or(0, |path| path as u8), Ordering::Relaxed);
}

/// Whether the gradients of attention are the same, bit for bit, in every run. Off at the start: cuDNN then adds up the
/// gradient of the queries in whatever order its blocks finish. On, a few percent to half of the speed is given up.
pub fn set_deterministic_attention(deterministic: bool) {
    DETERMINISTIC.store(deterministic, Ordering::Relaxed);
}

/// How many attentions each path has computed.
pub fn attention_calls() -> AttentionCalls {
    let read = |pass: usize| [0, 1, 2].map(|path| CALLS[pass][path].load(Ordering::Relaxed));
    AttentionCalls {
        forward: read(0),
        backward: read(1),
    }
}

/// Why cuDNN did not serve attentions that it was asked for, each reason once: the library is missing, or no engine takes
/// the problem. Such attentions were computed by this crate's own kernels.
pub fn attention_refusals() -> Vec<String> {
    REFUSALS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
        .clone()
}

fn note_refusal(reason: &str) {
    let mut refusals = REFUSALS
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if refusals.len() < REFUSALS_KEPT && !refusals.iter().any(|known| known == reason) {
        refusals.push(reason.to_owned());
    }
}

fn forced() -> Option<AttentionPath> {
    match FORCED.load(Ordering::Relaxed) {
        1 => Some(AttentionPath::Cudnn),
        2 => Some(AttentionPath::TensorCores),
        3 => Some(AttentionPath::Generic),
        _ => None,
    }
}

/// Sizes of a problem.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    s: usize,
    t: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    dv: usize,
}

impl Sizes {
    #[track_caller]
    fn of(q: &CudaTensor, k: &CudaTensor, v: &CudaTensor) -> Self {
        let (&[batch, s, heads, d], &[_, t, kv_heads, _], &[_, _, _, dv]) =
            (q.dims(), k.dims(), v.dims())
        else {
            panic!(
                "attention: q, k and v are [batch, seq, heads, channels], found {q:?}, {k:?}, {v:?}"
            )
        };
        assert!(
            d <= 512 && dv <= 512,
            "not supported on cuda: attention with heads of more than 512 channels"
        );
        Self {
            batch,
            s,
            t,
            heads,
            kv_heads,
            d,
            dv,
        }
    }

    fn rows(&self) -> usize {
        self.batch * self.heads * self.s
    }
}

/// Queries, keys and values, `[batch, seq, heads, channels]` each, of one dtype.
struct Inputs {
    q: CudaTensor,
    k: CudaTensor,
    v: CudaTensor,
}

impl Inputs {
    fn map(self, mut f: impl FnMut(CudaTensor) -> CudaTensor) -> Self {
        Self {
            q: f(self.q),
            k: f(self.k),
            v: f(self.v),
        }
    }
}

/// Packed gradients of the inputs.
struct Gradients {
    dq: CudaTensor,
    dk: CudaTensor,
    dv: CudaTensor,
}

/// Channels packed and every row of channels on a 16-byte boundary, as `cp.async` and cuDNN want it.
fn aligned(x: CudaTensor) -> CudaTensor {
    let per_piece = 16 / x.dtype().size() as i64;
    let steps = (0..3).all(|d| x.dims()[d] == 1 || x.strides()[d] % per_piece == 0);
    if x.strides()[3] == 1 && steps && x.address().is_multiple_of(16) {
        x
    } else {
        x.copied()
    }
}

/// The path of a pass: what is forced, else cuDNN if `fused` has a plan, else this crate's own kernels.
#[track_caller]
fn choose<P>(
    pass: usize,
    dtype: DType,
    sizes: Sizes,
    fused: impl FnOnce() -> Result<P, fused::Refusal>,
) -> (AttentionPath, Option<P>) {
    let own = AttentionPath::own(dtype, sizes.d, sizes.dv);
    let (path, plan) = match forced() {
        None => match fused() {
            Ok(plan) => (AttentionPath::Cudnn, Some(plan)),
            Err(refusal) => {
                if let fused::Refusal::Library(reason) = refusal {
                    note_refusal(&reason);
                }
                (own, None)
            }
        },
        Some(AttentionPath::Cudnn) => match fused() {
            Ok(plan) => (AttentionPath::Cudnn, Some(plan)),
            Err(refusal) => panic!("attention was forced to take cuDNN's path: {refusal}"),
        },
        Some(AttentionPath::TensorCores) => {
            assert!(
                own == AttentionPath::TensorCores,
                "attention was forced to take the tensor-core kernel, which serves bf16 and f16 with head size 64 or \
                 128; found {dtype:?} with head sizes {} and {}",
                sizes.d,
                sizes.dv
            );
            (own, None)
        }
        Some(AttentionPath::Generic) => (AttentionPath::Generic, None),
    };
    CALLS[pass][path as usize - 1].fetch_add(1, Ordering::Relaxed);
    (path, plan)
}

pub(super) fn forward(
    q: CudaTensor,
    k: CudaTensor,
    v: CudaTensor,
    sinks: Option<CudaTensor>,
    rule: &AttentionRule,
) -> AttentionOutput<Cuda> {
    let sizes = Sizes::of(&q, &k, &v);
    let gpu = q.gpu();
    let dtype = q.dtype();
    let inputs = Inputs {
        k: cast(k, dtype),
        v: cast(v, dtype),
        q,
    };
    let out = CudaTensor::empty(gpu, &[sizes.batch, sizes.s, sizes.heads, sizes.dv], dtype);
    let mut lse = CudaTensor::empty(gpu, &[sizes.batch, sizes.heads, sizes.s], DType::F32);
    if sizes.rows() == 0 {
        return AttentionOutput { output: out, lse };
    }
    let forced = forced().is_some();
    let (path, plan) = choose(0, dtype, sizes, || {
        fused::plan_forward(sizes, &inputs, sinks.is_some(), rule, forced)
    });
    match (path, plan) {
        (AttentionPath::Cudnn, Some(plan)) => {
            let sinks = sinks.map(|sinks| cast(sinks, DType::F32).packed());
            lse = plan.forward(&sinks, &out, lse).or_panic();
        }
        (AttentionPath::TensorCores, _) => {
            let sinks = sinks.map(|sinks| cast(sinks, dtype).packed());
            own::forward_tensor_cores(sizes, inputs, &sinks, &out, &lse, rule);
        }
        (AttentionPath::Generic | AttentionPath::Cudnn, _) => {
            let sinks = sinks.map(|sinks| cast(sinks, dtype).packed());
            own::forward_generic(sizes, inputs, &sinks, &out, &lse, rule);
        }
    }
    AttentionOutput { output: out, lse }
}

pub(super) fn backward(
    q: CudaTensor,
    k: CudaTensor,
    v: CudaTensor,
    sinks: Option<CudaTensor>,
    output: AttentionOutput<Cuda>,
    dout: CudaTensor,
    rule: &AttentionRule,
) -> AttentionGrads<Cuda> {
    let sizes = Sizes::of(&q, &k, &v);
    let gpu = q.gpu();
    let dtype = q.dtype();
    let kv_len = rule.kv_len.unwrap_or(sizes.t);
    if sizes.rows() == 0 || kv_len == 0 {
        let zeros = |x: &CudaTensor| CudaTensor::zeros(gpu, x.dims(), dtype);
        return AttentionGrads {
            dq: zeros(&q),
            dk: zeros(&k),
            dv: zeros(&v),
            dsinks: sinks.map(|sinks| CudaTensor::zeros(gpu, sinks.dims(), DType::F32)),
        };
    }
    // Keys past `kv_len` have no gradient; cuDNN does not see them.
    let new = |x: &CudaTensor, all: bool| {
        if all {
            CudaTensor::empty(gpu, x.dims(), dtype)
        } else {
            CudaTensor::zeros(gpu, x.dims(), dtype)
        }
    };
    let grads = Gradients {
        dq: new(&q, true),
        dk: new(&k, kv_len == sizes.t),
        dv: new(&v, kv_len == sizes.t),
    };
    let inputs = Inputs {
        k: cast(k, dtype),
        v: cast(v, dtype),
        q,
    };
    let dout = cast(dout, dtype).packed();
    let (out, lse) = (output.output.packed(), output.lse.packed());
    let forced = forced().is_some();
    let (path, plan) = choose(1, dtype, sizes, || {
        let deterministic = DETERMINISTIC.load(Ordering::Relaxed);
        fused::plan_backward(sizes, &inputs, sinks.is_some(), rule, deterministic, forced)
    });
    let results = [&out, &dout, &lse];
    let dots = match (path, plan) {
        (AttentionPath::Cudnn, Some(plan)) => {
            plan.backward(results, &grads).or_panic();
            sinks
                .is_some()
                .then(|| own::row_dots(sizes, [&out, &dout], rule))
        }
        (AttentionPath::TensorCores, _) => Some(own::backward_tensor_cores(
            sizes, inputs, results, &grads, rule,
        )),
        (AttentionPath::Generic | AttentionPath::Cudnn, _) => {
            Some(own::backward_generic(sizes, inputs, results, &grads, rule))
        }
    };
    let dsinks = sinks
        .zip(dots)
        .map(|(sinks, dots)| sink_gradient(sinks, lse, dots, sizes));
    let Gradients { dq, dk, dv } = grads;
    AttentionGrads { dq, dk, dv, dsinks }
}

/// `dsink = - sum over i of exp(sink - lse_i) D_i`. lse, dots: `[batch, heads, s]` -> `[heads]` fp32.
fn sink_gradient(sinks: CudaTensor, lse: CudaTensor, dots: CudaTensor, sizes: Sizes) -> CudaTensor {
    let heads = sizes.heads;
    let sinks = cast(sinks, DType::F32)
        .reshape(&[1, heads, 1])
        .expand(lse.dims());
    let p = unary("Exp", binary("SubTensor", sinks, lse, None));
    let product = scalar(
        "MulScalar",
        binary("MulTensor", p, dots, None),
        (-1.0).into(),
    );
    let sum = reduce(Reduction::Sum, &product, 2, DType::F32);
    reduce(Reduction::Sum, &sum, 0, DType::F32).reshape(&[heads])
}
