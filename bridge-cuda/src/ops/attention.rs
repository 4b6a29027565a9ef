//! Attention. Kernels: `kernels/attention.cu` for the tensor cores, `kernels/attention_generic.cu` for everything else.

use bridge_ops::{AttentionGrads, AttentionOutput, AttentionRule};
use burn_backend::{DType, TensorMetadata};

use crate::backend::Cuda;
use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::{binary, cast, scalar, type_name, unary};
use crate::error::OrPanic;
use crate::reduce::{Reduction, reduce};
use crate::tensor::CudaTensor;

/// Rows a block owns, `ROWS` of the kernel file; and its threads.
const ROWS: usize = 64;
const THREADS: u32 = 128;

/// Which kernels serve an attention problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionPath {
    /// Tensor cores: bf16 or f16, head size 64 or 128.
    TensorCores,
    /// One thread per score: any dtype and head size up to 512.
    Generic,
}

impl AttentionPath {
    /// The kernels for heads of `d` channels (`dv` for values) of `dtype`.
    pub fn of(dtype: DType, d: usize, dv: usize) -> Self {
        let half = matches!(dtype, DType::BF16 | DType::F16);
        if half && d == dv && (d == 64 || d == 128) {
            Self::TensorCores
        } else {
            Self::Generic
        }
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

/// Mirrors `Problem` in `kernels/attention.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Problem {
    batch: i64,
    s: i64,
    t: i64,
    heads: i64,
    kv_heads: i64,
    q: [i64; 3],
    k: [i64; 3],
    v: [i64; 3],
    o: [i64; 3],
    q_offset: i64,
    kv_len: i64,
    window: i64,
    causal: i32,
    windowed: i32,
    scale: f32,
    softcap: f32,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Problem {}

/// Mirrors `Rule` in `kernels/attention_generic.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Rule {
    batch: i64,
    s: i64,
    t: i64,
    heads: i64,
    kv_heads: i64,
    d: i64,
    dv: i64,
    q_offset: i64,
    kv_len: i64,
    window: i64,
    causal: i32,
    windowed: i32,
    scale: f32,
    softcap: f32,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Rule {}

impl Rule {
    fn new(sizes: Sizes, rule: &AttentionRule) -> Self {
        Self {
            batch: sizes.batch as i64,
            s: sizes.s as i64,
            t: sizes.t as i64,
            heads: sizes.heads as i64,
            kv_heads: sizes.kv_heads as i64,
            d: sizes.d as i64,
            dv: sizes.dv as i64,
            q_offset: rule.q_offset as i64,
            kv_len: rule.kv_len.unwrap_or(sizes.t) as i64,
            window: rule.window.unwrap_or(0) as i64,
            causal: rule.causal.into(),
            windowed: rule.window.is_some().into(),
            scale: rule.scale_for(sizes.d) as f32,
            softcap: rule.softcap.unwrap_or(0.0) as f32,
        }
    }
}

impl Problem {
    fn new(
        sizes: Sizes,
        rule: &AttentionRule,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
    ) -> Self {
        let generic = Rule::new(sizes, rule);
        let strides = |x: &CudaTensor| [x.strides()[0], x.strides()[1], x.strides()[2]];
        let (s, heads, d) = (sizes.s as i64, sizes.heads as i64, sizes.d as i64);
        Self {
            batch: generic.batch,
            s,
            t: generic.t,
            heads,
            kv_heads: generic.kv_heads,
            q: strides(q),
            k: strides(k),
            v: strides(v),
            o: [s * heads * d, heads * d, d],
            q_offset: generic.q_offset,
            kv_len: generic.kv_len,
            window: generic.window,
            causal: generic.causal,
            windowed: generic.windowed,
            scale: generic.scale,
            softcap: generic.softcap,
        }
    }
}

/// First and last key of each query's document, `[batch * s, 2]` i32, counted within its row of the batch.
fn documents(gpu: &'static Gpu, sizes: Sizes, rule: &AttentionRule) -> Option<CudaTensor> {
    let offsets = rule.cu_seqlens.as_deref()?;
    let span = rule.q_offset + sizes.s;
    assert_eq!(
        offsets.last(),
        Some(&(sizes.batch * span)),
        "cu_seqlens cover the batch's positions exactly"
    );
    let mut bounds = Vec::with_capacity(sizes.batch * sizes.s * 2);
    for document in offsets.windows(2) {
        for token in document[0]..document[1] {
            let row = token / span * span;
            if token - row >= rule.q_offset {
                bounds.extend([
                    document[0].saturating_sub(row) as i32,
                    (document[1] - row) as i32,
                ]);
            }
        }
    }
    Some(CudaTensor::from_bytes(
        gpu,
        bytemuck::cast_slice(&bounds),
        &[bounds.len()],
        DType::I32,
    ))
}

/// Channels packed and every row of channels on a 16-byte boundary, as `cp.async` wants it.
fn aligned(x: CudaTensor) -> CudaTensor {
    let per_piece = 16 / x.dtype().size() as i64;
    let steps = (0..3).all(|d| x.dims()[d] == 1 || x.strides()[d] % per_piece == 0);
    if x.strides()[3] == 1 && steps && x.address().is_multiple_of(16) {
        x
    } else {
        x.copied()
    }
}

fn address(x: &Option<CudaTensor>) -> u64 {
    x.as_ref().map_or(0, CudaTensor::address)
}

fn defines<'a>(q: &CudaTensor, d: &'a str, rule: &AttentionRule) -> [(&'static str, &'a str); 4] {
    [
        ("TYPE", type_name(q.dtype())),
        ("D", d),
        ("SOFTCAP", if rule.softcap.is_some() { "1" } else { "0" }),
        (
            "DOCUMENTS",
            if rule.cu_seqlens.is_some() { "1" } else { "0" },
        ),
    ]
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
    let (k, v) = (cast(k, dtype), cast(v, dtype));
    let sinks = sinks.map(|sinks| cast(sinks, dtype).packed());
    let documents = documents(gpu, sizes, rule);
    let output = CudaTensor::empty(gpu, &[sizes.batch, sizes.s, sizes.heads, sizes.dv], dtype);
    let lse = CudaTensor::empty(gpu, &[sizes.batch, sizes.heads, sizes.s], DType::F32);
    if sizes.rows() == 0 {
        return AttentionOutput { output, lse };
    }
    match AttentionPath::of(dtype, sizes.d, sizes.dv) {
        AttentionPath::TensorCores => {
            let (q, k, v) = (aligned(q), aligned(k), aligned(v));
            let d = sizes.d.to_string();
            let kernel = gpu
                .kernel("attention", &defines(&q, &d, rule), "forward")
                .or_panic();
            let shape = Launch::grid([sizes.s.div_ceil(ROWS), sizes.heads, sizes.batch], THREADS);
            let problem = Problem::new(sizes, rule, &q, &k, &v);
            // SAFETY: strides and sizes describe the operands; outputs are packed. Shared memory: two tiles of 64 keys
            // and two of values.
            unsafe {
                launch!(gpu, kernel, shape.shared(4 * 64 * sizes.d * 2); output.address(), lse.address(), q.address(),
                    k.address(), v.address(), address(&sinks), address(&documents), problem)
                .or_panic();
            }
        }
        AttentionPath::Generic => {
            let (q, k, v) = (q.packed(), k.packed(), v.packed());
            let kernel = gpu
                .kernel(
                    "attention_generic",
                    &[("TYPE", type_name(dtype))],
                    "forward",
                )
                .or_panic();
            let element = if dtype == DType::F64 { 8 } else { 4 };
            let shape = Launch::linear(sizes.rows(), THREADS)
                .shared((sizes.d + sizes.dv + THREADS as usize) * element);
            // SAFETY: packed operands of the rule's sizes; one block per query.
            unsafe {
                launch!(gpu, kernel, shape; output.address(), lse.address(), q.address(), k.address(), v.address(),
                    address(&sinks), address(&documents), Rule::new(sizes, rule))
                .or_panic();
            }
        }
    }
    AttentionOutput { output, lse }
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
    let (k, v) = (cast(k, dtype), cast(v, dtype));
    let dout = cast(dout, dtype).packed();
    let (out, lse) = (output.output.packed(), output.lse.packed());
    let documents = documents(gpu, sizes, rule);
    let dots = CudaTensor::empty(gpu, &[sizes.batch, sizes.heads, sizes.s], DType::F32);
    let new = |x: &CudaTensor| CudaTensor::empty(gpu, x.dims(), dtype);
    let (dq, dk, dv) = (new(&q), new(&k), new(&v));
    let rows = sizes.rows();
    if rows == 0 || sizes.t == 0 {
        let zeros = |x: &CudaTensor| CudaTensor::zeros(gpu, x.dims(), dtype);
        let dsinks = sinks.map(|sinks| CudaTensor::zeros(gpu, sinks.dims(), DType::F32));
        return AttentionGrads {
            dq: zeros(&q),
            dk: zeros(&k),
            dv: zeros(&v),
            dsinks,
        };
    }
    match AttentionPath::of(dtype, sizes.d, sizes.dv) {
        AttentionPath::TensorCores => {
            let (q, k, v) = (aligned(q), aligned(k), aligned(v));
            let dout = aligned(dout);
            let d = sizes.d.to_string();
            let defines = defines(&q, &d, rule);
            let kernel = |entry| gpu.kernel("attention", &defines, entry).or_panic();
            let problem = Problem::new(sizes, rule, &q, &k, &v);
            let tile = if sizes.d <= 64 { 64 } else { 32 };
            let by_query =
                Launch::grid([sizes.s.div_ceil(ROWS), sizes.heads, sizes.batch], THREADS);
            let by_key = Launch::grid(
                [sizes.t.div_ceil(ROWS), sizes.kv_heads, sizes.batch],
                THREADS,
            );
            // SAFETY: strides and sizes describe the operands; outputs are packed. Shared memory: four tiles, and the
            // block's own keys and values.
            unsafe {
                launch!(gpu, kernel("row_dots"), Launch::linear(rows.div_ceil(4), THREADS); dots.address(), out.address(),
                    dout.address(), rows as i64, sizes.s as i64, sizes.heads as i64)
                .or_panic();
                launch!(gpu, kernel("backward_kv"), by_key.shared((2 * ROWS + 4 * tile) * sizes.d * 2); dk.address(),
                    dv.address(), q.address(), k.address(), v.address(), dout.address(), lse.address(), dots.address(),
                    address(&documents), problem)
                .or_panic();
                launch!(gpu, kernel("backward_q"), by_query.shared(4 * tile * sizes.d * 2); dq.address(), q.address(),
                    k.address(), v.address(), dout.address(), lse.address(), dots.address(), address(&documents), problem)
                .or_panic();
            }
        }
        AttentionPath::Generic => {
            let (q, k, v) = (q.packed(), k.packed(), v.packed());
            let kernel = |entry| {
                gpu.kernel("attention_generic", &[("TYPE", type_name(dtype))], entry)
                    .or_panic()
            };
            let element = if dtype == DType::F64 { 8 } else { 4 };
            let threads = THREADS as usize;
            let generic = Rule::new(sizes, rule);
            let by_query =
                Launch::linear(rows, THREADS).shared((sizes.d + sizes.dv + threads) * element);
            let by_key = Launch::linear(sizes.batch * sizes.kv_heads * sizes.t, THREADS)
                .shared((sizes.d + sizes.dv + 2 * threads) * element);
            // SAFETY: packed operands of the rule's sizes; one block per query or per key.
            unsafe {
                launch!(gpu, kernel("row_dots"), Launch::linear(rows, THREADS); dots.address(), out.address(),
                    dout.address(), generic)
                .or_panic();
                launch!(gpu, kernel("backward_q"), by_query; dq.address(), q.address(), k.address(), v.address(),
                    dout.address(), lse.address(), dots.address(), address(&documents), generic)
                .or_panic();
                launch!(gpu, kernel("backward_kv"), by_key; dk.address(), dv.address(), q.address(), k.address(),
                    v.address(), dout.address(), lse.address(), dots.address(), address(&documents), generic)
                .or_panic();
            }
        }
    }
    let dsinks = sinks.map(|sinks| sink_gradient(sinks, lse, dots, sizes));
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
