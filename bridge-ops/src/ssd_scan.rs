//! The scan of Mamba-2: a linear recurrence per head whose decay, input and output depend on the token (Dao and Gu 2024,
//! "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality").
//!
//! ```text
//! h_t = exp(a_t) h_{t-1} + (dt_t x_t) B_t^T         h: [head_dim, state], a_t <= 0 and dt_t > 0 per head
//! y_t = h_t C_t + D x_t
//! ```
//!
//! Computed chunk by chunk (section 6 of the paper): with `A_i` the sum of `a` from the chunk's first token to token i,
//! `u = dt x`, `H` the state before the chunk and `n` its last token,
//!
//! ```text
//! M_ij = (C_i . B_j) exp(A_i - A_j)   for j <= i
//! y_i  = sum_j M_ij u_j + exp(A_i) H C_i + D x_i
//! H'   = exp(A_n) H + sum_j exp(A_n - A_j) u_j B_j^T
//! ```
//!
//! Backward, with `G` the gradient of the state after the chunk:
//!
//! ```text
//! G_before = exp(A_n) G + sum_i exp(A_i) dy_i C_i^T
//! du_j = sum_i M_ij dy_i + exp(A_n - A_j) G B_j             dx = dt du + D dy, ddt = du . x, dD = sum dy . x
//! dM_ij = dy_i . u_j,  W_ij = dM_ij exp(A_i - A_j)
//! dC_i = sum_j W_ij B_j + exp(A_i) H^T dy_i
//! dB_j = sum_i W_ij C_i + exp(A_n - A_j) G^T u_j
//! dA_i = sum_j dM_ij M_ij - sum_j dM_ji M_ji + exp(A_i) dy_i . H C_i - e_i,   e_j = exp(A_n - A_j) u_j . G B_j
//! dA_n += sum_j e_j + exp(A_n) <G, H>                       da_k = sum over i >= k of dA_i
//! ```
//!
//! A chunk of one token is the recurrence itself: generation runs the same code.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn_backend::TensorMetadata;

use crate::chunks::{Chunks, check_documents, chunk, last, per_document, shape_of, sum_to_end};
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// How a recurrence runs along a sequence. Plain data, the same for every backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanSpec {
    /// Tokens per chunk. Changes speed and rounding only.
    pub chunk_size: usize,
    /// Packed documents: offsets `[0, l1, l1 + l2, .., batch * seq]` into the batch's tokens in row-major order. The
    /// state starts anew with each document and each row.
    pub documents: Option<Arc<[usize]>>,
}

impl ScanSpec {
    /// One document per row.
    pub fn new(chunk_size: usize) -> Self {
        Self {
            chunk_size,
            documents: None,
        }
    }

    /// The same with packed documents.
    pub fn with_documents(mut self, documents: Option<Arc<[usize]>>) -> Self {
        self.documents = documents;
        self
    }
}

/// What the token of each position contributes to a [`ssd_scan`].
#[derive(Debug, Clone)]
pub struct SsdInputs<T> {
    /// [batch, seq, heads, head_dim].
    pub x: T,
    /// Step sizes, above 0: [batch, seq, heads].
    pub dt: T,
    /// Logarithms of the decays, at most 0: [batch, seq, heads].
    pub log_decay: T,
    /// What writes to the state: [batch, seq, groups, state]; heads share groups in equal runs of neighbours.
    pub b: T,
    /// What reads from the state: like `b`.
    pub c: T,
}

impl<T> SsdInputs<T> {
    fn into_array(self) -> [T; 5] {
        [self.x, self.dt, self.log_decay, self.b, self.c]
    }

    fn from_array([x, dt, log_decay, b, c]: [T; 5]) -> Self {
        Self {
            x,
            dt,
            log_decay,
            b,
            c,
        }
    }
}

/// What the backward kernel returns: the gradient of each input, and `[heads]` fp32 of the skip connection.
pub type SsdGrads<B> = (SsdInputs<Float<B>>, Option<Float<B>>);

