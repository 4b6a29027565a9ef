//! The training loop: steps, evaluations, saves, and the ways a run can end.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_core::layout::PipelineSplit;
use bridge_data::{Batch, Dataset, GlobalBatchSampler, IGNORE_INDEX, Loader};
use bridge_models::{AuxiliaryOptions, BalanceScope, SegmentedModel};
use bridge_ops::Ops;
use bridge_parallel::ParallelContext;

use crate::agree;

use crate::callback::{Callback, EvalReport, RunInfo, SaveReport, StepReport, StopReason, Summary};
use crate::checkpoint::{CheckpointStore, TrainState};
use crate::config::{NonFinitePolicy, RecomputeGranularity, ResolvedConfig};
use crate::engine::Executor;
use crate::error::{Error, Result};
use crate::lr_schedule::{LrSchedule, WeightDecaySchedule};
use crate::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};
use crate::signals::StopFlag;
use crate::step::{AuxiliaryMeans, NonFiniteGuard, StepOptions, evaluate_with, train_step};

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
    /// Losses besides that of the next token, and what else a mixture of experts wants in training.
    pub auxiliary: AuxiliaryOptions,
    /// What a layer keeps for its backward pass.
    pub recompute: RecomputeGranularity,
    /// How data-parallel ranks share the work of the optimizer.
    pub data_parallel: DataParallelOptions,
    /// Which pipeline stage runs which layers; an even split if `None`. The model must be built with the same.
    pub pipeline_split: Option<PipelineSplit>,
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
            auxiliary: AuxiliaryOptions::default(),
            recompute: RecomputeGranularity::None,
            data_parallel: DataParallelOptions::default(),
            pipeline_split: None,
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
                main_grads_dtype: config.optimizer.main_grads_dtype.dtype(),
                exp_avg_dtype: config.optimizer.exp_avg_dtype.dtype(),
            },
            clip_grad: config.optimizer.clip_grad,
            auxiliary: AuxiliaryOptions {
                // Beside adapters a model stays as it is, these biases included.
                bias_update_rate: match config.peft.adapters(config.train.seed) {
                    Some(_) => 0.0,
                    None => config.auxiliary_options().bias_update_rate,
                },
                ..config.auxiliary_options()
            },
            recompute: config.train.recompute_granularity,
            data_parallel: DataParallelOptions {
                distributed_optimizer: config.parallel.shards_optimizer(),
                overlap_param_gather: config.parallel.overlap_param_gather,
                shard_grads: config.parallel.shards_grads(),
                shard_params: config.parallel.shards_params(),
                overlap_grad_reduce: config.parallel.overlap_grad_reduce,
                bucket_size: config.parallel.ddp_bucket_size,
            },
            pipeline_split: config.parallel.split(decoder).ok(),
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
    executor: Executor<B>,
    options: TrainerOptions,
    optimizer: Optimizer<B>,
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
    /// Nothing is read on a pipeline stage that needs no samples.
    loader: Option<Loader>,
    /// Whether a rank was asked to stop, and whether the time is up, as of the last step: the same on every rank.
    asked: [bool; 2],
    guard: NonFiniteGuard,
    tokens: u64,
    step_time: Duration,
    last_loss: Option<f64>,
    last_eval: Option<(u64, f64)>,
    last_save: Option<u64>,
}

impl<'a, B: Ops> Trainer<'a, B> {
    /// A fresh run of `model` on the samples of `train`, on one rank.
    ///
    /// # Errors
    /// If two of the model's parameters have one name.
    pub fn new(
        model: &'a dyn SegmentedModel<B>,
        train: Arc<dyn Dataset>,
        device: &B::Device,
        options: TrainerOptions,
    ) -> Result<Self> {
        let parallel = Arc::new(ParallelContext::single(device.clone()));
        Self::on_rank(model, train, &parallel, options)
    }

