//! From the configuration as written to the checked, complete one a run uses.

use std::path::{Path, PathBuf};

use bridge_core::layout::PipelineSplit;
use bridge_core::{DecoderConfig, LayoutSpec, Registry};
use bridge_data::{BlendSpec, SplitWeights};
use bridge_models::{ParallelOptions, check_layout};
use toml::{Table, Value};

use super::auxiliary;
use super::model::{self, ModelConfig};
use super::peft::PeftConfig;
use super::section::{Problems, Section};
use super::sections::*;
use super::{ConfigLayers, SECTION_ORDER};
use crate::error::{Error, Result};
use crate::lr_schedule::{LrDecayStyle, LrSchedule, WeightDecayIncrStyle, WeightDecaySchedule};

/// What resolving needs beside the layers.
pub struct ResolveContext<'a> {
    /// The model families that are known.
    pub registry: &'a Registry,
    /// Turns the value of `model.hf` (a folder or a hub id) into a folder, or says why not.
    pub hf_folder: &'a dyn Fn(&str) -> Result<PathBuf, String>,
    /// Name of the run; its checkpoints go to `runs/NAME` unless the configuration says otherwise.
    pub name: &'a str,
}

impl<'a> ResolveContext<'a> {
    /// A context in which `model.hf` must be a folder.
    pub fn new(registry: &'a Registry, name: &'a str) -> Self {
        Self {
            registry,
            hf_folder: &local_folder,
            name,
        }
    }
}

fn local_folder(name: &str) -> Result<PathBuf, String> {
    let path = Path::new(name);
    if path.is_dir() {
        Ok(path.to_owned())
    } else {
        Err(format!("there is no folder {name}"))
    }
}

/// A configuration in which every key has its value and the values fit together.
#[derive(Clone, Debug, PartialEq)]
pub struct ResolvedConfig {
    /// The model.
    pub model: ModelConfig,
    /// Batches and length of the run.
    pub train: TrainConfig,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate and weight decay over time.
    pub scheduler: SchedulerConfig,
    /// Layout over ranks.
    pub parallel: ParallelConfig,
    /// Number formats.
    pub precision: PrecisionConfig,
    /// Training data.
    pub data: DataConfig,
    /// Text to tokens.
    pub tokenizer: TokenizerConfig,
    /// Where the run saves itself.
    pub checkpoint: CheckpointConfig,
    /// Evaluation.
    pub eval: EvalConfig,
    /// Reports.
    pub logging: LoggingConfig,
    /// Adapters.
    pub peft: PeftConfig,
}

/// Checks the layers and fills in every default.
///
/// # Errors
/// [`Error::Config`] with every unknown, missing, wrong or contradictory key at once.
pub fn resolve(layers: &ConfigLayers, context: &ResolveContext<'_>) -> Result<ResolvedConfig> {
    let mut problems = Problems::default();
    let empty = Table::new();
    let table = |name: &str| {
        layers
            .merged()
            .get(name)
            .and_then(Value::as_table)
            .unwrap_or(&empty)
    };
    let mut checkpoint_table = table("checkpoint").clone();
    checkpoint_table
        .entry("dir")
        .or_insert_with(|| Value::String(format!("runs/{}", context.name)));

    let model = model::read(
        table(model::SECTION),
        context.registry,
        context.hf_folder,
        &mut problems,
    );
    let mut config = Sections {
        train: TrainConfig::read(table("train"), &mut problems),
        optimizer: OptimizerConfig::read(table("optimizer"), &mut problems),
        scheduler: SchedulerConfig::read(table("scheduler"), &mut problems),
        parallel: ParallelConfig::read(table("parallel"), &mut problems),
        precision: PrecisionConfig::read(table("precision"), &mut problems),
        data: DataConfig::read(table("data"), &mut problems),
        tokenizer: TokenizerConfig::read(table("tokenizer"), &mut problems),
        checkpoint: CheckpointConfig::read(&checkpoint_table, &mut problems),
        eval: EvalConfig::read(table("eval"), &mut problems),
        logging: LoggingConfig::read(table("logging"), &mut problems),
        peft: PeftConfig::read(table("peft"), &mut problems),
    };
    // Contradictions are only worth telling about values that could be read.
    if problems.is_empty() {
        config.complete(&mut problems);
        if let Some(model) = &model {
            auxiliary::complete(&mut config.train, model);
        }
        config.check(model.as_ref(), &mut problems);
    }
    let problems = layers.problems_with(problems);
    match model {
        Some(model) if problems.is_empty() => {
            let Sections {
                train,
                optimizer,
                scheduler,
                parallel,
                precision,
                data,
                tokenizer,
                checkpoint,
                eval,
                logging,
                peft,
            } = config;
            Ok(ResolvedConfig {
                model,
                train,
                optimizer,
                scheduler,
                parallel,
                precision,
                data,
                tokenizer,
                checkpoint,
                eval,
                logging,
                peft,
            })
        }
        _ => Err(Error::Config(problems)),
    }
}