/// The Mamba-2 scan. `skip` is D, `[heads]`. -> [batch, seq, heads, head_dim] in the dtype of x.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn ssd_scan<B: Ops>(
    tape: &Tape<B>,
    inputs: &SsdInputs<Var<B>>,
    skip: Option<&Param<B>>,
    spec: &ScanSpec,
) -> Var<B> {
    let values = values_of(inputs);
    check::<B>(&values, skip, spec);
    let (output, _) = B::ssd_scan_forward(values.clone(), skip.map(Param::value), None, spec);

    let parents = [
        &inputs.x,
        &inputs.dt,
        &inputs.log_decay,
        &inputs.b,
        &inputs.c,
    ];
    let params: Vec<&Param<B>> = skip.into_iter().collect();
    let (skip, spec) = (skip.cloned(), spec.clone());
    tape.record_with_params(output, &parents, &params, move |dy| {
        let value = skip.as_ref().map(Param::value);
        let (grads, dskip) = B::ssd_scan_backward(values, value, dy, &spec);
        if let (Some(skip), Some(dskip)) = (skip.filter(|skip| skip.requires_grad()), dskip) {
            skip.accumulate_grad(dskip);
        }
        grads.into_array().into_iter().map(Some).collect()
    })
}

/// [`ssd_scan`] that goes on from a state and returns the next, for generation: `state` is [batch, heads, head_dim,
/// state] fp32, `None` at the start of a text.
///
/// # Panics
/// When the tape records (there is no gradient through the state), or the shapes do not fit.
#[track_caller]
pub fn ssd_scan_with_state<B: Ops>(
    tape: &Tape<B>,
    inputs: &SsdInputs<Var<B>>,
    skip: Option<&Param<B>>,
    state: Option<Float<B>>,
    spec: &ScanSpec,
) -> (Var<B>, Float<B>) {
    assert!(
        !tape.is_recording() && spec.documents.is_none(),
        "ssd_scan: a state that is carried over has no gradient and belongs to one document per row"
    );
    let values = values_of(inputs);
    check::<B>(&values, skip, spec);
    let (output, state) = B::ssd_scan_forward(values, skip.map(Param::value), state, spec);
    (tape.constant(output), state)
}

fn values_of<B: Ops>(inputs: &SsdInputs<Var<B>>) -> SsdInputs<Float<B>> {
    SsdInputs {
        x: inputs.x.value(),
        dt: inputs.dt.value(),
        log_decay: inputs.log_decay.value(),
        b: inputs.b.value(),
        c: inputs.c.value(),
    }
}

#[track_caller]
fn check<B: Ops>(inputs: &SsdInputs<Float<B>>, skip: Option<&Param<B>>, spec: &ScanSpec) {
    let x: [usize; 4] = shape_of::<B, 4>("ssd_scan", "x", &inputs.x);
    let [batch, seq, heads, _] = x;
    let b: [usize; 4] = shape_of::<B, 4>("ssd_scan", "b", &inputs.b);
    let (dt, decay, c) = (dims(&inputs.dt), dims(&inputs.log_decay), dims(&inputs.c));
    let fits = dt == [batch, seq, heads]
        && decay == dt
        && b[..2] == [batch, seq]
        && c == b
        && b[2] > 0
        && heads.is_multiple_of(b[2]);
    assert!(
        fits,
        "ssd_scan: x {x:?}, dt {dt:?}, log_decay {decay:?}, b {b:?} and c {c:?} do not fit together"
    );
    if let Some(skip) = skip {
        let shape = skip.shape();
        assert_eq!(
            shape,
            [heads],
            "ssd_scan: `{}` has shape {shape:?}",
            skip.name()
        );
    }
    assert!(spec.chunk_size > 0, "ssd_scan: chunk_size is 0");
    check_documents("ssd_scan", spec.documents.as_deref(), batch * seq);
}

/// [`Ops::ssd_scan_forward`] in plain Burn operations.
pub fn portable<B: Ops>(
    inputs: SsdInputs<Float<B>>,
    skip: Option<Float<B>>,
    state: Option<Float<B>>,
    spec: &ScanSpec,
) -> (Float<B>, Float<B>) {
    let Some(documents) = &spec.documents else {
        return forward::<B>(inputs, skip, state, spec.chunk_size);
    };
    let mut last_state = None;
    let [output] = per_document::<B, 5, 1>(inputs.into_array(), documents, |own| {
        let (output, state) = forward::<B>(
            SsdInputs::from_array(own),
            skip.clone(),
            None,
            spec.chunk_size,
        );
        last_state = Some(state);
        [output]
    });
    (
        output,
        last_state.expect("a batch has at least one document"),
    )
}

