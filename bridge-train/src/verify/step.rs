//! The rows of a reference as the micro-batches of a step, and that step.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bridge_core::{DecoderConfig, LayoutSpec};
use bridge_data::{Batch, IGNORE_INDEX};
use bridge_models::verify::{Reference, VerifyOptions};
use bridge_models::{
    Boundary, Decoder, ForwardContext, ParallelOptions, ParamRole, SegmentedModel, Targets,
};
use bridge_ops::{Float, Ops, Param, Tape, Var, to_f32_vec};
use bridge_parallel::{ParallelContext, SequenceShard};

use super::parts::{GradientPart, LogitsPart, Parts, region};
use crate::agree;
use crate::config::RecomputeGranularity;
use crate::engine::{Executor, TokenLoss};
use crate::error::Result;
use crate::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};

/// Elements that are summed together: little, so that a small model has several buckets.
const BUCKET_SIZE: usize = 4096;

/// The inputs of a reference.
pub(super) struct Rows {
    batch: usize,
    seq: usize,
    vocab: usize,
    /// `[batch, seq]`.
    tokens: Vec<i64>,
    /// `[batch, seq]`.
    labels: Vec<i64>,
}

impl Rows {
    pub(super) fn new(reference: &Reference, config: &DecoderConfig) -> Result<Self> {
        let (inputs, labels) = reference.inputs(config.vocab_size)?;
        Ok(Self {
            batch: inputs.batch,
            seq: inputs.seq,
            vocab: config.vocab_size,
            tokens: inputs.input_ids.iter().map(|id| i64::from(*id)).collect(),
            labels,
        })
    }

    /// The rows of one data-parallel rank, an equal number for each; `None` for one without any tokens to predict. A
    /// pipeline gets as many as fill it, in whole groups, which the interleaved schedule asks for.
    fn of_rank(&self, layout: &LayoutSpec, dp_rank: usize) -> Vec<Option<usize>> {
        let share = self.batch.div_ceil(layout.dp).next_multiple_of(layout.pp);
        (0..share)
            // Dealt out in turns, so that every rank has some that count.
            .map(|turn| turn * layout.dp + dp_rank)
            .map(|row| (row < self.batch).then_some(row))
            .collect()
    }

    fn micro_batches(&self, layout: &LayoutSpec, dp_rank: usize) -> Vec<Batch> {
        let values = |of: &[i64], row: Option<usize>, otherwise: i64| match row {
            Some(row) => of[row * self.seq..(row + 1) * self.seq].to_vec(),
            None => vec![otherwise; self.seq],
        };
        let batch = |row| Batch {
            batch: 1,
            seq: self.seq,
            tokens: values(&self.tokens, row, 0),
            labels: values(&self.labels, row, IGNORE_INDEX),
            position_ids: (0..self.seq as i64).collect(),
            cu_seqlens: None,
        };
        self.of_rank(layout, dp_rank)
            .into_iter()
            .map(batch)
            .collect()
    }

    /// This rank's part of a step without its update.
    pub(super) fn step<B: Ops>(
        &self,
        model: &Decoder<B>,
        parallel: &Arc<ParallelContext<B>>,
        divided: &ParallelOptions,
        options: &VerifyOptions,
    ) -> Result<Parts> {
        let observed = Observed {
            model,
            logits: Mutex::default(),
        };
        let executor = Executor::new(
            &observed,
            Arc::clone(parallel),
            divided.pipeline.clone(),
            RecomputeGranularity::None,
        )?;
        let micro_batches = if executor.reads_samples() {
            self.micro_batches(parallel.layout(), parallel.coords().dp)
        } else {
            Vec::new()
        };
        let mut gradients = Vec::new();
        let local = if options.gradients {
            // A rank that is alone has nothing to sum, and needs no memory for an optimizer.
            let optimizer = (!parallel.is_alone())
                .then(|| optimizer(&observed, parallel))
                .transpose()?;
            let mut reduction = optimizer.as_ref().map(Optimizer::start_reduction);
            let local = executor.forward_backward(&observed, &micro_batches, &mut |segment| {
                if let Some(reduction) = &mut reduction {
                    reduction.segment_done(segment);
                }
            })?;
            if let (Some(optimizer), Some(reduction)) = (&optimizer, reduction) {
                optimizer.finish_reduction(reduction)?;
            }
            let trained = model.params().into_iter().filter(Param::requires_grad);
            gradients.extend(trained.map(|param| gradient_part(&param)));
            local
        } else {
            executor.forward(&observed, &micro_batches)?
        };
        let [sum, tokens] = agree::sum(parallel, [local.sum, local.tokens as f64])?;
        let logits = observed.logits.into_inner();
        let logits = logits.unwrap_or_else(PoisonError::into_inner);
        // Tensor-parallel ranks have the same ones.
        let wanted = parallel.is_last_stage() && parallel.coords().tp == 0;
        Ok(Parts {
            loss: TokenLoss::of(sum, tokens, local.valid_tokens).mean,
            logits: wanted.then(|| LogitsPart {
                values: logits.into_iter().flat_map(to_f32_vec::<B>).collect(),
            }),
            gradients,
        })
    }