/// Every section but the model, while it is being checked.
struct Sections {
    train: TrainConfig,
    optimizer: OptimizerConfig,
    scheduler: SchedulerConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    data: DataConfig,
    tokenizer: TokenizerConfig,
    checkpoint: CheckpointConfig,
    eval: EvalConfig,
    logging: LoggingConfig,
    peft: PeftConfig,
}

impl Sections {
    /// Fills in defaults that follow from other keys.
    fn complete(&mut self, problems: &mut Problems) {
        let batch = (self.train.global_batch_size as u64).max(1);
        match (self.train.train_iters, self.train.train_samples) {
            (Some(_), Some(_)) => problems.add(
                "train.train_samples",
                "is set together with train.train_iters; keep one",
            ),
            (None, None) => {
                problems.add("train.train_iters", "must be set (or train.train_samples)")
            }
            (None, Some(samples)) => {
                self.train.train_iters = Some(samples / batch);
                self.train.train_samples = None;
            }
            (Some(_), None) => {}
        }
        let schedule = &mut self.scheduler;
        if schedule.lr_decay_iters.is_none() && schedule.lr_decay_samples.is_none() {
            schedule.lr_decay_iters = self.train.train_iters;
        }
        let warmups = [
            schedule.lr_warmup_iters.is_some(),
            schedule.lr_warmup_samples.is_some(),
            schedule.lr_warmup_fraction.is_some(),
        ];
        match warmups.iter().filter(|given| **given).count() {
            0 => schedule.lr_warmup_iters = Some(0),
            1 => {}
            _ => problems.add(
                "scheduler.lr_warmup_iters",
                "is one of lr_warmup_iters, lr_warmup_samples and lr_warmup_fraction; keep one of them",
            ),
        }
        schedule
            .start_weight_decay
            .get_or_insert(self.optimizer.weight_decay);
        schedule
            .end_weight_decay
            .get_or_insert(self.optimizer.weight_decay);
        self.data.seed.get_or_insert(self.train.seed);
        self.logging
            .dir
            .get_or_insert_with(|| self.checkpoint.dir.clone());
    }

    /// What must hold between keys.
    fn check(&self, model: Option<&ModelConfig>, problems: &mut Problems) {
        self.check_batches(problems);
        self.check_layout(model, problems);
        if let Some(model) = model {
            auxiliary::check(&self.train, model, problems);
        }
        self.check_optimizer(problems);
        self.check_schedule(problems);
        self.check_data(model, problems);
        let pretrained = self.checkpoint.pretrained.as_deref();
        self.peft
            .check(self.train.seed, pretrained, model, problems);
    }

