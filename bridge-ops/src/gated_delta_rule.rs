//! The gated delta rule: a linear recurrence per head that decays its state, erases what the state holds under the
//! token's key, and writes the token's value there (Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks: Improving
//! Mamba2 with Delta Rule").
//!
//! ```text
//! S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - k_t^T exp(g_t) S_{t-1})      S: [key_dim, value_dim], g_t <= 0
//! o_t = scale S_t^T q_t
//! ```
//!
//! Computed chunk by chunk (section 3.3 of the paper). With `A_i` the sum of `g` from the chunk's first token to token
//! i, `S` the state before the chunk, `n` its last token and `D_ij = exp(A_i - A_j)` for j <= i,
//!
//! ```text
//! N_ij = beta_i (k_i . k_j) D_ij   for j < i,    T = (I + N)^-1
//! U = T (beta v),   W = T (beta exp(A) k),   V = U - W S
//! P_ij = scale (q_i . k_j) D_ij    for j <= i
//! o  = exp(A) scale q S + P V
//! S' = exp(A_n) S + (exp(A_n - A) k)^T V
//! ```
//!
//! Backward, with `G` the gradient of the state after the chunk, `Q = exp(A) scale q`, `K = exp(A_n - A) k`, and
//! `X = [beta v, beta exp(A) k]` so that `T X = [U, W]`:
//!
//! ```text
//! dV = P^T do + K G,  dU = dV,  dW = -dV S^T,  dX = T^T [dU, dW],  dN = -dX [U, W]^T below the diagonal
//! G_before = exp(A_n) G + Q^T do - W^T dV
//! dP = do V^T,  dQ = do S^T,  dK = V G^T
//! ```
//!
//! and from there by the product rule; everything that carries a factor `exp(A_i)` adds the product of itself and its
//! gradient to `dA_i`, and `dg_k` is the sum of `dA_i` over i >= k.
//!
//! `T` is built from blocks of doubling size: where T inverts the diagonal blocks of one size, `T - T N' T` inverts
//! those of twice the size, N' being the part of N that joins two neighbours. That is as exact as substitution row by
//! row, which a series in powers of N is not. A chunk of one token is the recurrence itself: generation runs the same
//! code.

use burn::tensor::{Bool, Tensor, TensorData};
use burn_backend::TensorMetadata;

use crate::chunks::{Chunks, check_documents, chunk, last, per_document, shape_of, sum_to_end};
use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};
use crate::ssd_scan::ScanSpec;
use crate::tape::{Tape, Var};

/// What the token of each position contributes to a [`gated_delta_rule`].
#[derive(Debug, Clone)]
pub struct DeltaRuleInputs<T> {
    /// [batch, seq, key_heads, key_dim], usually of length one each; value heads share them in equal runs of
    /// neighbours.
    pub q: T,
    /// Like q.
    pub k: T,
    /// [batch, seq, heads, value_dim].
    pub v: T,
    /// Logarithms of the decays, at most 0: [batch, seq, heads].
    pub log_decay: T,
    /// How much is erased and written, in 0..1: [batch, seq, heads].
    pub beta: T,
}

impl<T> DeltaRuleInputs<T> {
    fn into_array(self) -> [T; 5] {
        [self.q, self.k, self.v, self.log_decay, self.beta]
    }

    fn from_array([q, k, v, log_decay, beta]: [T; 5]) -> Self {
        Self {
            q,
            k,
            v,
            log_decay,
            beta,
        }
    }
}

/// The gated delta rule. `scale` multiplies the queries. -> [batch, seq, heads, value_dim] in the dtype of v.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn gated_delta_rule<B: Ops>(
    tape: &Tape<B>,
    inputs: &DeltaRuleInputs<Var<B>>,
    scale: f64,
    spec: &ScanSpec,
) -> Var<B> {
    let values = values_of(inputs);
    check::<B>(&values, spec);
    let (output, _) = B::gated_delta_rule_forward(values.clone(), None, scale, spec);
    let parents = [
        &inputs.q,
        &inputs.k,
        &inputs.v,
        &inputs.log_decay,
        &inputs.beta,
    ];
    let spec = spec.clone();
    tape.record(output, &parents, move |dout| {
        let grads = B::gated_delta_rule_backward(values, dout, scale, &spec);
        grads.into_array().into_iter().map(Some).collect()
    })
}

