//! `pretrain`: trains from scratch or continues.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bridge_core::Registry;
use bridge_models::generate::{GenerateOptions, Sampling, generate};
use bridge_parallel::{ParallelContext, run_threads};
use bridge_tokenizers::{SpecialTokens, TokenizerKind};
use bridge_train::callback::{Callback, Callbacks, StepReport, StopReason, Summary};
use bridge_train::config::{
    ConfigLayers, PeftScheme, Platform, ResolveContext, ResolvedConfig, resolve,
};
use bridge_train::metrics::Console;
use bridge_train::signals::StopFlag;
use bridge_train::{PretrainContext, PretrainOutcome, pretrain};
use serde_json::json;

use crate::backend::{Machine, OnBackend, dispatch};
use crate::bench::memory;
use crate::failure::{Blame, Failure, Result};
use crate::flags::{BackendFlags, BackendName, LayoutFlags, hugging_face_folder};
use crate::job::{self, Job};
use crate::report::Report;
use crate::transport::as_rank;

/// What a freshly trained model is asked to continue.
const SAMPLE_PROMPT: &str = "The ";
/// How long a rank waits for another before the run is given up.
const RANK_TIMEOUT: Duration = Duration::from_secs(600);
/// Tokens of that sample.
const SAMPLE_TOKENS: usize = 120;

/// Trains a model from scratch, or continues a run. With nothing: a tiny Llama on the bundled text, in about two minutes.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask pretrain\n  \
    cargo xtask pretrain llama32_1b train.train_iters=20 data.seq_length=512 checkpoint.dir=runs/try\n  \
    cargo xtask pretrain --config my_run.toml optimizer.lr=1e-3\n\n\
    A run that was stopped continues when the same command is given again.")]
pub(crate) struct Args {
    /// A recipe (see `recipes list`) and any number of overrides of single keys.
    #[arg(value_name = "RECIPE or key=value")]
    pub(crate) words: Vec<String>,
    /// TOML file over the recipe; without a recipe it must say everything.
    #[arg(long, value_name = "F.toml")]
    pub(crate) config: Option<PathBuf>,
    /// Print the configuration with every default filled in, and stop.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Measure the share of time that the GPUs of a job stand still for one another, from the fourth step on.
    #[arg(long)]
    pub(crate) exposed_comm: bool,
    #[command(flatten)]
    pub(crate) layout: LayoutFlags,
    #[command(flatten)]
    pub(crate) backend: BackendFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let (recipes, overrides): (Vec<String>, Vec<String>) =
        args.words.into_iter().partition(|word| !word.contains('='));
    let recipe = match recipes.as_slice() {
        [] if args.config.is_some() => None,
        [] => Some(bridge_recipes::DEFAULT_RECIPE.to_owned()),
        [one] => Some(one.clone()),
        [first, second, ..] => {
            let what = format!(
                "`{first}` and `{second}`: give one recipe; everything else is written key=value"
            );
            return Err(Failure::input(what));
        }
    };
    let mut layers = match &recipe {
        Some(name) => bridge_recipes::layers(name)?,
        None => ConfigLayers::new(),
    };
    if let Some(path) = &args.config {
        layers.push_file(path)?;
    }
    for (key, degree) in args.layout.overrides() {
        layers.push_override(&format!("parallel.{key}={degree}"));
    }
    overrides.iter().for_each(|word| layers.push_override(word));
    let from_file = args
        .config
        .as_deref()
        .and_then(Path::file_stem)
        .map(|stem| stem.to_string_lossy().into_owned());
    let name = from_file
        .or(recipe)
        .unwrap_or_else(|| bridge_recipes::DEFAULT_RECIPE.to_owned());

    let registry = bridge_models::registry();
    let hf_folder = |source: &str| hugging_face_folder(source).map_err(|failure| failure.text());
    let context = ResolveContext {
        registry: &registry,
        hf_folder: &hf_folder,
        name: &name,
    };
    let config = resolve(&layers, &context)?;
    if args.dry_run {
        let toml = config.to_toml();
        report.text(toml.trim_end())?;
        return report.json(&json!({"name": name, "toml": toml}));
    }
    let work = Pretrain {
        config: &config,
        registry: &registry,
        name: &name,
        exposed_comm: args.exposed_comm,
    };
    let trained = dispatch(args.backend, work)?;
    if trained.rank == 0 {
        tell(&config, &trained, report)?;
    }
    match trained.summary.reason {
        StopReason::Interrupted => Err(Failure::interrupted(
            "stopped on request; the same command continues",
        )),
        StopReason::Finished | StopReason::AlreadyFinished | StopReason::TimeUp => Ok(()),
    }
}

/// What is told of a run once it is over.
struct Trained {
    /// The rank that tells it; the first one speaks for all.
    rank: usize,
    summary: Summary,
    /// Prompt and continuation by the trained model, where it has text.
    sample: Option<(String, String)>,
    /// Most memory in use, in bytes: the GPU's, or on the CPU the process's.
    peak_memory: Option<u64>,
    /// Share of time in which this rank's GPU stood still for others, where that was measured.
    exposed_comm: Option<f64>,
}