fn forward<B: Ops>(
    inputs: SsdInputs<Float<B>>,
    skip: Option<Float<B>>,
    state: Option<Float<B>>,
    chunk_size: usize,
) -> (Float<B>, Float<B>) {
    let dtype = inputs.x.dtype();
    let parts = Parts::<B>::new(inputs, state, chunk_size);
    let mut y =
        parts.m.matmul(parts.u) + parts.from_start * parts.c.matmul(parts.entering.swap_dims(2, 3));
    if let Some(skip) = skip {
        y = y + parts.x * per_head::<B>(skip, &parts.shape);
    }
    let [batch, _, heads, head_dim] = parts.shape.x;
    let y = parts.shape.chunks.join(y, heads);
    let state = float(parts.leaving_last);
    let state = reshaped::<B>(state, &[batch, heads, head_dim, parts.shape.state]);
    (to_dtype::<B>(float(y), dtype), state)
}

/// [`Ops::ssd_scan_backward`] in plain Burn operations.
pub fn portable_backward<B: Ops>(
    inputs: SsdInputs<Float<B>>,
    skip: Option<Float<B>>,
    dy: Float<B>,
    spec: &ScanSpec,
) -> SsdGrads<B> {
    let Some(documents) = &spec.documents else {
        return backward::<B>(inputs, skip, dy, spec.chunk_size);
    };
    let mut dskip: Option<Float<B>> = None;
    let [x, dt, log_decay, b, c] = inputs.into_array();
    let grads = per_document::<B, 6, 5>([x, dt, log_decay, b, c, dy], documents, |own| {
        let [x, dt, log_decay, b, c, dy] = own;
        let inputs = SsdInputs::from_array([x, dt, log_decay, b, c]);
        let (grads, added) = backward::<B>(inputs, skip.clone(), dy, spec.chunk_size);
        if let Some(added) = added {
            dskip = Some(match dskip.take() {
                Some(sum) => B::float_add(sum, added),
                None => added,
            });
        }
        grads.into_array()
    });
    (SsdInputs::from_array(grads), dskip)
}

fn backward<B: Ops>(
    inputs: SsdInputs<Float<B>>,
    skip: Option<Float<B>>,
    dy: Float<B>,
    chunk_size: usize,
) -> SsdGrads<B> {
    let dtypes = inputs.clone().into_array().map(|x| x.dtype());
    let parts = Parts::<B>::new(inputs, None, chunk_size);
    let (shape, chunks) = (parts.shape, parts.shape.chunks);
    let dy = chunks.split::<B>(dy); // [sequences, count, len, head_dim]

    let read = (dy.clone() * parts.from_start.clone())
        .swap_dims(2, 3)
        .matmul(parts.c.clone()); // [.., head_dim, state]
    let zeros = chunk(&read, 0).zeros_like();
    let leaving = chunks.scan_back(zeros, |index, grad| {
        grad * chunk(&parts.whole, index) + chunk(&read, index)
    });

    let written = parts.b.clone().matmul(leaving.clone().swap_dims(2, 3)); // [.., len, head_dim]
    let du =
        parts.m.clone().swap_dims(2, 3).matmul(dy.clone()) + written.clone() * parts.to_end.clone();
    let dm = dy.clone().matmul(parts.u.clone().swap_dims(2, 3));
    let w = dm.clone() * parts.decay;
    let dc = w.clone().matmul(parts.b.clone())
        + dy.clone().matmul(parts.entering.clone()) * parts.from_start.clone();
    let db = w.swap_dims(2, 3).matmul(parts.c.clone())
        + parts.u.clone().matmul(leaving.clone()) * parts.to_end.clone();

    let pairs = dm * parts.m;
    let state_read = parts.c.matmul(parts.entering.clone().swap_dims(2, 3)); // [.., len, head_dim]
    let e = (parts.u * written).sum_dim(3) * parts.to_end;
    let dsums = pairs.clone().sum_dim(3) - pairs.sum_dim(2).swap_dims(2, 3)
        + (dy.clone() * state_read).sum_dim(3) * parts.from_start
        - e.clone();
    let at_last = e.sum_dim(2) + (leaving * parts.entering).sum_dim(3).sum_dim(2) * parts.whole;
    let len = dsums.dims()[2];
    let dsums = if len == 1 {
        dsums + at_last
    } else {
        let tail = dsums.clone().narrow(2, len - 1, 1) + at_last;
        Tensor::cat(vec![dsums.narrow(2, 0, len - 1), tail], 2)
    };
    let dlog_decay = sum_to_end(dsums);

    let ddt = (du.clone() * parts.x.clone()).sum_dim(3);
    let mut dx = du * parts.dt;
    let mut dskip = None;
    if let Some(skip) = skip {
        dx = dx + dy.clone() * per_head::<B>(skip, &shape);
        let [batch, _, heads, _] = shape.x;
        let sums = (dy * parts.x).sum_dim(3).sum_dim(2).sum_dim(1); // [sequences, 1, 1, 1]
        let sums = sums.reshape([batch, heads]).sum_dim(0);
        dskip = Some(reshaped::<B>(float(sums), &[heads]));
    }
    let heads = shape.x[2];
    let joined = [
        float(chunks.join(dx, heads)),
        float(chunks.join_scalars(ddt)),
        float(chunks.join_scalars(dlog_decay)),
        float(chunks.join(db, shape.groups)),
        float(chunks.join(dc, shape.groups)),
    ];
    let mut dtypes = dtypes.into_iter();
    let grads = joined.map(|grad| {
        let dtype = dtypes.next().expect("a dtype per input");
        to_dtype::<B>(grad, dtype)
    });
    (SsdInputs::from_array(grads), dskip)
}