/// [`gated_delta_rule`] that goes on from a state and returns the next, for generation: `state` is [batch, heads,
/// key_dim, value_dim] fp32, `None` at the start of a text.
///
/// # Panics
/// When the tape records (there is no gradient through the state), or the shapes do not fit.
#[track_caller]
pub fn gated_delta_rule_with_state<B: Ops>(
    tape: &Tape<B>,
    inputs: &DeltaRuleInputs<Var<B>>,
    state: Option<Float<B>>,
    scale: f64,
    spec: &ScanSpec,
) -> (Var<B>, Float<B>) {
    assert!(
        !tape.is_recording() && spec.documents.is_none(),
        "gated_delta_rule: a state that is carried over has no gradient and belongs to one document per row"
    );
    let values = values_of(inputs);
    check::<B>(&values, spec);
    let (output, state) = B::gated_delta_rule_forward(values, state, scale, spec);
    (tape.constant(output), state)
}

fn values_of<B: Ops>(inputs: &DeltaRuleInputs<Var<B>>) -> DeltaRuleInputs<Float<B>> {
    DeltaRuleInputs {
        q: inputs.q.value(),
        k: inputs.k.value(),
        v: inputs.v.value(),
        log_decay: inputs.log_decay.value(),
        beta: inputs.beta.value(),
    }
}

#[track_caller]
fn check<B: Ops>(inputs: &DeltaRuleInputs<Float<B>>, spec: &ScanSpec) {
    let op = "gated_delta_rule";
    let k: [usize; 4] = shape_of::<B, 4>(op, "k", &inputs.k);
    let v: [usize; 4] = shape_of::<B, 4>(op, "v", &inputs.v);
    let (q, decay, beta) = (dims(&inputs.q), dims(&inputs.log_decay), dims(&inputs.beta));
    let fits = q == k
        && k[..2] == v[..2]
        && k[2] > 0
        && v[2].is_multiple_of(k[2])
        && decay == v[..3]
        && beta == decay;
    assert!(
        fits,
        "{op}: q {q:?}, k {k:?}, v {v:?}, log_decay {decay:?} and beta {beta:?} do not fit together"
    );
    assert!(spec.chunk_size > 0, "{op}: chunk_size is 0");
    check_documents(op, spec.documents.as_deref(), v[0] * v[1]);
}

/// [`Ops::gated_delta_rule_forward`] in plain Burn operations.
pub fn portable<B: Ops>(
    inputs: DeltaRuleInputs<Float<B>>,
    state: Option<Float<B>>,
    scale: f64,
    spec: &ScanSpec,
) -> (Float<B>, Float<B>) {
    let Some(documents) = &spec.documents else {
        return forward::<B>(inputs, state, scale, spec.chunk_size);
    };
    let mut last_state = None;
    let [output] = per_document::<B, 5, 1>(inputs.into_array(), documents, |own| {
        let own = DeltaRuleInputs::from_array(own);
        let (output, state) = forward::<B>(own, None, scale, spec.chunk_size);
        last_state = Some(state);
        [output]
    });
    (
        output,
        last_state.expect("a batch has at least one document"),
    )
}

fn forward<B: Ops>(
    inputs: DeltaRuleInputs<Float<B>>,
    state: Option<Float<B>>,
    scale: f64,
    chunk_size: usize,
) -> (Float<B>, Float<B>) {
    let dtype = inputs.v.dtype();
    let parts = Parts::<B>::new(inputs, state, scale, chunk_size);
    let output = parts.q_decayed.matmul(parts.entering) + parts.p.matmul(parts.v_new);
    let [batch, _, heads, value_dim] = parts.v_shape;
    let output = parts.chunks.join(output, heads);
    let state = reshaped::<B>(
        float(parts.leaving_last),
        &[batch, heads, parts.key_dim, value_dim],
    );
    (to_dtype::<B>(float(output), dtype), state)
}

/// [`Ops::gated_delta_rule_backward`] in plain Burn operations.
pub fn portable_backward<B: Ops>(
    inputs: DeltaRuleInputs<Float<B>>,
    dout: Float<B>,
    scale: f64,
    spec: &ScanSpec,
) -> DeltaRuleInputs<Float<B>> {
    let Some(documents) = &spec.documents else {
        return backward::<B>(inputs, dout, scale, spec.chunk_size);
    };
    let [q, k, v, log_decay, beta] = inputs.into_array();
    let grads = per_document::<B, 6, 5>([q, k, v, log_decay, beta, dout], documents, |own| {
        let [q, k, v, log_decay, beta, dout] = own;
        let inputs = DeltaRuleInputs::from_array([q, k, v, log_decay, beta]);
        backward::<B>(inputs, dout, scale, spec.chunk_size).into_array()
    });
    DeltaRuleInputs::from_array(grads)
}

