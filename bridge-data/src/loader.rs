//! Reading batches ahead of the training loop.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::batch::Batch;
use crate::dataset::Dataset;
use crate::error::{DataError, Result};
use crate::sampler::GlobalBatchSampler;

/// Global batches read ahead.
const AHEAD: usize = 2;

/// This rank's micro-batches of one global batch after another, read ahead by a thread of its own.
///
/// What it yields is exactly `sampler.micro_batches(..)` read with [`Batch::load`]; the thread changes the time, not the
/// content. To resume, make a new one at the number of samples consumed.
pub struct Loader {
    /// `None` once dropped: closing the channel is what ends the thread.
    batches: Option<Receiver<Result<Vec<Batch>>>>,
    reader: Option<JoinHandle<()>>,
}

impl Loader {
    /// Starts reading the global batch that follows `consumed_samples`. `batch_size_at(consumed)` is the global batch size at a
    /// number of consumed samples; a constant, unless the size ramps up.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        dataset: Arc<dyn Dataset>,
        sampler: GlobalBatchSampler,
        consumed_samples: u64,
        batch_size_at: impl Fn(u64) -> usize + Send + 'static,
    ) -> Result<Self> {
        let (sender, batches) = sync_channel(AHEAD);
        let read = move || {
            read_ahead(
                dataset.as_ref(),
                &sampler,
                consumed_samples,
                &batch_size_at,
                &sender,
            )
        };
        let reader = std::thread::Builder::new()
            .name("data-loader".into())
            .spawn(read);
        let reader = reader.map_err(|error| DataError::Loader {
            reason: format!("it could not be started: {error}"),
        })?;
        Ok(Self {
            batches: Some(batches),
            reader: Some(reader),
        })
    }

    /// The micro-batches of the next global batch.
    ///
    /// # Errors
    /// If the data cannot be read or the batch size cannot be dealt out; nothing more follows after an error.
    pub fn next_batch(&mut self) -> Result<Vec<Batch>> {
        let gone = || {
            Err(DataError::Loader {
                reason: "an earlier batch failed".into(),
            })
        };
        self.batches
            .as_ref()
            .and_then(|batches| batches.recv().ok())
            .unwrap_or_else(gone)
    }
}

fn read_ahead(
    dataset: &dyn Dataset,
    sampler: &GlobalBatchSampler,
    mut consumed: u64,
    batch_size_at: &dyn Fn(u64) -> usize,
    sender: &SyncSender<Result<Vec<Batch>>>,
) {
    loop {
        let size = batch_size_at(consumed);
        let batch = sampler.micro_batches(consumed, size).and_then(|micro| {
            micro
                .iter()
                .map(|indices| Batch::load(dataset, indices))
                .collect::<Result<Vec<_>>>()
        });
        let failed = batch.is_err();
        if sender.send(batch).is_err() || failed {
            return;
        }
        consumed += size as u64;
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        drop(self.batches.take());
        if let Some(reader) = self.reader.take() {
            // A panic of the reader has been printed and, for whoever waited, reported as an error.
            let _ = reader.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::MockGptDataset;

    #[test]
    fn reading_ahead_gives_the_batches_of_the_sampler() {
        let data = Arc::new(MockGptDataset::new(9, 50, 3).unwrap());
        let sampler = GlobalBatchSampler::new(2, 3, 1).unwrap();
        let mut loader = Loader::start(data.clone(), sampler, 12, |consumed| {
            if consumed < 24 { 6 } else { 12 }
        })
        .unwrap();
        let mut consumed = 12;
        for size in [6, 6, 12, 12] {
            let expected = sampler.micro_batches(consumed, size).unwrap();
            let expected = expected
                .iter()
                .map(|indices| Batch::load(data.as_ref(), indices).unwrap());
            assert_eq!(loader.next_batch().unwrap(), expected.collect::<Vec<_>>());
            consumed += size as u64;
        }
    }

    #[test]
    fn an_error_is_passed_on_and_ends_the_stream() {
        let data = Arc::new(MockGptDataset::new(9, 50, 3).unwrap());
        let mut loader =
            Loader::start(data, GlobalBatchSampler::new(4, 1, 0).unwrap(), 0, |_| 6).unwrap();
        assert!(
            loader
                .next_batch()
                .unwrap_err()
                .to_string()
                .contains("global_batch_size = 6")
        );
        assert!(loader.next_batch().is_err());
    }
}
