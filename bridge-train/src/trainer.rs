//! The training loop: steps, evaluations, saves, and the ways a run can end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_data::{Batch, Dataset, GlobalBatchSampler, Loader};
use bridge_models::SegmentedModel;
use bridge_ops::Ops;

use crate::callback::{Callback, EvalReport, RunInfo, SaveReport, StepReport, StopReason, Summary};
use crate::checkpoint::{CheckpointStore, TrainState};
use crate::config::{NonFinitePolicy, RecomputeGranularity, ResolvedConfig};
use crate::error::{Error, Result};
use crate::lr_schedule::{LrSchedule, WeightDecaySchedule};
use crate::optimizer::{AdamW, AdamWOptions};
use crate::signals::StopFlag;
use crate::step::{NonFiniteGuard, StepOptions, evaluate, train_step};

/// How a run goes. [`TrainerOptions::new`] fills in what most runs share.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerOptions {
    /// Samples that go through the model at once.
    pub micro_batch_size: usize,
    /// Samples per optimizer step.
    pub global_batch_size: usize,
    /// Optimizer steps of the whole run.
    pub train_iters: u64,
    /// Learning rate over the run.
    pub lr: LrSchedule,
    /// Weight decay over the run.
    pub weight_decay: WeightDecaySchedule,
    /// The rest of the optimizer.
    pub adamw: AdamWOptions,
    /// Largest global norm of the gradient; 0 disables clipping.
    pub clip_grad: f64,
    /// What a layer keeps for its backward pass.
    pub recompute: RecomputeGranularity,
    /// What a NaN or an infinity does.
    pub on_non_finite: NonFinitePolicy,
    /// How many steps in a row may be skipped for that.
    pub max_skipped_in_a_row: u64,
    /// Evaluate every so many steps and at the end; 0 never.
    pub eval_interval: u64,
    /// Global batches per evaluation.
    pub eval_iters: u64,
    /// Save every so many steps, besides the save at the end; 0 only at the end.
    pub save_interval: u64,
    /// Stop after this much time.
    pub exit_duration: Option<Duration>,
    /// Model FLOPs per token (see [`crate::flops`]), for the reports.
    pub flops_per_token: Option<f64>,
}

impl TrainerOptions {
    /// `train_iters` steps of `global_batch_size` samples under `lr`, one micro-batch each, with weight decay 0.1 and
    /// clipping at 1.
    pub fn new(global_batch_size: usize, train_iters: u64, lr: LrSchedule) -> Self {
        Self {
            micro_batch_size: global_batch_size,
            global_batch_size,
            train_iters,
            lr,
            weight_decay: WeightDecaySchedule::constant(0.1),
            adamw: AdamWOptions::default(),
            clip_grad: 1.0,
            recompute: RecomputeGranularity::None,
            on_non_finite: NonFinitePolicy::Stop,
            max_skipped_in_a_row: 10,
            eval_interval: 0,
            eval_iters: 8,
            save_interval: 0,
            exit_duration: None,
            flops_per_token: None,
        }
    }
}

impl From<&ResolvedConfig> for TrainerOptions {
    fn from(config: &ResolvedConfig) -> Self {
        let decoder = &config.model.decoder;
        Self {
            micro_batch_size: config.train.micro_batch_size,
            global_batch_size: config.train.global_batch_size,
            train_iters: config.train_iters(),
            lr: config.lr_schedule(),
            weight_decay: config.weight_decay_schedule(),
            adamw: AdamWOptions {
                beta1: config.optimizer.adam_beta1,
                beta2: config.optimizer.adam_beta2,
                eps: config.optimizer.adam_eps,
                no_weight_decay: config.optimizer.no_weight_decay.clone(),
            },
            clip_grad: config.optimizer.clip_grad,
            recompute: config.train.recompute_granularity,
            on_non_finite: config.train.on_non_finite,
            max_skipped_in_a_row: config.train.max_skipped_in_a_row,
            eval_interval: config.eval.eval_interval,
            eval_iters: config.eval.eval_iters,
            save_interval: config.checkpoint.save_interval,
            exit_duration: config
                .train
                .exit_duration_in_mins
                .map(|m| Duration::from_secs_f64(m * 60.0)),
            flops_per_token: Some(crate::flops::train_flops_per_token(
                decoder,
                config.data.seq_length,
            )),
        }
    }
}

