//! Samples and batches.

use std::sync::Arc;

use crate::dataset::Dataset;
use crate::error::{DataError, Result};

/// The label of a position that has no loss, as in PyTorch and `transformers`.
pub const IGNORE_INDEX: i64 = -100;

/// One window of tokens with what is to be predicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Input ids: `[seq]`.
    pub tokens: Vec<i64>,
    /// The token after each input, or [`IGNORE_INDEX`]: `[seq]`. Already shifted: `labels[i]` is predicted from
    /// `tokens[..=i]`.
    pub labels: Vec<i64>,
    /// Position of each token, from 0; begins again with each document where positions are reset: `[seq]`.
    pub position_ids: Vec<i64>,
    /// Where the stretches that attend to one another begin, and the end: `0, ..., seq`. Only the two ends where
    /// attention may cross documents.
    pub boundaries: Vec<usize>,
}

/// Samples of equal length, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of samples.
    pub batch: usize,
    /// Tokens in each.
    pub seq: usize,
    /// Input ids: `[batch, seq]`, row-major.
    pub tokens: Vec<i64>,
    /// The token to predict at each place, or [`IGNORE_INDEX`]: `[batch, seq]`.
    pub labels: Vec<i64>,
    /// Position of each token: `[batch, seq]`.
    pub position_ids: Vec<i64>,
    /// Where documents begin in the tokens seen as one row of `batch * seq`, and the end: `0, ..., batch * seq`. `None` where
    /// attention may cross documents, so that each row is one stretch.
    pub cu_seqlens: Option<Arc<[usize]>>,
}

impl Batch {
    /// Joins samples.
    ///
    /// # Errors
    /// If there are none, or their lengths differ.
    pub fn from_samples(samples: impl IntoIterator<Item = Sample>) -> Result<Self> {
        let mut joined = Self {
            batch: 0,
            seq: 0,
            tokens: vec![],
            labels: vec![],
            position_ids: vec![],
            cu_seqlens: None,
        };
        let mut starts = vec![0];
        let mut packed = false;
        for sample in samples {
            if joined.batch == 0 {
                joined.seq = sample.tokens.len();
            } else if sample.tokens.len() != joined.seq {
                let value = format!("{} and {} tokens", joined.seq, sample.tokens.len());
                return Err(DataError::BadOption {
                    option: "samples",
                    value,
                    reason: "samples of a batch have one length".into(),
                });
            }
            let offset = joined.batch * joined.seq;
            packed |= sample.boundaries.len() > 2;
            starts.extend(sample.boundaries.iter().skip(1).map(|start| offset + start));
            joined.batch += 1;
            joined.tokens.extend(sample.tokens);
            joined.labels.extend(sample.labels);
            joined.position_ids.extend(sample.position_ids);
        }
        if joined.batch == 0 {
            let reason = "a batch needs at least one".into();
            return Err(DataError::BadOption {
                option: "samples",
                value: "none".into(),
                reason,
            });
        }
        joined.cu_seqlens = packed.then(|| starts.into());
        Ok(joined)
    }

    /// Reads the samples with the given global indices.
    ///
    /// # Errors
    /// If there are no indices or a sample cannot be read.
    pub fn load(dataset: &dyn Dataset, indices: &[u64]) -> Result<Self> {
        let samples = indices
            .iter()
            .map(|&index| dataset.sample(index))
            .collect::<Result<Vec<_>>>()?;
        Self::from_samples(samples)
    }

    /// Number of places with a loss.
    pub fn loss_tokens(&self) -> usize {
        self.labels
            .iter()
            .filter(|&&label| label != IGNORE_INDEX)
            .count()
    }
}
