//! Rotary position embeddings: the inverse frequencies of each scaling rule.
//!
//! The arithmetic follows `modeling_rope_utils.py` of Hugging Face transformers step by step in single precision, since
//! a frequency that is off by one part in a million turns into a visible phase error after a hundred thousand tokens.

use serde::{Deserialize, Serialize};

use crate::error::Problems;

/// A rotary embedding: its base and how its frequencies are stretched for longer contexts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths (`rope_theta`).
    pub theta: f64,
    /// Stretching of the frequencies.
    #[serde(default)]
    pub scaling: RopeScaling,
}

/// How the frequencies of a rotary embedding are stretched. Lengths are in tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    #[default]
    Default,
    /// Every frequency divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// The base grows with the sequence once it passes `max_position_embeddings` ("dynamic NTK").
    Dynamic {
        /// Stretch of the context.
        factor: f64,
        /// Length up to which nothing changes.
        max_position_embeddings: usize,
    },
    /// High frequencies kept, low ones divided by `factor`, a ramp between (YaRN, arXiv 2309.00071).
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Context length before the stretch.
        original_max_position_embeddings: usize,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over the original context below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Numerator's weight in the attention factor, where `mscale_all_dim` is set as well.
        #[serde(default)]
        mscale: Option<f64>,
        /// Denominator's weight in the attention factor, where `mscale` is set as well.
        #[serde(default)]
        mscale_all_dim: Option<f64>,
        /// Overrides the attention factor that the other fields lead to.
        #[serde(default)]
        attention_factor: Option<f64>,
        /// Whether the ramp's ends are rounded outwards to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1's rule: long wavelengths divided by `factor`, short ones kept, a smooth step between.
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided by `factor`.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the stretch.
        original_max_position_embeddings: usize,
    },
}

/// What a rotary table is computed from: `angle[position, i] = position * inv_freq[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Inverse frequencies in radians per token: `[rotary_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Factor on both cosine and sine (YaRN's temperature); 1 for the other rules.
    pub attention_factor: f64,
}

impl RopeScaling {
    /// Names of the rules in a `config.json` (`rope_type`).
    pub const NAMES: [&'static str; 5] = ["default", "linear", "dynamic", "yarn", "llama3"];

    /// The rule's name in a `config.json` (`rope_type`).
    pub fn name(&self) -> &'static str {
        match self {
            RopeScaling::Default => "default",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Dynamic { .. } => "dynamic",
            RopeScaling::Yarn { .. } => "yarn",
            RopeScaling::Llama3 { .. } => "llama3",
        }
    }
}

impl RopeConfig {
    /// An unscaled rotary embedding.
    pub fn new(theta: f64) -> Self {
        Self {
            theta,
            scaling: RopeScaling::Default,
        }
    }

    /// Whether the frequencies depend on the length of the sequence, so that a table must be renewed as it grows.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }

    /// Inverse frequencies for heads of which `rotary_dim` elements are rotated, for a sequence of `seq_len` tokens.
    ///
    /// Only `Dynamic` looks at `seq_len`. `rotary_dim` is taken as even.
    /// Source: `ROPE_INIT_FUNCTIONS` in transformers' `modeling_rope_utils.py`.
    pub fn frequencies(&self, rotary_dim: usize, seq_len: usize) -> Frequencies {
        let plain = |theta: f64| {
            wavelengths(theta, rotary_dim)
                .map(|p| 1.0 / p)
                .collect::<Vec<f32>>()
        };
        let unscaled = |inv_freq| Frequencies {
            inv_freq,
            attention_factor: 1.0,
        };
        match &self.scaling {
            RopeScaling::Default => unscaled(plain(self.theta)),
            RopeScaling::Linear { factor } => unscaled(
                plain(self.theta)
                    .into_iter()
                    .map(|f| f / *factor as f32)
                    .collect(),
            ),
            RopeScaling::Dynamic {
                factor,
                max_position_embeddings,
            } => {
                let trained = *max_position_embeddings as f64;
                let length = (seq_len as f64).max(trained);
                let dim = rotary_dim as f64;
                let growth = (factor * length / trained - (factor - 1.0)).powf(dim / (dim - 2.0));
                unscaled(plain(self.theta * growth))
            }
            RopeScaling::Llama3 { .. } => unscaled(self.llama3(plain(self.theta))),
            RopeScaling::Yarn { .. } => self.yarn(rotary_dim),
        }
    }

