//! From batches of the data crate to what a model runs on.

use bridge_data::{Batch, Dataset, Sample};
use bridge_models::{ForwardContext, Positions};
use bridge_ops::{Int, Ops, int_from_i64};

use crate::error::{Error, Result};

/// What a model's segments run in: the batch's tokens, positions and document boundaries, on `device`.
///
/// # Panics
/// If a token id does not fit 32 bits; see [`CheckedDataset`].
pub fn context<B: Ops>(batch: &Batch, device: &B::Device) -> ForwardContext<'static, B> {
    let ids: Vec<u32> = batch.tokens.iter().map(|id| to_u32(*id)).collect();
    let ctx = ForwardContext::new(&ids, [batch.batch, batch.seq], device);
    let Some(boundaries) = &batch.cu_seqlens else { return ctx };
    let positions = batch.position_ids.iter().map(|position| to_u32(*position)).collect();
    ctx.with_positions(Positions::Explicit(positions)).with_documents(boundaries.clone())
}

fn to_u32(value: i64) -> u32 {
    u32::try_from(value).unwrap_or_else(|_| panic!("{value} is no token id or position"))
}

/// The tokens to predict, `[batch * seq]`, -100 where there is no loss.
pub fn targets<B: Ops>(batch: &Batch, device: &B::Device) -> Int<B> {
    int_from_i64::<B>(&batch.labels, &[batch.labels.len()], device)
}

/// A dataset whose samples are checked against the model that is to read them, so that a wrong file is an error that
/// names the sample rather than an index out of bounds in a kernel.
pub struct CheckedDataset<'a> {
    inner: &'a dyn Dataset,
    vocab_size: usize,
}

impl<'a> CheckedDataset<'a> {
    /// Lets through samples whose ids are below `vocab_size`.
    pub fn new(inner: &'a dyn Dataset, vocab_size: usize) -> Self {
        Self { inner, vocab_size }
    }

    /// The sample with the given global index.
    ///
    /// # Errors
    /// If it cannot be read, or holds an id outside the vocabulary.
    pub fn sample(&self, index: u64) -> Result<Sample> {
        let sample = self.inner.sample(index)?;
        let known = |id: &i64| usize::try_from(*id).is_ok_and(|id| id < self.vocab_size);
        let label_known = |id: &i64| *id == bridge_data::IGNORE_INDEX || known(id);
        let outside = sample.tokens.iter().find(|id| !known(id));
        match outside.or_else(|| sample.labels.iter().find(|id| !label_known(id))) {
            None => Ok(sample),
            Some(&id) => Err(Error::TokenOutOfVocabulary {
                id,
                sample: index,
                dataset: self.inner.describe(),
                vocab_size: self.vocab_size,
            }),
        }
    }

    /// The samples with the given global indices, joined.
    ///
    /// # Errors
    /// As [`sample`](Self::sample), or if their lengths differ.
    pub fn batch(&self, indices: &[u64]) -> Result<Batch> {
        let samples = indices.iter().map(|index| self.sample(*index)).collect::<Result<Vec<_>>>()?;
        Ok(Batch::from_samples(samples)?)
    }
}
