//! `export`: native to Hugging Face.

use std::path::PathBuf;
use std::time::Instant;

use bridge_core::convert::ExportOptions;
use bridge_core::dtype::DType;
use clap::ValueEnum;
use serde_json::json;

use crate::conversion::{ConversionProgress, options, tell_skipped};
use crate::failure::Result;
use crate::flags::byte_size;
use crate::report::{Report, bytes};

/// Converts a native checkpoint to a Hugging Face folder.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask export --checkpoint runs/tiny_llama --out exported --dtype bf16"
)]
pub(crate) struct Args {
    /// Native checkpoint: a run's folder (its newest iteration) or one iteration's.
    #[arg(long, value_name = "CKPT")]
    checkpoint: PathBuf,
    /// The folder to make; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Type to write weights as [default: as stored].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
    /// Most bytes per file, such as 5GB [default: the source's files, or 5GB].
    #[arg(long, value_name = "SIZE", value_parser = byte_size)]
    max_shard_size: Option<u64>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    F32,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let dtype = args.dtype.map(|d| match d {
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
    });
    let export = ExportOptions {
        dtype,
        max_shard_bytes: args.max_shard_size,
        convert: options(),
    };
    let started = Instant::now();
    let done = {
        let progress = ConversionProgress::new()?;
        bridge_core::convert::export(
            &args.checkpoint,
            &args.out,
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
