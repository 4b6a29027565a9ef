//! Running a segmented model forward and backward in the plainest way: what checks compare with, and what examples use.

use bridge_core::layout::{PipelineSplit, Place};
use bridge_ops::{Float, Ops, Tape, Var, float_from_f32, to_f32_vec};
use bridge_parallel::{Axis, Group, ParallelContext};

use crate::context::{ForwardContext, IGNORED_TARGET, Targets};
use crate::segmented::SegmentedModel;

/// What [`loss_and_gradients`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct StepLoss {
    /// Loss of each token, 0 where there is no target: `batch * seq`.
    pub token_losses: Vec<f32>,
    /// Number of tokens that have a target.
    pub num_tokens: usize,
}

impl StepLoss {
    /// Mean over the tokens that have a target; 0 if none has.
    pub fn mean_loss(&self) -> f64 {
        let sum: f64 = self.token_losses.iter().map(|loss| f64::from(*loss)).sum();
        sum / self.num_tokens.max(1) as f64
    }
}

/// Runs forward and backward once and adds the gradients of the mean loss to the weights' gradient slots.
///
/// `targets` are `batch * seq` token ids, already shifted, [`IGNORED_TARGET`] for no loss. The tapes of all segments
/// are alive at once; the training engine does better.
pub fn loss_and_gradients<B: Ops>(
    model: &dyn SegmentedModel<B>,
    ctx: &ForwardContext<'_, B>,
    targets: &[i64],
) -> StepLoss {
    let num_tokens = targets
        .iter()
        .filter(|target| **target != IGNORED_TARGET)
        .count();
    let head = model.num_segments() - 1;
    // Per hidden segment: its tape, its input (none for the first), its output.
    let mut segments: Vec<(Tape<B>, Option<Var<B>>, Var<B>)> = Vec::with_capacity(head);
    for index in 0..head {
        let tape = Tape::new();
        let input = segments
            .last()
            .map(|(_, _, output)| tape.leaf(output.value()));
        let output = model.forward_segment(index, &tape, input.as_ref(), ctx);
        segments.push((tape, input, output));
    }
    let tape = Tape::new();
    let input = segments
        .last()
        .map(|(_, _, output)| tape.leaf(output.value()))
        .expect("a model has hidden segments");
    let losses = model.head_loss(&tape, &input, &Targets::new(targets, ctx.device()), ctx);

    let token_losses = to_f32_vec::<B>(losses.value());
    let seed = vec![1.0 / num_tokens.max(1) as f32; token_losses.len()];
    let seed = float_from_f32::<B>(&seed, &[token_losses.len()], ctx.device());
    let mut gradient = tape.backward(vec![(losses, seed)], &[&input]).remove(0);
    for (tape, input, output) in segments.into_iter().rev() {
        let Some(seed) = gradient else { break };
        let leaves: Vec<&Var<B>> = input.iter().collect();
        gradient = tape.backward(vec![(output, seed)], &leaves).pop().flatten();
    }
    StepLoss {
        token_losses,
        num_tokens,
    }
}

/// A rank's segments of a model whose stages hand one micro-batch on: no schedule, nothing at the same time. The reference
/// for pipelines, as the functions above are for one stage.
pub struct StagedRun<'a, B: Ops> {
    model: &'a dyn SegmentedModel<B>,
    ctx: &'a ForwardContext<'a, B>,
    /// The stage of each segment.
    stages: Vec<usize>,
    pipeline: Group<B>,
}

impl<'a, B: Ops> StagedRun<'a, B> {
    /// A run of `model`, whose segments are divided as `split` says.
    pub fn new(
        model: &'a dyn SegmentedModel<B>,
        ctx: &'a ForwardContext<'a, B>,
        split: &PipelineSplit,
        parallel: &ParallelContext<B>,
    ) -> Self {
        let head = model.num_segments() - 1;
        let stage = |segment: usize| match segment {
            0 => split.stages(Place::First)[0],
            last if last == head => split.stages(Place::Last)[0],
            layer => split.stage_of_layer(layer - 1),
        };
        Self {
            model,
            ctx,
            stages: (0..=head).map(stage).collect(),
            pipeline: parallel.group(Axis::Pp).clone(),
        }
    }