/// Trains a model on a dataset. Any [`SegmentedModel`] will do, and any [`Dataset`].
///
/// ```
/// use bridge_data::MockGptDataset;
/// use bridge_models::families::llama::presets;
/// use bridge_models::{Decoder, Init, RandomInit};
/// use bridge_train::callback::{Callback, StepReport};
/// use bridge_train::lr_schedule::LrSchedule;
/// use bridge_train::{Trainer, TrainerOptions};
/// use burn::backend::Flex;
/// use std::sync::Arc;
///
/// #[derive(Default)]
/// struct Losses(Vec<f64>);
/// impl Callback for Losses {
///     fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
///         self.0.push(step.loss);
///         Ok(())
///     }
/// }
///
/// let config = presets::tiny();
/// let device = Default::default();
/// let mut fresh = RandomInit::new(&Init::default(), &config);
/// let model = Decoder::<Flex>::build(config.clone(), &mut fresh, &device)?;
/// let data = Arc::new(MockGptDataset::new(16, config.vocab_size, 1234)?);
///
/// let mut losses = Losses::default();
/// let options = TrainerOptions::new(4, 3, LrSchedule::constant(1e-3));
/// let summary = Trainer::new(&model, data, &device, options)?.with_callback(&mut losses).run()?;
/// assert_eq!((summary.iteration, losses.0.len()), (3, 3));
/// # Ok::<(), bridge_train::Error>(())
/// ```
pub struct Trainer<'a, B: Ops> {
    model: &'a dyn SegmentedModel<B>,
    device: B::Device,
    options: TrainerOptions,
    optimizer: AdamW<B>,
    train: Arc<dyn Dataset>,
    valid: Option<Arc<dyn Dataset>>,
    store: Option<CheckpointStore>,
    callback: Option<&'a mut dyn Callback>,
    stop: StopFlag,
    state: TrainState,
    notes: Vec<String>,
}

/// Where a run stands within its loop.
struct Running {
    started: Instant,
    loader: Loader,
    guard: NonFiniteGuard,
    tokens: u64,
    step_time: Duration,
    last_loss: Option<f64>,
    last_eval: Option<(u64, f64)>,
    last_save: Option<u64>,
}

impl<'a, B: Ops> Trainer<'a, B> {
    /// A fresh run of `model` on the samples of `train`.
    ///
    /// # Errors
    /// If two of the model's parameters have one name.
    pub fn new(
        model: &'a dyn SegmentedModel<B>,
        train: Arc<dyn Dataset>,
        device: &B::Device,
        options: TrainerOptions,
    ) -> Result<Self> {
        Ok(Self {
            optimizer: AdamW::new(model.params(), &options.adamw)?,
            model,
            device: device.clone(),
            options,
            train,
            valid: None,
            store: None,
            callback: None,
            stop: StopFlag::new(),
            state: TrainState::default(),
            notes: Vec::new(),
        })
    }

    /// Evaluates on the first samples of `valid`, always the same ones.
    #[must_use]
    pub fn with_validation(mut self, valid: Arc<dyn Dataset>) -> Self {
        self.valid = Some(valid);
        self
    }

    /// Tells `callback` what happens.
    #[must_use]
    pub fn with_callback(mut self, callback: &'a mut dyn Callback) -> Self {
        self.callback = Some(callback);
        self
    }

    /// Ends the run, after the step at hand and a save, when `stop` is raised.
    #[must_use]
    pub fn with_stop(mut self, stop: StopFlag) -> Self {
        self.stop = stop;
        self
    }

    /// Saves checkpoints in `store`, and continues from the newest one there, if there is one: weights, optimizer
    /// state and place in the data are then those of that checkpoint.
    ///
    /// # Errors
    /// If there is a checkpoint that cannot be read, or that is of another model.
    pub fn with_checkpoints(mut self, store: CheckpointStore) -> Result<Self> {
        if let Some((state, notes)) = store.resume(&self.model.params(), &mut self.optimizer)? {
            self.state = state;
            self.notes = notes;
            self.compare_data();
        }
        self.store = Some(store);
        Ok(self)
    }

