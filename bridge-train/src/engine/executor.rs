//! Runs pipeline schedules.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bridge_core::layout::PipelineSplit;
use bridge_data::Batch;
use bridge_models::{
    AuxiliaryLosses, AuxiliaryOptions, AuxiliaryReport, ForwardContext, SegmentedModel,
};
use bridge_ops::{Float, Ops, float_zeros, random, to_f32_vec};
use bridge_parallel::pipeline::{Action, Schedule, Transfer, TransferKind};
use bridge_parallel::{Axis, ParallelContext, Pending};

use super::chunk::{ChunkOutput, ChunkState, infer};
use super::header::StepHeader;
use super::hooks::{NoHooks, SegmentHooks, WhenComplete};
use crate::batch::{header_context, local_context};
use crate::config::RecomputeGranularity;
use crate::error::{Error, Result};

/// A loss over the tokens of a step, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLoss {
    /// Mean over the tokens that count; 0 if there are none.
    pub mean: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Tokens that count.
    pub valid_tokens: u64,
}

impl TokenLoss {
    /// Of the sum over the tokens that count.
    pub(crate) fn of(sum: f64, tokens: f64, valid_tokens: u64) -> Self {
        Self {
            mean: sum / u64::max(valid_tokens, 1) as f64,
            tokens: tokens as u64,
            valid_tokens,
        }
    }
}

/// This rank's part in a step, before it is summed over the ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LocalLoss {
    /// Sum of the losses of the tokens whose loss this rank is the one to count.
    pub sum: f64,
    /// Tokens that went through the model, where this rank is the one to count them.
    pub tokens: u64,
    /// Tokens with a loss in the whole step, over all ranks.
    pub valid_tokens: u64,
}

/// Runs a model, or the part of one that this rank holds, over micro-batches.
pub struct Executor<B: Ops> {
    parallel: Arc<ParallelContext<B>>,
    split: PipelineSplit,
    recompute: RecomputeGranularity,
    /// The step of the run that is at work.
    step: AtomicU64,
}

impl<B: Ops> Executor<B> {
    /// An executor for this rank of a layout. `split` says which stage runs which layers, an even split if `None`.
    ///
    /// # Errors
    /// If the model cannot be divided like that, or does not hold the segments that it should.
    pub fn new(
        model: &dyn SegmentedModel<B>,
        parallel: Arc<ParallelContext<B>>,
        split: Option<PipelineSplit>,
        recompute: RecomputeGranularity,
    ) -> Result<Self> {
        let (layout, layers) = (parallel.layout(), model.num_segments() - 2);
        let split = match split {
            Some(split) => split,
            None if layout.pp * layout.vpp == 1 => {
                PipelineSplit::uneven(layout, layers, &[layers])?
            }
            None => PipelineSplit::even(layout, layers)?,
        };
        let executor = Self {
            split,
            recompute,
            parallel,
            step: AtomicU64::new(0),
        };
        let stage = executor.parallel.coords().pp;
        for chunk in 0..executor.split.num_chunks() {
            let here = chunk % executor.parallel.layout().pp == stage;
            for segment in executor.split.segments(chunk) {
                if here && !model.holds_segment(segment) {
                    return Err(Error::Parallel(format!(
                        "pipeline stage {stage} runs segment {segment} of the model but does not hold it; build the \
                         model with the same pipeline split"
                    )));
                }
            }
        }
        Ok(executor)
    }

    /// An executor of a whole model on one rank.
    ///
    /// # Errors
    /// If the model does not hold all of its segments.
    pub fn single(
        model: &dyn SegmentedModel<B>,
        device: &B::Device,
        recompute: RecomputeGranularity,
    ) -> Result<Self> {
        let parallel = Arc::new(ParallelContext::single(device.clone()));
        Self::new(model, parallel, None, recompute)
    }

    /// Says which step of the run comes next: what layers drop at random is a function of it.
    pub fn begin_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Tells a micro-batch from every other one of the run, alike on all ranks that have its tokens.
    fn pass_key(&self, micro_batch: usize) -> u64 {
        let coords = self.parallel.coords();
        [coords.dp, coords.cp, micro_batch]
            .into_iter()
            .fold(self.step.load(Ordering::Relaxed), |key, part| {
                random::mix(random::mix(key) ^ part as u64)
            })
    }

