//! The optimizer's state on its way to a checkpoint and back, whole or in parts.

use bridge_ops::{DType, Float, Ops, Param, float_from_f32};

use super::buckets::{Bucket, model_weights, narrow};
use super::parallel::{Optimizer, State};
use super::sharded::{BucketState, Stretch};
use crate::error::Result;

/// A part of a weight's optimizer state that this rank keeps.
pub struct StatePart<B: Ops> {
    /// The weight.
    pub param: Param<B>,
    /// The state's name and values, fp32: all of the weight's elements, or a vector of `start..end`.
    pub values: Vec<(&'static str, Float<B>)>,
    /// Which of the weight's elements here, in row-major order.
    pub elements: std::ops::Range<usize>,
}

impl<B: Ops> Optimizer<B> {
    /// The parts of the state that this rank is the one to write: over all ranks, everything once.
    pub fn state_parts(&self) -> Vec<StatePart<B>> {
        self.parts_of(|bucket, state| {
            let [weight, m, v] = state.parts();
            let mut values = vec![("exp_avg", m), ("exp_avg_sq", v)];
            // Where the weights are fp32 themselves, these are the same.
            if bucket.kind.dtype != DType::F32 {
                values.push(("master", weight));
            }
            values
        })
    }

    /// The parts of sharded weights, as the model computes with them, that this rank is the one to write: over all ranks,
    /// everything once. None where weights are not sharded.
    pub fn weight_parts(&self) -> Vec<StatePart<B>> {
        if !self.shards_params() {
            return Vec::new();
        }
        self.parts_of(|bucket, state| {
            let [weight, ..] = state.parts();
            vec![("", model_weights::<B>(weight, bucket.kind.dtype))]
        })
    }

    fn parts_of(
        &self,
        values: impl Fn(&Bucket, &BucketState<B>) -> Vec<(&'static str, Float<B>)>,
    ) -> Vec<StatePart<B>> {
        match &self.state {
            State::Whole(adamw) => adamw
                .states()
                .iter()
                .zip(&self.placements)
                .filter(|(_, placement)| placement.writes())
                .map(|(state, _)| StatePart {
                    values: [
                        ("exp_avg", Some(state.exp_avg())),
                        ("exp_avg_sq", Some(state.exp_avg_sq())),
                        ("master", state.master()),
                    ]
                    .into_iter()
                    .filter_map(|(kind, values)| Some((kind, values?)))
                    .collect(),
                    elements: 0..state.param.numel(),
                    param: state.param.clone(),
                })
                .collect(),
            State::Divided { buckets, .. } => {
                let mut parts = Vec::new();
                for (bucket, state) in self.buckets.iter().zip(buckets) {
                    if !bucket.kind.counts {
                        continue;
                    }
                    let values = values(bucket, state);
                    for s in self.stretches(bucket) {
                        let cut = |x: &Float<B>| narrow::<B>(x.clone(), s.at, s.end - s.start);
                        parts.push(StatePart {
                            param: self.params[s.param].clone(),
                            values: (values.iter()).map(|(kind, x)| (*kind, cut(x))).collect(),
                            elements: s.start..s.end,
                        });
                    }
                }
                parts
            }
        }
    }

    /// Restores the state: `read` gives the elements of a weight's state by kind (`exp_avg`, `exp_avg_sq`, `master`, the
    /// last being the fp32 weight), fp32.
    ///
    /// # Errors
    /// The first error of `read`.
    pub fn restore(
        &mut self,
        mut read: impl FnMut(&str, &Param<B>, std::ops::Range<usize>) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let device = self.parallel.device().clone();
        let tensor = |values: &[f32], shape: &[usize]| float_from_f32::<B>(values, shape, &device);
        let per_bucket: Vec<Vec<Stretch>> =
            self.buckets.iter().map(|b| self.stretches(b)).collect();
        match &mut self.state {
            State::Whole(adamw) => {
                for state in adamw.states_mut() {
                    let (param, shape) = (state.param.clone(), state.param.shape());
                    let mut all = |kind| read(kind, &param, 0..param.numel());
                    let (m, v, weight) = (all("exp_avg")?, all("exp_avg_sq")?, all("master")?);
                    state.set_moments(tensor(&m, &shape), tensor(&v, &shape));
                    state.set_weight(tensor(&weight, &shape));
                }
            }
            State::Divided { buckets, .. } => {
                for ((bucket, state), stretches) in
                    self.buckets.iter().zip(buckets).zip(&per_bucket)
                {
                    let share = bucket.len / self.parallel.group(bucket.kind.replicas).size();
                    let mut parts = [vec![0.0; share], vec![0.0; share], vec![0.0; share]];
                    for s in stretches {
                        for (kind, part) in
                            ["master", "exp_avg", "exp_avg_sq"].iter().zip(&mut parts)
                        {
                            let values = read(kind, &self.params[s.param], s.start..s.end)?;
                            part[s.at..s.at + values.len()].copy_from_slice(&values);
                        }
                    }
                    state.set_parts(parts.map(|part| tensor(&part, &[share])));
                }
            }
        }
        // The weights that the model runs with are those that are trained on.
        if let Some((weights, parts)) = self.weights() {
            for index in 0..self.buckets.len() {
                weights.renewed(parts, index);
            }
        }
        self.finish_param_gather()?;
        Ok(())
    }
}