struct Pretrain<'a> {
    config: &'a ResolvedConfig,
    registry: &'a Registry,
    name: &'a str,
    exposed_comm: bool,
}

impl OnBackend for Pretrain<'_> {
    type Output = Trained;

    fn run<B: Machine>(self, device: B::Device) -> Result<Trained> {
        let job = job::from_environment()?;
        let platform = Platform {
            world_size: self.config.parallel.layout().world_size(),
            ..B::platform()
        };
        let stop = StopFlag::on_signals().running("cannot listen for signals")?;
        if let Some(job) = job {
            return self.run_process::<B>(&job, platform, stop);
        }
        if platform.world_size > 1 {
            return self.run_ranks::<B>(platform, stop);
        }
        let hf_folder =
            |source: &str| hugging_face_folder(source).map_err(|failure| failure.text());
        let mut console = Console::new(self.config.logging.log_interval);
        let context = PretrainContext::<B> {
            parallel: Arc::new(ParallelContext::single(device.clone())),
            platform,
            registry: self.registry,
            hf_folder: &hf_folder,
            name: self.name,
            callback: &mut console,
            stop,
        };
        let PretrainOutcome {
            summary,
            model,
            tokenizer,
        } = pretrain(self.config, context)?;
        let peak_memory = B::peak_memory(&device);
        let finished = matches!(
            summary.reason,
            StopReason::Finished | StopReason::AlreadyFinished
        );
        let sample = if finished && tokenizer.kind() != TokenizerKind::Null {
            let sampling = Sampling::Random {
                temperature: 0.7,
                top_k: None,
                top_p: Some(0.95),
                seed: 1,
            };
            let options = GenerateOptions {
                max_new_tokens: SAMPLE_TOKENS,
                sampling,
                ..GenerateOptions::default()
            };
            let prompt = tokenizer.encode(SAMPLE_PROMPT, SpecialTokens::Omit)?;
            let ids = generate(&model, &prompt, &options)?.token_ids;
            Some((
                SAMPLE_PROMPT.to_owned(),
                tokenizer.decode(&ids, SpecialTokens::Omit)?,
            ))
        } else {
            None
        };
        Ok(Trained {
            rank: 0,
            summary,
            sample,
            peak_memory,
            exposed_comm: None,
        })
    }
}

impl Pretrain<'_> {
    /// Runs every rank of the layout as a thread of this process.
    fn run_ranks<B: Machine>(self, platform: Platform, stop: StopFlag) -> Result<Trained> {
        if platform.backend != BackendName::Cpu.as_str() {
            return Err(Failure::input(format!(
                "the layout has {} ranks, and only the cpu backend runs them in one process",
                platform.world_size
            )));
        }
        // What is wrong with the input is said once, not by every rank.
        platform.check(self.config)?;
        let layout = self.config.parallel.layout();
        let (config, name) = (self.config.clone(), self.name.to_owned());
        let summaries = run_threads::<B, _, _>(layout, RANK_TIMEOUT, move |parallel| {
            run_rank(
                &config,
                &name,
                platform.clone(),
                parallel,
                stop.clone(),
                &mut Callbacks::new(),
            )
        });
        let summary = summaries
            .running("the run failed")?
            .into_iter()
            .next()
            .ok_or_else(|| Failure::running("no rank has run".to_owned()))?;
        Ok(Trained {
            rank: 0,
            summary,
            sample: None,
            peak_memory: B::peak_memory(&B::Device::default()),
            exposed_comm: None,
        })
    }

    /// Runs this process's rank of a job that a launcher has started. Every rank reads the configuration; what it does not
    /// know of the others goes over the transport.
    fn run_process<B: Machine>(
        self,
        job: &Job,
        mut platform: Platform,
        stop: StopFlag,
    ) -> Result<Trained> {
        platform.world_size = job.options.world_size;
        // Before the ranks meet, so that a mistake that all of them make is not a wait for each other.
        platform.check(self.config)?;
        let layout = self.config.parallel.layout();
        as_rank::<B, _, _>(job, layout, |parallel| {
            let mut waits = Waits {
                parallel: Arc::clone(parallel),
                measured: self.exposed_comm,
                waited: Duration::ZERO,
                elapsed: Duration::ZERO,
            };
            let summary = run_rank(
                self.config,
                self.name,
                platform,
                Arc::clone(parallel),
                stop,
                &mut waits,
            )?;
            Ok::<_, bridge_train::Error>(Trained {
                rank: job.options.rank,
                summary,
                sample: None,
                peak_memory: B::peak_memory(parallel.device()),
                exposed_comm: waits.share(),
            })
        })
    }
}

/// Adds up how long a rank's GPU stands still for others.
struct Waits<B: Machine> {
    parallel: Arc<ParallelContext<B>>,
    measured: bool,
    waited: Duration,
    elapsed: Duration,
}

