//! This crate's own attention kernels: `kernels/attention.cu` for the tensor cores, `kernels/attention_generic.cu` for
//! everything else.

use bridge_ops::AttentionRule;
use burn_backend::{DType, TensorMetadata};

use super::{Gradients, Inputs, Sizes, aligned};
use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::type_name;
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

/// Rows a block owns, `ROWS` of the kernel file; and its threads.
const ROWS: usize = 64;
const THREADS: u32 = 128;

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

/// Forward on the tensor cores. `out` and `lse` are packed and written in full.
pub(super) fn forward_tensor_cores(
    sizes: Sizes,
    inputs: Inputs,
    sinks: &Option<CudaTensor>,
    out: &CudaTensor,
    lse: &CudaTensor,
    rule: &AttentionRule,
) {
    let gpu = out.gpu();
    let documents = documents(gpu, sizes, rule);
    let Inputs { q, k, v } = inputs.map(aligned);
    let d = sizes.d.to_string();
    let kernel = gpu
        .kernel("attention", &defines(&q, &d, rule), "forward")
        .or_panic();
    let shape = Launch::grid([sizes.s.div_ceil(ROWS), sizes.heads, sizes.batch], THREADS);
    let problem = Problem::new(sizes, rule, &q, &k, &v);
    // SAFETY: strides and sizes describe the operands; outputs are packed. Shared memory: two tiles of 64 keys and two of
    // values.
    unsafe {
        launch!(gpu, kernel, shape.shared(4 * 64 * sizes.d * 2); out.address(), lse.address(), q.address(),
            k.address(), v.address(), address(sinks), address(&documents), problem)
        .or_panic();
    }
}

/// Forward for any dtype and head size.
pub(super) fn forward_generic(
    sizes: Sizes,
    inputs: Inputs,
    sinks: &Option<CudaTensor>,
    out: &CudaTensor,
    lse: &CudaTensor,
    rule: &AttentionRule,
) {
    let gpu = out.gpu();
    let dtype = out.dtype();
    let documents = documents(gpu, sizes, rule);
    let Inputs { q, k, v } = inputs.map(|x| x.packed());
    let kernel = gpu
        .kernel(
            "attention_generic",
            &[("TYPE", type_name(dtype))],
            "forward",
        )
        .or_panic();
    let shape = Launch::linear(sizes.rows(), THREADS)
        .shared((sizes.d + sizes.dv + THREADS as usize) * accumulator_size(dtype));
    // SAFETY: packed operands of the rule's sizes; one block per query.
    unsafe {
        launch!(gpu, kernel, shape; out.address(), lse.address(), q.address(), k.address(), v.address(),
            address(sinks), address(&documents), Rule::new(sizes, rule))
        .or_panic();
    }
}

/// Bytes of the type that the generic kernels compute in.
fn accumulator_size(dtype: DType) -> usize {
    if dtype == DType::F64 { 8 } else { 4 }
}

/// `dout . out` of every row, `[batch, heads, s]` fp32, from packed tensors of the same dtype.
pub(super) fn row_dots(
    sizes: Sizes,
    [out, dout]: [&CudaTensor; 2],
    rule: &AttentionRule,
) -> CudaTensor {
    let gpu = out.gpu();
    let dots = CudaTensor::empty(gpu, &[sizes.batch, sizes.heads, sizes.s], DType::F32);
    let kernel = gpu
        .kernel(
            "attention_generic",
            &[("TYPE", type_name(out.dtype()))],
            "row_dots",
        )
        .or_panic();
    let rows = Launch::linear(sizes.rows(), THREADS);
    // SAFETY: packed operands; one block per row.
    unsafe {
        launch!(gpu, kernel, rows; dots.address(), out.address(), dout.address(),
            Rule::new(sizes, rule))
        .or_panic();
    }
    dots
}

