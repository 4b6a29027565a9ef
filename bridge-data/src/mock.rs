//! Synthetic data.

use crate::batch::Sample;
use crate::dataset::{Dataset, Fingerprint};
use crate::error::{DataError, Result};
use crate::shuffle::{Purpose, derive_key, mix};

/// How often each of a token's four successors follows it, in 256ths.
const SUCCESSOR_WEIGHTS: [u64; 4] = [180, 40, 24, 12];

/// Different tokens used at most, however large the vocabulary, so that a short run can learn them all.
const MAX_STATES: u64 = 128;

/// Samples of a random but learnable language, for benchmarks and tests without data.
///
/// A Markov chain over up to 128 tokens spread over the vocabulary: each has four successors (drawn from the seed; some
/// may coincide) that follow it with probabilities 180, 40, 24 and 12 in 256. A model that has learnt it reaches a loss of at
/// most [`ENTROPY`](Self::ENTROPY).
#[derive(Clone, Debug)]
pub struct MockGptDataset {
    seq_length: usize,
    vocab_size: u64,
    seed: u64,
}

impl MockGptDataset {
    /// The least loss per token that can be reached if all successors differ, in nats: -sum p ln p.
    pub const ENTROPY: f64 = 0.903_07;

    /// Samples of `seq_length` tokens below `vocab_size`.
    ///
    /// # Errors
    /// If a size is 0.
    pub fn new(seq_length: usize, vocab_size: usize, seed: u64) -> Result<Self> {
        for (option, value) in [("seq_length", seq_length), ("vocab_size", vocab_size)] {
            if value == 0 {
                return Err(DataError::BadOption {
                    option,
                    value: "0".into(),
                    reason: "it must be at least 1".into(),
                });
            }
        }
        Ok(Self {
            seq_length,
            vocab_size: vocab_size as u64,
            seed,
        })
    }
}

impl Dataset for MockGptDataset {
    fn seq_length(&self) -> usize {
        self.seq_length
    }

    /// Every sample is new; the number only paces what counts epochs.
    fn samples_per_epoch(&self) -> u64 {
        1 << 20
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        let states = self.vocab_size.min(MAX_STATES);
        let spread = self.vocab_size / states;
        let rules = derive_key(self.seed, Purpose::Mock, u64::MAX);
        let mut random = derive_key(self.seed, Purpose::Mock, index);
        let mut state = mix(random) % states;
        let window: Vec<i64> = (0..=self.seq_length)
            .map(|_| {
                let token = state * spread;
                random = mix(random);
                let mut draw = random & 0xff;
                let mut choice = 0;
                while draw >= SUCCESSOR_WEIGHTS[choice] {
                    draw -= SUCCESSOR_WEIGHTS[choice];
                    choice += 1;
                }
                state = mix(rules ^ (state << 2 | choice as u64)) % states;
                token as i64
            })
            .collect();
        Ok(Sample {
            tokens: window[..self.seq_length].to_vec(),
            labels: window[1..].to_vec(),
            position_ids: (0..self.seq_length as i64).collect(),
            boundaries: vec![0, self.seq_length],
        })
    }

    fn describe(&self) -> String {
        format!(
            "synthetic tokens below {}, samples of {}",
            self.vocab_size, self.seq_length
        )
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("mock")
            .number(self.seq_length as u64)
            .number(self.vocab_size)
            .number(self.seed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn samples_are_a_function_of_seed_and_index() {
        let data = MockGptDataset::new(32, 1000, 7).unwrap();
        assert_eq!(data.sample(3).unwrap(), data.sample(3).unwrap());
        assert_ne!(data.sample(3).unwrap(), data.sample(4).unwrap());
        assert_ne!(
            data.sample(3).unwrap(),
            MockGptDataset::new(32, 1000, 8).unwrap().sample(3).unwrap()
        );
        for vocab_size in [1, 2, 131, 128_256] {
            let sample = MockGptDataset::new(50, vocab_size, 7)
                .unwrap()
                .sample(0)
                .unwrap();
            assert!(
                sample
                    .tokens
                    .iter()
                    .chain(&sample.labels)
                    .all(|&id| (0..vocab_size as i64).contains(&id))
            );
            assert_eq!(sample.tokens[1..], sample.labels[..49]);
        }
    }

    /// Bigram statistics of many samples give the stated entropy.
    #[test]
    fn the_next_token_is_as_predictable_as_stated() {
        let exact: f64 = SUCCESSOR_WEIGHTS
            .iter()
            .map(|&w| w as f64 / 256.0)
            .map(|p| -p * p.ln())
            .sum();
        assert!((exact - MockGptDataset::ENTROPY).abs() < 1e-4, "{exact}");
        let data = MockGptDataset::new(1000, 5000, 1).unwrap();
        let (mut pairs, mut singles) = (HashMap::new(), HashMap::new());
        for index in 0..200 {
            let sample = data.sample(index).unwrap();
            for (&a, &b) in sample.tokens.iter().zip(&sample.labels) {
                *pairs.entry((a, b)).or_insert(0u32) += 1;
                *singles.entry(a).or_insert(0u32) += 1;
            }
        }
        let total: u32 = pairs.values().sum();
        let entropy: f64 = pairs
            .iter()
            .map(|((a, _), &n)| {
                -f64::from(n) / f64::from(total) * (f64::from(n) / f64::from(singles[a])).ln()
            })
            .sum();
        assert!(
            (0.8..=MockGptDataset::ENTROPY + 0.01).contains(&entropy),
            "{entropy}"
        );
    }
}
