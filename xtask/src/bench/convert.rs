//! `bench convert`: a conversion there and back against a plain copy of the same bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use bridge_core::convert::{ExportOptions, ModelPlace, convert};
use serde_json::{Value, json};

use super::synthetic::{self, Stored};
use super::{memory, rounded};
use crate::conversion::{ConversionProgress, options};
use crate::failure::{Blame, Failure, Result};
use crate::flags::{byte_size, hugging_face_folder};
use crate::report::Report;

/// Times import to a native or Megatron-Core checkpoint, and export from it, with peak memory, beside `cp` of the same
/// bytes.
///
/// The kernel is asked to finish writing before each phase, so that no phase pays for the one before.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench convert --synthetic 8GB --dir /data/scratch\n  \
    cargo xtask bench convert --synthetic 8GB --megatron --dir /data/scratch\n  \
    cargo xtask bench convert --hf HuggingFaceTB/SmolLM2-135M-Instruct")]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,
    /// Make the projections of the synthetic checkpoint FP8 in blocks, as DeepSeek-V3 is published.
    #[arg(long, requires = "synthetic")]
    fp8: bool,
    /// Make the synthetic checkpoint a gpt-oss with its experts in MXFP4.
    #[arg(long, requires = "synthetic", conflicts_with = "fp8")]
    mxfp4: bool,
    /// Convert to a Megatron-Core checkpoint and back, in place of a native one.
    #[arg(long)]
    megatron: bool,
    /// Where to work; needs room for three more copies [default: the system's temporary folder].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct Source {
    /// Make a Llama-shaped bf16 checkpoint of about this size, such as 8GB, and convert that.
    #[arg(long, value_name = "SIZE", value_parser = byte_size)]
    synthetic: Option<u64>,
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    hf: Option<String>,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = Scratch::new(&parent)?;
    let stored = match (args.fp8, args.mxfp4) {
        (true, _) => Stored::Fp8,
        (_, true) => Stored::Mxfp4,
        _ => Stored::Bf16,
    };
    let (source, made) = match (&args.source.hf, args.source.synthetic) {
        (_, Some(size)) => {
            let folder = scratch.0.join("source");
            let started = Instant::now();
            synthetic::write(&folder, size, stored)?;
            (folder, Some(started.elapsed().as_secs_f64()))
        }
        (hf, None) => (
            hugging_face_folder(hf.as_deref().unwrap_or_default())?,
            None,
        ),
    };
    let bytes = folder_bytes(&source)?;
    let (there, back, copy) = (
        scratch.0.join("there"),
        scratch.0.join("back"),
        scratch.0.join("copy"),
    );
    let there = if args.megatron {
        ModelPlace::Megatron {
            dir: there,
            hf_config: None,
        }
    } else {
        ModelPlace::Native(there)
    };
    let registry = bridge_models::registry();

    let cp_before = copy_time(&source, &copy)?;
    let progress = ConversionProgress::new()?;
    let how = ExportOptions {
        convert: options(),
        ..ExportOptions::default()
    };
    let run = |from: &ModelPlace, to: &ModelPlace| {
        phase(|| {
            convert(from, to, &registry, &how, &progress)?;
            Ok(())
        })
    };
    let (import_s, import_peak) = run(&ModelPlace::Hf(source.clone()), &there)?;
    let (export_s, export_peak) = run(&there, &ModelPlace::Hf(back))?;
    drop(progress);
    let cp_after = copy_time(&source, &copy)?;
    let cp_s = cp_before.zip(cp_after).map(|(a, b)| (a + b) / 2.0);
    let ratio = |seconds: f64| cp_s.map(|cp| rounded(seconds / cp, 2));
    report.line(&json!({
        "bench": "convert",
        "bytes": bytes,
        "fp8": args.fp8,
        "mxfp4": args.mxfp4,
        "megatron": args.megatron,
        "threads": options().threads,
        "synthetic_s": made.map(|s| rounded(s, 2)),
        "cp_s": cp_s.map(|s| rounded(s, 3)),
        "import_s": rounded(import_s, 3),
        "export_s": rounded(export_s, 3),
        "import_over_cp": ratio(import_s),
        "export_over_cp": ratio(export_s),
        "import_gb_per_s": rounded(bytes as f64 / import_s / 1e9, 2),
        "export_gb_per_s": rounded(bytes as f64 / export_s / 1e9, 2),
        "import_peak_gib": import_peak.map_or(Value::Null, Value::from),
        "export_peak_gib": export_peak.map_or(Value::Null, Value::from),
    }))
}

/// Seconds of `work`, and its peak memory in GiB.
fn phase(work: impl FnOnce() -> Result) -> Result<(f64, Option<f64>)> {
    flush()?;
    memory::reset_peak();
    let started = Instant::now();
    work()?;
    Ok((started.elapsed().as_secs_f64(), memory::gib(memory::peak())))
}

/// Seconds that `cp -r` takes; `None` where there is no `cp`.
fn copy_time(from: &Path, to: &Path) -> Result<Option<f64>> {
    flush()?;
    let started = Instant::now();
    // A hub cache is full of links, which must be followed.
    let Ok(status) = Command::new("cp").arg("-rL").arg(from).arg(to).status() else {
        return Ok(None);
    };
    let seconds = started.elapsed().as_secs_f64();
    if !status.success() {
        return Err(Failure::running(format!("cp to {} failed", to.display())));
    }
    fs::remove_dir_all(to).running(format!("cannot remove {}", to.display()))?;
    Ok(Some(seconds))
}

/// Waits until the kernel has written what is pending.
fn flush() -> Result {
    match Command::new("sync").status() {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Failure::running("the command `sync` failed")),
    }
}

fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).input(format!("cannot read {}", folder.display()))? {
        let entry = entry.input(format!("cannot read {}", folder.display()))?;
        bytes += fs::metadata(entry.path())
            .input(format!("cannot read {}", entry.path().display()))?
            .len();
    }
    Ok(bytes)
}

/// A folder of our own that is gone in the end, however it ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("bridge-bench-{}", std::process::id()));
        fs::create_dir_all(&path).input(format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
