//! One optimizer step: micro-batches in, gradients of their common mean, clipping, update.

use bridge_data::Batch;
use bridge_models::SegmentedModel;
use bridge_ops::Ops;

use crate::agree;
use crate::config::NonFinitePolicy;
use crate::engine::Executor;
pub use crate::engine::TokenLoss;
use crate::error::Result;
use crate::optimizer::{Gradients, Optimizer, clip_coefficient};

/// Adds the gradients of the mean loss over all ranks' micro-batches to the parameters' slots, each rank its own
/// contribution. `micro_batches` are those of this rank (see [`Executor::forward_backward`]).
///
/// The mean is over the valid tokens of all micro-batches together, not a mean of means, so loss and gradients do not
/// depend on how a batch is cut.
///
/// # Errors
/// If a rank fails.
pub fn accumulate_gradients<B: Ops>(
    executor: &Executor<B>,
    model: &dyn SegmentedModel<B>,
    micro_batches: &[Batch],
) -> Result<TokenLoss> {
    let local = executor.forward_backward(model, micro_batches, &mut |_| {})?;
    let [sum, tokens] = agree::sum(executor.parallel(), [local.sum, local.tokens as f64])?;
    Ok(TokenLoss::of(sum, tokens, local.valid_tokens))
}

/// The mean loss over all ranks' micro-batches, without gradients.
///
/// # Errors
/// If a rank fails.
pub fn evaluate<B: Ops>(
    executor: &Executor<B>,
    model: &dyn SegmentedModel<B>,
    micro_batches: &[Batch],
) -> Result<TokenLoss> {
    let local = executor.forward(model, micro_batches)?;
    let [sum, tokens] = agree::sum(executor.parallel(), [local.sum, local.tokens as f64])?;
    Ok(TokenLoss::of(sum, tokens, local.valid_tokens))
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
    /// How many ranks asked for something in this step (see [`train_step`]).
    pub asked: [u64; 2],
}

/// Computes gradients, sums them over ranks, clips them and updates the weights. If the loss or a gradient is not finite
/// the weights stay as they were, and the outcome says so. Everything in the outcome is the same on every rank.
///
/// `asks` are requests of this rank, such as to stop; the outcome says how many ranks made each.
///
/// # Errors
/// If a rank fails; the weights may be worthless then.
pub fn train_step<B: Ops>(
    executor: &Executor<B>,
    model: &dyn SegmentedModel<B>,
    optimizer: &mut Optimizer<B>,
    micro_batches: &[Batch],
    options: &StepOptions,
    asks: [bool; 2],
) -> Result<StepOutcome> {
    optimizer.clear_grads();
    let mut reduction = optimizer.start_reduction();
    let local = executor.forward_backward(model, micro_batches, &mut |segment| {
        reduction.segment_done(segment);
    })?;
    let gradients = optimizer.finish_reduction(reduction)?;
    // One meeting of all ranks per step: whatever they must know of each other is in it.
    let [sum, tokens, squares, first, second] = agree::sum(
        executor.parallel(),
        [
            local.sum,
            local.tokens as f64,
            optimizer.local_squared_norm(&gradients),
            f64::from(u8::from(asks[0])),
            f64::from(u8::from(asks[1])),
        ],
    )?;
    let loss = TokenLoss::of(sum, tokens, local.valid_tokens);
    let grad_norm = squares.sqrt();
    let non_finite = describe_non_finite(&loss, grad_norm, optimizer, &gradients)?;
    if non_finite.is_none() {
        optimizer.step(
            gradients,
            options.lr,
            options.weight_decay,
            clip_coefficient(grad_norm, options.clip_grad),
        )?;
    }
    optimizer.clear_grads();
    Ok(StepOutcome {
        loss,
        grad_norm,
        non_finite,
        asked: [first as u64, second as u64],
    })
}

fn describe_non_finite<B: Ops>(
    loss: &TokenLoss,
    grad_norm: f64,
    optimizer: &Optimizer<B>,
    gradients: &Gradients<B>,
) -> Result<Option<String>> {
    if !loss.mean.is_finite() {
        return Ok(Some(format!("the loss is {}", loss.mean)));
    }
    if grad_norm.is_finite() {
        return Ok(None);
    }
    let names = optimizer.non_finite(gradients, 3)?;
    Ok(Some(match names.as_slice() {
        // Every element is finite; only the sum of squares is not.
        [] => "the gradient is too large for its norm to be a number".to_owned(),
        names => format!(
            "the gradient norm is {grad_norm}, with a NaN or infinity in the gradient of {}",
            names.join(", ")
        ),
    }))
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