    fn llama3(&self, mut inv_freq: Vec<f32>) -> Vec<f32> {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } = self.scaling
        else {
            return inv_freq;
        };
        let original = original_max_position_embeddings as f64;
        let (long, short) = (
            (original / low_freq_factor) as f32,
            (original / high_freq_factor) as f32,
        );
        let (factor, original, low) = (factor as f32, original as f32, low_freq_factor as f32);
        let width = (high_freq_factor - low_freq_factor) as f32;
        for frequency in &mut inv_freq {
            let wavelength = std::f64::consts::TAU as f32 / *frequency;
            if wavelength > long {
                *frequency /= factor;
            } else if wavelength >= short {
                let smooth = (original / wavelength - low) / width;
                *frequency = (1.0 - smooth) * *frequency / factor + smooth * *frequency;
            }
        }
        inv_freq
    }

    fn yarn(&self, rotary_dim: usize) -> Frequencies {
        let RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            attention_factor,
            truncate,
        } = self.scaling
        else {
            return Frequencies {
                inv_freq: Vec::new(),
                attention_factor: 1.0,
            };
        };
        let dim = rotary_dim as f64;
        let original = original_max_position_embeddings as f64;
        // The (fractional) index of the frequency that makes `rotations` turns over the original context.
        let index_of = |rotations: f64| {
            dim * (original / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (index_of(beta_fast), index_of(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let mut high = high.min(dim - 1.0);
        if low == high {
            high += 0.001; // a ramp of no width would divide by zero
        }
        let inv_freq = wavelengths(self.theta, rotary_dim)
            .enumerate()
            .map(|(index, wavelength)| {
                let ramp = ((index as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let kept = 1.0 - ramp;
                let (interpolated, extrapolated) =
                    (1.0 / (factor as f32 * wavelength), 1.0 / wavelength);
                interpolated * (1.0 - kept) + extrapolated * kept
            })
            .collect();
        Frequencies {
            inv_freq,
            attention_factor: attention_factor.unwrap_or_else(|| {
                match (
                    mscale.filter(|m| *m != 0.0),
                    mscale_all_dim.filter(|m| *m != 0.0),
                ) {
                    (Some(mscale), Some(all_dim)) => {
                        RopeConfig::yarn_mscale(factor, mscale)
                            / RopeConfig::yarn_mscale(factor, all_dim)
                    }
                    _ => RopeConfig::yarn_mscale(factor, 1.0),
                }
            }),
        }
    }

    /// YaRN's temperature `0.1 * mscale * ln(factor) + 1`, or 1 where nothing is stretched.
    pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * mscale * factor.ln() + 1.0
        }
    }

    /// What is wrong with the numbers.
    pub(crate) fn problems(&self) -> Problems {
        let mut problems = Problems::new();
        if !(self.theta.is_finite() && self.theta > 1.0) {
            problems.push(format!(
                "rope_theta is {}, expected a finite number above 1",
                self.theta
            ));
        }
        let mut positive = |name: &str, value: f64| {
            if !(value.is_finite() && value > 0.0) {
                problems.push(format!(
                    "{name} is {value}, expected a finite number above 0"
                ));
            }
        };
        match &self.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => positive("factor", *factor),
            RopeScaling::Dynamic {
                factor,
                max_position_embeddings,
            } => {
                positive("factor", *factor);
                positive("max_position_embeddings", *max_position_embeddings as f64);
            }
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                attention_factor,
                truncate: _,
            } => {
                positive("factor", *factor);
                positive(
                    "original_max_position_embeddings",
                    *original_max_position_embeddings as f64,
                );
                positive("beta_fast", *beta_fast);
                positive("beta_slow", *beta_slow);
                for (name, value) in [
                    ("mscale", mscale),
                    ("mscale_all_dim", mscale_all_dim),
                    ("attention_factor", attention_factor),
                ] {
                    // Zero means "not given" for the two mscales, as in transformers.
                    if let Some(value) =
                        value.filter(|value| *value != 0.0 || name == "attention_factor")
                    {
                        positive(name, value);
                    }
                }
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                positive("factor", *factor);
                positive("low_freq_factor", *low_freq_factor);
                positive("high_freq_factor", *high_freq_factor);
                positive(
                    "original_max_position_embeddings",
                    *original_max_position_embeddings as f64,
                );
                if high_freq_factor <= low_freq_factor {
                    problems.push(format!(
                        "high_freq_factor is {high_freq_factor}, expected more than low_freq_factor={low_freq_factor}"
                    ));
                }
            }
        }
        problems
    }
}

/// `theta^(2i / dim)` for `i` in `0..dim/2`, rounded to single precision where torch rounds: the exponent, the base
/// and the power.
fn wavelengths(theta: f64, dim: usize) -> impl Iterator<Item = f32> {
    let base = f64::from(theta as f32);
    (0..dim).step_by(2).map(move |i| {
        let exponent = i as f32 / dim as f32;
        base.powf(f64::from(exponent)) as f32
    })
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
