//! One optimizer step: micro-batches in, gradients of their common mean, clipping, update.

use bridge_data::Batch;
use bridge_models::SegmentedModel;
use bridge_ops::{Float, Ops, to_f32_vec};

use crate::batch::context;
use crate::config::{NonFinitePolicy, RecomputeGranularity};
use crate::engine::{forward_backward, forward_loss};
use crate::optimizer::{AdamW, clip_coefficient, grad_norm, non_finite_gradients};

/// A loss over the tokens of several micro-batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLoss {
    /// Mean over the tokens that count; 0 if there are none.
    pub mean: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Tokens that count.
    pub valid_tokens: u64,
}

/// Adds the gradients of the mean loss over all `micro_batches` to the parameters' slots.
///
/// The mean is over the valid tokens of all micro-batches together, not a mean of means, so loss and gradients do not
/// depend on how a batch is cut.
pub fn accumulate_gradients<B: Ops>(
    model: &dyn SegmentedModel<B>,
    micro_batches: &[Batch],
    device: &B::Device,
    recompute: RecomputeGranularity,
) -> TokenLoss {
    let valid_tokens: usize = micro_batches.iter().map(Batch::loss_tokens).sum();
    let loss_scale = 1.0 / valid_tokens.max(1) as f64;
    token_loss::<B>(micro_batches, |batch| {
        forward_backward(
            model,
            &context(batch, device),
            &batch.labels,
            loss_scale,
            recompute,
        )
    })
}

/// The mean loss over all `micro_batches`, without gradients.
pub fn evaluate<B: Ops>(
    model: &dyn SegmentedModel<B>,
    micro_batches: &[Batch],
    device: &B::Device,
) -> TokenLoss {
    token_loss::<B>(micro_batches, |batch| {
        forward_loss(model, &context(batch, device), &batch.labels)
    })
}

fn token_loss<B: Ops>(micro_batches: &[Batch], run: impl FnMut(&Batch) -> Float<B>) -> TokenLoss {
    let losses: Vec<Float<B>> = micro_batches.iter().map(run).collect();
    // Read back after all the work is queued, so that a device never waits for the host between micro-batches.
    let sum: f64 = losses
        .into_iter()
        .flat_map(to_f32_vec::<B>)
        .map(f64::from)
        .sum();
    let tokens = micro_batches
        .iter()
        .map(|batch| batch.tokens.len() as u64)
        .sum();
    let valid_tokens = micro_batches
        .iter()
        .map(|batch| batch.loss_tokens() as u64)
        .sum();
    TokenLoss {
        mean: sum / u64::max(valid_tokens, 1) as f64,
        tokens,
        valid_tokens,
    }
}

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 disables clipping.
    pub clip_grad: f64,
    /// What a layer keeps for its backward pass.
    pub recompute: RecomputeGranularity,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    /// Loss before the update.
    pub loss: TokenLoss,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// What was not finite, in words; then the weights are as before.
    pub non_finite: Option<String>,
}

/// Computes gradients, clips them and updates the weights. If the loss or a gradient is not finite the weights stay as
/// they were, and the outcome says so.
pub fn train_step<B: Ops>(
    model: &dyn SegmentedModel<B>,
    optimizer: &mut AdamW<B>,
    micro_batches: &[Batch],
    device: &B::Device,
    options: &StepOptions,
) -> StepOutcome {
    optimizer.clear_grads();
    let loss = accumulate_gradients(model, micro_batches, device, options.recompute);
    let params = optimizer.params();
    let grad_norm = grad_norm(&params);
    let non_finite = describe_non_finite(&loss, grad_norm, || non_finite_gradients(&params, 3));
    if non_finite.is_none() {
        optimizer.step(
            options.lr,
            options.weight_decay,
            clip_coefficient(grad_norm, options.clip_grad),
        );
    }
    optimizer.clear_grads();
    StepOutcome {
        loss,
        grad_norm,
        non_finite,
    }
}

fn describe_non_finite(
    loss: &TokenLoss,
    grad_norm: f64,
    names: impl FnOnce() -> Vec<String>,
) -> Option<String> {
    if !loss.mean.is_finite() {
        return Some(format!("the loss is {}", loss.mean));
    }
    if grad_norm.is_finite() {
        return None;
    }
    let names = names();
    Some(match names.as_slice() {
        // Every element is finite; only the sum of squares is not.
        [] => "the gradient is too large for its norm to be a number".to_owned(),
        names => format!(
            "the gradient norm is {grad_norm}, with a NaN or infinity in the gradient of {}",
            names.join(", ")
        ),
    })
}

/// Counts skipped steps and decides when it is enough.
#[derive(Clone, Debug)]
pub struct NonFiniteGuard {
    policy: NonFinitePolicy,
    max_in_a_row: u64,
    in_a_row: u64,
    total: u64,
}

impl NonFiniteGuard {
    /// A guard that has seen nothing.
    pub fn new(policy: NonFinitePolicy, max_in_a_row: u64) -> Self {
        Self {
            policy,
            max_in_a_row,
            in_a_row: 0,
            total: 0,
        }
    }

    /// Takes note of a step; `false` means that the run must stop.
    pub fn allows(&mut self, outcome: &StepOutcome) -> bool {
        if outcome.non_finite.is_none() {
            self.in_a_row = 0;
            return true;
        }
        self.in_a_row += 1;
        self.total += 1;
        self.policy == NonFinitePolicy::Skip && self.in_a_row <= self.max_in_a_row
    }

    /// Steps skipped so far.
    pub fn total(&self) -> u64 {
        self.total
    }
}