fn backward<B: Ops>(
    inputs: DeltaRuleInputs<Float<B>>,
    dout: Float<B>,
    scale: f64,
    chunk_size: usize,
) -> DeltaRuleInputs<Float<B>> {
    let dtypes = inputs.clone().into_array().map(|x| x.dtype());
    let parts = Parts::<B>::new(inputs, None, scale, chunk_size);
    let chunks = parts.chunks;
    let dout = chunks.split::<B>(dout); // [.., len, value_dim]

    // From the last chunk to the first: the gradient of the state that each leaves behind, and of V, which needs it.
    let dv_inside = parts.p.clone().swap_dims(2, 3).matmul(dout.clone());
    let read = parts.q_decayed.clone().swap_dims(2, 3).matmul(dout.clone()); // [.., key_dim, value_dim]
    let zeros = chunk(&read, 0).zeros_like();
    let leaving = chunks.scan_back(zeros, |index, grad| {
        let dv = chunk(&dv_inside, index) + chunk(&parts.k_to_end, index).matmul(grad.clone());
        grad * chunk(&parts.whole, index) + chunk(&read, index)
            - chunk(&parts.w, index).swap_dims(1, 2).matmul(dv)
    });
    let dv_new = dv_inside + parts.k_to_end.clone().matmul(leaving.clone());

    // Through T.
    let dw = dv_new
        .clone()
        .matmul(parts.entering.clone().swap_dims(2, 3))
        .neg();
    let inverse = parts.inverse.swap_dims(2, 3);
    let dx_v = inverse.clone().matmul(dv_new);
    let dx_k = inverse.matmul(dw);
    let upper = chunks.lower_mask(&dout.device(), -1);
    let dn = (dx_v.clone().matmul(parts.u.swap_dims(2, 3))
        + dx_k.clone().matmul(parts.w.swap_dims(2, 3)))
    .neg()
    .mask_fill(upper, 0.0);

    // N = beta (k . k) D and P = scale (q . k) D.
    let dn_decayed = dn.clone() * parts.decay.clone();
    let dkk = dn_decayed.clone() * parts.beta.clone();
    let dp = dout.clone().matmul(parts.v_new.clone().swap_dims(2, 3));
    let dqk = dp.clone() * parts.decay;
    let pairs = dn * parts.n + dp * parts.p;

    let dq_decayed = dout.matmul(parts.entering.clone().swap_dims(2, 3));
    let dk_to_end = parts.v_new.matmul(leaving.clone().swap_dims(2, 3));
    let beta_start = parts.beta.clone() * parts.from_start.clone();

    // q carries the scale already.
    let dq = (dqk.clone().matmul(parts.k.clone()) + dq_decayed.clone() * parts.from_start.clone())
        .mul_scalar(scale);
    let dk = dqk.swap_dims(2, 3).matmul(parts.q.clone())
        + dkk.clone().matmul(parts.k.clone())
        + dkk.swap_dims(2, 3).matmul(parts.k.clone())
        + dx_k.clone() * beta_start.clone()
        + dk_to_end.clone() * parts.to_end;
    let dbeta = (dn_decayed * parts.kk).sum_dim(3)
        + (dx_v.clone() * parts.v).sum_dim(3)
        + (dx_k.clone() * parts.k.clone()).sum_dim(3) * parts.from_start;
    let dv = dx_v * parts.beta;

    let e = (dk_to_end * parts.k_to_end).sum_dim(3);
    let dsums = pairs.clone().sum_dim(3) - pairs.sum_dim(2).swap_dims(2, 3)
        + (dx_k * parts.k * beta_start).sum_dim(3)
        + (dq_decayed * parts.q_decayed).sum_dim(3)
        - e.clone();
    let at_last = e.sum_dim(2) + (leaving * parts.entering).sum_dim(3).sum_dim(2) * parts.whole;
    let len = dsums.dims()[2];
    let dsums = if len == 1 {
        dsums + at_last
    } else {
        let tail = dsums.clone().narrow(2, len - 1, 1) + at_last;
        Tensor::cat(vec![dsums.narrow(2, 0, len - 1), tail], 2)
    };

    let heads = parts.v_shape[2];
    let joined = [
        float(chunks.join(dq, parts.key_heads)),
        float(chunks.join(dk, parts.key_heads)),
        float(chunks.join(dv, heads)),
        float(chunks.join_scalars(sum_to_end(dsums))),
        float(chunks.join_scalars(dbeta)),
    ];
    let mut dtypes = dtypes.into_iter();
    DeltaRuleInputs::from_array(joined.map(|grad| {
        let dtype = dtypes.next().expect("a dtype per input");
        to_dtype::<B>(grad, dtype)
    }))
}