    /// The logits of all ranks, `[batch, seq, vocab]`: NaN where no rank has any.
    pub(super) fn whole_logits(
        &self,
        ranks: &[Option<LogitsPart>],
        layout: &LayoutSpec,
    ) -> Vec<f32> {
        let mut whole = vec![f32::NAN; self.batch * self.seq * self.vocab];
        for (rank, part) in ranks.iter().enumerate() {
            let Some(part) = part else { continue };
            let coords = layout.coords(rank);
            let shard = SequenceShard::new(self.seq, layout, coords.cp);
            let width = shard.local_seq() * self.vocab;
            let rows = self.of_rank(layout, coords.dp);
            for (row, own) in rows.into_iter().zip(part.values.chunks(width)) {
                if let Some(row) = row {
                    let width = self.seq * self.vocab;
                    let whole = &mut whole[row * width..(row + 1) * width];
                    shard.put(own, whole, self.vocab);
                }
            }
        }
        whole
    }
}

fn optimizer<B: Ops>(
    model: &dyn SegmentedModel<B>,
    parallel: &Arc<ParallelContext<B>>,
) -> Result<Optimizer<B>> {
    let options = DataParallelOptions {
        bucket_size: BUCKET_SIZE,
        ..DataParallelOptions::default()
    };
    Optimizer::new(model, parallel, &AdamWOptions::default(), &options)
}

/// What this rank holds of a gradient, without the rows that pad its weight. A weight that the loss does not depend on has
/// none: zeros.
fn gradient_part<B: Ops>(param: &Param<B>) -> GradientPart {
    let shape = param.shape();
    let whole = || shape.iter().map(|extent| 0..*extent).collect();
    let ranges: Vec<Range<usize>> = param.shard().map_or_else(whole, |s| s.ranges.clone());
    let values = match param.take_grad() {
        Some(grad) => to_f32_vec::<B>(grad),
        None => vec![0.0; param.numel()],
    };
    let corner: Vec<Range<usize>> = ranges.iter().map(|range| 0..range.len()).collect();
    GradientPart {
        name: param.name().to_owned(),
        values: region(&shape, &corner)
            .into_iter()
            .map(|i| values[i])
            .collect(),
        global_shape: param
            .shard()
            .map_or(shape, |shard| shard.global_shape.clone()),
        ranges,
    }
}

/// A model whose logits are kept, one tensor a micro-batch, in the order in which they reach the head.
struct Observed<'a, B: Ops> {
    model: &'a Decoder<B>,
    logits: Mutex<Vec<Float<B>>>,
}

impl<B: Ops> SegmentedModel<B> for Observed<'_, B> {
    fn num_segments(&self) -> usize {
        self.model.num_segments()
    }

    fn holds_segment(&self, index: usize) -> bool {
        self.model.holds_segment(index)
    }

    fn boundary(&self, ctx: &ForwardContext<'_, B>) -> Option<Boundary> {
        self.model.boundary(ctx)
    }

    fn forward_segment(
        &self,
        index: usize,
        tape: &Tape<B>,
        input: Option<&Var<B>>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        self.model.forward_segment(index, tape, input, ctx)
    }

    fn head_loss(
        &self,
        tape: &Tape<B>,
        input: &Var<B>,
        targets: &Targets<B>,
        ctx: &ForwardContext<'_, B>,
    ) -> Var<B> {
        let aside = Tape::inference();
        let logits = self.model.logits(&aside, &aside.constant(input.value()));
        let mut kept = self.logits.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(logits.into_value());
        drop(kept);
        self.model.head_loss(tape, input, targets, ctx)
    }

    fn segment_params(&self, index: usize) -> Vec<Param<B>> {
        self.model.segment_params(index)
    }

    fn param_role(&self, param: &Param<B>) -> ParamRole {
        self.model.param_role(param)
    }
}
