//! `convert`: between any two of Hugging Face, Megatron-Core and native.

use std::path::PathBuf;
use std::time::Instant;

use bridge_core::convert::{ExportOptions, ModelPlace};
use serde_json::json;

use crate::conversion::{ConversionProgress, megatron_place, options, tell_skipped};
use crate::export::Dtype;
use crate::failure::{Failure, Result};
use crate::flags::hugging_face_folder;
use crate::report::{Report, bytes};

/// Converts a model between Hugging Face, Megatron-Core and native, streaming straight through.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask convert --from megatron:runs/gpt --hf-config configs/llama32_1b --to hf:exported"
)]
pub(crate) struct Args {
    /// Where the model is: hf:DIR (or a hub id), megatron:DIR, native:DIR.
    #[arg(long, value_name = "KIND:DIR")]
    from: String,
    /// The folder to make, in the same spelling; must not exist.
    #[arg(long, value_name = "KIND:DIR")]
    to: String,
    /// Folder or hub id of the Hugging Face config and tokenizer of a Megatron-Core source [default: its own hf folder].
    #[arg(long, value_name = "DIR")]
    hf_config: Option<String>,
    /// Type to write weights as [default: as stored].
    #[arg(long, value_enum)]
    dtype: Option<Dtype>,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let from = match split(&args.from)? {
        ("hf", dir) => ModelPlace::Hf(hugging_face_folder(dir)?),
        ("megatron", dir) => megatron_place(PathBuf::from(dir), args.hf_config.as_deref())?,
        (_, dir) => ModelPlace::Native(PathBuf::from(dir)),
    };
    if args.hf_config.is_some() && !matches!(from, ModelPlace::Megatron { .. }) {
        return Err(Failure::input(
            "--hf-config is for a megatron: source; other sources hold their config",
        ));
    }
    let to = match split(&args.to)? {
        ("hf", dir) => ModelPlace::Hf(PathBuf::from(dir)),
        ("megatron", dir) => ModelPlace::Megatron {
            dir: PathBuf::from(dir),
            hf_config: None,
        },
        (_, dir) => ModelPlace::Native(PathBuf::from(dir)),
    };
    let (dtype, quantize) = args.dtype.map_or((None, None), Dtype::split);
    let export = ExportOptions {
        dtype,
        quantize,
        convert: options(),
        ..ExportOptions::default()
    };
    run_places(&from, &to, &export, report)
}

/// Converts and tells what was done.
pub(crate) fn run_places(
    from: &ModelPlace,
    to: &ModelPlace,
    export: &ExportOptions,
    report: Report,
) -> Result {
    let started = Instant::now();
    let done = {
        let progress = ConversionProgress::new()?;
        bridge_core::convert::convert(from, to, &bridge_models::registry(), export, &progress)?
    };
    let seconds = started.elapsed().as_secs_f64();
    tell_skipped(&done.skipped_files);
    report.text(format!(
        "wrote {} tensors ({}) to {} in {seconds:.2} s",
        done.tensors,
        bytes(done.bytes),
        done.dir.display()
    ))?;
    report.json(&json!({
        "dir": done.dir,
        "tensors": done.tensors,
        "bytes": done.bytes,
        "seconds": seconds,
    }))
}

/// Kind and folder of `kind:folder`.
fn split(place: &str) -> Result<(&str, &str)> {
    match place.split_once(':') {
        Some((kind @ ("hf" | "megatron" | "native"), dir)) if !dir.is_empty() => Ok((kind, dir)),
        _ => Err(Failure::input(format!(
            "`{place}` is no place; write hf:DIR, megatron:DIR or native:DIR"
        ))),
    }
}
