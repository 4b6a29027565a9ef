//! `plan`: what a conversion or a training run would do and need, from the config and the headers alone.

use std::path::PathBuf;

use bridge_models::check_layout;
use bridge_parallel::memory::{
    Fit, MemorySpec, RankMemory, Recompute, SearchLimits, StateBytes, layouts_that_fit,
    stage_memory,
};
use bridge_parallel::pipeline::Schedule;
use bridge_train::config::{
    ConfigLayers, PrecisionMode, RecomputeGranularity, ResolveContext, ResolvedConfig, StateDType,
    resolve,
};
use serde_json::{json, to_value};

use crate::conversion::source_place;
use crate::failure::{Blame, Failure, Result};
use crate::flags::{ContextFlags, LayoutFlags, byte_size, hugging_face_folder};
use crate::report::{Report, bytes, table};

/// How many layouts a search lists.
const MOST_LISTED: usize = 12;

/// Shows the conversion plan and what each rank of a layout would hold, from the headers alone; with --memory, what
/// training needs on each rank, and which layouts fit.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask plan --hf meta-llama/Llama-3.2-1B --tp 2 --pp 2\n  \
    cargo xtask plan --hf meta-llama/Llama-3.2-1B --pp 4 --vpp 2 --schedule 8\n  \
    cargo xtask plan --memory --recipe llama3_8b --tp 2 --dp 4 --sp parallel.use_distributed_optimizer=true\n  \
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
    #[command(flatten)]
    context: ContextFlags,
    /// Draw the pipeline schedule of a step with so many micro-batches per data-parallel rank.
    #[arg(long, value_name = "MICRO-BATCHES", num_args = 0..=1, default_missing_value = "8")]
    schedule: Option<usize>,
}

/// Short forms of settings that memory depends on, and what is searched.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Memory")]
struct TrainingFlags {
    /// Settings over those of the recipe, as `pretrain` takes them: train.recompute_granularity=full
    #[arg(value_name = "key=value", requires = "memory")]
    overrides: Vec<String>,
    /// Samples that go through the model at once [default: the recipe's, or 1].
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch: Option<u32>,
    /// Samples of a step over all ranks [default: the recipe's, or 128].
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..))]
    global_batch: Option<u32>,
    /// Tokens of a sample [default: the recipe's, or 4096].
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..))]
    seq: Option<u32>,
    /// Search the layouts of this many GPUs that fit, with the optimizer's state divided among data-parallel ranks.
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u32).range(1..=65536))]
    gpus: Option<u32>,
    /// GPUs of one host, within which tensor parallelism stays.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    gpus_per_host: u32,
    /// Memory of one GPU.
    #[arg(long, default_value = "80GB", value_name = "SIZE", value_parser = byte_size)]
    gpu_memory: u64,
    /// Part of that which is left for the driver and the libraries.
    #[arg(long, default_value = "4GB", value_name = "SIZE", value_parser = byte_size)]
    reserve: u64,
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
    // The weights can be divided; whether the layers can then run is a question of its own.
    check_layout(model.config(), &layout, &args.context.options())?;
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

/// The configuration of a run: a recipe's, or that of a model with usual settings.
fn configuration(args: &Args) -> Result<ResolvedConfig> {
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
    for (key, degree) in args.layout.overrides() {
        layers.push_override(&format!("parallel.{key}={degree}"));
    }
    if let Some(kind) = args.context.cp_comm_type {
        layers.push_override(&format!("parallel.cp_comm_type={}", kind.name()));
    }
    let words = flags.overrides.iter();
    words.for_each(|word| layers.push_override(word));
    let name = args.recipe.as_deref().unwrap_or("plan");
    Ok(resolve(
        &layers,
        &ResolveContext {
            registry: &registry,
            hf_folder: &hf_folder,
            name,
        },
    )?)
}

/// What memory depends on besides model and layout, all of it from the configuration.
fn memory_spec(config: &ResolvedConfig) -> Result<MemorySpec> {
    let (train, parallel) = (&config.train, &config.parallel);
    let divides = parallel.shards_optimizer();
    let split = parallel.split(&config.model.decoder);
    Ok(MemorySpec {
        micro_batch: train.micro_batch_size,
        seq: config.data.seq_length,
        num_micro_batches: train.global_batch_size
            / (parallel.data_parallel_size * train.micro_batch_size).max(1),
        state: state_bytes(config, divides),
        recompute: match train.recompute_granularity {
            RecomputeGranularity::None => Recompute::None,
            RecomputeGranularity::Selective => Recompute::Selective,
            RecomputeGranularity::Full => Recompute::Full,
        },
        distributed_optimizer: divides,
        shard_grads: parallel.shards_grads(),
        shard_params: parallel.shards_params(),
        bucket_size: parallel.ddp_bucket_size,
        split: Some(split.map_err(Failure::input)?),
    })
}

/// What each weight takes; `divided`: data-parallel ranks divide the optimizer's state.
fn state_bytes(config: &ResolvedConfig, divided: bool) -> StateBytes {
    let whole = match config.precision.mode {
        PrecisionMode::Fp32 => StateBytes::fp32(),
        PrecisionMode::Auto | PrecisionMode::Bf16Mixed => StateBytes::bf16(divided),
    };
    let optimizer = &config.optimizer;
    let bytes = |format: StateDType| format.dtype().size() as u64;
    StateBytes {
        gradient: bytes(optimizer.main_grads_dtype),
        moments: bytes(optimizer.exp_avg_dtype) + 4,
        ..whole
    }
}

fn memory(args: &Args, report: Report) -> Result {
    let config = configuration(args)?;
    match args.training.gpus {
        Some(gpus) => search(&config, gpus as usize, &args.training, report),
        None => one_layout(&config, report),
    }
}

fn one_layout(config: &ResolvedConfig, report: Report) -> Result {
    let layout = config.parallel.layout();
    let spec = memory_spec(config)?;
    let stages = stage_memory(&config.model.decoder, &layout, &spec)?;
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
                "peak",
            ],
            &rows,
        )
        .trim_end(),
    )?;
    report.json(&json!({"layout": layout, "ranks": ranks, "stages": stages}))
}

fn search(config: &ResolvedConfig, gpus: usize, flags: &TrainingFlags, report: Report) -> Result {
    let limits = SearchLimits {
        ranks: gpus,
        per_host: flags.gpus_per_host as usize,
        bytes: flags.gpu_memory.saturating_sub(flags.reserve),
        global_batch: config.train.global_batch_size,
    };
    let own = memory_spec(config)?;
    let spec = MemorySpec {
        distributed_optimizer: true,
        state: state_bytes(config, true),
        ..own
    };
    let fits = layouts_that_fit(&config.model.decoder, &limits, &spec)?;
    if fits.is_empty() {
        return Err(Failure::check(format!(
            "no layout of {gpus} GPUs needs at most {} each; use more GPUs, shorter sequences or a smaller micro-batch",
            bytes(limits.bytes)
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
        "peak",
    ];
    report.text("with parallel.use_distributed_optimizer=true:")?;
    report.text(table(&header, &rows).trim_end())?;
    if fits.len() > MOST_LISTED {
        report.text(format!("and {} more", fits.len() - MOST_LISTED))?;
    }
    report.json(&json!({"gpus": gpus, "limit_bytes": limits.bytes, "fits": fits}))
}

fn columns(memory: &RankMemory) -> Vec<String> {
    [
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.peak,
    ]
    .map(bytes)
    .to_vec()
}
