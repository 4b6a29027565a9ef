//! A model forward and backward, segment by segment.
//!
//! Each segment (the embedding, one layer, the head) has a tape of its own, whose input is a leaf. Going back, each
//! tape is fed the gradient of its output and gives that of its input. So what a segment keeps can be chosen one by one
//! (recomputation), a pipeline can hold some segments here and others elsewhere, and a layer's gradients are complete,
//! and can travel, while the layers before it still work.

use bridge_models::{ForwardContext, SegmentedModel, Targets};
use bridge_ops::{Float, Ops, Tape, Var};

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

/// Runs one micro-batch forward and backward, and adds the gradients of `loss_scale` times the sum of the token losses
/// to the parameters' slots.
///
/// `labels` are the tokens to predict, `[batch * seq]`, -100 where there is no loss. Returns the loss of each token,
/// `[batch * seq]` fp32, not scaled, 0 where there is none.
pub fn forward_backward<B: Ops>(
    model: &dyn SegmentedModel<B>,
    ctx: &ForwardContext<'_, B>,
    labels: &[i64],
    loss_scale: f64,
    recompute: RecomputeGranularity,
) -> Float<B> {
    let head = model.num_segments() - 1;
    let mut kept: Vec<Kept<B>> = Vec::with_capacity(head);
    let mut hidden: Option<Float<B>> = None;
    for index in 0..head {
        hidden = Some(match (hidden.take(), recompute) {
            // The embedding has no input to run again from, and keeps next to nothing.
            (Some(input), RecomputeGranularity::Full) => {
                let tape = Tape::inference();
                let output =
                    model.forward_segment(index, &tape, Some(&tape.constant(input.clone())), ctx);
                kept.push(Kept::Input(input));
                output.into_value()
            }
            (input, _) => {
                let recorded = record(model, index, input, ctx, recompute);
                let value = recorded.2.value();
                kept.push(Kept::Tape {
                    tape: recorded.0,
                    input: recorded.1,
                    output: recorded.2,
                });
                value
            }
        });
    }

    let tape = Tape::new();
    let input =
        tape.leaf(hidden.expect("a segmented model has at least one segment before its head"));
    // The head is told what its losses will be seeded with, so that it can do forward and backward in one.
    let targets = Targets::weighted(labels, loss_scale as f32, ctx.device());
    let losses = model.head_loss(&tape, &input, &targets, ctx);
    let token_losses = losses.value();
    let seed = targets
        .loss_gradient
        .expect("weighted targets have a gradient");
    let mut gradient = tape
        .backward(vec![(losses, seed)], &[&input])
        .pop()
        .flatten();
    drop(input);

    for (index, kept) in kept.into_iter().enumerate().rev() {
        // Nothing below depends on a trained weight.
        let Some(seed) = gradient.take() else { break };
        let (tape, input, output) = match kept {
            Kept::Tape {
                tape,
                input,
                output,
            } => (tape, input, output),
            Kept::Input(input) => record(model, index, Some(input), ctx, recompute),
        };
        let leaves: Vec<&Var<B>> = input.iter().collect();
        gradient = tape.backward(vec![(output, seed)], &leaves).pop().flatten();
    }
    token_losses
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
    let input = input.map(|value| tape.leaf(value));
    let output = model.forward_segment(index, &tape, input.as_ref(), ctx);
    (tape, input, output)
}

/// Runs one micro-batch forward only. Returns the loss of each token, `[batch * seq]` fp32, 0 where `labels` says -100.
pub fn forward_loss<B: Ops>(
    model: &dyn SegmentedModel<B>,
    ctx: &ForwardContext<'_, B>,
    labels: &[i64],
) -> Float<B> {
    let tape = Tape::inference();
    let head = model.num_segments() - 1;
    let mut hidden: Option<Var<B>> = None;
    for index in 0..head {
        hidden = Some(model.forward_segment(index, &tape, hidden.as_ref(), ctx));
    }
    let hidden = hidden.expect("a segmented model has at least one segment before its head");
    model
        .head_loss(&tape, &hidden, &Targets::new(labels, ctx.device()), ctx)
        .into_value()
}
