//! `import`: Hugging Face or Megatron-Core to native.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use bridge_core::convert::{ExportOptions, ModelPlace};

use crate::conversion::{ConversionProgress, SourceFlags, options, tell_skipped};
use crate::failure::Result;
use crate::report::{Report, bytes};

/// Converts a Hugging Face model or a Megatron-Core checkpoint to a native checkpoint.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Examples:\n  cargo xtask import --hf meta-llama/Llama-3.2-1B --out checkpoints/llama32_1b\n  \
                  cargo xtask import --megatron runs/gpt --hf-config configs/llama32_1b --out checkpoints/gpt"
)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceFlags,
    /// The native checkpoint to make; must not exist.
    #[arg(long, value_name = "CKPT")]
    out: PathBuf,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let from = args.source.place()?;
    let to = ModelPlace::Native(args.out);
    let registry = bridge_models::registry();
    let started = Instant::now();
    let done = {
        let progress = ConversionProgress::new()?;
        let export = ExportOptions {
            convert: options(),
            ..ExportOptions::default()
        };
        bridge_core::convert::convert(&from, &to, &registry, &export, &progress)?
    };
    let seconds = started.elapsed().as_secs_f64();
    tell_skipped(&done.skipped_files);
    report.text(format!(
        "imported {} tensors of {} ({}) into {} in {seconds:.2} s",
        done.tensors,
        done.family,
        bytes(done.bytes),
        done.dir.display()
    ))?;
    report.json(&json!({
        "checkpoint": done.dir,
        "family": done.family,
        "tensors": done.tensors,
        "bytes": done.bytes,
        "seconds": seconds,
    }))
}
