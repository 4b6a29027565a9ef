//! Learning rate and weight decay as pure functions of the number of samples consumed.
//!
//! Counting samples rather than steps keeps a schedule meaningful when the batch size changes between runs. The
//! formulas, including the edges (the first step of a warm-up runs at `warmup_init`, the last sample of the decay runs
//! at `min_lr`), are those of Megatron-Core's `OptimizerParamScheduler`.

use std::f64::consts::PI;

use crate::config::choice;

choice! {
    /// How the learning rate falls after the warm-up.
    pub enum LrDecayStyle {
        /// Stays at the peak.
        Constant = "constant",
        /// Straight line from the peak to the minimum.
        Linear = "linear",
        /// Half a cosine from the peak to the minimum.
        Cosine = "cosine",
        /// Falls with the inverse square root of the samples seen, never below the minimum.
        InverseSquareRoot = "inverse-square-root",
        /// Warm-up, stable, decay: stays at the peak until the last `lr_wsd_decay_iters`, then falls.
        Wsd = "WSD",
    }
}

choice! {
    /// How the learning rate falls in the last phase of [`LrDecayStyle::Wsd`].
    pub enum WsdDecayStyle {
        /// `2 * 0.5^r - 1` for the fraction `r` of the phase.
        Exponential = "exponential",
        /// `1 - r`.
        Linear = "linear",
        /// Half a cosine.
        Cosine = "cosine",
        /// `1 - sqrt(r)`.
        MinusSqrt = "minus_sqrt",
    }
}

choice! {
    /// How weight decay moves from its start to its end value.
    pub enum WeightDecayIncrStyle {
        /// Does not move.
        Constant = "constant",
        /// Straight line.
        Linear = "linear",
        /// Half a cosine.
        Cosine = "cosine",
    }
}

/// The learning rate of a run.
///
/// ```
/// use bridge_train::lr_schedule::{LrDecayStyle, LrSchedule, WsdDecayStyle};
///
/// let schedule = LrSchedule {
///     max_lr: 3e-4,
///     min_lr: 3e-5,
///     warmup_init: 0.0,
///     warmup_samples: 100.0,
///     decay_samples: 1000,
///     style: LrDecayStyle::Cosine,
///     wsd_decay_samples: 0,
///     wsd_style: WsdDecayStyle::Exponential,
/// };
/// assert_eq!(schedule.lr(0), 0.0);
/// assert_eq!(schedule.lr(100), 3e-4);
/// assert_eq!(schedule.lr(1000), 3e-5);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LrSchedule {
    /// Peak learning rate, reached at the end of the warm-up.
    pub max_lr: f64,
    /// Learning rate at and after the end of the decay.
    pub min_lr: f64,
    /// Learning rate of the very first step when there is a warm-up.
    pub warmup_init: f64,
    /// Length of the linear warm-up, in samples; 0 disables it. May be fractional, since it can be given as a fraction
    /// of the decay.
    pub warmup_samples: f64,
    /// Samples from the start of training to the end of the decay (the warm-up is part of it).
    pub decay_samples: u64,
    /// Shape of the decay.
    pub style: LrDecayStyle,
    /// Length of the last phase of [`LrDecayStyle::Wsd`], in samples.
    pub wsd_decay_samples: u64,
    /// Shape of the last phase of [`LrDecayStyle::Wsd`].
    pub wsd_style: WsdDecayStyle,
}

impl LrSchedule {
    /// A learning rate that never changes.
    pub fn constant(lr: f64) -> Self {
        Self {
            max_lr: lr,
            min_lr: lr,
            warmup_init: lr,
            warmup_samples: 0.0,
            decay_samples: u64::MAX,
            style: LrDecayStyle::Constant,
            wsd_decay_samples: 0,
            wsd_style: WsdDecayStyle::Exponential,
        }
    }