/// Backward on the tensor cores. `out`, `dout`, `lse` and the gradients are packed; returns the row dots.
pub(super) fn backward_tensor_cores(
    sizes: Sizes,
    inputs: Inputs,
    [out, dout, lse]: [&CudaTensor; 3],
    grads: &Gradients,
    rule: &AttentionRule,
) -> CudaTensor {
    let gpu = out.gpu();
    let documents = documents(gpu, sizes, rule);
    let Inputs { q, k, v } = inputs.map(aligned);
    let dout = aligned(dout.clone());
    let dots = CudaTensor::empty(gpu, &[sizes.batch, sizes.heads, sizes.s], DType::F32);
    let d = sizes.d.to_string();
    let defines = defines(&q, &d, rule);
    let kernel = |entry| gpu.kernel("attention", &defines, entry).or_panic();
    let problem = Problem::new(sizes, rule, &q, &k, &v);
    let tile = if sizes.d <= 64 { 64 } else { 32 };
    let rows = sizes.rows();
    let by_query = Launch::grid([sizes.s.div_ceil(ROWS), sizes.heads, sizes.batch], THREADS);
    let by_key = Launch::grid(
        [sizes.t.div_ceil(ROWS), sizes.kv_heads, sizes.batch],
        THREADS,
    );
    // SAFETY: strides and sizes describe the operands; outputs are packed. Shared memory: four tiles, and the block's own
    // keys and values.
    unsafe {
        launch!(gpu, kernel("row_dots"), Launch::linear(rows.div_ceil(4), THREADS); dots.address(), out.address(),
            dout.address(), rows as i64, sizes.s as i64, sizes.heads as i64)
        .or_panic();
        launch!(gpu, kernel("backward_kv"), by_key.shared((2 * ROWS + 4 * tile) * sizes.d * 2);
            grads.dk.address(), grads.dv.address(), q.address(), k.address(), v.address(), dout.address(),
            lse.address(), dots.address(), address(&documents), problem)
        .or_panic();
        launch!(gpu, kernel("backward_q"), by_query.shared(4 * tile * sizes.d * 2); grads.dq.address(), q.address(),
            k.address(), v.address(), dout.address(), lse.address(), dots.address(), address(&documents), problem)
        .or_panic();
    }
    dots
}

/// Backward for any dtype and head size. As [`backward_tensor_cores`].
pub(super) fn backward_generic(
    sizes: Sizes,
    inputs: Inputs,
    [out, dout, lse]: [&CudaTensor; 3],
    grads: &Gradients,
    rule: &AttentionRule,
) -> CudaTensor {
    let gpu = out.gpu();
    let dtype = out.dtype();
    let documents = documents(gpu, sizes, rule);
    let Inputs { q, k, v } = inputs.map(|x| x.packed());
    let dots = row_dots(sizes, [out, dout], rule);
    let kernel = |entry| {
        gpu.kernel("attention_generic", &[("TYPE", type_name(dtype))], entry)
            .or_panic()
    };
    let element = accumulator_size(dtype);
    let threads = THREADS as usize;
    let generic = Rule::new(sizes, rule);
    let by_query =
        Launch::linear(sizes.rows(), THREADS).shared((sizes.d + sizes.dv + threads) * element);
    let by_key = Launch::linear(sizes.batch * sizes.kv_heads * sizes.t, THREADS)
        .shared((sizes.d + sizes.dv + 2 * threads) * element);
    // SAFETY: packed operands of the rule's sizes; one block per query or per key.
    unsafe {
        launch!(gpu, kernel("backward_q"), by_query; grads.dq.address(), q.address(), k.address(), v.address(),
            dout.address(), lse.address(), dots.address(), address(&documents), generic)
        .or_panic();
        launch!(gpu, kernel("backward_kv"), by_key; grads.dk.address(), grads.dv.address(), q.address(), k.address(),
            v.address(), dout.address(), lse.address(), dots.address(), address(&documents), generic)
        .or_panic();
    }
    dots
}
