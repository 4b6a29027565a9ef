//! Fresh weights that depend on the seed and the weight's name alone.

use std::ops::Range;

use bridge_ops::{Float, Ops, float_from_vec, random};
use serde::{Deserialize, Serialize};

use super::{ParamRole, WeightSource};
use crate::error::Result;
use bridge_core::DecoderConfig;

/// How fresh weights are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Init {
    /// Seed of everything.
    pub seed: u64,
    /// Standard deviation of matrices and embeddings; `None` takes the config's `initializer_range`.
    pub std: Option<f64>,
    /// Whether the matrices that end in the residual stream are drawn with `std / sqrt(2 * num_hidden_layers)`, so that
    /// the stream's variance does not grow with depth. Megatron-LM's rule; Hugging Face classes do not have it.
    pub scale_output_projections: bool,
}

impl Default for Init {
    fn default() -> Self {
        Self {
            seed: 0,
            std: None,
            scale_output_projections: true,
        }
    }
}

/// A [`WeightSource`] of fresh weights: normal matrices, norms that scale by 1, biases 0.
///
/// Element `i` of a weight is a function of the seed, the weight's canonical name and `i`. So a model does not depend
/// on the order in which its weights are made, nor on how it is divided among ranks.
#[derive(Debug, Clone)]
pub struct RandomInit {
    seed: u64,
    std: f64,
    output_std: f64,
    /// What a norm's weight is so that it scales by 1.
    norm_scale: f32,
}

impl RandomInit {
    /// Fresh weights for the model that `config` describes.
    pub fn new(init: &Init, config: &DecoderConfig) -> Self {
        let std = init.std.unwrap_or(config.initializer_range);
        let depth = (2.0 * config.num_hidden_layers as f64).sqrt();
        Self {
            seed: init.seed,
            std,
            output_std: if init.scale_output_projections {
                std / depth
            } else {
                std
            },
            norm_scale: if config.norm.unit_offset { 0.0 } else { 1.0 },
        }
    }

    /// Elements `range` of the weight called `name` in row-major order, as a rank that holds a part of it needs them.
    pub fn elements(&self, name: &str, shape: &[usize], range: std::ops::Range<usize>) -> Vec<f32> {
        match ParamRole::of(name, shape) {
            ParamRole::NormScale => vec![self.norm_scale; range.len()],
            ParamRole::GatedNormScale | ParamRole::Skip => vec![1.0; range.len()],
            ParamRole::Bias => vec![0.0; range.len()],
            // As mamba_ssm draws them: filters like a convolution's, rates of decay in 1..16, and biases for which the
            // steps lie between a thousandth and a tenth, uniform in their logarithm.
            ParamRole::Convolution => {
                let taps = shape.last().copied().unwrap_or(1).max(1);
                let bound = (taps as f64).sqrt().recip();
                self.uniform(name, range, |u| bound * (2.0 * u - 1.0))
            }
            ParamRole::DecayRate => self.uniform(name, range, |u| (1.0 + 15.0 * u).ln()),
            ParamRole::StepBias => self.uniform(name, range, |u| {
                let step = 0.001 * 100f64.powf(u);
                step + (-(-step).exp_m1()).ln()
            }),
            role @ (ParamRole::Embedding | ParamRole::Matrix | ParamRole::OutputProjection) => {
                let std = self.deviation(role).unwrap_or(self.std);
                random::normal(self.key(name), std, range)
            }
        }
    }

    /// Numbers in 0..1, mapped by `f`.
    fn uniform(
        &self,
        name: &str,
        range: std::ops::Range<usize>,
        f: impl Fn(f64) -> f64,
    ) -> Vec<f32> {
        let key = self.key(name);
        range
            .map(|index| f(random::uniform(key, index as u64)) as f32)
            .collect()
    }

    /// The standard deviation of the weight called `name`, if it is normal.
    fn deviation(&self, role: ParamRole) -> Option<f64> {
        match role {
            ParamRole::Embedding | ParamRole::Matrix => Some(self.std),
            ParamRole::OutputProjection => Some(self.output_std),
            _ => None,
        }
    }

    fn key(&self, name: &str) -> u64 {
        // FNV-1a, then mixed with the seed. Names are few and short; what matters is that the function never changes.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        random::mix(hash ^ random::mix(self.seed))
    }
}