    /// The learning rate of the step that starts after `samples` samples.
    pub fn lr(&self, samples: u64) -> f64 {
        let n = samples as f64;
        if self.warmup_samples > 0.0 && n <= self.warmup_samples {
            return self.warmup_init + (self.max_lr - self.warmup_init) * n / self.warmup_samples;
        }
        if self.style == LrDecayStyle::Constant {
            return self.max_lr;
        }
        if samples > self.decay_samples {
            return self.min_lr;
        }
        if self.style == LrDecayStyle::InverseSquareRoot {
            let lr = self.max_lr * self.warmup_samples.max(1.0).sqrt() / n.max(1.0).sqrt();
            return lr.max(self.min_lr);
        }
        let ratio = (n - self.warmup_samples) / (self.decay_samples as f64 - self.warmup_samples);
        let coefficient = match self.style {
            LrDecayStyle::Linear => 1.0 - ratio,
            LrDecayStyle::Cosine => half_cosine(ratio),
            LrDecayStyle::Wsd => self.wsd_coefficient(samples),
            LrDecayStyle::Constant | LrDecayStyle::InverseSquareRoot => {
                unreachable!("handled above")
            }
        };
        self.min_lr + coefficient * (self.max_lr - self.min_lr)
    }

    fn wsd_coefficient(&self, samples: u64) -> f64 {
        let start = self.decay_samples.saturating_sub(self.wsd_decay_samples);
        if samples <= start {
            return 1.0;
        }
        let ratio = (samples - start) as f64 / self.wsd_decay_samples as f64;
        match self.wsd_style {
            WsdDecayStyle::Exponential => 2.0 * 0.5f64.powf(ratio) - 1.0,
            WsdDecayStyle::Linear => 1.0 - ratio,
            WsdDecayStyle::Cosine => half_cosine(ratio),
            WsdDecayStyle::MinusSqrt => 1.0 - ratio.sqrt(),
        }
    }
}

/// The weight decay coefficient of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightDecaySchedule {
    /// Coefficient at the start.
    pub start: f64,
    /// Coefficient from `incr_samples` on.
    pub end: f64,
    /// Samples over which the coefficient moves from `start` to `end`.
    pub incr_samples: u64,
    /// Shape of the move.
    pub style: WeightDecayIncrStyle,
}

impl WeightDecaySchedule {
    /// A coefficient that never changes.
    pub fn constant(weight_decay: f64) -> Self {
        Self {
            start: weight_decay,
            end: weight_decay,
            incr_samples: 0,
            style: WeightDecayIncrStyle::Constant,
        }
    }

    /// The coefficient of the step that starts after `samples` samples.
    pub fn weight_decay(&self, samples: u64) -> f64 {
        if samples >= self.incr_samples {
            return self.end;
        }
        let ratio = samples as f64 / self.incr_samples as f64;
        let coefficient = match self.style {
            WeightDecayIncrStyle::Constant => 1.0,
            WeightDecayIncrStyle::Linear => ratio,
            WeightDecayIncrStyle::Cosine => half_cosine(1.0 - ratio),
        };
        self.start + coefficient * (self.end - self.start)
    }
}