    /// The layout, and this rank's place in it.
    pub fn parallel(&self) -> &Arc<ParallelContext<B>> {
        &self.parallel
    }

    /// Whether this rank runs the first or the last chunk, which need samples.
    pub fn reads_samples(&self) -> bool {
        self.parallel.is_first_stage() || self.parallel.is_last_stage()
    }

    /// Runs every micro-batch forward and backward, and adds the gradients of the mean loss over the valid tokens of all
    /// ranks' micro-batches to the parameters' slots. The gradients are this rank's contribution: they are still to be
    /// summed over the ranks that hold the same weights.
    ///
    /// `micro_batches` are those of this data-parallel rank; ranks that do not [read samples](Self::reads_samples) pass
    /// none. `segment_done` is told each segment once no more gradients will come from it.
    ///
    /// # Errors
    /// If the ranks do not agree or one of them fails; the gradients are worthless then.
    pub fn forward_backward(
        &self,
        model: &dyn SegmentedModel<B>,
        micro_batches: &[Batch],
        segment_done: &mut dyn FnMut(usize),
    ) -> Result<LocalLoss> {
        let (options, mut hooks) = (AuxiliaryOptions::default(), WhenComplete(segment_done));
        let (loss, _) = self.train(model, micro_batches, &options, &mut hooks)?;
        Ok(loss)
    }

    /// As [`Executor::forward_backward`], with the losses that `options` ask for besides that of the next token, whose
    /// values as far as this rank has computed them come second. `hooks` hear of every pass.
    ///
    /// # Errors
    /// As [`Executor::forward_backward`].
    pub fn train(
        &self,
        model: &dyn SegmentedModel<B>,
        micro_batches: &[Batch],
        options: &AuxiliaryOptions,
        hooks: &mut dyn SegmentHooks,
    ) -> Result<(LocalLoss, AuxiliaryReport)> {
        let Some(header) = self.agree(micro_batches)? else {
            return Ok(Default::default());
        };
        let layout = self.parallel.layout();
        let schedule = Schedule::training(layout.pp, layout.vpp, header.micro_batches.len())
            .map_err(|error| Error::Parallel(error.to_string()))?;
        let auxiliary = (options.is_active()).then(|| {
            AuxiliaryLosses::new(*options, header.tokens.try_into().unwrap_or(usize::MAX))
        });
        let auxiliary = auxiliary.as_ref();
        let loss = self.run(model, micro_batches, &header, &schedule, auxiliary, hooks)?;
        let report = auxiliary.map_or_else(Default::default, AuxiliaryLosses::report);
        self.parallel.health()?;
        Ok((loss, report))
    }

    /// Runs every micro-batch forward. As [`Executor::forward_backward`], without gradients.
    ///
    /// # Errors
    /// If the ranks do not agree or one of them fails.
    pub fn forward(
        &self,
        model: &dyn SegmentedModel<B>,
        micro_batches: &[Batch],
    ) -> Result<LocalLoss> {
        self.evaluate(
            model,
            micro_batches,
            &AuxiliaryOptions::default(),
            &mut NoHooks,
        )
    }

    /// As [`Executor::forward`]. Of `options`, the limit on the tokens of an expert applies; `hooks` hear of every pass.
    ///
    /// # Errors
    /// As [`Executor::forward`].
    pub fn evaluate(
        &self,
        model: &dyn SegmentedModel<B>,
        micro_batches: &[Batch],
        options: &AuxiliaryOptions,
        hooks: &mut dyn SegmentHooks,
    ) -> Result<LocalLoss> {
        let Some(header) = self.agree(micro_batches)? else {
            return Ok(LocalLoss::default());
        };
        let layout = self.parallel.layout();
        let schedule = Schedule::forward_only(layout.pp, layout.vpp, header.micro_batches.len())
            .map_err(|error| Error::Parallel(error.to_string()))?;
        let auxiliary = options.capacity.map(|_| AuxiliaryLosses::new(*options, 1));
        self.run(
            model,
            micro_batches,
            &header,
            &schedule,
            auxiliary.as_ref(),
            hooks,
        )
    }