    /// One rank of a run. Every rank calls this with its part of the model and the same data and options, and then the
    /// same methods; what the ranks do not decide together, a stop for example, one of them decides for all. Reports go to
    /// the callback of each rank, and are the same on all.
    ///
    /// # Errors
    /// If two of the model's parameters have one name, or the ranks' parts do not make up a model.
    pub fn on_rank(
        model: &'a dyn SegmentedModel<B>,
        train: Arc<dyn Dataset>,
        parallel: &Arc<ParallelContext<B>>,
        options: TrainerOptions,
    ) -> Result<Self> {
        let optimizer = Optimizer::new(model, parallel, &options.adamw, &options.data_parallel)?;
        Self::with_optimizer(model, train, parallel, options, optimizer)
    }

    /// As [`on_rank`](Self::on_rank), with an optimizer of the model's weights, made with the same options.
    ///
    /// # Errors
    /// If the ranks' parts do not make up a model.
    pub fn with_optimizer(
        model: &'a dyn SegmentedModel<B>,
        train: Arc<dyn Dataset>,
        parallel: &Arc<ParallelContext<B>>,
        options: TrainerOptions,
        optimizer: Optimizer<B>,
    ) -> Result<Self> {
        let executor = Executor::new(
            model,
            Arc::clone(parallel),
            options.pipeline_split.clone(),
            options.recompute,
        )?;
        Ok(Self {
            optimizer,
            model,
            executor,
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
        let (params, parallel) = (self.model.params(), self.executor.parallel());
        if let Some((state, notes)) = store.resume(&params, &mut self.optimizer, parallel)? {
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
    pub fn optimizer(&self) -> &Optimizer<B> {
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
        let info = self.run_info()?;
        self.tell(|callback| callback.on_train_start(&info))?;
        let mut running = Running {
            started: Instant::now(),
            loader,
            asked: [false; 2],
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
        self.optimizer.finish_param_gather()?;
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
    /// `None` on a pipeline stage that needs no samples.
    fn start_loader(&self) -> Result<Option<Loader>> {
        if !self.executor.reads_samples() {
            return Ok(None);
        }
        let parallel = self.executor.parallel();
        let (replicas, replica) = (parallel.layout().dp, parallel.coords().dp);
        let sampler = GlobalBatchSampler::new(self.options.micro_batch_size, replicas, replica)?;
        let global_batch_size = self.options.global_batch_size;
        let dataset = Arc::clone(&self.train);
        let loader = Loader::start(dataset, sampler, self.state.consumed_samples, move |_| {
            global_batch_size
        })?;
        Ok(Some(loader))
    }

    fn run_info(&self) -> Result<RunInfo> {
        // Up to 2^53 weights are counted exactly.
        let own = self.optimizer.counted_elements() as f64;
        let [num_parameters] = agree::sum(self.executor.parallel(), [own])?;
        Ok(RunInfo {
            first_iteration: self.state.iteration,
            train_iters: self.options.train_iters,
            num_parameters: num_parameters as u64,
            notes: self.notes.clone(),
            tokens_per_step: (self.options.global_batch_size * self.train.seq_length()) as u64,
        })
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
            let [stop, time_up] = running.asked;
            if is_due(self.options.eval_interval, iteration) && !stop {
                self.evaluate(running)?;
            }
            if is_due(self.options.save_interval, iteration) {
                self.save(running)?;
            }
            if iteration == self.options.train_iters {
                break;
            }
            // One rank alone also hears a stop that was asked for after its step.
            if stop || (self.is_alone() && self.stop.is_raised()) {
                return Ok(StopReason::Interrupted);
            }
            if time_up || (self.is_alone() && self.is_time_up(running)) {
                return Ok(StopReason::TimeUp);
            }
        }
        Ok(StopReason::Finished)
    }

    fn is_alone(&self) -> bool {
        self.executor.parallel().world_size() == 1
    }

    fn is_time_up(&self, running: &Running) -> bool {
        let limit = self.options.exit_duration;
        limit.is_some_and(|limit| running.started.elapsed() >= limit)
    }

    fn step(&mut self, running: &mut Running) -> Result<()> {
        let started = Instant::now();
        let (options, consumed) = (&self.options, self.state.consumed_samples);
        let iteration = self.state.iteration + 1;
        let micro_batches = match &mut running.loader {
            Some(loader) => loader.next_batch()?,
            None => Vec::new(),
        };
        let step = StepOptions {
            lr: options.lr.lr(consumed),
            weight_decay: options.weight_decay.weight_decay(consumed),
            clip_grad: options.clip_grad,
            auxiliary: options.auxiliary,
        };
        let asks = [self.stop.is_raised(), self.is_time_up(running)];
        self.executor.begin_step(iteration);
        let outcome = train_step(
            &self.executor,
            self.model,
            &mut self.optimizer,
            &micro_batches,
            &step,
            asks,
        )?;
        running.asked = outcome.asked.map(|ranks| ranks > 0);
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
            auxiliary_losses: auxiliary_losses(&options.auxiliary, &outcome.auxiliary),
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
        let parallel = self.executor.parallel();
        let (replicas, replica) = (parallel.layout().dp as u64, parallel.coords().dp as u64);
        let (mut sum, mut valid_tokens) = (0.0, 0);
        // A global batch at a time, dealt out in micro-batches.
        for start in (0..samples).step_by(global.max(1) as usize) {
            let end = samples.min(start + global);
            let rounds = (end - start).div_ceil(micro * replicas);
            let mut micro_batches = Vec::new();
            for round in 0..rounds {
                if !self.executor.reads_samples() {
                    break;
                }
                let first = start + (round * replicas + replica) * micro;
                micro_batches.push(eval_batch(valid.as_ref(), first, end, micro)?);
            }
            let loss = evaluate_with(
                &self.executor,
                self.model,
                &micro_batches,
                &self.options.auxiliary,
                &mut self.optimizer.weight_hooks(),
            )?;
            sum += loss.mean * loss.valid_tokens as f64;
            valid_tokens += loss.valid_tokens;
            if self.is_alone() && self.stop.is_raised() {
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
        let (params, parallel) = (self.model.params(), self.executor.parallel());
        let Some(path) = store.save(&self.state, &params, &self.optimizer, parallel)? else {
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

/// What a step reports of the losses that are on, by Megatron's names.
fn auxiliary_losses(
    options: &AuxiliaryOptions,
    means: &AuxiliaryMeans,
) -> Vec<(Cow<'static, str>, f64)> {
    let balance = match options.scope {
        BalanceScope::Sequence => "seq_load_balancing_loss",
        BalanceScope::MicroBatch => "load_balancing_loss",
        BalanceScope::Step => "global_load_balancing_loss",
    };
    let on = |factor: f64, name: &'static str, value: Option<f64>| {
        let value = value.filter(|_| factor != 0.0)?;
        Some((Cow::Borrowed(name), value))
    };
    let router = [
        on(options.balance, balance, means.balance),
        on(options.router_z, "z_loss", means.router_z),
    ];
    let mtp = means.mtp.iter().enumerate();
    let mtp = mtp.map(|(index, mean)| (format!("mtp_{} loss", index + 1).into(), *mean));
    router.into_iter().flatten().chain(mtp).collect()
}

/// The samples `first..first + micro` below `end`. Where there are none, a sample that counts for no loss, so that every
/// rank runs as many micro-batches.
fn eval_batch(valid: &dyn Dataset, first: u64, end: u64, micro: u64) -> Result<Batch> {
    if first < end {
        let indices: Vec<u64> = (first..end.min(first + micro)).collect();
        return Ok(Batch::load(valid, &indices)?);
    }
    let mut batch = Batch::load(valid, &[end - 1])?;
    batch.labels.fill(IGNORE_INDEX);
    Ok(batch)
}
