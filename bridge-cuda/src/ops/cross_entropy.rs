//! Cross-entropy, alone and joined with the output layer. Kernels: `kernels/cross_entropy.cu`.

use bridge_ops::{CrossEntropyOutput, CrossEntropySpec, GradSlot, LossGradRequest, LossGrads};
use burn_backend::{DType, TensorMetadata};

use super::{linear, matrix, open_slot, vector};
use crate::backend::Cuda;
use crate::device::{Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::OrPanic;
use crate::matmul::matmul_into;
use crate::nvrtc::Kernel;
use crate::tensor::CudaTensor;

/// Memory for the logits of one piece of tokens, in bytes. Large pieces make efficient products; the weight gradient,
/// which is read and written once per piece, wants them larger than the logits alone would.
const PIECE: usize = 512 << 20;

fn kernel(
    logits: &CudaTensor,
    targets: &CudaTensor,
    spec: &CrossEntropySpec,
    entry: &'static str,
) -> (Kernel, Launch, f32) {
    let vector = vector(logits.dims()[1], &[logits]).to_string();
    let defines = [
        ("TYPE", type_name(logits.dtype())),
        ("INDEX", type_name(targets.dtype())),
        (
            "SOFTCAP",
            if spec.logit_softcap.is_some() {
                "1"
            } else {
                "0"
            },
        ),
        ("VECTOR", vector.as_str()),
    ];
    let kernel = logits
        .gpu()
        .kernel("cross_entropy", &defines, entry)
        .or_panic();
    (
        kernel,
        Launch::linear(logits.dims()[0], 512),
        spec.logit_softcap.unwrap_or(0.0) as f32,
    )
}

fn empty_output(like: &CudaTensor, tokens: usize) -> CrossEntropyOutput<Cuda> {
    let new = || CudaTensor::empty(like.gpu(), &[tokens], DType::F32);
    CrossEntropyOutput {
        loss: new(),
        lse: new(),
    }
}

/// Writes loss and log-sum-exp of packed logits.
fn queue_forward(
    logits: &CudaTensor,
    targets: &CudaTensor,
    output: &CrossEntropyOutput<Cuda>,
    spec: &CrossEntropySpec,
) {
    if logits.dims()[0] == 0 {
        return;
    }
    let (kernel, shape, cap) = kernel(logits, targets, spec, "forward");
    let n = logits.dims()[1] as i64;
    // SAFETY: packed operands, one block per row.
    unsafe {
        launch!(logits.gpu(), kernel, shape; output.loss.address(), output.lse.address(), logits.address(),
            targets.address(), n, spec.ignore_index, cap)
        .or_panic();
    }
}

/// Writes the gradient of packed logits to `dlogits`, which may be the logits.
fn queue_backward(
    dlogits: &CudaTensor,
    logits: &CudaTensor,
    targets: &CudaTensor,
    lse: &CudaTensor,
    dloss: &CudaTensor,
    spec: &CrossEntropySpec,
) {
    if logits.dims()[0] == 0 {
        return;
    }
    let (kernel, shape, cap) = kernel(logits, targets, spec, "backward");
    let n = logits.dims()[1] as i64;
    // SAFETY: packed operands, one block per row.
    unsafe {
        launch!(logits.gpu(), kernel, shape; dlogits.address(), logits.address(), targets.address(), lse.address(),
            dloss.address(), n, spec.ignore_index, cap)
        .or_panic();
    }
}

/// Both at once, in place.
fn queue_both(
    logits: &CudaTensor,
    targets: &CudaTensor,
    output: &CrossEntropyOutput<Cuda>,
    dloss: &CudaTensor,
    spec: &CrossEntropySpec,
) {
    if logits.dims()[0] == 0 {
        return;
    }
    let (kernel, shape, cap) = kernel(logits, targets, spec, "both");
    let n = logits.dims()[1] as i64;
    // SAFETY: packed operands, one block per row; the kernel reads a row's target logit before it overwrites the row.
    unsafe {
        launch!(logits.gpu(), kernel, shape; logits.address(), output.loss.address(), output.lse.address(),
            logits.address(), targets.address(), dloss.address(), n, spec.ignore_index, cap)
        .or_panic();
    }
}

pub(super) fn forward(
    logits: CudaTensor,
    targets: CudaTensor,
    spec: &CrossEntropySpec,
) -> CrossEntropyOutput<Cuda> {
    let (logits, targets) = (matrix(logits), targets.packed());
    let output = empty_output(&logits, logits.dims()[0]);
    queue_forward(&logits, &targets, &output, spec);
    output
}

pub(super) fn backward(
    logits: CudaTensor,
    targets: CudaTensor,
    lse: CudaTensor,
    dloss: CudaTensor,
    spec: &CrossEntropySpec,
) -> CudaTensor {
    let (logits, targets) = (matrix(logits), targets.packed());
    let (lse, dloss) = (
        cast(lse, DType::F32).packed(),
        cast(dloss, DType::F32).packed(),
    );
    let dlogits = if logits.is_unique() {
        logits.clone()
    } else {
        CudaTensor::empty(logits.gpu(), logits.dims(), logits.dtype())
    };
    queue_backward(&dlogits, &logits, &targets, &lse, &dloss, spec);
    dlogits
}

/// Rows of a piece: like pieces that fit in [`PIECE`] bytes, in multiples of 128.
pub(super) fn piece_rows(tokens: usize, vocab: usize, element: usize) -> usize {
    let most = (PIECE / (vocab * element).max(1)).max(128);
    let pieces = tokens.div_ceil(most).max(1);
    tokens
        .div_ceil(pieces)
        .next_multiple_of(128)
        .min(tokens.max(1))
}

/// Scratch for the logits of the largest piece, and a view of its first rows.
struct Scratch(CudaTensor);

impl Scratch {
    fn new(x: &CudaTensor, rows: usize, vocab: usize) -> Self {
        Self(CudaTensor::empty(x.gpu(), &[rows, vocab], x.dtype()))
    }

    /// The logits of some rows of x.
    fn logits(&self, x: &CudaTensor, weight: &CudaTensor) -> CudaTensor {
        let logits = self.0.clone().narrow(0, 0, x.dims()[0]);
        matmul_into(
            &logits,
            x.clone(),
            weight.clone().swap_dims(0, 1),
            None,
            None,
        );
        logits
    }
}

pub(super) fn linear_forward(
    x: CudaTensor,
    weight: CudaTensor,
    targets: CudaTensor,
    spec: &CrossEntropySpec,
) -> CrossEntropyOutput<Cuda> {
    let (x, weight, targets) = (
        linear::rows(x.clone()),
        cast(weight, x.dtype()),
        targets.packed(),
    );
    let (tokens, vocab) = (x.dims()[0], weight.dims()[0]);
    let rows = piece_rows(tokens, vocab, x.dtype().size());
    let output = empty_output(&x, tokens);
    let scratch = Scratch::new(&x, rows, vocab);
    for start in (0..tokens).step_by(rows) {
        let count = rows.min(tokens - start);
        let part = |t: &CudaTensor| t.clone().narrow(0, start, count);
        let logits = scratch.logits(&part(&x), &weight);
        let output = CrossEntropyOutput {
            loss: part(&output.loss),
            lse: part(&output.lse),
        };
        queue_forward(&logits, &part(&targets), &output, spec);
    }
    output
}

/// Gradients for a known `dloss`; with no `lse` given, loss and log-sum-exp as well. The logits of a piece become their
/// gradient in place, which then makes that piece's part of dx and of dW.
pub(super) fn linear_grads(
    x: CudaTensor,
    weight: CudaTensor,
    targets: CudaTensor,
    lse: Option<CudaTensor>,
    dloss: CudaTensor,
    spec: &CrossEntropySpec,
    request: LossGradRequest<Cuda>,
) -> (Option<CrossEntropyOutput<Cuda>>, LossGrads<Cuda>) {
    let shape = x.dims().to_vec();
    let (x, weight, targets) = (
        linear::rows(x.clone()),
        cast(weight, x.dtype()),
        targets.packed(),
    );
    let (lse, dloss) = (
        lse.map(|lse| cast(lse, DType::F32).packed()),
        cast(dloss, DType::F32).packed(),
    );
    let (tokens, vocab, hidden) = (x.dims()[0], weight.dims()[0], x.dims()[1]);
    let rows = piece_rows(tokens, vocab, x.dtype().size());
    let output = lse.is_none().then(|| empty_output(&x, tokens));
    let dx = request
        .input
        .then(|| CudaTensor::empty(x.gpu(), &[tokens, hidden], x.dtype()));
    let kept = request.weight.as_ref().map_or(DType::F32, GradSlot::dtype);
    let mut slot = request.weight.map(|slot| {
        let (sum, accumulate) = open_slot(slot, &x, &[vocab, hidden]);
        if accumulate {
            GradSlot::Sum(sum)
        } else {
            GradSlot::Stale(sum)
        }
    });
    let scratch = Scratch::new(&x, rows, vocab);
    for start in (0..tokens).step_by(rows) {
        let count = rows.min(tokens - start);
        let part = |t: &CudaTensor| t.clone().narrow(0, start, count);
        let logits = scratch.logits(&part(&x), &weight);
        match (&output, &lse) {
            (Some(output), _) => {
                let output = CrossEntropyOutput {
                    loss: part(&output.loss),
                    lse: part(&output.lse),
                };
                queue_both(&logits, &part(&targets), &output, &part(&dloss), spec);
            }
            (None, Some(lse)) => {
                queue_backward(
                    &logits,
                    &logits,
                    &part(&targets),
                    &part(lse),
                    &part(&dloss),
                    spec,
                );
            }
            (None, None) => unreachable!("either the log-sum-exp is known or it is computed"),
        }
        if let Some(dx) = &dx {
            matmul_into(&part(dx), logits.clone(), weight.clone(), None, None);
        }
        slot =
            slot.map(|slot| GradSlot::Sum(linear::accumulate_weight_grad(part(&x), logits, slot)));
    }
    let grads = LossGrads {
        input: dx.map(|dx| dx.reshape(&shape)),
        weight: slot.map(|slot| match slot {
            GradSlot::Sum(sum) => sum,
            // No tokens, so nothing was written.
            GradSlot::Stale(_) | GradSlot::Empty => {
                CudaTensor::zeros(x.gpu(), &[vocab, hidden], kept)
            }
        }),
    };
    (output, grads)
}