    /// What all ranks must know of a step: the number of valid tokens over all data-parallel ranks, and on every stage
    /// the micro-batches' shapes. `None` if there are no micro-batches.
    fn agree(&self, micro_batches: &[Batch]) -> Result<Option<StepHeader>> {
        let mut header = None;
        if self.reads_samples() {
            let valid: usize = micro_batches.iter().map(Batch::loss_tokens).sum();
            let tokens: usize = micro_batches.iter().map(|b| b.batch * b.seq).sum();
            let own = [valid, tokens].map(|count| (count as u64).to_le_bytes());
            let all = self
                .parallel
                .group(Axis::Dp)
                .all_gather_bytes(own.as_flattened())?;
            let mut counts = [0, 0];
            for bytes in &all {
                let (numbers, rest) = bytes.as_chunks::<8>();
                if numbers.len() != counts.len() || !rest.is_empty() {
                    return Err(garbled("a number of tokens"));
                }
                for (count, own) in counts.iter_mut().zip(numbers) {
                    *count += u64::from_le_bytes(*own);
                }
            }
            header = Some(StepHeader::of(counts, micro_batches));
        }
        if self.parallel.layout().pp > 1 {
            // Only the first stage's is used; the others send an empty one.
            let own = match &header {
                Some(header) if self.parallel.is_first_stage() => header.encode(),
                _ => Vec::new(),
            };
            let all = self.parallel.group(Axis::Pp).all_gather_bytes(&own)?;
            let first = all.first().and_then(|bytes| StepHeader::decode(bytes));
            let first = first.ok_or_else(|| garbled("the first stage's micro-batches"))?;
            if header.as_ref().is_some_and(|own| *own != first) {
                return Err(Error::Parallel(
                    "the last pipeline stage has read other samples than the first; every rank must be given the same \
                     data and configuration"
                        .into(),
                ));
            }
            header = Some(first);
        }
        Ok(header.filter(|header| !header.micro_batches.is_empty()))
    }

    fn run(
        &self,
        model: &dyn SegmentedModel<B>,
        micro_batches: &[Batch],
        header: &StepHeader,
        schedule: &Schedule,
        auxiliary: Option<&AuxiliaryLosses<B>>,
        hooks: &mut dyn SegmentHooks,
    ) -> Result<LocalLoss> {
        let actions = schedule.stage(self.parallel.coords().pp);
        let trains = actions
            .iter()
            .any(|action| matches!(action, Action::Backward { .. }));
        let mut run = Run {
            executor: self,
            model,
            micro_batches,
            header,
            schedule,
            auxiliary,
            trains,
            loss_scale: 1.0 / header.valid_tokens.max(1) as f64,
            contexts: HashMap::new(),
            states: HashMap::new(),
            inbox: HashMap::new(),
            outbox: HashMap::new(),
            backward_left: HashMap::new(),
            token_losses: Vec::new(),
        };
        let mut received = 0;
        for (index, action) in actions.iter().enumerate() {
            match *action {
                Action::Recv(transfer) => {
                    if index >= received {
                        run.receive(transfer)?;
                    }
                }
                Action::Send(transfer) => run.send(transfer),
                Action::Forward { chunk, micro_batch } => {
                    // What the next pass waits for may arrive while this one runs.
                    received = run.receive_ahead(actions, index, received)?;
                    run.forward(chunk, micro_batch, hooks);
                    self.parallel.health()?;
                }
                Action::Backward { chunk, micro_batch } => {
                    received = run.receive_ahead(actions, index, received)?;
                    run.backward(chunk, micro_batch, hooks);
                    self.parallel.health()?;
                }
            }
        }
        let losses = std::mem::take(&mut run.token_losses);
        drop(run);
        let loss = self.local_loss(header, losses);
        self.parallel.health()?;
        Ok(loss)
    }

