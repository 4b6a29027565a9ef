//! `plan`: what a conversion or a training run would do and need, from the config and the headers alone.

use std::path::PathBuf;

use bridge_core::{CanonicalTensor, LayoutSpec};
use bridge_parallel::memory::{
    Fit, MemorySpec, RankMemory, Recompute, layouts_that_fit, stage_memory,
};
use bridge_parallel::pipeline::Schedule;
use bridge_train::config::{ConfigLayers, ResolveContext, resolve};
use clap::ValueEnum;
use serde_json::{json, to_value};

use crate::conversion::source_place;
use crate::failure::{Blame, Failure, Result};
use crate::flags::{LayoutFlags, byte_size, hugging_face_folder};
use crate::report::{Report, bytes, table};

/// How many layouts a search lists.
const MOST_LISTED: usize = 12;

/// Shows the conversion plan and what each rank of a layout would hold, from the headers alone; with --memory, what
/// training needs on each rank, and which layouts fit.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask plan --hf meta-llama/Llama-3.2-1B --tp 2 --pp 2\n  \
    cargo xtask plan --hf meta-llama/Llama-3.2-1B --pp 4 --vpp 2 --schedule 8\n  \
    cargo xtask plan --memory --recipe llama3_8b --tp 2 --dp 4 --sp\n  \
    cargo xtask plan --memory --recipe llama3_8b --gpus 8 --gpu-memory 80GB")]
pub(crate) struct Args {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR", required_unless_present_any = ["recipe", "megatron"])]
    hf: Option<String>,
    /// Megatron-Core checkpoint (torch_dist): a run's folder or one iteration's.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["hf", "recipe", "memory"])]
    megatron: Option<PathBuf>,
    /// Folder or hub id of the Hugging Face config of a Megatron-Core checkpoint [default: its own hf folder].
    #[arg(long, value_name = "DIR", requires = "megatron")]
    hf_config: Option<String>,
    /// With --memory: a recipe instead of a model (see `recipes list`).
    #[arg(long, value_name = "NAME", conflicts_with = "hf", requires = "memory")]
    recipe: Option<String>,
    /// Show the memory that training needs on each pipeline stage.
    #[arg(long)]
    memory: bool,
    #[command(flatten)]
    training: TrainingFlags,
    #[command(flatten)]
    layout: LayoutFlags,
    /// Draw the pipeline schedule of a step with so many micro-batches per data-parallel rank.
    #[arg(long, value_name = "MICRO-BATCHES", num_args = 0..=1, default_missing_value = "8")]
    schedule: Option<usize>,
}

/// What memory depends on besides model and layout.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
struct TrainingFlags {
    /// Samples that go through the model at once [default: the recipe's, or 1].
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch: Option<u32>,
    /// Samples of a step over all ranks [default: the recipe's, or 128].
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..))]
    global_batch: Option<u32>,
    /// Tokens of a sample [default: the recipe's, or 4096].
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..))]
    seq: Option<u32>,
    /// What is kept of a layer for its backward pass.
    #[arg(long, value_enum, default_value_t = Kept::None, value_name = "KIND")]
    recompute: Kept,
    /// Weights and activations in fp32 instead of bf16.
    #[arg(long, requires = "memory")]
    fp32: bool,
    /// Every data-parallel rank keeps the whole optimizer state.
    #[arg(long, requires = "memory")]
    no_distributed_optimizer: bool,
    /// Experts that each token goes to.
    #[arg(long, default_value_t = 0, value_name = "K")]
    experts_per_token: u32,
    /// Search the layouts of this many GPUs that fit.
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..=65536))]
    gpus: Option<u32>,
    /// GPUs of one host, within which tensor parallelism stays.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    gpus_per_host: u32,
    /// Memory of one GPU.
    #[arg(long, default_value = "80GB", value_name = "SIZE", value_parser = byte_size)]
    gpu_memory: u64,
    /// Part of that which is left for the libraries and for what lives for a moment only.
    #[arg(long, default_value = "4GB", value_name = "SIZE", value_parser = byte_size)]
    reserve: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kept {
    /// Everything.
    None,
    /// All but the outputs of norms and activation functions.
    Selective,
    /// The layer's input.
    Full,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    if args.memory {
        return memory(&args, report);
    }
    let place = source_place(
        args.hf.as_deref(),
        args.megatron.as_ref(),
        args.hf_config.as_deref(),
    )?;
    let layout = args.layout.spec();
    let registry = bridge_models::registry();
    let (model, _) = bridge_core::convert::open(&place, &registry, &layout)?;
    let plan = model.plan();
    report.text(plan.to_string().trim_end())?;
    let schedule = args
        .schedule
        .map(|micro_batches| Schedule::training(layout.pp, layout.vpp, micro_batches))
        .transpose()
        .input("--schedule")?;
    if let Some(schedule) = &schedule {
        report.text(format!("\n{schedule}").trim_end())?;
    }
    if report.is_json() {
        let mut plan = to_value(plan).running("cannot write the plan as JSON")?;
        if let Some(schedule) = schedule {
            plan["schedule"] = schedule.to_string().into();
        }
        report.json(&plan)?;
    }
    Ok(())
}

/// A model and how it is trained.
struct Subject {
    tensors: Vec<CanonicalTensor>,
    num_layers: usize,
    global_batch: usize,
    spec: MemorySpec,
}

