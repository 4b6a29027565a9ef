//! `adapter`: adapters to and from Hugging Face PEFT folders, and into a model's weights.

use std::path::{Path, PathBuf};

use bridge_core::LayoutSpec;
use bridge_core::checkpoint::native::{Group, NativeCheckpoint, NativeWriter, PieceSpec};
use bridge_core::convert::{HF_DIR, HfModel};
use bridge_core::dtype::{DType, encode_f32};
use bridge_core::{DecoderConfig, HfConfig, ModelBridge};
use bridge_models::registry;
use bridge_models::weights::native_config;
use bridge_peft::{ADAPTER_FILE, AdapterWeights, base_fingerprint, hf, merge};
use serde_json::{Value, json};

use crate::conversion::ConversionProgress;
use crate::failure::{Blame, Failure, Result};
use crate::flags::hugging_face_folder;
use crate::model::{ModelFlags, ModelOnDisk};
use crate::report::Report;

/// Moves LoRA and DoRA adapters between training, Hugging Face PEFT folders and a model's weights.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Debug)]
enum What {
    Export(ExportArgs),
    Import(ImportArgs),
    Merge(MergeArgs),
}

/// Writes a trained adapter as a PEFT folder, which `peft` loads.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask adapter export --checkpoint runs/llama32_1b_lora --out adapter"
)]
struct ExportArgs {
    /// Checkpoint of adapters: a run's folder or one iteration's.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// The folder to make; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Reads a PEFT folder into a checkpoint of adapters.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask adapter import --adapter adapter --hf meta-llama/Llama-3.2-1B --out runs/adapter"
)]
struct ImportArgs {
    /// The PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// The model that it belongs to: a Hugging Face folder or hub id.
    #[arg(long, value_name = "DIR")]
    hf: String,
    /// The checkpoint to make.
    #[arg(long, value_name = "CKPT")]
    out: PathBuf,
}

/// Adds an adapter to a model's weights: computed in fp32 and cast back to what each weight is stored as.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Examples:\n  cargo xtask adapter merge --hf meta-llama/Llama-3.2-1B --checkpoint runs/llama32_1b_lora --out merged\n  \
                  cargo xtask adapter merge --base-checkpoint runs/base --adapter adapter --out merged --native"
)]
struct MergeArgs {
    /// The model: a Hugging Face folder or hub id.
    #[arg(long, value_name = "DIR", required_unless_present = "base_checkpoint")]
    hf: Option<String>,
    /// The model: a native checkpoint.
    #[arg(long, value_name = "CKPT", conflicts_with = "hf")]
    base_checkpoint: Option<PathBuf>,
    /// The adapter: a checkpoint of adapters.
    #[arg(long, value_name = "CKPT", required_unless_present = "adapter")]
    checkpoint: Option<PathBuf>,
    /// The adapter: a PEFT folder, or a checkpoint of adapters.
    #[arg(long, value_name = "DIR", conflicts_with = "checkpoint")]
    adapter: Option<PathBuf>,
    /// The Hugging Face folder to make; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Make a native checkpoint in its place.
    #[arg(long)]
    native: bool,
    /// Merge also where the model is not the one that the adapter was trained beside.
    #[arg(long)]
    any_base: bool,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    match args.what {
        What::Export(args) => export(args, report),
        What::Import(args) => import(args, report),
        What::Merge(args) => run_merge(args, report),
    }
}

fn open(path: &Path) -> Result<NativeCheckpoint> {
    Ok(NativeCheckpoint::open(path)?)
}

/// What a checkpoint of adapters says of itself.
fn adapter_json(checkpoint: &NativeCheckpoint) -> Result<Value> {
    let json = checkpoint.read_file(ADAPTER_FILE)?;
    serde_json::from_slice(&json).input(format!(
        "{}/{ADAPTER_FILE} is no JSON",
        checkpoint.dir().display()
    ))
}

fn tell(weights: &AdapterWeights, out: &Path, what: &str, report: Report) -> Result {
    let layers = weights.layers.len();
    let parameters: usize = weights
        .layers
        .values()
        .map(|factors| {
            factors.a.len() + factors.b.len() + factors.magnitude.as_ref().map_or(0, Vec::len)
        })
        .sum();
    report.text(format!(
        "{what} {:?} of rank {} on {layers} layers ({parameters} parameters): {}",
        weights.config.kind,
        weights.config.dim,
        out.display()
    ))?;
    report.json(&json!({
        "out": out,
        "kind": weights.config.kind,
        "dim": weights.config.dim,
        "layers": layers,
        "parameters": parameters,
    }))
}

fn export(args: ExportArgs, report: Report) -> Result {
    let checkpoint = open(&args.checkpoint)?;
    let weights = AdapterWeights::from_native(&checkpoint)?;
    let (bridge, _, config) = native_config(&checkpoint, &registry())?;
    let json = adapter_json(&checkpoint)?;
    let base = json["base"].as_str().unwrap_or_default();
    hf::export(&weights, bridge, &config, base, &args.out)?;
    tell(&weights, &args.out, "exported", report)
}

