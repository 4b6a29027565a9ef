//! The optimizer of a run: gradients summed over ranks, their norm, and AdamW with its state whole or divided.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bridge_models::SegmentedModel;
use bridge_ops::{AdamWStep, Float, Ops, Param, float_zeros};
use bridge_parallel::{Axis, ParallelContext, ReduceOp, complete_gradients};

use super::adamw::{AdamW, AdamWOptions};
use super::buckets::{Bucket, plan_buckets};
use super::grad_norm::{non_finite_gradients, sum_of_squares};
use super::placement::{Placement, placements};
use super::reduction::{Reduction, Share};
use super::sharded::{BucketState, Stretch, non_finite, stretches};
use super::weights::{Parts, WeightHooks, Weights};
use crate::agree;
use crate::error::{Error, Result};

/// How data-parallel ranks share the work of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataParallelOptions {
    /// Whether each rank keeps a part of the optimizer's state rather than all of it.
    pub distributed_optimizer: bool,
    /// With the distributed optimizer: whether new weights are gathered while the next forward pass is at work. Until it
    /// has passed, or [`Optimizer::gather_weights`] was called, a weight may have its old value.
    pub overlap_param_gather: bool,
    /// Whether ranks divide gradients as well: each keeps its part of the sums, which are made after every backward pass
    /// (ZeRO-2). Includes the distributed optimizer.
    pub shard_grads: bool,
    /// Whether ranks divide weights and gradients as well, and have whole ones only of the segments at work (ZeRO-3).
    /// Includes the distributed optimizer.
    pub shard_params: bool,
    /// Whether gradients are summed over ranks while the backward pass goes on.
    pub overlap_grad_reduce: bool,
    /// Elements that are summed together.
    pub bucket_size: usize,
}

impl Default for DataParallelOptions {
    /// Whole state on every rank, sums during the backward pass, in buckets of 40 million elements, which Megatron-Core
    /// starts from as well.
    fn default() -> Self {
        Self {
            distributed_optimizer: false,
            overlap_param_gather: false,
            shard_grads: false,
            shard_params: false,
            overlap_grad_reduce: true,
            bucket_size: 40_000_000,
        }
    }
}

/// The optimizer of the weights that this rank holds.
///
/// A rank that belongs to no job runs [`AdamW`] and nothing else. In a job, gradients are summed in buckets over the ranks that hold
/// the same weights, and the state is kept whole on each of them or divided among them.
pub struct Optimizer<B: Ops> {
    pub(super) parallel: Arc<ParallelContext<B>>,
    pub(super) params: Vec<Param<B>>,
    pub(super) placements: Vec<Placement>,
    pub(super) buckets: Vec<Bucket>,
    /// By segment, the weights that it uses.
    segments: Vec<Vec<usize>>,
    overlap: bool,
    pub(super) state: State<B>,
}

pub(super) enum State<B: Ops> {
    Whole(AdamW<B>),
    Divided {
        buckets: Vec<BucketState<B>>,
        weights: Weights<B>,
        share: Share,
        overlap_param_gather: bool,
        options: AdamWOptions,
        steps: u64,
    },
}

/// Summed gradients of a step.
pub struct Gradients<B: Ops> {
    /// This rank's part of each bucket, where the state is divided. Else the gradients are in the weights' slots.
    parts: Vec<Float<B>>,
}

impl<B: Ops> Optimizer<B> {
    /// A fresh optimizer of the weights of `model` that require a gradient. Every rank calls this.
    ///
    /// # Errors
    /// If two weights have one name, or the ranks do not hold what they should.
    pub fn new(
        model: &dyn SegmentedModel<B>,
        parallel: &Arc<ParallelContext<B>>,
        adamw: &AdamWOptions,
        options: &DataParallelOptions,
    ) -> Result<Self> {
        Self::with_weights(model, parallel, adamw, options, &mut |param| {
            Err(Error::WeightNotThere {
                name: param.name().to_owned(),
            })
        })
    }

