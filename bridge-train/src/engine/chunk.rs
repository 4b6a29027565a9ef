//! One micro-batch through a stretch of segments, forward and backward.

use std::ops::Range;

use bridge_models::{ForwardContext, SegmentedModel, Targets};
use bridge_ops::{Float, Ops, Tape, Var};

use super::hooks::SegmentHooks;
use crate::config::RecomputeGranularity;

/// What is kept of a segment between its forward and its backward pass.
enum Kept<B: Ops> {
    /// Everything its backward pass needs.
    Tape {
        tape: Tape<B>,
        input: Option<Var<B>>,
        output: Var<B>,
    },
    /// Its input, from which it runs again.
    Input(Float<B>),
}

/// What a chunk's forward pass leaves for its backward pass.
pub(super) struct ChunkState<B: Ops> {
    first: usize,
    kept: Vec<Kept<B>>,
    /// The gradient of the token losses, where the chunk ends in the head.
    seed: Option<Float<B>>,
    recompute: RecomputeGranularity,
}

/// What a chunk's forward pass gives.
pub(super) enum ChunkOutput<B: Ops> {
    /// Hidden states for the next chunk.
    Hidden(Float<B>),
    /// The loss of each token, fp32, not scaled, 0 where there is none.
    TokenLosses(Float<B>),
}

impl<B: Ops> ChunkState<B> {
    /// Runs `segments` forward. `input` is what the segment before them gave, `None` from segment 0 on. `labels` are the
    /// tokens to predict, -100 where there is no loss, and are read by the head alone, whose gradients will be those of
    /// `loss_scale` times the sum of the token losses.
    #[allow(
        clippy::too_many_arguments,
        reason = "one caller, and each is something of its own"
    )]
    pub(super) fn forward(
        model: &dyn SegmentedModel<B>,
        segments: Range<usize>,
        input: Option<Float<B>>,
        ctx: &ForwardContext<'_, B>,
        labels: &[i64],
        loss_scale: f64,
        recompute: RecomputeGranularity,
        hooks: &mut dyn SegmentHooks,
    ) -> (Self, ChunkOutput<B>) {
        let head = model.num_segments() - 1;
        let next = |index: usize| (index + 1 < segments.end).then_some(index + 1);
        let mut state = Self {
            first: segments.start,
            kept: Vec::with_capacity(segments.len()),
            seed: None,
            recompute,
        };
        let mut hidden = input;
        for index in segments.start..segments.end.min(head) {
            hooks.before_pass(index, next(index));
            hidden = Some(match (hidden.take(), recompute) {
                // The embedding has no input to run again from, and keeps next to nothing.
                (Some(input), RecomputeGranularity::Full) => {
                    let tape = Tape::inference().for_pass(ctx.pass());
                    let output = model.forward_segment(
                        index,
                        &tape,
                        Some(&tape.constant(input.clone())),
                        ctx,
                    );
                    state.kept.push(Kept::Input(input));
                    output.into_value()
                }
                (input, _) => {
                    let recorded = record(model, index, input, ctx, recompute);
                    let value = recorded.2.value();
                    state.kept.push(Kept::Tape {
                        tape: recorded.0,
                        input: recorded.1,
                        output: recorded.2,
                    });
                    value
                }
            });
            hooks.forward_done(index, next(index));
        }
        let hidden = hidden.expect("a chunk has an input or begins with the embedding");
        if segments.end <= head {
            return (state, ChunkOutput::Hidden(hidden));
        }
        hooks.before_pass(head, None);
        let tape = Tape::new().for_pass(ctx.pass());
        let input = tape.leaf(hidden);
        // The head is told what its losses will be seeded with, so that it can do forward and backward in one.
        let targets = Targets::weighted(labels, loss_scale as f32, ctx.device());
        let output = model.head_loss(&tape, &input, &targets, ctx);
        let losses = output.value();
        state.seed = targets.loss_gradient;
        state.kept.push(Kept::Tape {
            tape,
            input: Some(input),
            output,
        });
        // In every schedule the last chunk turns back at once.
        hooks.forward_done(head, Some(head));
        (state, ChunkOutput::TokenLosses(losses))
    }

    /// Runs the chunk backward and adds to the parameters' slots. `gradient` is that of the hidden states the chunk gave,
    /// `None` where it ended in the head. Returns the gradient of its input, if it has one. `last`: this was the last
    /// micro-batch of the step.
    pub(super) fn backward(
        self,
        model: &dyn SegmentedModel<B>,
        gradient: Option<Float<B>>,
        ctx: &ForwardContext<'_, B>,
        last: bool,
        hooks: &mut dyn SegmentHooks,
    ) -> Option<Float<B>> {
        let mut gradient = gradient.or(self.seed);
        for (index, kept) in self.kept.into_iter().enumerate().rev() {
            let index = self.first + index;
            let next = (index > self.first).then(|| index - 1);
            hooks.before_pass(index, next);
            // Without a gradient nothing from here on depends on a trained weight.
            if let Some(seed) = gradient.take() {
                let (tape, input, output) = match kept {
                    Kept::Tape {
                        tape,
                        input,
                        output,
                    } => (tape, input, output),
                    Kept::Input(input) => record(model, index, Some(input), ctx, self.recompute),
                };
                let leaves: Vec<&Var<B>> = input.iter().collect();
                gradient = tape.backward(vec![(output, seed)], &leaves).pop().flatten();
            }
            hooks.backward_done(index, last, next);
        }
        gradient
    }
}

/// Runs one segment on a recording tape.
fn record<B: Ops>(
    model: &dyn SegmentedModel<B>,
    index: usize,
    input: Option<Float<B>>,
    ctx: &ForwardContext<'_, B>,
    recompute: RecomputeGranularity,
) -> (Tape<B>, Option<Var<B>>, Var<B>) {
    let tape = match recompute {
        RecomputeGranularity::None => Tape::new(),
        // A layer that runs again holds its activations for a short time, yet all of them at once.
        RecomputeGranularity::Selective | RecomputeGranularity::Full => {
            Tape::new().recompute_cheap()
        }
    };
    let tape = tape.for_pass(ctx.pass());
    let input = input.map(|value| tape.leaf(value));
    let output = model.forward_segment(index, &tape, input.as_ref(), ctx);
    (tape, input, output)
}

/// Runs `segments` forward without keeping anything. As [`ChunkState::forward`].
pub(super) fn infer<B: Ops>(
    model: &dyn SegmentedModel<B>,
    segments: Range<usize>,
    input: Option<Float<B>>,
    ctx: &ForwardContext<'_, B>,
    labels: &[i64],
    hooks: &mut dyn SegmentHooks,
) -> ChunkOutput<B> {
    let tape = Tape::inference();
    let head = model.num_segments() - 1;
    let mut hidden = input.map(|input| tape.constant(input));
    for index in segments.start..segments.end.min(head) {
        let next = (index + 1 < segments.end).then_some(index + 1);
        hooks.before_pass(index, next);
        hidden = Some(model.forward_segment(index, &tape, hidden.as_ref(), ctx));
        hooks.forward_done(index, next);
    }
    let hidden = hidden.expect("a chunk has an input or begins with the embedding");
    if segments.end <= head {
        return ChunkOutput::Hidden(hidden.into_value());
    }
    let targets = Targets::new(labels, ctx.device());
    hooks.before_pass(head, None);
    let losses = model.head_loss(&tape, &hidden, &targets, ctx).into_value();
    hooks.forward_done(head, None);
    ChunkOutput::TokenLosses(losses)
}