    fn check_batches(&self, problems: &mut Problems) {
        let TrainConfig {
            micro_batch_size: micro,
            global_batch_size: global,
            ..
        } = self.train;
        problems.require(micro > 0, "train.micro_batch_size", || {
            "is 0, expected 1 or more".into()
        });
        problems.require(global > 0, "train.global_batch_size", || {
            "is 0, expected 1 or more".into()
        });
        problems.require(
            self.train.train_iters != Some(0),
            "train.train_iters",
            || "comes to 0 steps, expected 1 or more".into(),
        );
        for (key, degree) in self.parallel.degrees() {
            problems.require(degree > 0, key, || "is 0, expected 1 or more".into());
        }
        let layout = self.parallel.layout();
        problems.require(
            self.parallel.ddp_bucket_size > 0,
            "parallel.ddp_bucket_size",
            || "is 0, expected 1 or more".into(),
        );
        let step = micro.saturating_mul(self.parallel.data_parallel_size);
        if layout.vpp > 1 && step > 0 && !(global / step).is_multiple_of(layout.pp.max(1)) {
            problems.add(
                "train.global_batch_size",
                format!(
                    "is {global}, which makes {} micro-batches per rank; with virtual pipeline stages their number must \
                     be a multiple of pipeline_model_parallel_size={}",
                    global / step,
                    layout.pp
                ),
            );
        }
        if micro > 0 && step > 0 && global > 0 && global % step != 0 {
            let (below, above) = (global / step * step, (global / step + 1) * step);
            let nearest = match below {
                0 => format!("{above}, or take a smaller micro-batch"),
                below => format!("{below} or {above}"),
            };
            problems.add(
                "train.global_batch_size",
                format!(
                    "is {global}, which is not a multiple of micro_batch_size={micro} times data_parallel_size={}; make it \
                     {nearest}",
                    self.parallel.data_parallel_size
                ),
            );
        }
        let minutes = self.train.exit_duration_in_mins;
        problems.require(
            minutes.is_none_or(|m| m > 0.0),
            "train.exit_duration_in_mins",
            || "must be more than 0".into(),
        );
    }

    fn check_layout(&self, model: Option<&ModelConfig>, problems: &mut Problems) {
        let Some(model) = model else { return };
        // Each degree of 0 has been reported by its key.
        if self
            .parallel
            .degrees()
            .iter()
            .any(|(_, degree)| *degree == 0)
        {
            return;
        }
        let (layout, decoder) = (self.parallel.layout(), &model.decoder);
        let tensors = model.bridge.tensors(decoder);
        if let Err(error) = layout.validate(&tensors, decoder.num_hidden_layers) {
            problems.add("parallel", error.to_string());
            return;
        }
        match self.parallel.options(decoder) {
            Err(problem) => problems.add("parallel.pipeline_model_parallel_layout", problem),
            Ok(options) => {
                // That sequence parallelism needs ranks to divide by is said when it is known what there is.
                let known = LayoutSpec {
                    sp: layout.sp && layout.tp > 1,
                    ..layout
                };
                if let Err(error) = check_layout(decoder, &known, &options) {
                    problems.add("parallel", error.to_string());
                }
            }
        }
    }

    fn check_optimizer(&self, problems: &mut Problems) {
        let o = &self.optimizer;
        for (key, value) in [
            ("optimizer.lr", o.lr),
            ("optimizer.min_lr", o.min_lr),
            ("optimizer.adam_eps", o.adam_eps),
            ("optimizer.weight_decay", o.weight_decay),
            ("optimizer.clip_grad", o.clip_grad),
            ("scheduler.lr_warmup_init", self.scheduler.lr_warmup_init),
        ] {
            problems.require(value >= 0.0, key, || {
                format!("is {value}, expected 0 or more")
            });
        }
        for (key, beta) in [
            ("optimizer.adam_beta1", o.adam_beta1),
            ("optimizer.adam_beta2", o.adam_beta2),
        ] {
            problems.require((0.0..1.0).contains(&beta), key, || {
                format!("is {beta}, expected from 0 to below 1")
            });
        }
        problems.require(o.min_lr <= o.lr, "optimizer.min_lr", || {
            format!("is {}, more than optimizer.lr={}", o.min_lr, o.lr)
        });
    }

