//! Running a segmented model forward and backward in the plainest way: what checks compare with, and what examples use.

use bridge_ops::{Ops, Tape, Var, float_from_f32, to_f32_vec};

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