    /// As [`new`](Self::new) of a model some or all of whose weights are not there yet: `load` brings the value of a
    /// parameter (see [`load_param`](bridge_models::weights::load_param)). With sharded parameters, no more than a bucket
    /// of them is there at a time.
    ///
    /// # Errors
    /// As [`new`](Self::new), or the first error of `load`.
    pub fn with_weights(
        model: &dyn SegmentedModel<B>,
        parallel: &Arc<ParallelContext<B>>,
        adamw: &AdamWOptions,
        options: &DataParallelOptions,
        load: &mut dyn FnMut(&Param<B>) -> Result<()>,
    ) -> Result<Self> {
        let mut load_missing = |param: &Param<B>| -> Result<()> {
            if param.is_released() {
                load(param)?;
            }
            Ok(())
        };
        let params: Vec<Param<B>> = model
            .params()
            .into_iter()
            .filter(Param::requires_grad)
            .collect();
        let placements = placements(&params, parallel)?;
        let index: HashMap<&str, usize> = params
            .iter()
            .enumerate()
            .map(|(index, param)| (param.name(), index))
            .collect();
        let segments: Vec<Vec<usize>> = (0..model.num_segments())
            .map(|segment| {
                let params = model.segment_params(segment);
                params
                    .iter()
                    .filter_map(|param| index.get(param.name()).copied())
                    .collect()
            })
            .collect();
        // Gradients are complete from the last segment to the first, of a shared weight with the lowest that uses it.
        let mut order: Vec<usize> = Vec::new();
        for segment in segments.iter() {
            for param in segment {
                if !order.contains(param) {
                    order.push(*param);
                }
            }
        }
        order.reverse();
        for param in &params {
            param.set_grad_dtype(adamw.main_grads_dtype);
        }
        let several = !parallel.is_alone();
        // One rank in a job of its own has whole weights in any case.
        let sharded = options.shard_params && parallel.world_size() > 1;
        let shard_grads = options.shard_grads || options.shard_params;
        let divided = several && (options.distributed_optimizer || shard_grads);
        if !divided {
            order.retain(|param| parallel.exchanges(placements[*param].replicas));
        }
        let decayed: Vec<bool> = params.iter().map(|p| adamw.decays(p.name())).collect();
        let buckets = plan_buckets(
            &params,
            &placements,
            &decayed,
            &order,
            options.bucket_size,
            // What is sharded comes and goes with the segments that use it, and its gradients are completed in parts.
            |param| {
                (divided && shard_grads).then(|| {
                    let users = segments.iter().enumerate();
                    let users = users.filter(|(_, used)| used.contains(&param));
                    (
                        users.map(|(segment, _)| segment).collect::<Vec<_>>(),
                        params[param].shard().map(|shard| shard.reduction),
                        placements[param].tied_across_stages,
                    )
                })
            },
            parallel,
        );
        // What is not trained, or not divided, is there from now on.
        for param in model.params() {
            if !(sharded && param.requires_grad()) {
                load_missing(&param)?;
            }
        }
        let state = if divided {
            let weights = Weights::new(&buckets, &segments, sharded);
            let share = if shard_grads {
                Share::PartOfEach
            } else {
                Share::Part
            };
            let mut states = Vec::with_capacity(buckets.len());
            for (index, bucket) in buckets.iter().enumerate() {
                for slot in &bucket.slots {
                    load_missing(&params[slot.param])?;
                }
                states.push(BucketState::new(
                    bucket,
                    &params,
                    parallel,
                    adamw.exp_avg_dtype,
                ));
                if sharded {
                    // At once, so that whole weights and parts of them are not there together.
                    let parts = Parts {
                        params: &params,
                        buckets: &buckets,
                        states: &states,
                        parallel,
                    };
                    weights.renewed(parts, index);
                }
            }
            State::Divided {
                buckets: states,
                weights,
                share,
                overlap_param_gather: options.overlap_param_gather,
                options: adamw.clone(),
                steps: 0,
            }
        } else {
            State::Whole(AdamW::new(params.clone(), adamw)?)
        };
        Ok(Self {
            parallel: Arc::clone(parallel),
            params,
            placements,
            buckets,
            segments,
            overlap: options.overlap_grad_reduce,
            state,
        })
    }

    /// The weights that are trained, as far as this rank holds them.
    pub fn params(&self) -> &[Param<B>] {
        &self.params
    }