    fn check_schedule(&self, problems: &mut Problems) {
        let s = &self.scheduler;
        problems.require(
            s.lr_decay_iters.is_none() || s.lr_decay_samples.is_none(),
            "scheduler.lr_decay_samples",
            || "is set together with scheduler.lr_decay_iters; keep one".into(),
        );
        problems.require(
            s.lr_wsd_decay_iters.is_none() || s.lr_wsd_decay_samples.is_none(),
            "scheduler.lr_wsd_decay_samples",
            || "is set together with scheduler.lr_wsd_decay_iters; keep one".into(),
        );
        if let Some(fraction) = s.lr_warmup_fraction {
            problems.require(
                (0.0..1.0).contains(&fraction),
                "scheduler.lr_warmup_fraction",
                || format!("is {fraction}, expected from 0 to below 1"),
            );
        }
        problems.require(
            s.lr_warmup_init <= self.optimizer.lr,
            "scheduler.lr_warmup_init",
            || {
                format!(
                    "is {}, more than optimizer.lr={}",
                    s.lr_warmup_init, self.optimizer.lr
                )
            },
        );
        let schedule = lr_schedule(&self.train, &self.optimizer, s);
        // A warm-up longer than the run is legal: a short test of a long schedule.
        problems.require(
            schedule.decay_samples > 0 && schedule.warmup_samples < schedule.decay_samples as f64
                || s.lr_decay_style == LrDecayStyle::Constant,
            "scheduler.lr_warmup_iters",
            || {
                format!(
                    "the warm-up of {} samples does not end before the decay of {} samples; shorten it, or set scheduler.lr_decay_iters",
                    schedule.warmup_samples, schedule.decay_samples
                )
            },
        );
        if s.lr_decay_style == LrDecayStyle::Wsd {
            if schedule.wsd_decay_samples == 0 {
                problems.add(
                    "scheduler.lr_wsd_decay_iters",
                    "must be set (or lr_wsd_decay_samples) for lr_decay_style = \"WSD\"",
                );
            }
            problems.require(
                schedule.wsd_decay_samples as f64 + schedule.warmup_samples
                    <= schedule.decay_samples as f64,
                "scheduler.lr_wsd_decay_iters",
                || {
                    format!(
                        "the last phase of {} samples and the warm-up of {} do not fit into {}",
                        schedule.wsd_decay_samples, schedule.warmup_samples, schedule.decay_samples
                    )
                },
            );
        }
        let (start, end) = (
            s.start_weight_decay.unwrap_or_default(),
            s.end_weight_decay.unwrap_or_default(),
        );
        problems.require(start >= 0.0 && end >= start, "scheduler.end_weight_decay", || {
            format!("is {end}, expected at least start_weight_decay={start}, which must be 0 or more")
        });
        problems.require(
            start == end || s.weight_decay_incr_style != WeightDecayIncrStyle::Constant,
            "scheduler.weight_decay_incr_style",
            || format!("is constant, but weight decay moves from {start} to {end}; choose linear or cosine"),
        );
    }