    fn local_loss(&self, header: &StepHeader, token_losses: Vec<Float<B>>) -> LocalLoss {
        let coords = self.parallel.coords();
        // Tensor-parallel ranks have the same losses, context-parallel ranks those of different tokens.
        let sum = if coords.tp == 0 {
            // Read back after all the work is queued, so that a device never waits for the host between micro-batches.
            token_losses
                .into_iter()
                .flat_map(to_f32_vec::<B>)
                .map(f64::from)
                .sum()
        } else {
            0.0
        };
        let counts = coords.tp == 0 && coords.cp == 0 && self.parallel.is_last_stage();
        let tokens = header
            .micro_batches
            .iter()
            .map(|batch| (batch.batch * batch.seq) as u64);
        LocalLoss {
            sum,
            tokens: if counts { tokens.sum() } else { 0 },
            valid_tokens: header.valid_tokens,
        }
    }
}

fn garbled(what: &str) -> Error {
    Error::Parallel(format!(
        "another rank sent {what} that cannot be read; run the same program on every rank"
    ))
}

/// A schedule while it runs on one stage.
struct Run<'r, B: Ops> {
    executor: &'r Executor<B>,
    model: &'r dyn SegmentedModel<B>,
    micro_batches: &'r [Batch],
    header: &'r StepHeader,
    schedule: &'r Schedule,
    auxiliary: Option<&'r AuxiliaryLosses<B>>,
    trains: bool,
    loss_scale: f64,
    /// By micro-batch: its context, and how many passes here still need it.
    contexts: HashMap<usize, (Arc<ForwardContext<'r, B>>, usize)>,
    /// By chunk and micro-batch.
    states: HashMap<(usize, usize), ChunkState<B>>,
    inbox: HashMap<(TransferKind, usize, usize), Pending<B>>,
    outbox: HashMap<(TransferKind, usize, usize), Float<B>>,
    /// By chunk: micro-batches that have not come back yet.
    backward_left: HashMap<usize, usize>,
    token_losses: Vec<Float<B>>,
}

impl<'r, B: Ops> Run<'r, B> {
    /// Posts the receives that lie between pass `index` and the one after it, and says up to where receives are posted.
    fn receive_ahead(
        &mut self,
        actions: &[Action],
        index: usize,
        received: usize,
    ) -> Result<usize> {
        let next = actions[index + 1..]
            .iter()
            .position(|action| !action.is_transfer())
            .map_or(actions.len(), |next| index + 1 + next);
        for action in &actions[received.max(index + 1)..next] {
            if let Action::Recv(transfer) = action {
                self.receive(*transfer)?;
            }
        }
        Ok(next)
    }

    fn receive(&mut self, transfer: Transfer) -> Result<()> {
        let ctx = self.context(transfer.micro_batch);
        let Some(boundary) = self.model.boundary(&ctx) else {
            return Err(Error::Parallel(
                "this kind of model cannot be divided into pipeline stages; set pipeline_model_parallel_size=1".into(),
            ));
        };
        let group = self.executor.parallel.group(Axis::Pp);
        let pending = group.start_recv(&boundary.shape, boundary.dtype, transfer.peer);
        self.inbox.insert(key(&transfer), pending);
        Ok(())
    }

    fn send(&mut self, transfer: Transfer) {
        let tensor = self
            .outbox
            .remove(&key(&transfer))
            .expect("a schedule sends what a pass has made");
        let group = self.executor.parallel.group(Axis::Pp);
        group.send(tensor, transfer.peer);
    }

    /// What was received, or made here, for a pass.
    fn take(&mut self, kind: TransferKind, chunk: usize, micro_batch: usize) -> Float<B> {
        let pending = self.inbox.remove(&(kind, chunk, micro_batch));
        pending
            .expect("a schedule receives before a pass what it needs")
            .wait()
    }

