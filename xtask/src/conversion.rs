//! What the converting verbs share: progress that a signal can stop, and words about files left behind.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use std::path::PathBuf;

use bridge_core::convert::{ConvertOptions, ModelPlace, Progress, SkippedFile};
use bridge_train::signals::StopFlag;

use crate::failure::{Blame, Result};
use crate::flags::hugging_face_folder;
use crate::progress::ByteProgress;

/// Where a model comes from.
#[derive(clap::Args, Debug)]
pub(crate) struct SourceFlags {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "megatron",
        conflicts_with = "megatron"
    )]
    hf: Option<String>,
    /// Megatron-Core checkpoint (torch_dist): a run's folder or one iteration's.
    #[arg(long, value_name = "DIR")]
    megatron: Option<PathBuf>,
    /// Folder or hub id of the Hugging Face config and tokenizer of a Megatron-Core checkpoint [default: its own hf
    /// folder, which those written here have].
    #[arg(long, value_name = "DIR", requires = "megatron")]
    hf_config: Option<String>,
}

impl SourceFlags {
    /// The place; hub ids are fetched.
    pub(crate) fn place(&self) -> Result<ModelPlace> {
        match (&self.megatron, &self.hf) {
            (Some(dir), _) => megatron_place(dir.clone(), self.hf_config.as_deref()),
            // One of the two is there, as the parser makes sure.
            (None, hf) => Ok(ModelPlace::Hf(hugging_face_folder(
                hf.as_deref().unwrap_or_default(),
            )?)),
        }
    }
}

/// A Megatron-Core checkpoint and the folder of its config, which a hub id may name.
pub(crate) fn megatron_place(dir: PathBuf, hf_config: Option<&str>) -> Result<ModelPlace> {
    let hf_config = match hf_config {
        // A file, or a folder with nothing but a config, is taken as it is.
        Some(path) if PathBuf::from(path).exists() => Some(PathBuf::from(path)),
        Some(id) => Some(hugging_face_folder(id)?),
        None => None,
    };
    Ok(ModelPlace::Megatron { dir, hf_config })
}

/// Shows a conversion's progress. A signal stops the conversion, which then cleans up after itself.
pub(crate) struct ConversionProgress {
    shown: ByteProgress,
    stage: Mutex<String>,
    total: AtomicU64,
    done: AtomicU64,
    stop: StopFlag,
}

impl ConversionProgress {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            shown: ByteProgress::new("converting"),
            stage: Mutex::default(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stop: StopFlag::on_signals().running("cannot listen for signals")?,
        })
    }
}

impl Progress for ConversionProgress {
    fn begin(&self, stage: &str, total_bytes: u64) {
        if let Ok(mut shown) = self.stage.lock() {
            stage.clone_into(&mut shown);
        }
        self.total.store(total_bytes, Ordering::Relaxed);
        self.done.store(0, Ordering::Relaxed);
    }

    fn advance(&self, _tensor: &str, bytes: u64) -> bool {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let stage = self.stage.lock().map(|s| s.clone()).unwrap_or_default();
        self.shown
            .update(done, self.total.load(Ordering::Relaxed), &stage);
        !self.stop.is_raised()
    }
}

/// How conversions run on this machine.
pub(crate) fn options() -> ConvertOptions {
    ConvertOptions {
        threads: rayon::current_num_threads(),
        ..ConvertOptions::default()
    }
}

/// Tells which files beside the weights were not taken along.
pub(crate) fn tell_skipped(files: &[SkippedFile]) {
    for SkippedFile { name, reason } in files {
        eprintln!("left behind: {name} ({reason})");
    }
}