    fn check_data(&self, model: Option<&ModelConfig>, problems: &mut Problems) {
        let data = &self.data;
        problems.require(data.seq_length > 0, "data.seq_length", || {
            "is 0, expected 1 or more".into()
        });
        if let Some(longest) = model.map(|m| m.decoder.max_position_embeddings) {
            problems.require(data.seq_length <= longest, "data.seq_length", || {
                format!(
                    "is {}, longer than the model's context of {longest} tokens; lower it or raise model.max_position_embeddings",
                    data.seq_length
                )
            });
        }
        let needs_path = matches!(
            data.source,
            DataSource::Text | DataSource::Indexed | DataSource::Sft
        );
        problems.require(
            !needs_path || !data.data_path.is_empty(),
            "data.data_path",
            || format!("must name what data.source = \"{}\" reads", data.source),
        );
        problems.require(
            needs_path || data.data_path.is_empty(),
            "data.data_path",
            || {
                format!(
                    "is not read by data.source = \"{}\"; set data.source to text, indexed or sft",
                    data.source
                )
            },
        );
        if !data.data_path.is_empty()
            && let Err(error) = BlendSpec::parse(&data.data_path)
        {
            problems.add("data.data_path", error.to_string());
        }
        if let Err(error) = data.split.parse::<SplitWeights>() {
            problems.add("data.split", error.to_string());
        }
        problems.require(
            data.source == DataSource::Sft || data.validation_path.is_empty(),
            "data.validation_path",
            || format!("is not read by data.source = \"{}\"", data.source),
        );
        let has_folder = self.tokenizer.path.is_some() || model.is_none_or(|m| m.hf_dir.is_some());
        problems.require(self.tokenizer.kind != TokenizerKind::HuggingFace || has_folder, "tokenizer.path", || {
            "must be set: the folder with tokenizer.json (or set tokenizer.kind to bytes, bpe or null)".into()
        });
        let needs_text = matches!(
            data.source,
            DataSource::Corpus | DataSource::Text | DataSource::Sft
        );
        problems.require(
            !needs_text || self.tokenizer.kind != TokenizerKind::Null,
            "tokenizer.kind",
            || format!("is null, but data.source = \"{}\" is text", data.source),
        );
        problems.require(
            matches!(data.source, DataSource::Corpus | DataSource::Text)
                || self.tokenizer.kind != TokenizerKind::Bpe,
            "tokenizer.kind",
            || {
                format!(
                    "is bpe, which is learnt from plain text, but data.source = \"{}\" is none",
                    data.source
                )
            },
        );
    }
}

impl ParallelConfig {
    /// Whether data-parallel ranks divide the optimizer's state.
    pub fn shards_optimizer(&self) -> bool {
        self.use_distributed_optimizer
            || self.data_parallel_sharding_strategy != ShardingStrategy::NoShard
    }

    /// Whether they divide gradients as well.
    pub fn shards_grads(&self) -> bool {
        matches!(
            self.data_parallel_sharding_strategy,
            ShardingStrategy::OptimGrads | ShardingStrategy::OptimGradsParams
        )
    }

    /// Whether they divide weights as well.
    pub fn shards_params(&self) -> bool {
        self.data_parallel_sharding_strategy == ShardingStrategy::OptimGradsParams
    }

    /// The degrees as a layout.
    pub fn layout(&self) -> LayoutSpec {
        LayoutSpec {
            tp: self.tensor_model_parallel_size,
            pp: self.pipeline_model_parallel_size,
            vpp: self.virtual_pipeline_model_parallel_size,
            cp: self.context_parallel_size,
            ep: self.expert_model_parallel_size,
            etp: self.expert_tensor_parallel_size,
            dp: self.data_parallel_size,
            sp: self.sequence_parallel,
        }
    }

    /// Which pipeline stage runs which layers of a model.
    ///
    /// # Errors
    /// What is wrong with `pipeline_model_parallel_layout`, or with the number of chunks.
    pub fn split(&self, decoder: &DecoderConfig) -> Result<PipelineSplit, String> {
        let (layout, layers) = (self.layout(), decoder.num_hidden_layers);
        let split = match &self.pipeline_model_parallel_layout {
            Some(text) => PipelineSplit::parse(text, &layout, layers, decoder.num_mtp_layers),
            None => PipelineSplit::even(&layout, layers),
        };
        split.map_err(|error| error.to_string())
    }
}

impl ParallelConfig {
    /// What models are divided by beyond the degrees.
    ///
    /// # Errors
    /// As [`split`](Self::split).
    pub fn options(&self, decoder: &DecoderConfig) -> Result<ParallelOptions, String> {
        Ok(ParallelOptions {
            cp_comm_type: self.cp_comm_type.comm_type(),
            pipeline: Some(self.split(decoder)?),
        })
    }