/// Falls from 1 at `ratio = 0` to 0 at `ratio = 1`.
fn half_cosine(ratio: f64) -> f64 {
    0.5 * ((PI * ratio).cos() + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(style: LrDecayStyle) -> LrSchedule {
        LrSchedule {
            max_lr: 3e-4,
            min_lr: 3e-5,
            warmup_init: 1e-5,
            warmup_samples: 40.0,
            decay_samples: 320,
            style,
            wsd_decay_samples: 96,
            wsd_style: WsdDecayStyle::Exponential,
        }
    }

    #[track_caller]
    fn check(schedule: &LrSchedule, expected: &[(u64, f64)]) {
        for &(samples, lr) in expected {
            let got = schedule.lr(samples);
            assert!(
                (got - lr).abs() < 1e-15,
                "{:?} after {samples} samples: {got:e}, expected {lr:e}",
                schedule.style
            );
        }
    }

    // The expected values below come from running Megatron-Core 0.16.1's `OptimizerParamScheduler` with the same
    // settings in steps of 16 samples.

    #[test]
    fn warmup_and_constant_match_megatron() {
        check(
            &schedule(LrDecayStyle::Constant),
            &[
                (0, 1e-5),
                (16, 0.000126),
                (32, 0.000242),
                (48, 0.0003),
                (320, 0.0003),
                (368, 0.0003),
            ],
        );
    }

    #[test]
    fn linear_matches_megatron() {
        check(
            &schedule(LrDecayStyle::Linear),
            &[
                (48, 0.0002922857142857143),
                (80, 0.0002614285714285714),
                (160, 0.00018428571428571425),
                (224, 0.00012257142857142857),
                (304, 4.542857142857143e-05),
                (320, 3e-05),
                (336, 3e-05),
            ],
        );
    }

    #[test]
    fn cosine_matches_megatron() {
        check(
            &schedule(LrDecayStyle::Cosine),
            &[
                (48, 0.00029945652968935724),
                (80, 0.00028663079716682654),
                (160, 0.0001950403260841024),
                (272, 4.910941286374807e-05),
                (304, 3.2169505539184994e-05),
                (320, 3e-05),
                (368, 3e-05),
            ],
        );
    }

    #[test]
    fn inverse_square_root_matches_megatron() {
        check(
            &schedule(LrDecayStyle::InverseSquareRoot),
            &[
                (48, 0.00027386127875258305),
                (80, 0.00021213203435596425),
                (160, 0.00015),
                (304, 0.00010882143751650174),
                (320, 0.00010606601717798212),
                (336, 3e-05),
            ],
        );
    }

    #[test]
    fn wsd_matches_megatron_in_every_shape() {
        let with = |wsd_style| LrSchedule {
            wsd_style,
            ..schedule(LrDecayStyle::Wsd)
        };
        let flat = [
            (16, 0.000126),
            (48, 0.0003),
            (160, 0.0003),
            (224, 0.0003),
            (320, 3e-5),
            (336, 3e-5),
        ];
        for style in [
            WsdDecayStyle::Linear,
            WsdDecayStyle::Cosine,
            WsdDecayStyle::Exponential,
            WsdDecayStyle::MinusSqrt,
        ] {
            check(&with(style), &flat);
        }
        check(
            &with(WsdDecayStyle::Linear),
            &[(272, 0.000165), (304, 7.5e-05)],
        );
        check(
            &with(WsdDecayStyle::Cosine),
            &[(272, 0.000165), (304, 4.808657048910077e-05)],
        );
        check(
            &with(WsdDecayStyle::Exponential),
            &[(272, 0.00014183766184073566), (304, 6.306475304353071e-05)],
        );
        check(
            &with(WsdDecayStyle::MinusSqrt),
            &[(272, 0.00010908116907963214), (304, 5.352484912267523e-05)],
        );
    }

    #[test]
    fn without_warmup_the_first_step_runs_at_the_peak() {
        for style in [
            LrDecayStyle::Constant,
            LrDecayStyle::Linear,
            LrDecayStyle::Cosine,
            LrDecayStyle::Wsd,
        ] {
            assert_eq!(
                LrSchedule {
                    warmup_samples: 0.0,
                    ..schedule(style)
                }
                .lr(0),
                3e-4,
                "{style}"
            );
        }
    }

    #[test]
    fn weight_decay_matches_megatron() {
        let with = |style| WeightDecaySchedule {
            start: 0.01,
            end: 0.1,
            incr_samples: 320,
            style,
        };
        let check = |style, expected: &[(u64, f64)]| {
            for &(samples, value) in expected {
                let got = with(style).weight_decay(samples);
                assert!(
                    (got - value).abs() < 1e-15,
                    "{style} after {samples}: {got}, expected {value}"
                );
            }
        };
        check(
            WeightDecayIncrStyle::Linear,
            &[
                (0, 0.01),
                (16, 0.0145),
                (160, 0.055),
                (304, 0.0955),
                (336, 0.1),
            ],
        );
        check(
            WeightDecayIncrStyle::Cosine,
            &[
                (16, 0.010554024673218806),
                (80, 0.023180194846605363),
                (272, 0.09509529358847656),
                (320, 0.1),
            ],
        );
        assert_eq!(WeightDecaySchedule::constant(0.1).weight_decay(0), 0.1);
    }
}