    /// Steps done so far, by earlier processes at first.
    pub fn iteration(&self) -> u64 {
        self.state.iteration
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &AdamW<B> {
        &self.optimizer
    }

    /// Does the steps that are left. On an error the weights in memory are those after the last whole step.
    ///
    /// # Errors
    /// If data cannot be read, a checkpoint or a report not be written, or the loss stops being a number.
    pub fn run(mut self) -> Result<Summary> {
        self.state.data_fingerprint = Some(self.train.fingerprint().to_string());
        let loader = self.start_loader()?;
        if self.options.eval_interval > 0 && self.valid.is_none() {
            self.notes
                .push("there is no validation data, so nothing is evaluated".to_owned());
        }
        let info = self.run_info();
        self.tell(|callback| callback.on_train_start(&info))?;
        let mut running = Running {
            started: Instant::now(),
            loader,
            guard: NonFiniteGuard::new(
                self.options.on_non_finite,
                self.options.max_skipped_in_a_row,
            ),
            tokens: 0,
            step_time: Duration::ZERO,
            last_loss: None,
            last_eval: None,
            // What was resumed from is on disk already.
            last_save: (self.state.iteration > 0).then_some(self.state.iteration),
        };
        let reason = self.run_steps(&mut running)?;
        if reason == StopReason::Finished && self.options.eval_interval > 0 {
            self.evaluate(&mut running)?;
        }
        self.save(&mut running)?;
        let summary = Summary {
            reason,
            iteration: self.state.iteration,
            consumed_samples: self.state.consumed_samples,
            last_loss: running.last_loss,
            last_eval_loss: running.last_eval.map(|(_, loss)| loss),
            skipped_steps: running.guard.total(),
            tokens: running.tokens,
            step_time: running.step_time,
            elapsed: running.started.elapsed(),
        };
        self.tell(|callback| callback.on_train_end(&summary))?;
        Ok(summary)
    }

    fn compare_data(&mut self) {
        let (saved, here) = (
            self.state.data_fingerprint.as_deref(),
            self.train.fingerprint().to_string(),
        );
        if saved.is_some_and(|saved| saved != here) {
            self.notes.push(
                "the training data is not that of the checkpoint; going on with the new data"
                    .to_owned(),
            );
        }
    }

    /// Starts reading ahead from the run's place in its data.
    fn start_loader(&self) -> Result<Loader> {
        let sampler = GlobalBatchSampler::new(self.options.micro_batch_size, 1, 0)?;
        let global_batch_size = self.options.global_batch_size;
        let dataset = Arc::clone(&self.train);
        Ok(Loader::start(
            dataset,
            sampler,
            self.state.consumed_samples,
            move |_| global_batch_size,
        )?)
    }

    fn run_info(&self) -> RunInfo {
        RunInfo {
            first_iteration: self.state.iteration,
            train_iters: self.options.train_iters,
            num_parameters: self
                .optimizer
                .states()
                .iter()
                .map(|state| state.param.numel() as u64)
                .sum(),
            notes: self.notes.clone(),
            tokens_per_step: (self.options.global_batch_size * self.train.seq_length()) as u64,
        }
    }

    fn run_steps(&mut self, running: &mut Running) -> Result<StopReason> {
        if self.state.iteration >= self.options.train_iters {
            return Ok(StopReason::AlreadyFinished);
        }
        let is_due =
            |interval: u64, iteration: u64| interval > 0 && iteration.is_multiple_of(interval);
        while self.state.iteration < self.options.train_iters {
            self.step(running)?;
            let iteration = self.state.iteration;
            if is_due(self.options.eval_interval, iteration) && !self.stop.is_raised() {
                self.evaluate(running)?;
            }
            if is_due(self.options.save_interval, iteration) {
                self.save(running)?;
            }
            if iteration == self.options.train_iters {
                break;
            }
            if self.stop.is_raised() {
                return Ok(StopReason::Interrupted);
            }
            if self
                .options
                .exit_duration
                .is_some_and(|limit| running.started.elapsed() >= limit)
            {
                return Ok(StopReason::TimeUp);
            }
        }
        Ok(StopReason::Finished)
    }

    fn step(&mut self, running: &mut Running) -> Result<()> {
        let started = Instant::now();
        let (options, consumed) = (&self.options, self.state.consumed_samples);
        let iteration = self.state.iteration + 1;
        let micro_batches = running.loader.next_batch()?;
        let step = StepOptions {
            lr: options.lr.lr(consumed),
            weight_decay: options.weight_decay.weight_decay(consumed),
            clip_grad: options.clip_grad,
            recompute: options.recompute,
        };
        let outcome = train_step(
            self.model,
            &mut self.optimizer,
            &micro_batches,
            &self.device,
            &step,
        );
        let elapsed = started.elapsed();
        if !running.guard.allows(&outcome) {
            let what = outcome.non_finite.unwrap_or_default();
            return Err(Error::NonFinite { iteration, what });
        }
        self.state.iteration = iteration;
        self.state.consumed_samples += options.global_batch_size as u64;
        self.state.skipped_steps += u64::from(outcome.non_finite.is_some());
        running.tokens += outcome.loss.tokens;
        running.step_time += elapsed;
        running.last_loss = Some(outcome.loss.mean);
        let report = StepReport {
            iteration,
            consumed_samples: self.state.consumed_samples,
            loss: outcome.loss.mean,
            lr: step.lr,
            grad_norm: outcome.grad_norm,
            tokens: outcome.loss.tokens,
            valid_tokens: outcome.loss.valid_tokens,
            elapsed,
            tflops_per_s: options.flops_per_token.map(|flops| {
                flops * outcome.loss.tokens as f64 / elapsed.as_secs_f64().max(1e-9) / 1e12
            }),
            skipped: outcome.non_finite.is_some(),
        };
        self.tell(|callback| callback.on_step_end(&report))
    }

    /// Evaluates, unless this very state was evaluated before or there is nothing to evaluate on.
    fn evaluate(&mut self, running: &mut Running) -> Result<()> {
        let iteration = self.state.iteration;
        let Some(valid) = self.valid.clone() else {
            return Ok(());
        };
        if running.last_eval.is_some_and(|(at, _)| at == iteration) {
            return Ok(());
        }
        let started = Instant::now();
        let (micro, global) = (
            self.options.micro_batch_size as u64,
            self.options.global_batch_size as u64,
        );
        // Once through the held-out data is all it can tell.
        let samples = (self.options.eval_iters * global).min(valid.samples_per_epoch());
        let (mut sum, mut valid_tokens) = (0.0, 0);
        for start in (0..samples).step_by(micro as usize) {
            let indices: Vec<u64> = (start..samples.min(start + micro)).collect();
            let loss = evaluate(
                self.model,
                &[Batch::load(valid.as_ref(), &indices)?],
                &self.device,
            );
            sum += loss.mean * loss.valid_tokens as f64;
            valid_tokens += loss.valid_tokens;
            if self.stop.is_raised() {
                // A mean over fewer samples would not compare with the others.
                return Ok(());
            }
        }
        let loss = sum / u64::max(valid_tokens, 1) as f64;
        running.last_eval = Some((iteration, loss));
        let report = EvalReport {
            iteration,
            loss,
            valid_tokens,
            elapsed: started.elapsed(),
        };
        self.tell(|callback| callback.on_eval(&report))
    }

    /// Saves, unless this very state is saved.
    fn save(&mut self, running: &mut Running) -> Result<()> {
        let iteration = self.state.iteration;
        if running.last_save == Some(iteration) {
            return Ok(());
        }
        let Some(store) = &self.store else {
            return Ok(());
        };
        let started = Instant::now();
        let Some(path) = store.save(&self.state, &self.model.params(), &self.optimizer)? else {
            return Ok(());
        };
        running.last_save = Some(iteration);
        let report = SaveReport {
            iteration,
            path: &path,
            elapsed: started.elapsed(),
        };
        self.tell(|callback| callback.on_checkpoint_save(&report))
    }

    fn tell(&mut self, event: impl FnOnce(&mut dyn Callback) -> Result<()>) -> Result<()> {
        match &mut self.callback {
            Some(callback) => event(&mut **callback),
            None => Ok(()),
        }
    }
}