    fn is_here(&self, segment: usize) -> bool {
        self.stages[segment] == self.pipeline.rank()
    }

    /// The output of segment `segment - 1` where it is `here`, or from the stage that has it.
    fn receive(&self, from: usize, here: Option<Float<B>>) -> Float<B> {
        if self.is_here(from) {
            return here.expect("the segment before ran here");
        }
        let boundary = self.model.boundary(self.ctx);
        let boundary = boundary.expect("a model in stages says what goes between them");
        self.pipeline
            .recv(&boundary.shape, boundary.dtype, self.stages[from])
    }

    /// Runs the hidden segments forward, without recording. The hidden states where the head is here.
    pub fn hidden_states(&self) -> Option<Float<B>> {
        let head = self.stages.len() - 1;
        let mut own: Option<Float<B>> = None;
        for segment in 0..=head {
            if !self.is_here(segment) {
                continue;
            }
            let input = (segment > 0).then(|| self.receive(segment - 1, own.take()));
            if segment == head {
                return input;
            }
            let tape = Tape::inference();
            let input = input.map(|x| tape.constant(x));
            let output = self
                .model
                .forward_segment(segment, &tape, input.as_ref(), self.ctx)
                .into_value();
            if self.is_here(segment + 1) {
                own = Some(output);
            } else {
                self.pipeline.send(output, self.stages[segment + 1]);
            }
        }
        None
    }

    /// Runs forward and backward and adds the gradients of `weight` times the sum of the token losses to the weights'
    /// slots. `targets` are those of this rank's tokens. Returns the loss of each of these tokens where the head is here.
    pub fn loss_and_gradients(&self, targets: &[i64], weight: f32) -> Option<Vec<f32>> {
        let head = self.stages.len() - 1;
        // Of each segment here: number, tape, input, output.
        let mut ran: Vec<(usize, Tape<B>, Option<Var<B>>, Var<B>)> = Vec::new();
        let mut losses = None;
        for segment in (0..=head).filter(|segment| self.is_here(*segment)) {
            let own = ran.last().map(|(.., output)| output.value());
            let input = (segment > 0).then(|| self.receive(segment - 1, own));
            let tape = Tape::new();
            let input = input.map(|x| tape.leaf(x));
            let output = match &input {
                Some(input) if segment == head => {
                    let targets = Targets::weighted(targets, weight, self.ctx.device());
                    let output = self.model.head_loss(&tape, input, &targets, self.ctx);
                    losses = Some(to_f32_vec::<B>(output.value()));
                    output
                }
                input => {
                    let (tape, ctx) = (&tape, self.ctx);
                    self.model
                        .forward_segment(segment, tape, input.as_ref(), ctx)
                }
            };
            if segment < head && !self.is_here(segment + 1) {
                self.pipeline.send(output.value(), self.stages[segment + 1]);
            }
            ran.push((segment, tape, input, output));
        }

        let mut gradient: Option<Float<B>> = None;
        for (segment, tape, input, output) in ran.into_iter().rev() {
            let seed = if segment == head {
                let count = output.shape()[0];
                float_from_f32::<B>(&vec![weight; count], &[count], self.ctx.device())
            } else {
                self.receive(segment + 1, gradient.take())
            };
            let leaves: Vec<&Var<B>> = input.iter().collect();
            let found = tape.backward(vec![(output, seed)], &leaves).pop().flatten();
            if segment > 0 && !self.is_here(segment - 1) {
                let found = found.expect("every segment depends on its input");
                self.pipeline.send(found, self.stages[segment - 1]);
            } else {
                gradient = found;
            }
        }
        losses
    }
}
