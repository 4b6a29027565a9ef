//! `pretrain`: trains from scratch or continues.

use std::path::{Path, PathBuf};

use bridge_core::Registry;
use bridge_models::generate::{GenerateOptions, Sampling, generate};
use bridge_tokenizers::{SpecialTokens, TokenizerKind};
use bridge_train::callback::{StopReason, Summary};
use bridge_train::config::{ConfigLayers, ResolveContext, ResolvedConfig, resolve};
use bridge_train::metrics::Console;
use bridge_train::signals::StopFlag;
use bridge_train::{PretrainContext, PretrainOutcome, pretrain};
use serde_json::json;

use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Blame, Failure, Result};
use crate::flags::{BackendFlags, hugging_face_folder};
use crate::report::Report;

/// What a freshly trained model is asked to continue.
const SAMPLE_PROMPT: &str = "The ";
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
    words: Vec<String>,
    /// TOML file over the recipe; without a recipe it must say everything.
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    /// Print the configuration with every default filled in, and stop.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    backend: BackendFlags,
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
    };
    let trained = dispatch(args.backend, work)?;
    tell(&config, &trained, report)?;
    match trained.summary.reason {
        StopReason::Interrupted => Err(Failure::interrupted(
            "stopped on request; the same command continues",
        )),
        StopReason::Finished | StopReason::AlreadyFinished | StopReason::TimeUp => Ok(()),
    }
}

/// What is told of a run once it is over.
struct Trained {
    summary: Summary,
    /// Prompt and continuation by the trained model, where it has text.
    sample: Option<(String, String)>,
}

struct Pretrain<'a> {
    config: &'a ResolvedConfig,
    registry: &'a Registry,
    name: &'a str,
}

impl OnBackend for Pretrain<'_> {
    type Output = Trained;

    fn run<B: Machine>(self, device: B::Device) -> Result<Trained> {
        let hf_folder =
            |source: &str| hugging_face_folder(source).map_err(|failure| failure.text());
        let mut console = Console::new(self.config.logging.log_interval);
        let context = PretrainContext::<B> {
            device,
            platform: B::platform(),
            registry: self.registry,
            hf_folder: &hf_folder,
            name: self.name,
            callback: &mut console,
            stop: StopFlag::on_signals().running("cannot listen for signals")?,
        };
        let PretrainOutcome {
            summary,
            model,
            tokenizer,
        } = pretrain(self.config, context)?;
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
        Ok(Trained { summary, sample })
    }
}

/// Final losses, where everything is, a sample, and what to try next.
fn tell(config: &ResolvedConfig, trained: &Trained, report: Report) -> Result {
    let Trained { summary, sample } = trained;
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

    let loss = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |v| format!("{v:.4}"));
    report.text(format!(
        "step {}: loss {}, evaluation loss {}, {:.0} tokens/s",
        summary.iteration,
        loss(summary.last_loss),
        loss(summary.last_eval_loss),
        summary.tokens_per_s()
    ))?;
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
        report.text(format!(
            "\nnext:\n  cargo xtask generate --checkpoint {path} --prompt \"It was \" --temperature 0.7\n  \
             cargo xtask export --checkpoint {path} --out {path}-hf"
        ))?;
    }
    report.json(&json!({
        "reason": reason(summary.reason),
        "iteration": summary.iteration,
        "loss": summary.last_loss,
        "eval_loss": summary.last_eval_loss,
        "tokens": summary.tokens,
        "tokens_per_s": summary.tokens_per_s(),
        "skipped_steps": summary.skipped_steps,
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
