//! One optimizer step: micro-batches in, gradients of their common mean, clipping, update.

use bridge_data::Batch;
use bridge_models::{
    AuxiliaryOptions, AuxiliaryReport, ExpertLoad, SegmentedModel, load_with_correction_bias,
    update_correction_biases,
};
use bridge_ops::{Ops, float_from_f32, to_f32_vec};
use bridge_parallel::{Axis, ParallelContext, ReduceOp};

use crate::agree;
use crate::config::NonFinitePolicy;
pub use crate::engine::TokenLoss;
use crate::engine::{Executor, NoHooks, SegmentHooks};
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
    let options = AuxiliaryOptions::default();
    evaluate_with(executor, model, micro_batches, &options, &mut NoHooks)
}

/// As [`evaluate`]; see [`Executor::evaluate`] for `options` and `hooks`.
///
/// # Errors
/// If a rank fails.
pub fn evaluate_with<B: Ops>(
    executor: &Executor<B>,
    model: &dyn SegmentedModel<B>,
    micro_batches: &[Batch],
    options: &AuxiliaryOptions,
    hooks: &mut dyn SegmentHooks,
) -> Result<TokenLoss> {
    let local = executor.evaluate(model, micro_batches, options, hooks)?;
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
    /// Losses besides that of the next token, and what else a mixture of experts wants in training.
    pub auxiliary: AuxiliaryOptions,
}

/// The values of the losses besides that of the next token, over the whole step, without their factors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AuxiliaryMeans {
    /// Mean over the routers of their balance losses; 1 when all experts are equally busy. `None` without routers.
    pub balance: Option<f64>,
    /// Mean over the routers of their z losses.
    pub router_z: Option<f64>,
    /// Mean loss of each multi-token prediction module.
    pub mtp: Vec<f64>,
}

impl AuxiliaryMeans {
    /// What this rank adds to the sums over all ranks: numbers whose meaning [`of_sums`](Self::of_sums) knows.
    fn contribution<B: Ops>(report: &AuxiliaryReport, parallel: &ParallelContext<B>) -> Vec<f64> {
        let (layout, coords) = (parallel.layout(), parallel.coords());
        // Of ranks with the same tokens one counts, of a router's ranks one counts the router.
        let once = |yes: bool| f64::from(u8::from(yes));
        let tokens = once(layout.sp || coords.tp == 0);
        let layers = once((coords.tp, coords.cp, coords.dp) == (0, 0, 0));
        let losses = once(coords.tp == 0);
        let mut values = vec![
            tokens * report.balance,
            tokens * report.router_z,
            layers * report.num_routers as f64,
        ];
        for mtp in &report.mtp {
            values.extend([losses * mtp.sum, losses * mtp.tokens]);
        }
        values
    }

    fn of_sums(sums: &[f64]) -> Self {
        let &[balance, z, routers, ref mtp @ ..] = sums else {
            return Self::default();
        };
        let mean = |sum: f64| (routers > 0.0).then(|| sum / routers);
        Self {
            balance: mean(balance),
            router_z: mean(z),
            mtp: mtp
                .as_chunks()
                .0
                .iter()
                .map(|[sum, tokens]| sum / tokens.max(1.0))
                .collect(),
        }
    }
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    /// Loss before the update.
    pub loss: TokenLoss,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The other losses.
    pub auxiliary: AuxiliaryMeans,
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
    let parallel = executor.parallel();
    let (local, report) =
        executor.train(model, micro_batches, &options.auxiliary, &mut reduction)?;
    let gradients = optimizer.finish_reduction(reduction)?;
    // One meeting of all ranks per step: whatever they must know of each other is in it.
    let own = [
        local.sum,
        local.tokens as f64,
        optimizer.local_squared_norm(&gradients),
        f64::from(u8::from(asks[0])),
        f64::from(u8::from(asks[1])),
    ];
    let auxiliary = AuxiliaryMeans::contribution(&report, parallel);
    let sums = agree::sum_lists(parallel, own.into_iter().chain(auxiliary).collect())?;
    let &[sum, tokens, squares, first, second, ref auxiliary @ ..] = sums.as_slice() else {
        unreachable!("every rank gives at least as many numbers");
    };
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
        let rate = options.auxiliary.bias_update_rate;
        if rate != 0.0 {
            let params = model.params();
            let load = load_with_correction_bias(&params, report.load);
            update_correction_biases(&params, &over_step(load, parallel)?, rate);
        }
    }
    optimizer.clear_grads();
    Ok(StepOutcome {
        loss,
        grad_norm,
        auxiliary: AuxiliaryMeans::of_sums(auxiliary),
        non_finite,
        asked: [first as u64, second as u64],
    })
}

/// The load of the experts over the whole step, from what each rank has seen.
fn over_step<B: Ops>(
    mut load: Vec<ExpertLoad>,
    parallel: &ParallelContext<B>,
) -> Result<Vec<ExpertLoad>> {
    // Tensor-parallel ranks have the same tokens, unless they divide the sequences.
    let group = parallel.group(if parallel.layout().sp {
        Axis::Stage
    } else {
        Axis::DpCp
    });
    if group.size() == 1 || load.is_empty() {
        return Ok(load);
    }
    let own: Vec<f32> = load
        .iter()
        .flat_map(|load| load.counts.iter().copied())
        .collect();
    let own = float_from_f32::<B>(&own, &[own.len()], parallel.device());
    let sums = to_f32_vec::<B>(group.all_reduce(own, ReduceOp::Sum));
    parallel.health()?;
    let mut sums = sums.into_iter();
    for load in &mut load {
        load.counts = sums.by_ref().take(load.counts.len()).collect();
    }
    Ok(load)
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