/// What both directions need, as [sequences, count, len, ..] unless said otherwise. Names as in the module
/// documentation.
struct Parts<B: Ops> {
    chunks: Chunks,
    v_shape: [usize; 4],
    key_heads: usize,
    key_dim: usize,
    /// With the scale.
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    /// [.., len, 1].
    beta: Tensor<B, 4>,
    decay: Tensor<B, 4>,
    /// k_i . k_j.
    kk: Tensor<B, 4>,
    n: Tensor<B, 4>,
    /// T.
    inverse: Tensor<B, 4>,
    u: Tensor<B, 4>,
    w: Tensor<B, 4>,
    p: Tensor<B, 4>,
    /// exp(A): [.., len, 1].
    from_start: Tensor<B, 4>,
    /// exp(A_n - A): [.., len, 1].
    to_end: Tensor<B, 4>,
    /// exp(A_n): [.., 1, 1].
    whole: Tensor<B, 4>,
    /// Q.
    q_decayed: Tensor<B, 4>,
    /// K.
    k_to_end: Tensor<B, 4>,
    /// V.
    v_new: Tensor<B, 4>,
    /// The state before each chunk: [sequences, count, key_dim, value_dim].
    entering: Tensor<B, 4>,
    /// The state after the last chunk: [sequences, key_dim, value_dim].
    leaving_last: Tensor<B, 3>,
}

impl<B: Ops> Parts<B> {
    fn new(
        inputs: DeltaRuleInputs<Float<B>>,
        state: Option<Float<B>>,
        scale: f64,
        chunk_size: usize,
    ) -> Self {
        let op = "gated_delta_rule";
        let v_shape: [usize; 4] = shape_of::<B, 4>(op, "v", &inputs.v);
        let [_, _, key_heads, key_dim] = shape_of::<B, 4>(op, "k", &inputs.k);
        let [batch, seq, heads, value_dim] = v_shape;
        let chunks = Chunks::new(batch, seq, heads, chunk_size);

        let q = chunks.split::<B>(inputs.q).mul_scalar(scale);
        let (k, v) = (chunks.split::<B>(inputs.k), chunks.split::<B>(inputs.v));
        let beta = chunks.split_scalars::<B>(inputs.beta);
        let sums = chunks.split_scalars::<B>(inputs.log_decay).cumsum(2);
        let device = k.device();
        let decay = chunks.pairwise_decay(&sums);
        let total = last(&sums);
        let to_end = (total.clone() - sums.clone()).exp();
        let (from_start, whole) = (sums.exp(), total.exp());

        let kk = k.clone().matmul(k.clone().swap_dims(2, 3));
        let n = (kk.clone() * decay.clone() * beta.clone())
            .mask_fill(chunks.lower_mask(&device, -1), 0.0);
        let inverse = unit_lower_inverse(&n);
        let u = inverse.clone().matmul(v.clone() * beta.clone());
        let w = inverse
            .clone()
            .matmul(k.clone() * (beta.clone() * from_start.clone()));
        let p = q.clone().matmul(k.clone().swap_dims(2, 3)) * decay.clone();
        let k_to_end = k.clone() * to_end.clone();

        let size = [chunks.sequences(), key_dim, value_dim];
        let first = match state {
            Some(state) => tensor::<B, 4>(to_f32::<B>(state)).reshape(size),
            None => Tensor::zeros(size, &device),
        };
        let mut v_new = Vec::with_capacity(chunks.count());
        let (entering, leaving_last) = chunks.scan(first, |index, state| {
            let v = chunk(&u, index) - chunk(&w, index).matmul(state.clone());
            v_new.push(v.clone());
            state * chunk(&whole, index) + chunk(&k_to_end, index).swap_dims(1, 2).matmul(v)
        });
        Self {
            q_decayed: q.clone() * from_start.clone(),
            v_new: Tensor::stack(v_new, 1),
            chunks,
            v_shape,
            key_heads,
            key_dim,
            q,
            k,
            v,
            beta,
            decay,
            kk,
            n,
            inverse,
            u,
            w,
            p,
            from_start,
            to_end,
            whole,
            k_to_end,
            entering,
            leaving_last,
        }
    }
}

/// `(I + n)^-1` for `n` zero on and above the diagonal. [.., len, len].
fn unit_lower_inverse<B: Ops>(n: &Tensor<B, 4>) -> Tensor<B, 4> {
    let shape = n.dims();
    let (len, device) = (shape[3], n.device());
    let mut inverse = Tensor::<B, 2>::eye(len, &device)
        .unsqueeze::<4>()
        .expand(shape);
    let mut size = 1;
    while size < len {
        // Where row and column lie in the two halves of one block of twice the size.
        let outside: Vec<bool> = (0..len * len)
            .map(|at| {
                let (row, column) = (at / len / size, at % len / size);
                !(row % 2 == 1 && column + 1 == row)
            })
            .collect();
        let outside =
            Tensor::<B, 2, Bool>::from_data(TensorData::new(outside, [len, len]), &device);
        let joining = n
            .clone()
            .mask_fill(outside.unsqueeze::<4>().expand(shape), 0.0);
        inverse = inverse.clone() - inverse.clone().matmul(joining).matmul(inverse);
        size *= 2;
    }
    inverse
}

#[cfg(test)]
#[path = "gated_delta_rule_tests.rs"]
mod tests;