    /// What this rank is to each of them.
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    /// Elements of the trained weights that this rank is the one to count.
    pub fn counted_elements(&self) -> u64 {
        let of = |param: &Param<B>| match param.shard() {
            Some(shard) => shard
                .ranges
                .iter()
                .map(ExactSizeIterator::len)
                .product::<usize>(),
            None => param.numel(),
        };
        self.params
            .iter()
            .zip(&self.placements)
            .filter(|(_, placement)| placement.writes())
            .map(|(param, _)| of(param) as u64)
            .sum()
    }

    /// Forgets the gradients.
    pub fn clear_grads(&self) {
        self.params.iter().for_each(Param::clear_grad);
    }

    /// Begins the sums of a step's gradients. To be told of every segment that is done, and then
    /// [finished](Self::finish_reduction).
    pub fn start_reduction(&self) -> Reduction<'_, B> {
        let mut uses_left = vec![0; self.params.len()];
        for param in self.segments.iter().flatten() {
            uses_left[*param] += 1;
        }
        let weights = self.weights();
        Reduction {
            params: &self.params,
            placements: &self.placements,
            buckets: &self.buckets,
            segments: &self.segments,
            parallel: &self.parallel,
            share: self.share(),
            weights,
            overlap: self.overlap,
            uses_left,
            missing: self.buckets.iter().map(|b| b.slots.len()).collect(),
            started: self.buckets.iter().map(|_| None).collect(),
            passes: VecDeque::new(),
            sums: self.buckets.iter().map(|_| None).collect(),
        }
    }

    /// What brings weights to where they are used, where nothing is trained: to be told of every pass. Every rank does the
    /// same passes.
    pub fn weight_hooks(&self) -> WeightHooks<'_, B> {
        WeightHooks {
            weights: self.weights(),
        }
    }

    /// Puts the whole weights of this rank's part of the model into its parameters, wherever they are. Every rank calls
    /// this. Sharded parameters stay whole until they have been used again.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn gather_weights(&self) -> Result<()> {
        self.bring_weights(true)
    }

    /// Waits for weights that are on their way. Every rank calls this.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn finish_param_gather(&self) -> Result<()> {
        self.bring_weights(false)
    }

    fn bring_weights(&self, all: bool) -> Result<()> {
        if let Some((weights, parts)) = self.weights() {
            weights.bring(parts, all);
            self.parallel.health()?;
        }
        Ok(())
    }

    pub(super) fn weights(&self) -> Option<(&Weights<B>, Parts<'_, B>)> {
        match &self.state {
            State::Whole(_) => None,
            State::Divided {
                buckets, weights, ..
            } => {
                let parts = Parts {
                    params: &self.params,
                    buckets: &self.buckets,
                    states: buckets,
                    parallel: &self.parallel,
                };
                Some((weights, parts))
            }
        }
    }

    fn share(&self) -> Share {
        match self.state {
            State::Whole(_) => Share::Whole,
            State::Divided { share, .. } => share,
        }
    }

    pub(super) fn shards_params(&self) -> bool {
        self.weights()
            .is_some_and(|(weights, _)| weights.are_sharded())
    }

    /// Waits for the sums.
    ///
    /// # Errors
    /// If a rank failed; the gradients are worthless then.
    pub fn finish_reduction(&self, reduction: Reduction<'_, B>) -> Result<Gradients<B>> {
        if self.share() != Share::PartOfEach {
            complete_gradients(&self.params, &self.parallel);
            self.complete_tied();
        }
        let sums = reduction.finish();
        let parts = match self.state {
            State::Divided { .. } => sums,
            State::Whole(_) => {
                for (bucket, sum) in self.buckets.iter().zip(&sums) {
                    bucket.split(sum, &self.params, |param, grad| param.set_grad(Some(grad)));
                }
                // A weight that met no token takes a step like any other, so that no layout differs from another.
                for param in self.params.iter().filter(|param| param.grad().is_none()) {
                    let dtype = param.grad_dtype();
                    let zeros = float_zeros::<B>(&param.shape(), dtype, &param.device());
                    param.set_grad(Some(zeros));
                }
                Vec::new()
            }
        };
        self.parallel.health()?;
        Ok(Gradients { parts })
    }

    /// Sums the gradients of weights that the first and the last stage share.
    fn complete_tied(&self) {
        let group = self.parallel.group(Axis::Embedding);
        for (param, placement) in self.params.iter().zip(&self.placements) {
            if placement.tied_across_stages {
                let own = param.take_grad().unwrap_or_else(|| {
                    float_zeros::<B>(&param.shape(), param.grad_dtype(), &param.device())
                });
                param.set_grad(Some(group.all_reduce(own, ReduceOp::Sum)));
            }
        }
    }

    /// This rank's part of the square of the gradient's norm: summed over all ranks, every element of every weight is in
    /// it once. Waits for the device.
    pub fn local_squared_norm(&self, gradients: &Gradients<B>) -> f64 {
        match &self.state {
            State::Whole(_) => sum_of_squares::<B>(
                self.params
                    .iter()
                    .zip(&self.placements)
                    .filter(|(_, placement)| placement.writes())
                    .filter_map(|(param, _)| param.grad()),
            ),
            State::Divided { .. } => sum_of_squares::<B>(
                self.buckets
                    .iter()
                    .zip(&gradients.parts)
                    .filter(|(bucket, _)| bucket.kind.counts)
                    .map(|(_, part)| part.clone()),
            ),
        }
    }

    /// The names of the weights whose gradient holds a NaN or an infinity on any rank, at most `limit` of them. Every
    /// rank calls this.
    ///
    /// # Errors
    /// If a rank failed.
    pub fn non_finite(&self, gradients: &Gradients<B>, limit: usize) -> Result<Vec<String>> {
        let own = match &self.state {
            State::Whole(_) => non_finite_gradients(&self.params, limit),
            State::Divided { .. } => self
                .buckets
                .iter()
                .zip(&gradients.parts)
                .flat_map(|(bucket, part)| non_finite(part, &self.stretches(bucket), &self.params))
                .collect(),
        };
        agree::texts(&self.parallel, own, limit)
    }

    pub(super) fn stretches(&self, bucket: &Bucket) -> Vec<Stretch> {
        let group = self.parallel.group(bucket.kind.replicas);
        stretches(bucket, group.size(), group.rank())
    }

    /// One update. `grad_scale` multiplies every gradient (see [`super::clip_coefficient`]).
    ///
    /// # Errors
    /// If a rank failed; the weights are worthless then.
    pub fn step(
        &mut self,
        gradients: Gradients<B>,
        lr: f64,
        weight_decay: f64,
        grad_scale: f64,
    ) -> Result<()> {
        match &mut self.state {
            State::Whole(adamw) => adamw.step(lr, weight_decay, grad_scale),
            State::Divided {
                buckets,
                weights,
                overlap_param_gather,
                options,
                steps,
                ..
            } => {
                *steps += 1;
                let betas = (options.beta1, options.beta2);
                for (index, grad) in gradients.parts.into_iter().enumerate() {
                    let bucket = &self.buckets[index];
                    let decay = if bucket.kind.decayed {
                        weight_decay
                    } else {
                        0.0
                    };
                    let step = AdamWStep {
                        grad_scale,
                        ..AdamWStep::new(*steps, lr, betas, options.eps, decay)
                    };
                    buckets[index].update(grad, &step);
                    // The next bucket is updated while this one's weights travel.
                    let parts = Parts {
                        params: &self.params,
                        buckets: &self.buckets,
                        states: buckets,
                        parallel: &self.parallel,
                    };
                    weights.renewed(parts, index);
                }
                if !*overlap_param_gather {
                    self.finish_param_gather()?;
                }
            }
        }
        self.parallel.health()?;
        Ok(())
    }

    /// Updates done, which the bias correction depends on.
    pub fn steps(&self) -> u64 {
        match &self.state {
            State::Whole(adamw) => adamw.steps(),
            State::Divided { steps, .. } => *steps,
        }
    }

    /// Sets the number of updates done, when state is restored.
    pub fn set_steps(&mut self, done: u64) {
        match &mut self.state {
            State::Whole(adamw) => adamw.set_steps(done),
            State::Divided { steps, .. } => *steps = done,
        }
    }
}
