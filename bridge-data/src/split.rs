//! Train, validation and test: a division of the documents.

use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

use crate::blend::BlendedDataset;
use crate::dataset::Dataset;
use crate::error::{DataError, Result};
use crate::gpt::{GptDataset, GptOptions};
use crate::token_source::TokenSource;

/// A part of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What is trained on.
    Train,
    /// What progress is measured on.
    Valid,
    /// What the end result is measured on.
    Test,
}

impl Split {
    /// All three, in the order in which they divide the documents.
    pub const ALL: [Self; 3] = [Self::Train, Self::Valid, Self::Test];
}

/// Shares of the documents, such as `969,30,1`. Only their proportions matter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SplitWeights([f64; 3]);

impl SplitWeights {
    /// Shares for training, validation and test.
    ///
    /// # Errors
    /// If one is negative or not a number, or all are 0.
    pub fn new(weights: [f64; 3]) -> Result<Self> {
        let sum: f64 = weights.iter().sum();
        if weights.iter().any(|weight| *weight < 0.0) || !sum.is_finite() || sum <= 0.0 {
            let reason =
                "shares must not be negative, and one must be above 0, as in 969,30,1".into();
            return Err(DataError::BadOption {
                option: "split",
                value: format!("{weights:?}"),
                reason,
            });
        }
        Ok(Self(weights.map(|weight| weight / sum)))
    }

    /// The documents of a split out of `documents`: consecutive ones, cut where the shares say, rounded as Megatron-Core
    /// rounds.
    pub fn documents(&self, split: Split, documents: u64) -> Range<u64> {
        let index = split as usize;
        let border = |count: usize| {
            // Summed in this order so that the borders are those of Megatron-Core to the last bit.
            let share: f64 = self.0[..count].iter().fold(0.0, |sum, weight| sum + weight);
            ((share * documents as f64).round_ties_even() as u64).min(documents)
        };
        border(index)..border(index + 1).max(border(index))
    }
}

impl FromStr for SplitWeights {
    type Err = DataError;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |reason: &str| DataError::BadOption {
            option: "split",
            value: text.into(),
            reason: reason.into(),
        };
        let parts = text.split([',', '/']).map(str::trim).collect::<Vec<_>>();
        if parts.len() > 3 {
            return Err(bad(
                "at most three shares: training, validation, test, as in 969,30,1",
            ));
        }
        let mut weights = [0.0; 3];
        for (weight, part) in weights.iter_mut().zip(parts) {
            *weight = part
                .parse()
                .map_err(|_| bad("expected numbers separated by commas, as in 969,30,1"))?;
        }
        Self::new(weights).map_err(|_| {
            bad("shares must not be negative, and one must be above 0, as in 969,30,1")
        })
    }
}

/// The datasets of a run.
#[derive(Clone)]
pub struct Splits([Option<Arc<dyn Dataset>>; 3]);

impl Splits {
    /// Datasets made by hand; `None` for a part without data.
    pub fn new(
        train: Option<Arc<dyn Dataset>>,
        valid: Option<Arc<dyn Dataset>>,
        test: Option<Arc<dyn Dataset>>,
    ) -> Self {
        Self([train, valid, test])
    }

    /// The dataset of a split; `None` if its share of the documents is empty.
    pub fn get(&self, split: Split) -> Option<&Arc<dyn Dataset>> {
        self.0[split as usize].as_ref()
    }
}

/// Packed datasets for each split over one or more sources, each with its weight in the mixture.
///
/// Each source is divided by documents on its own. Without any weight, sources count by their number of samples; a
/// source without data in a split takes no part in it.
///
/// # Errors
/// If only some sources have a weight, a weight is not positive, there are no sources, or one holds a single token in a
/// split.
pub fn gpt_splits(
    sources: &[(Option<f64>, Arc<dyn TokenSource>)],
    weights: &SplitWeights,
    options: &GptOptions,
) -> Result<Splits> {
    if sources.is_empty() {
        let reason = "name at least one dataset".into();
        return Err(DataError::BadOption {
            option: "data",
            value: "no sources".into(),
            reason,
        });
    }
    let mut splits = [None, None, None];
    for split in Split::ALL {
        let mut parts: Vec<(Option<f64>, Arc<dyn Dataset>)> = Vec::new();
        for (weight, source) in sources {
            let documents = weights.documents(split, source.documents());
            if !documents.is_empty() {
                parts.push((
                    *weight,
                    Arc::new(GptDataset::new(source.clone(), documents, options.clone())?),
                ));
            }
        }
        splits[split as usize] = match parts.len() {
            0 => None,
            1 => parts.pop().map(|(_, dataset)| dataset),
            _ => Some(Arc::new(BlendedDataset::new(parts)?) as Arc<dyn Dataset>),
        };
    }
    Ok(Splits(splits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, documents: u64, expected: [Range<u64>; 3]) {
        let weights: SplitWeights = text.parse().unwrap();
        assert_eq!(
            Split::ALL.map(|split| weights.documents(split, documents)),
            expected
        );
    }

    #[test]
    fn shares_divide_the_documents_without_gap_or_overlap() {
        check("969,30,1", 1000, [0..969, 969..999, 999..1000]);
        check("969,30,1", 10, [0..10, 10..10, 10..10]);
        check("8,1,1", 10, [0..8, 8..9, 9..10]);
        check("99, 1", 150, [0..148, 148..150, 150..150]);
        check("1", 7, [0..7, 7..7, 7..7]);
        check("0,1,0", 7, [0..0, 0..7, 7..7]);
        check("50/50/0", 5, [0..2, 2..5, 5..5]); // 2.5 rounds to even
    }

    #[test]
    fn impossible_shares_are_errors() {
        for text in ["", "a", "1,-1", "0,0,0", "1,2,3,4", "nan", "inf"] {
            assert!(text.parse::<SplitWeights>().is_err(), "{text}");
        }
    }
}