    /// Every degree with its key.
    pub fn degrees(&self) -> [(&'static str, usize); 7] {
        [
            (
                "parallel.tensor_model_parallel_size",
                self.tensor_model_parallel_size,
            ),
            (
                "parallel.pipeline_model_parallel_size",
                self.pipeline_model_parallel_size,
            ),
            (
                "parallel.virtual_pipeline_model_parallel_size",
                self.virtual_pipeline_model_parallel_size,
            ),
            ("parallel.context_parallel_size", self.context_parallel_size),
            (
                "parallel.expert_model_parallel_size",
                self.expert_model_parallel_size,
            ),
            (
                "parallel.expert_tensor_parallel_size",
                self.expert_tensor_parallel_size,
            ),
            ("parallel.data_parallel_size", self.data_parallel_size),
        ]
    }
}

fn lr_schedule(
    train: &TrainConfig,
    optimizer: &OptimizerConfig,
    scheduler: &SchedulerConfig,
) -> LrSchedule {
    let batch = train.global_batch_size as u64;
    let samples = |iters: Option<u64>, samples: Option<u64>| {
        samples
            .or(iters.map(|n| n.saturating_mul(batch)))
            .unwrap_or_default()
    };
    let decay_samples = samples(scheduler.lr_decay_iters, scheduler.lr_decay_samples);
    let warmup_samples = match scheduler.lr_warmup_fraction {
        Some(fraction) => fraction * decay_samples as f64,
        None => samples(scheduler.lr_warmup_iters, scheduler.lr_warmup_samples) as f64,
    };
    LrSchedule {
        max_lr: optimizer.lr,
        min_lr: optimizer.min_lr,
        warmup_init: scheduler.lr_warmup_init,
        warmup_samples,
        decay_samples,
        style: scheduler.lr_decay_style,
        wsd_decay_samples: samples(scheduler.lr_wsd_decay_iters, scheduler.lr_wsd_decay_samples),
        wsd_style: scheduler.lr_wsd_decay_style,
    }
}

impl ResolvedConfig {
    /// Optimizer steps of the whole run.
    pub fn train_iters(&self) -> u64 {
        self.train.train_iters.expect("resolve() fills train_iters")
    }

    /// The learning rate over the run.
    pub fn lr_schedule(&self) -> LrSchedule {
        lr_schedule(&self.train, &self.optimizer, &self.scheduler)
    }

    /// The weight decay over the run.
    pub fn weight_decay_schedule(&self) -> WeightDecaySchedule {
        WeightDecaySchedule {
            start: self
                .scheduler
                .start_weight_decay
                .unwrap_or(self.optimizer.weight_decay),
            end: self
                .scheduler
                .end_weight_decay
                .unwrap_or(self.optimizer.weight_decay),
            incr_samples: self
                .train_iters()
                .saturating_mul(self.train.global_batch_size as u64),
            style: self.scheduler.weight_decay_incr_style,
        }
    }

    /// The configuration as TOML, every default written out. Resolving it again gives the same configuration.
    pub fn to_toml(&self) -> String {
        let mut sections = Table::new();
        for name in SECTION_ORDER {
            let table = match *name {
                "train" => section_table(&self.train),
                "optimizer" => section_table(&self.optimizer),
                "scheduler" => section_table(&self.scheduler),
                "parallel" => section_table(&self.parallel),
                "precision" => section_table(&self.precision),
                "data" => section_table(&self.data),
                "tokenizer" => section_table(&self.tokenizer),
                "checkpoint" => section_table(&self.checkpoint),
                "eval" => section_table(&self.eval),
                "logging" => section_table(&self.logging),
                "peft" => section_table(&self.peft),
                _ => self.model.keys.clone(),
            };
            sections.insert((*name).to_owned(), Value::Table(table));
        }
        toml::to_string(&sections).expect("a table of plain values is TOML")
    }
}

fn section_table<T: serde::Serialize>(section: &T) -> Table {
    Table::try_from(section).expect("sections hold only plain values")
}
