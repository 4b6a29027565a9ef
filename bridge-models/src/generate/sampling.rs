//! Choosing a token from logits.

use crate::error::{Error, Result};

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Sampling {
    /// The likeliest one; of several, the one with the lowest id.
    #[default]
    Greedy,
    /// At random by the model's probabilities.
    Random {
        /// Divides the logits; above 0. Below 1 sharpens the distribution, above 1 flattens it.
        temperature: f64,
        /// Only the so many likeliest tokens are drawn from.
        top_k: Option<usize>,
        /// Only the likeliest tokens that together reach this probability are drawn from; in (0, 1].
        top_p: Option<f64>,
        /// Seed of the draws.
        seed: u64,
    },
}

/// Chooses tokens one after another.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    /// State of SplitMix64 (Steele, Lea and Flood 2014).
    state: u64,
}

impl Sampler {
    /// A sampler at the start of its sequence.
    ///
    /// # Errors
    /// [`Error::SamplingOption`] if an option is out of range.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let mut state = 0;
        if let Sampling::Random {
            temperature,
            top_k,
            top_p,
            seed,
        } = sampling
        {
            let check = |name, good: bool, value: String, expected| {
                if good {
                    Ok(())
                } else {
                    Err(Error::SamplingOption {
                        name,
                        value,
                        expected,
                    })
                }
            };
            let finite = temperature.is_finite() && temperature > 0.0;
            check(
                "temperature",
                finite,
                temperature.to_string(),
                "a number above 0 (greedy decoding needs none)",
            )?;
            let top_k = top_k.unwrap_or(1);
            check(
                "top-k",
                top_k > 0,
                top_k.to_string(),
                "a whole number above 0",
            )?;
            let top_p = top_p.unwrap_or(1.0);
            check(
                "top-p",
                top_p > 0.0 && top_p <= 1.0,
                top_p.to_string(),
                "a number above 0 and at most 1",
            )?;
            state = seed;
        }
        Ok(Self { sampling, state })
    }

    /// A token id for `logits`: `[vocab]`.
    ///
    /// # Errors
    /// The first logit that is NaN or positive infinity.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, f32> {
        if let Some(bad) = logits
            .iter()
            .find(|logit| logit.is_nan() || **logit == f32::INFINITY)
        {
            return Err(*bad);
        }
        Ok(match self.sampling {
            Sampling::Greedy => likeliest(logits),
            Sampling::Random {
                temperature,
                top_k,
                top_p,
                ..
            } => {
                let candidates = candidates(logits, temperature, top_k, top_p);
                self.draw(&candidates)
            }
        })
    }

    /// One of the candidates, by weight.
    fn draw(&mut self, candidates: &[(u32, f64)]) -> u32 {
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut rest = self.uniform() * total;
        for (token, weight) in candidates {
            rest -= weight;
            if rest < 0.0 {
                return *token;
            }
        }
        // Rounding may leave a sliver past the last one.
        candidates.last().map_or(0, |(token, _)| *token)
    }

    /// The next number in [0, 1).
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (index, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = index;
        }
    }
    best as u32
}