impl<B: Ops> WeightSource<B> for RandomInit {
    fn weight(&mut self, name: &str, shape: &[usize], device: &B::Device) -> Result<Float<B>> {
        let whole: Vec<Range<usize>> = shape.iter().map(|extent| 0..*extent).collect();
        WeightSource::<B>::slice(self, name, shape, &whole, device)
    }

    fn slice(
        &mut self,
        name: &str,
        shape: &[usize],
        ranges: &[Range<usize>],
        device: &B::Device,
    ) -> Result<Float<B>> {
        if let Some(std) = self.deviation(ParamRole::of(name, shape)) {
            // Where the device can draw them, nothing is sent to it.
            return Ok(B::normal_region(self.key(name), std, shape, ranges, device));
        }
        let held: Vec<usize> = ranges.iter().map(Range::len).collect();
        let values = (random::runs(shape, ranges).into_iter())
            .flat_map(|run| self.elements(name, shape, run))
            .collect();
        Ok(float_from_vec::<B>(values, &held, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::llama::presets;

    fn init(seed: u64) -> RandomInit {
        RandomInit::new(
            &Init {
                seed,
                ..Init::default()
            },
            &presets::tiny(),
        )
    }

    #[test]
    fn any_part_of_a_weight_equals_that_part_of_the_whole() {
        let (name, shape) = ("layers.0.mlp.up_proj.weight", [80, 48]);
        let whole = init(7).elements(name, &shape, 0..80 * 48);
        for range in [0..1, 1..2, 3..1000, 17..18, 1000..3840, 3839..3840, 5..5] {
            assert_eq!(init(7).elements(name, &shape, range.clone()), whole[range]);
        }
    }

    #[test]
    fn weights_depend_on_seed_and_name() {
        let draw = |seed, name: &str| init(seed).elements(name, &[9, 11], 0..99);
        let base = draw(0, "layers.0.mlp.up_proj.weight");
        assert_eq!(base, draw(0, "layers.0.mlp.up_proj.weight"));
        assert_ne!(base, draw(1, "layers.0.mlp.up_proj.weight"));
        assert_ne!(base, draw(0, "layers.1.mlp.up_proj.weight"));
    }

    #[test]
    fn matrices_are_normal_with_the_asked_deviation() {
        let config = presets::tiny();
        let expected = |name: &str| {
            let output = ParamRole::of(name, &[2, 2]) == ParamRole::OutputProjection;
            config.initializer_range
                / if output {
                    (2.0 * config.num_hidden_layers as f64).sqrt()
                } else {
                    1.0
                }
        };
        for name in [
            "embedding.weight",
            "layers.0.attention.o_proj.weight",
            "layers.2.mlp.gate_proj.weight",
        ] {
            let values = init(3).elements(name, &[400, 500], 0..200_000);
            let n = values.len() as f64;
            let moment = |power: i32| {
                values
                    .iter()
                    .map(|v| f64::from(*v).powi(power))
                    .sum::<f64>()
                    / n
            };
            let std = moment(2).sqrt();
            // Five standard errors of each estimate.
            assert!(
                moment(1).abs() < 5.0 * std / n.sqrt(),
                "{name}: mean {}",
                moment(1)
            );
            assert!(
                (std / expected(name) - 1.0).abs() < 5.0 / (2.0 * n).sqrt(),
                "{name}: deviation {std}"
            );
            let kurtosis = moment(4) / moment(2).powi(2);
            assert!(
                (kurtosis - 3.0).abs() < 5.0 * (24.0 / n).sqrt(),
                "{name}: kurtosis {kurtosis}"
            );
        }
    }

    #[test]
    fn norms_scale_by_one_and_biases_are_zero() {
        assert_eq!(init(0).elements("final_norm.weight", &[3], 0..3), [1.0; 3]);
        assert_eq!(
            init(0).elements("layers.0.mlp.up_proj.bias", &[3], 0..3),
            [0.0; 3]
        );
        let mut config = presets::tiny();
        config.norm.unit_offset = true;
        let zero_centred = RandomInit::new(&Init::default(), &config);
        assert_eq!(
            zero_centred.elements("final_norm.weight", &[3], 0..3),
            [0.0; 3]
        );
    }

    #[test]
    fn the_sequence_is_pinned() {
        // Checkpoints made from a seed must stay reproducible over versions.
        let values = init(42).elements("embedding.weight", &[4, 4], 0..4);
        let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
        assert_eq!(
            bits,
            [3_164_525_418, 3_148_450_783, 1_000_773_640, 3_172_952_508]
        );
    }
}
