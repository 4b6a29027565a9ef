//! What the converting verbs share: progress that a signal can stop, and words about files left behind.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bridge_core::convert::{ConvertOptions, Progress, SkippedFile};
use bridge_train::signals::StopFlag;

use crate::failure::{Blame, Result};
use crate::progress::ByteProgress;

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