fn subject(args: &Args) -> Result<Subject> {
    let flags = &args.training;
    let registry = bridge_models::registry();
    let hf_folder = |source: &str| hugging_face_folder(source).map_err(|failure| failure.text());
    let mut layers = match &args.recipe {
        Some(recipe) => bridge_recipes::layers(recipe)?,
        None => {
            let mut layers = ConfigLayers::new();
            let model = format!("model.hf={}", args.hf.as_deref().unwrap_or_default());
            for word in [
                model.as_str(),
                "train.global_batch_size=128",
                "train.train_iters=1",
                "data.seq_length=4096",
                "optimizer.lr=1e-4",
            ] {
                layers.push_override(word);
            }
            layers
        }
    };
    for (key, value) in [
        ("train.micro_batch_size", flags.micro_batch),
        ("train.global_batch_size", flags.global_batch),
        ("data.seq_length", flags.seq),
    ] {
        if let Some(value) = value {
            layers.push_override(&format!("{key}={value}"));
        }
    }
    let name = args.recipe.as_deref().unwrap_or("plan");
    let config = resolve(
        &layers,
        &ResolveContext {
            registry: &registry,
            hf_folder: &hf_folder,
            name,
        },
    )?;
    Ok(Subject {
        tensors: config.model.decoder.tensors(),
        num_layers: config.model.decoder.num_hidden_layers,
        global_batch: config.train.global_batch_size,
        spec: MemorySpec {
            micro_batch: config.train.micro_batch_size,
            seq: config.data.seq_length,
            num_micro_batches: 1,
            bytes: if flags.fp32 { 4 } else { 2 },
            recompute: match flags.recompute {
                Kept::None => Recompute::None,
                Kept::Selective => Recompute::Selective,
                Kept::Full => Recompute::Full,
            },
            distributed_optimizer: !flags.no_distributed_optimizer,
            experts_per_token: flags.experts_per_token as usize,
        },
    })
}

fn memory(args: &Args, report: Report) -> Result {
    let subject = subject(args)?;
    match args.training.gpus {
        Some(gpus) => search(&subject, gpus as usize, &args.training, report),
        None => one_layout(&subject, args.layout.spec(), report),
    }
}

fn one_layout(subject: &Subject, layout: LayoutSpec, report: Report) -> Result {
    let per_step = layout.dp * subject.spec.micro_batch;
    if !subject.global_batch.is_multiple_of(per_step) {
        return Err(Failure::input(format!(
            "a global batch of {} does not divide among dp={} ranks with a micro-batch of {}; give --global-batch or \
             --micro-batch",
            subject.global_batch, layout.dp, subject.spec.micro_batch
        )));
    }
    let spec = MemorySpec {
        num_micro_batches: subject.global_batch / per_step,
        ..subject.spec
    };
    let stages = stage_memory(&subject.tensors, subject.num_layers, &layout, &spec)?;
    let rows: Vec<Vec<String>> = stages
        .iter()
        .enumerate()
        .map(|(stage, memory)| [vec![format!("stage {stage}")], columns(memory)].concat())
        .collect();
    let ranks = layout.world_size();
    report.text(match ranks {
        1 => "a single rank:".to_owned(),
        ranks => format!("{layout}: each of {ranks} ranks, by pipeline stage:"),
    })?;
    report.text(
        table(
            &[
                "",
                "weights",
                "gradients",
                "optimizer",
                "activations",
                "total",
            ],
            &rows,
        )
        .trim_end(),
    )?;
    report.json(&json!({"layout": layout, "ranks": ranks, "stages": stages}))
}

fn search(subject: &Subject, gpus: usize, flags: &TrainingFlags, report: Report) -> Result {
    let limit = flags.gpu_memory.saturating_sub(flags.reserve);
    let fits = layouts_that_fit(
        &subject.tensors,
        subject.num_layers,
        gpus,
        flags.gpus_per_host as usize,
        limit,
        subject.global_batch,
        &subject.spec,
    )?;
    if fits.is_empty() {
        return Err(Failure::check(format!(
            "no layout of {gpus} GPUs needs at most {} each; use more GPUs, shorter sequences or a smaller micro-batch",
            bytes(limit)
        )));
    }
    let row = |fit: &Fit| {
        let recompute = match fit.recompute {
            Recompute::None => "none",
            Recompute::Selective => "selective",
            Recompute::Full => "full",
        };
        let head = vec![
            fit.layout.to_string(),
            recompute.to_owned(),
            fit.num_micro_batches.to_string(),
        ];
        [head, columns(&fit.memory)].concat()
    };
    let rows: Vec<Vec<String>> = fits.iter().take(MOST_LISTED).map(row).collect();
    let header = [
        "layout",
        "recompute",
        "micro-batches",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "total",
    ];
    report.text(table(&header, &rows).trim_end())?;
    if fits.len() > MOST_LISTED {
        report.text(format!("and {} more", fits.len() - MOST_LISTED))?;
    }
    report.json(&json!({"gpus": gpus, "limit_bytes": limit, "fits": fits}))
}

fn columns(memory: &RankMemory) -> Vec<String> {
    [
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.total(),
    ]
    .map(bytes)
    .to_vec()
}
