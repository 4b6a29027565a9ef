//! What a run tells the outside: hooks at the points where something worth knowing happened.

use std::borrow::Cow;
use std::path::Path;
use std::time::Duration;

use crate::error::Result;

/// Facts about a run, known before its first step.
#[derive(Clone, Debug, PartialEq)]
pub struct RunInfo {
    /// Steps already done by an earlier process; 0 for a fresh run.
    pub first_iteration: u64,
    /// Steps of the whole run.
    pub train_iters: u64,
    /// Weights that are trained.
    pub num_parameters: u64,
    /// Tokens of a full global batch.
    pub tokens_per_step: u64,
    /// What a person should hear before the run begins; usually nothing.
    pub notes: Vec<String>,
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Which step, counted from 1.
    pub iteration: u64,
    /// Samples consumed by the whole run, this step included.
    pub consumed_samples: u64,
    /// Mean loss over the valid tokens of the global batch, before the update.
    pub loss: f64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Tokens that counted in the loss.
    pub valid_tokens: u64,
    /// Wall time of the step.
    pub elapsed: Duration,
    /// Model arithmetic per second, in units of 10^12 (see [`crate::flops`]); `None` if the model does not say.
    pub tflops_per_s: Option<f64>,
    /// Losses besides that of the next token, by their names in Megatron (`load_balancing_loss`, `z_loss`, `mtp_1 loss`),
    /// without their factors. Each is a mean: over the routers, over the tokens of a multi-token prediction module.
    pub auxiliary_losses: Vec<(Cow<'static, str>, f64)>,
    /// Whether the update was left out because the loss or the gradient was not finite.
    pub skipped: bool,
}

impl StepReport {
    /// Tokens that went through the model per second.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// One evaluation on held-out samples.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalReport {
    /// Steps done so far.
    pub iteration: u64,
    /// Mean loss over the valid tokens.
    pub loss: f64,
    /// Tokens that counted.
    pub valid_tokens: u64,
    /// Wall time.
    pub elapsed: Duration,
}

/// One checkpoint that is complete on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct SaveReport<'a> {
    /// Steps done so far.
    pub iteration: u64,
    /// Its folder.
    pub path: &'a Path,
    /// Wall time.
    pub elapsed: Duration,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// Every step is done.
    Finished,
    /// There was nothing to do: an earlier process had done every step.
    AlreadyFinished,
    /// Someone asked for it (a signal, or [`crate::signals::StopFlag`]).
    Interrupted,
    /// The time of `exit_duration_in_mins` was up.
    TimeUp,
}

/// The outcome of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub reason: StopReason,
    /// Steps done, earlier processes included.
    pub iteration: u64,
    /// Samples consumed, earlier processes included.
    pub consumed_samples: u64,
    /// Loss of the last step of this process.
    pub last_loss: Option<f64>,
    /// Loss of the last evaluation of this process.
    pub last_eval_loss: Option<f64>,
    /// Steps of this process that left the weights as they were, since something was not finite.
    pub skipped_steps: u64,
    /// Tokens that went through the model in this process.
    pub tokens: u64,
    /// Wall time of this process's steps, without evaluation and saves.
    pub step_time: Duration,
    /// Wall time of this process from its first step to its end.
    pub elapsed: Duration,
}

impl Summary {
    /// Tokens per second over the steps of this process.
    pub fn tokens_per_s(&self) -> f64 {
        self.tokens as f64 / self.step_time.as_secs_f64().max(1e-9)
    }
}

/// Receives what happens in a run. Every hook may fail, which ends the run with that error: metrics that cannot be
/// written are a fault the user should hear about.
///
/// ```
/// use bridge_train::callback::{Callback, StepReport};
///
/// /// Remembers every loss.
/// #[derive(Default)]
/// struct Losses(Vec<f64>);
///
/// impl Callback for Losses {
///     fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
///         self.0.push(step.loss);
///         Ok(())
///     }
/// }
/// ```
pub trait Callback {
    /// Before the first step.
    ///
    /// # Errors
    /// Ends the run.
    fn on_train_start(&mut self, _run: &RunInfo) -> Result<()> {
        Ok(())
    }

    /// After every optimizer step.
    ///
    /// # Errors
    /// Ends the run.
    fn on_step_end(&mut self, _step: &StepReport) -> Result<()> {
        Ok(())
    }

    /// After every evaluation.
    ///
    /// # Errors
    /// Ends the run.
    fn on_eval(&mut self, _eval: &EvalReport) -> Result<()> {
        Ok(())
    }

    /// After every checkpoint.
    ///
    /// # Errors
    /// Ends the run.
    fn on_checkpoint_save(&mut self, _save: &SaveReport<'_>) -> Result<()> {
        Ok(())
    }

    /// After the last step.
    ///
    /// # Errors
    /// Becomes the run's error.
    fn on_train_end(&mut self, _summary: &Summary) -> Result<()> {
        Ok(())
    }
}

/// Calls each of its members in order.
#[derive(Default)]
pub struct Callbacks<'a>(Vec<Box<dyn Callback + 'a>>);

impl<'a> Callbacks<'a> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one at the end.
    #[must_use]
    pub fn with(mut self, callback: impl Callback + 'a) -> Self {
        self.0.push(Box::new(callback));
        self
    }

    /// Adds one at the end.
    pub fn push(&mut self, callback: impl Callback + 'a) {
        self.0.push(Box::new(callback));
    }
}

impl Callback for Callbacks<'_> {
    fn on_train_start(&mut self, run: &RunInfo) -> Result<()> {
        self.0.iter_mut().try_for_each(|c| c.on_train_start(run))
    }

    fn on_step_end(&mut self, step: &StepReport) -> Result<()> {
        self.0.iter_mut().try_for_each(|c| c.on_step_end(step))
    }

    fn on_eval(&mut self, eval: &EvalReport) -> Result<()> {
        self.0.iter_mut().try_for_each(|c| c.on_eval(eval))
    }

    fn on_checkpoint_save(&mut self, save: &SaveReport<'_>) -> Result<()> {
        self.0
            .iter_mut()
            .try_for_each(|c| c.on_checkpoint_save(save))
    }

    fn on_train_end(&mut self, summary: &Summary) -> Result<()> {
        self.0.iter_mut().try_for_each(|c| c.on_train_end(summary))
    }
}

impl<C: Callback + ?Sized> Callback for &mut C {
    fn on_train_start(&mut self, run: &RunInfo) -> Result<()> {
        (**self).on_train_start(run)
    }

    fn on_step_end(&mut self, step: &StepReport) -> Result<()> {
        (**self).on_step_end(step)
    }

    fn on_eval(&mut self, eval: &EvalReport) -> Result<()> {
        (**self).on_eval(eval)
    }

    fn on_checkpoint_save(&mut self, save: &SaveReport<'_>) -> Result<()> {
        (**self).on_checkpoint_save(save)
    }

    fn on_train_end(&mut self, summary: &Summary) -> Result<()> {
        (**self).on_train_end(summary)
    }
}
