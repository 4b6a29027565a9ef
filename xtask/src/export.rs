//! `export`: native to Hugging Face or Megatron-Core.

use std::path::PathBuf;
use std::time::Instant;

use bridge_core::convert::{ExportOptions, ModelPlace};
use bridge_core::dtype::DType;
use bridge_core::quant::QuantScheme;
use clap::ValueEnum;
use serde_json::json;

use crate::conversion::{ConversionProgress, options, tell_skipped};
use crate::failure::Result;
use crate::flags::byte_size;
use crate::report::{Report, bytes};

/// Converts a native checkpoint to a Hugging Face folder or a Megatron-Core checkpoint.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask export --checkpoint runs/tiny_llama --out exported --dtype bf16"
)]
pub(crate) struct Args {
    /// Native checkpoint: a run's folder (its newest iteration) or one iteration's.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// The Hugging Face folder to make; must not exist.
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "megatron",
        conflicts_with = "megatron"
    )]
    out: Option<PathBuf>,
    /// The Megatron-Core checkpoint (torch_dist) to make; must not exist.
    #[arg(long, value_name = "DIR")]
    megatron: Option<PathBuf>,
    /// Type to write weights as [default: as stored, quantized again if the source was].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Most bytes per file, such as 5GB [default: the source's files, or 5GB].
    #[arg(long, value_name = "SIZE", value_parser = byte_size, conflicts_with = "megatron")]
    max_shard_size: Option<u64>,
}

/// Types that weights can be written as.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Dtype {
    Bf16,
    F16,
    F32,
    /// 8-bit floats with a scale per block of 128 x 128, as DeepSeek-V3 is published.
    Fp8,
    /// 4-bit floats with a scale per 32, as gpt-oss is published.
    Mxfp4,
}

impl Dtype {
    /// The plain type to cast to, or the scheme to quantize by.
    pub(crate) fn split(self) -> (Option<DType>, Option<QuantScheme>) {
        match self {
            Dtype::Bf16 => (Some(DType::BF16), None),
            Dtype::F16 => (Some(DType::F16), None),
            Dtype::F32 => (Some(DType::F32), None),
            Dtype::Fp8 => (None, Some(QuantScheme::FP8)),
            Dtype::Mxfp4 => (None, Some(QuantScheme::Mxfp4)),
        }
    }
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let (dtype, quantize) = args.dtype.map_or((None, None), Dtype::split);
    let export = ExportOptions {
        dtype,
        quantize,
        max_shard_bytes: args.max_shard_size,
        convert: options(),
    };
    if let Some(dir) = args.megatron {
        let (from, hf_config) = (ModelPlace::Native(args.checkpoint), None);
        return crate::convert::run_places(
            &from,
            &ModelPlace::Megatron { dir, hf_config },
            &export,
            report,
        );
    }
    // The parser makes sure that one of the two is there.
    let out = args.out.unwrap_or_default();
    let started = Instant::now();
    let done = {
        let progress = ConversionProgress::new()?;
        bridge_core::convert::export(
            &args.checkpoint,
            &out,
            &bridge_models::registry(),
            &export,
            &progress,
        )?
    };
    let seconds = started.elapsed().as_secs_f64();
    tell_skipped(&done.skipped_files);
    report.text(format!(
        "exported {} tensors ({}) in {} files to {} in {seconds:.2} s",
        done.tensors,
        bytes(done.bytes),
        done.files.len(),
        done.dir.display()
    ))?;
    report.json(&json!({
        "hf": done.dir,
        "tensors": done.tensors,
        "bytes": done.bytes,
        "files": done.files,
        "seconds": seconds,
    }))
}