    /// Hands what a pass made to the chunk `to_chunk`.
    fn give(&mut self, kind: TransferKind, to_chunk: usize, micro_batch: usize, tensor: Float<B>) {
        let here = self.executor.parallel.coords().pp;
        if self.schedule.stage_of_chunk(to_chunk) == here {
            self.inbox
                .insert((kind, to_chunk, micro_batch), Pending::ready(tensor));
        } else {
            self.outbox.insert((kind, to_chunk, micro_batch), tensor);
        }
    }

    fn context(&mut self, micro_batch: usize) -> Arc<ForwardContext<'r, B>> {
        let parallel = &self.executor.parallel;
        let chunks = self.schedule.num_chunks() / self.schedule.num_stages();
        let passes = chunks * if self.trains { 2 } else { 1 };
        let (ctx, _) = self.contexts.entry(micro_batch).or_insert_with(|| {
            let ctx: ForwardContext<'r, B> = match self.micro_batches.get(micro_batch) {
                Some(batch) => local_context(batch, parallel),
                None => header_context(&self.header.micro_batches[micro_batch], parallel),
            };
            let ctx = match self.auxiliary {
                Some(auxiliary) => ctx.with_auxiliary(auxiliary),
                None => ctx,
            };
            let ctx = ctx.for_pass(self.trains.then(|| self.executor.pass_key(micro_batch)));
            (Arc::new(ctx), passes)
        });
        Arc::clone(ctx)
    }

    /// A pass is over; the last one of a micro-batch frees its context.
    fn passed(&mut self, micro_batch: usize) {
        if let Some((_, left)) = self.contexts.get_mut(&micro_batch) {
            *left -= 1;
            if *left == 0 {
                self.contexts.remove(&micro_batch);
            }
        }
    }

    fn forward(&mut self, chunk: usize, micro_batch: usize, hooks: &mut dyn SegmentHooks) {
        let ctx = self.context(micro_batch);
        let input = (chunk > 0).then(|| self.take(TransferKind::Activation, chunk, micro_batch));
        let segments = self.executor.split.segments(chunk);
        let labels = if chunk + 1 == self.schedule.num_chunks() {
            crate::batch::local_labels(&self.micro_batches[micro_batch], &ctx)
        } else {
            Vec::new()
        };
        let output = if self.trains {
            let (state, output) = ChunkState::forward(
                self.model,
                segments,
                input,
                &ctx,
                &labels,
                self.loss_scale,
                self.executor.recompute,
                hooks,
            );
            self.states.insert((chunk, micro_batch), state);
            output
        } else {
            infer(self.model, segments, input, &ctx, &labels, hooks)
        };
        match output {
            ChunkOutput::Hidden(hidden) => {
                self.give(TransferKind::Activation, chunk + 1, micro_batch, hidden);
            }
            ChunkOutput::TokenLosses(losses) => self.token_losses.push(losses),
        }
        self.passed(micro_batch);
    }

    fn backward(&mut self, chunk: usize, micro_batch: usize, hooks: &mut dyn SegmentHooks) {
        let ctx = self.context(micro_batch);
        let gradient = (chunk + 1 < self.schedule.num_chunks())
            .then(|| self.take(TransferKind::Gradient, chunk, micro_batch));
        let state = self
            .states
            .remove(&(chunk, micro_batch))
            .expect("a schedule runs forward before backward");
        let micro_batches = self.header.micro_batches.len();
        let left = self.backward_left.entry(chunk).or_insert(micro_batches);
        *left -= 1;
        let last = *left == 0;
        let gradient = state.backward(self.model, gradient, &ctx, last, hooks);
        if chunk > 0 {
            // The stage before waits for a gradient, also where nothing here depends on its output.
            let gradient = gradient.unwrap_or_else(|| {
                let boundary = self
                    .model
                    .boundary(&ctx)
                    .expect("activations were received");
                float_zeros::<B>(&boundary.shape, boundary.dtype, ctx.device())
            });
            self.give(TransferKind::Gradient, chunk - 1, micro_batch, gradient);
        }
        self.passed(micro_batch);
    }
}

fn key(transfer: &Transfer) -> (TransferKind, usize, usize) {
    (transfer.kind, transfer.to_chunk, transfer.micro_batch)
}
