//! `roundtrip`: proof that import, resharding and export lose nothing.

use std::path::PathBuf;

use serde_json::json;

use crate::conversion::{ConversionProgress, options};
use crate::failure::{Failure, Result};
use crate::flags::{LayoutFlags, hugging_face_folder};
use crate::report::{Report, bytes};

/// Imports, reshards and exports a model, and compares every tensor's bytes with the source.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask roundtrip --hf meta-llama/Llama-3.2-1B --tp 4 --pp 2"
)]
pub(crate) struct Args {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    hf: String,
    /// Where to work; needs room for two copies of the model [default: the system's temporary folder].
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    #[command(flatten)]
    layout: LayoutFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let folder = hugging_face_folder(&args.hf)?;
    let work_dir = args.work_dir.unwrap_or_else(std::env::temp_dir);
    let layout = args.layout.spec();
    let found = {
        let progress = ConversionProgress::new()?;
        let registry = bridge_models::registry();
        bridge_core::convert::roundtrip(
            &folder,
            &registry,
            &layout,
            Some(&work_dir),
            &options(),
            &progress,
        )?
    };
    let mismatches: Vec<_> = found
        .mismatches
        .iter()
        .map(|m| json!({"name": m.name, "problem": m.problem}))
        .collect();
    let result = json!({
        "family": found.family,
        "layout": found.layout.to_string(),
        "tensors": found.tensors,
        "bytes": found.bytes,
        "config_identical": found.config_identical,
        "identical_files": found.identical_files,
        "files": found.files,
        "mismatches": mismatches,
        "passed": found.passed(),
    });
    if !found.passed() {
        let all: Vec<String> = found
            .mismatches
            .iter()
            .map(|m| format!("\n  {}: {}", m.name, m.problem))
            .collect();
        return Err(Failure::check(format!(
            "{} did not come back as they were:{}",
            all.len(),
            all.concat()
        ))
        .with(result));
    }
    report.text(format!(
        "{} at {}: {} tensors ({}) and config.json came back byte for byte ({} of {} files identical)",
        found.family,
        found.layout,
        found.tensors,
        bytes(found.bytes),
        found.identical_files,
        found.files
    ))?;
    report.json(&result)
}
