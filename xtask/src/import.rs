//! `import`: Hugging Face to native.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use crate::conversion::{ConversionProgress, options, tell_skipped};
use crate::failure::Result;
use crate::flags::hugging_face_folder;
use crate::report::{Report, bytes};

/// Converts a Hugging Face model to a native checkpoint.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask import --hf meta-llama/Llama-3.2-1B --out checkpoints/llama32_1b"
)]
pub(crate) struct Args {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    hf: String,
    /// The native checkpoint to make; must not exist.
    #[arg(long, value_name = "CKPT")]
    out: PathBuf,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let folder = hugging_face_folder(&args.hf)?;
    let started = Instant::now();
    let done = {
        let progress = ConversionProgress::new()?;
        bridge_core::convert::import(
            &folder,
            &args.out,
            &bridge_models::registry(),
            &options(),
            &progress,
        )?
    };
    let seconds = started.elapsed().as_secs_f64();
    tell_skipped(&done.skipped_files);
    report.text(format!(
        "imported {} tensors of {} ({}) into {} in {seconds:.2} s",
        done.plan.tensors.len(),
        done.plan.family,
        bytes(done.bytes),
        done.dir.display()
    ))?;
    report.json(&json!({
        "checkpoint": done.dir,
        "family": done.plan.family,
        "tensors": done.plan.tensors.len(),
        "bytes": done.bytes,
        "seconds": seconds,
    }))
}