#[derive(Clone, Copy)]
struct Shape {
    chunks: Chunks,
    /// Of x.
    x: [usize; 4],
    groups: usize,
    state: usize,
}

/// What both directions need, as [sequences, count, len, ..] unless said otherwise.
struct Parts<B: Ops> {
    shape: Shape,
    x: Tensor<B, 4>,
    dt: Tensor<B, 4>,
    u: Tensor<B, 4>,
    b: Tensor<B, 4>,
    c: Tensor<B, 4>,
    decay: Tensor<B, 4>,
    m: Tensor<B, 4>,
    /// exp(A_i): the decay from before the chunk to each token.
    from_start: Tensor<B, 4>,
    /// exp(A_n - A_j): the decay from each token to the chunk's last.
    to_end: Tensor<B, 4>,
    /// exp(A_n): [sequences, count, 1, 1].
    whole: Tensor<B, 4>,
    /// The state before each chunk: [sequences, count, head_dim, state].
    entering: Tensor<B, 4>,
    /// The state after the last chunk: [sequences, head_dim, state].
    leaving_last: Tensor<B, 3>,
}

impl<B: Ops> Parts<B> {
    fn new(inputs: SsdInputs<Float<B>>, state: Option<Float<B>>, chunk_size: usize) -> Self {
        let x_shape: [usize; 4] = shape_of::<B, 4>("ssd_scan", "x", &inputs.x);
        let [_, _, groups, state_size] = shape_of::<B, 4>("ssd_scan", "b", &inputs.b);
        let [batch, seq, heads, head_dim] = x_shape;
        let chunks = Chunks::new(batch, seq, heads, chunk_size);

        let (x, dt) = (
            chunks.split::<B>(inputs.x),
            chunks.split_scalars::<B>(inputs.dt),
        );
        let (b, c) = (chunks.split::<B>(inputs.b), chunks.split::<B>(inputs.c));
        let sums = chunks.split_scalars::<B>(inputs.log_decay).cumsum(2);
        let decay = chunks.pairwise_decay(&sums);
        let total = last(&sums); // [.., 1, 1]
        let to_end = (total.clone() - sums.clone()).exp();
        let whole = total.exp();
        let u = x.clone() * dt.clone();
        let written = (u.clone() * to_end.clone())
            .swap_dims(2, 3)
            .matmul(b.clone()); // [.., head_dim, state]

        let size = [chunks.sequences(), head_dim, state_size];
        let first = match state {
            Some(state) => tensor::<B, 4>(to_f32::<B>(state)).reshape(size),
            None => Tensor::zeros(size, &x.device()),
        };
        let (entering, leaving_last) = chunks.scan(first, |index, state| {
            state * chunk(&whole, index) + chunk(&written, index)
        });
        Self {
            shape: Shape {
                chunks,
                x: x_shape,
                groups,
                state: state_size,
            },
            m: c.clone().matmul(b.clone().swap_dims(2, 3)) * decay.clone(),
            from_start: sums.exp(),
            x,
            dt,
            u,
            b,
            c,
            decay,
            to_end,
            whole,
            entering,
            leaving_last,
        }
    }
}

/// `[heads]` -> fp32 [sequences, 1, 1, 1].
fn per_head<B: Ops>(values: Float<B>, shape: &Shape) -> Tensor<B, 4> {
    let [batch, _, heads, _] = shape.x;
    tensor::<B, 1>(to_f32::<B>(values))
        .reshape([1, heads])
        .expand([batch, heads])
        .reshape([batch * heads, 1, 1, 1])
}

#[cfg(test)]
#[path = "ssd_scan_tests.rs"]
mod tests;