impl<B: Machine> Waits<B> {
    /// Of the time of the steps that count; `None` if nothing was measured.
    fn share(&self) -> Option<f64> {
        let seconds = self.elapsed.as_secs_f64();
        (seconds > 0.0).then(|| self.waited.as_secs_f64() / seconds)
    }
}

impl<B: Machine> Callback for Waits<B> {
    fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
        if !self.measured {
            return Ok(());
        }
        // The first steps make connections and choose algorithms.
        match (step.iteration, self.parallel.waited()) {
            (3, _) => self.parallel.measure_waits(),
            (4.., Some(waited)) => {
                self.waited += waited;
                self.elapsed += step.elapsed;
            }
            _ => {}
        }
        Ok(())
    }
}

/// One rank's part of a run. Rank 0 speaks for all; every rank tells `own`.
fn run_rank<B: Machine>(
    config: &ResolvedConfig,
    name: &str,
    platform: Platform,
    parallel: Arc<ParallelContext<B>>,
    stop: StopFlag,
    own: &mut dyn Callback,
) -> Result<Summary, bridge_train::Error> {
    let hf_folder = |source: &str| hugging_face_folder(source).map_err(|failure| failure.text());
    let mut callbacks = Callbacks::new().with(own);
    if parallel.rank() == 0 {
        callbacks.push(Console::new(config.logging.log_interval));
    }
    let context = PretrainContext::<B> {
        parallel,
        platform,
        registry: &bridge_models::registry(),
        hf_folder: &hf_folder,
        name,
        callback: &mut callbacks,
        stop,
    };
    pretrain(config, context).map(|outcome| outcome.summary)
}

/// Final losses, where everything is, a sample, and what to try next.
fn tell(config: &ResolvedConfig, trained: &Trained, report: Report) -> Result {
    let Trained {
        summary, sample, ..
    } = trained;
    let dir = PathBuf::from(&config.checkpoint.dir);
    let reports = config
        .logging
        .dir
        .as_ref()
        .map_or_else(|| dir.clone(), PathBuf::from);
    let exists = |path: PathBuf| path.exists().then_some(path);
    let checkpoint = config.checkpoint.save.then(|| dir.clone()).and_then(exists);
    let metrics = exists(reports.join("metrics.jsonl"));
    let tensorboard = exists(reports.join("tensorboard"));
    let plot = exists(reports.join("loss.png"));

    let known = |what: &str, value: Option<f64>| value.map(|v| format!("{what} {v:.4}"));
    let speed = (summary.tokens > 0).then(|| format!("{:.0} tokens/s", summary.tokens_per_s()));
    let peak_gib = memory::gib(trained.peak_memory);
    let facts = [
        known("loss", summary.last_loss),
        known("evaluation loss", summary.last_eval_loss),
        speed,
        peak_gib.map(|gib| format!("at most {gib:.1} GiB")),
    ];
    let facts: Vec<String> = facts.into_iter().flatten().collect();
    report.text(format!("step {}: {}", summary.iteration, facts.join(", ")))?;
    for (what, path) in [
        ("checkpoint", &checkpoint),
        ("metrics", &metrics),
        ("tensorboard", &tensorboard),
        ("plot", &plot),
    ] {
        if let Some(path) = path {
            report.text(format!("{what:<12}{}", path.display()))?;
        }
    }
    if let Some((prompt, text)) = sample {
        report.text(format!(
            "\nsample, after the prompt {prompt:?}:\n{prompt}{text}"
        ))?;
    }
    if let Some(path) = &checkpoint {
        let path = path.display();
        let base = config.checkpoint.pretrained.as_deref();
        let base = base.filter(|_| config.peft.scheme != PeftScheme::None);
        if let Some(base) = base {
            report.text(format!(
                "\nnext:\n  cargo xtask generate --hf {base} --adapter {path} --prompt \"...\"\n  \
                 cargo xtask adapter export --checkpoint {path} --out {path}-adapter\n  \
                 cargo xtask adapter merge --hf {base} --checkpoint {path} --out {path}-merged"
            ))?;
        } else {
            report.text(format!(
                "\nnext:\n  cargo xtask generate --checkpoint {path} --prompt \"It was \" --temperature 0.7\n  \
                 cargo xtask export --checkpoint {path} --out {path}-hf"
            ))?;
        }
    }
    report.json(&json!({
        "reason": reason(summary.reason),
        "iteration": summary.iteration,
        "loss": summary.last_loss,
        "eval_loss": summary.last_eval_loss,
        "tokens": summary.tokens,
        "tokens_per_s": summary.tokens_per_s(),
        "skipped_steps": summary.skipped_steps,
        "peak_gib": peak_gib,
        "exposed_comm": trained.exposed_comm,
        "seconds": summary.elapsed.as_secs_f64(),
        "checkpoint": checkpoint,
        "metrics": metrics,
        "tensorboard": tensorboard,
        "plot": plot,
        "sample": sample.as_ref().map(|(prompt, text)| format!("{prompt}{text}")),
    }))
}

fn reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Finished => "finished",
        StopReason::AlreadyFinished => "already_finished",
        StopReason::Interrupted => "interrupted",
        StopReason::TimeUp => "time_up",
    }
}