fn import(args: ImportArgs, report: Report) -> Result {
    let dir = hugging_face_folder(&args.hf)?;
    let model = HfModel::open(&dir, &registry(), &LayoutSpec::default())?;
    let weights = hf::import(&args.adapter, model.bridge(), model.config())?;
    let dim = weights.config.dim;
    let writer = NativeWriter::begin(&args.out, 0, Default::default())?;
    let raw = HfConfig::load(&dir)?.raw().to_vec();
    writer.add_file(&format!("{HF_DIR}/config.json"), &raw)?;
    let json = json!({
        "config": weights.config,
        "base": args.hf,
        "base_fingerprint": base_fingerprint(&dir)?,
    });
    writer.add_file(ADAPTER_FILE, json.to_string().as_bytes())?;
    let mut tensors: Vec<(PieceSpec, &[f32])> = Vec::new();
    for (layer, factors) in &weights.layers {
        let mut add = |part: &str, shape: Vec<usize>, values| {
            let spec = PieceSpec::whole(format!("{layer}.{part}"), DType::F32, shape);
            tensors.push((spec, values));
        };
        add("lora_a", vec![dim, factors.a.len() / dim], &factors.a);
        add("lora_b", vec![factors.b.len() / dim, dim], &factors.b);
        if let Some(magnitude) = &factors.magnitude {
            add("lora_magnitude", vec![magnitude.len()], magnitude);
        }
    }
    let specs = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let file = writer.piece_file(Group::Model, 0, specs)?;
    for (piece, (_, values)) in tensors.iter().enumerate() {
        let mut bytes = vec![0; 4 * values.len()];
        encode_f32(values, DType::F32, &mut bytes).running("cannot write fp32")?;
        file.write_at(piece, 0, &bytes)?;
    }
    file.finish()?;
    writer.finish(1, 0)?;
    tell(&weights, &args.out, "imported", report)
}

fn run_merge(args: MergeArgs, report: Report) -> Result {
    let registry = registry();
    let hf_dir = args.hf.as_deref().map(hugging_face_folder).transpose()?;
    let base = args.base_checkpoint.as_deref().map(open).transpose()?;
    // The parser makes sure that one of either two is there.
    let adapter = (args.checkpoint.as_deref().or(args.adapter.as_deref()))
        .ok_or_else(|| Failure::input("give --checkpoint or --adapter"))?;
    let model = ModelOnDisk::open(&ModelFlags {
        hf: args.hf.clone(),
        checkpoint: args.base_checkpoint.clone(),
    })?;
    let weights = model.read_adapter(adapter, args.any_base)?;
    let progress = ConversionProgress::new()?;
    match (&base, &hf_dir, args.native) {
        (Some(base), _, true) => {
            merge::merge_native(base, &weights, &registry, &args.out)?;
        }
        (Some(base), _, false) => {
            merge::merge_native_to_hf(base, &weights, &registry, &args.out, &progress)?;
        }
        (None, Some(dir), true) => {
            merge::merge_hf_to_native(dir, &weights, &registry, &args.out, &progress)?;
        }
        (None, Some(dir), false) => {
            merge::merge_hf(dir, &weights, &registry, &args.out, &progress)?;
        }
        (None, None, _) => return Err(Failure::input("give --hf or --base-checkpoint".to_owned())),
    }
    drop(progress);
    tell(&weights, &args.out, "merged", report)
}

/// An adapter for the model that `config` describes, whose weights are at `base`: a PEFT folder, or a checkpoint of
/// adapters, which is refused where it was trained beside another model unless `any_base` says so.
pub(crate) fn read(
    path: &Path,
    base: &Path,
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
    any_base: bool,
) -> Result<AdapterWeights> {
    if path.join(hf::CONFIG_FILE).exists() {
        return Ok(hf::import(path, bridge, config)?);
    }
    let checkpoint = NativeCheckpoint::open(path).input(format!(
        "{} is no PEFT folder, which has {}, and no checkpoint of adapters",
        path.display(),
        hf::CONFIG_FILE
    ))?;
    let weights = AdapterWeights::from_native(&checkpoint)?;
    if !any_base {
        same_base(&adapter_json(&checkpoint)?, base)?;
    }
    weights.check(config)?;
    Ok(weights)
}

/// Checks that the model at `place` is the one that an adapter was trained beside.
fn same_base(json: &Value, place: &Path) -> Result {
    let found = base_fingerprint(place)?;
    match json["base_fingerprint"].as_str() {
        Some(expected) if expected != found => Err(Failure::input(format!(
            "{} is not the model that the adapter was trained beside, {} (its weights have fingerprint {found}, expected \
             {expected}); give that one, or --any-base to use this one all the same",
            place.display(),
            json["base"]
        ))),
        _ => Ok(()),
    }
}
