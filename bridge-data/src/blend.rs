//! Mixing datasets by weight.

use std::sync::{Arc, Mutex, PoisonError};

use crate::batch::Sample;
use crate::dataset::{Dataset, Fingerprint};
use crate::error::{DataError, Result};

/// A mixture as Megatron-Core's command line writes it: paths, or weights and paths in turn (`0.3 books 0.7 web`).
#[derive(Clone, Debug, PartialEq)]
pub struct BlendSpec {
    /// Each dataset with its weight, or all without.
    pub entries: Vec<(Option<f64>, String)>,
}

impl BlendSpec {
    /// Reads a list of words. An even number of words of which every other is a number, beginning with the first, is weights and
    /// paths; anything else is paths alone.
    ///
    /// # Errors
    /// If there are no words, or a weight is not above 0.
    pub fn parse<S: AsRef<str>>(words: &[S]) -> Result<Self> {
        let bad = |value: &str, reason: &str| DataError::BadOption {
            option: "blend",
            value: value.into(),
            reason: reason.into(),
        };
        let words = words
            .iter()
            .flat_map(|word| word.as_ref().split_whitespace())
            .collect::<Vec<_>>();
        if words.is_empty() {
            return Err(bad(
                "",
                "name at least one dataset, or weights and datasets in turn, as in `0.3 books 0.7 web`",
            ));
        }
        let weighted = words.len().is_multiple_of(2)
            && words
                .iter()
                .step_by(2)
                .all(|word| word.parse::<f64>().is_ok());
        if !weighted {
            return Ok(Self {
                entries: words
                    .into_iter()
                    .map(|path| (None, path.to_owned()))
                    .collect(),
            });
        }
        let pairs = words
            .chunks_exact(2)
            .map(|pair| match pair[0].parse::<f64>() {
                Ok(weight) if weight > 0.0 && weight.is_finite() => {
                    Ok((Some(weight), pair[1].to_owned()))
                }
                _ => Err(bad(pair[0], "a weight must be above 0")),
            });
        Ok(Self {
            entries: pairs.collect::<Result<_>>()?,
        })
    }
}

/// Several datasets mixed so that at every moment each has had its share.
///
/// Sample `i` comes from the dataset that lags most behind its share, `weight * max(i, 1) - count`, the first of equals: the
/// rule of Megatron-Core. A dataset that runs out before the others begins its next epoch.
///
/// The rule needs the counts before `i`. They are kept for every 4096th sample and run forward from there, so any sample
/// can be found without a table of all.
pub struct BlendedDataset {
    parts: Vec<Arc<dyn Dataset>>,
    /// Sum to 1.
    weights: Vec<f64>,
    state: Mutex<State>,
}

/// Samples between two stored rows of counts.
const INTERVAL: u64 = 4096;

struct State {
    /// Counts before sample `INTERVAL * k`: row k, `parts.len()` numbers each.
    rows: Vec<u64>,
    /// Where the last look-up ended, since samples are mostly asked for in order.
    next: u64,
    counts: Vec<u64>,
}

impl BlendedDataset {
    /// Mixes datasets of one sequence length. Without weights, each counts by its number of samples.
    ///
    /// # Errors
    /// If there are no datasets, lengths differ, only some have weights, or a weight is not above 0.
    pub fn new(parts: Vec<(Option<f64>, Arc<dyn Dataset>)>) -> Result<Self> {
        let bad = |value: String, reason: &str| {
            Err(DataError::BadOption {
                option: "blend",
                value,
                reason: reason.into(),
            })
        };
        let Some((_, first)) = parts.first() else {
            return bad("nothing".into(), "name at least one dataset");
        };
        let seq_length = first.seq_length();
        if let Some((_, other)) = parts
            .iter()
            .find(|(_, part)| part.seq_length() != seq_length)
        {
            return bad(
                format!("{seq_length} and {} tokens", other.seq_length()),
                "samples of a mixture have one length",
            );
        }
        let given = parts.iter().filter(|(weight, _)| weight.is_some()).count();
        if given != 0 && given != parts.len() {
            return bad(
                format!("{given} weights for {} datasets", parts.len()),
                "give every dataset a weight, or none",
            );
        }
        let mut weights = Vec::with_capacity(parts.len());
        for (weight, part) in &parts {
            match weight {
                Some(weight) if *weight > 0.0 && weight.is_finite() => weights.push(*weight),
                Some(weight) => return bad(weight.to_string(), "a weight must be above 0"),
                None => weights.push(part.samples_per_epoch() as f64),
            }
        }
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
        let zeros = vec![0; parts.len()];
        let state = Mutex::new(State {
            rows: zeros.clone(),
            next: 0,
            counts: zeros,
        });
        Ok(Self {
            parts: parts.into_iter().map(|(_, part)| part).collect(),
            weights,
            state,
        })
    }

    /// Which dataset sample `index` comes from, and its index there.
    pub fn locate(&self, index: u64) -> (usize, u64) {
        // A panic elsewhere cannot leave the counts between two samples: they are changed last.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let width = self.parts.len();
        let stored = state.rows.len() as u64 / width as u64;
        let row = (index / INTERVAL).min(stored - 1);
        if state.next > index || state.next < row * INTERVAL {
            let counts = state.rows[row as usize * width..][..width].to_vec();
            state.next = row * INTERVAL;
            state.counts = counts;
        }
        loop {
            let at = state.next;
            let part = self.choose(at, &state.counts);
            let place = state.counts[part];
            state.counts[part] += 1;
            state.next = at + 1;
            if state.next.is_multiple_of(INTERVAL)
                && state.rows.len() as u64 == state.next / INTERVAL * width as u64
            {
                let counts = state.counts.clone();
                state.rows.extend(counts);
            }
            if at == index {
                return (part, place);
            }
        }
    }

    fn choose(&self, index: u64, counts: &[u64]) -> usize {
        let total = index.max(1) as f64;
        let mut best = (0, f64::NEG_INFINITY);
        for (part, (weight, &count)) in self.weights.iter().zip(counts).enumerate() {
            let lag = weight * total - count as f64;
            if lag > best.1 {
                best = (part, lag);
            }
        }
        best.0
    }
}

impl Dataset for BlendedDataset {
    fn seq_length(&self) -> usize {
        self.parts[0].seq_length()
    }

    /// The sum over the datasets, whatever their weights.
    fn samples_per_epoch(&self) -> u64 {
        self.parts.iter().map(|part| part.samples_per_epoch()).sum()
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let (part, place) = self.locate(index);
        self.parts[part].sample(place)
    }

    fn describe(&self) -> String {
        let parts = self.parts.iter().zip(&self.weights);
        parts
            .map(|(part, weight)| format!("{:.1} % {}", weight * 100.0, part.describe()))
            .collect::<Vec<_>>()
            .join("; ")
    }

    fn fingerprint(&self) -> Fingerprint {
        let parts = self.parts.iter().zip(&self.weights);
        parts.fold(Fingerprint::new("blend"), |sum, (part, weight)| {
            sum.number(part.fingerprint().0).number(weight.to_bits())
        })
    }
}

#[cfg(test)]
mod tests;