/// The tokens to draw from with their weights, likeliest first where there is an order: first the temperature, then
/// top-k, then top-p on what is left.
fn candidates(
    logits: &[f32],
    temperature: f64,
    top_k: Option<usize>,
    top_p: Option<f64>,
) -> Vec<(u32, f64)> {
    let highest = f64::from(logits[likeliest(logits) as usize]);
    let weigh = |(token, logit): (usize, &f32)| {
        (
            token as u32,
            ((f64::from(*logit) - highest) / temperature).exp(),
        )
    };
    let mut weights: Vec<(u32, f64)> = logits.iter().enumerate().map(weigh).collect();
    if top_k.is_none_or(|k| k >= weights.len()) && top_p.is_none_or(|p| p >= 1.0) {
        return weights;
    }
    // Ties go to the lower id, so that a result does not depend on how the sort moves equals.
    let order = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if let Some(k) = top_k
        && k < weights.len()
    {
        weights.select_nth_unstable_by(k - 1, order);
        weights.truncate(k);
    }
    weights.sort_unstable_by(order);
    if let Some(p) = top_p {
        let target = p * weights.iter().map(|(_, weight)| weight).sum::<f64>();
        let mut reached = 0.0;
        let kept = weights.iter().take_while(|(_, weight)| {
            let needed = reached < target;
            reached += weight;
            needed
        });
        let kept = kept.count().max(1);
        weights.truncate(kept);
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(temperature: f64, top_k: Option<usize>, top_p: Option<f64>, seed: u64) -> Sampling {
        Sampling::Random {
            temperature,
            top_k,
            top_p,
            seed,
        }
    }

    /// Logits whose probabilities at temperature 1 are as given.
    fn logits(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() as f32 + 3.0).collect()
    }

    #[track_caller]
    fn check_frequencies(sampling: Sampling, probabilities: &[f64], expected: &[f64]) {
        const DRAWS: usize = 20_000;
        let logits = logits(probabilities);
        let mut sampler = Sampler::new(sampling).unwrap();
        let mut counts = vec![0usize; expected.len()];
        for _ in 0..DRAWS {
            counts[sampler.choose(&logits).unwrap() as usize] += 1;
        }
        for (token, (count, expected)) in counts.iter().zip(expected).enumerate() {
            let found = *count as f64 / DRAWS as f64;
            // Five standard errors; a token that must not come, must not come once.
            let allowed = 5.0 * (expected * (1.0 - expected) / DRAWS as f64).sqrt();
            assert!(
                (found - expected).abs() <= allowed,
                "{sampling:?}: token {token} came {found}, not {expected}"
            );
        }
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let p = [0.1, 0.4, 0.2, 0.3];
        check_frequencies(random(1.0, None, None, 1), &p, &p);
        let squares: Vec<f64> = p.iter().map(|p| p * p / 0.3).collect();
        check_frequencies(random(0.5, None, None, 2), &p, &squares);
        check_frequencies(
            random(1.0, Some(2), None, 3),
            &p,
            &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        );
        check_frequencies(random(1.0, Some(9), None, 3), &p, &p);
        // 0.4 alone does not reach 0.6; with 0.3 it does.
        check_frequencies(
            random(1.0, None, Some(0.6), 4),
            &p,
            &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        );
        check_frequencies(random(1.0, None, Some(1e-9), 5), &p, &[0.0, 1.0, 0.0, 0.0]);
        // Top-p looks at what top-k has left: 0.4 of 0.9 is less than half, 0.7 of it is more.
        check_frequencies(
            random(1.0, Some(3), Some(0.5), 6),
            &p,
            &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0],
        );
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        let mut sampler = Sampler::new(Sampling::Greedy).unwrap();
        assert_eq!(sampler.choose(&[0.5, 2.0, -1.0, 2.0]), Ok(1));
        assert_eq!(sampler.choose(&[f32::NEG_INFINITY; 3]), Ok(0));
    }

    #[test]
    fn equal_seeds_draw_equal_tokens() {
        let logits = logits(&[0.25; 4]);
        let text = |seed| {
            let mut sampler = Sampler::new(random(1.0, None, Some(0.9), seed)).unwrap();
            (0..32)
                .map(|_| sampler.choose(&logits).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(text(5), text(5));
        assert_ne!(text(5), text(6));
    }

    #[test]
    fn damaged_logits_and_options_are_refused() {
        for sampling in [Sampling::Greedy, random(1.0, None, None, 0)] {
            let mut sampler = Sampler::new(sampling).unwrap();
            assert!(sampler.choose(&[0.0, f32::NAN]).unwrap_err().is_nan());
            assert_eq!(sampler.choose(&[f32::INFINITY, 0.0]), Err(f32::INFINITY));
        }
        for (sampling, name) in [
            (random(0.0, None, None, 0), "temperature"),
            (random(f64::NAN, None, None, 0), "temperature"),
            (random(1.0, Some(0), None, 0), "top-k"),
            (random(1.0, None, Some(0.0), 0), "top-p"),
            (random(1.0, None, Some(1.5), 0), "top-p"),
        ] {
            assert!(
                Sampler::new(sampling)
                    .unwrap_err()
                    .to_string()
                    .starts_with(name),
                "{sampling:?}"
            );
        }
    }
}
