//! How much memory each rank of a layout needs in training, from a model's config alone.
//!
//! Weights, gradients and optimizer state are exact. Activations are what tapes keep of each layer for its backward pass.
//! A step has four full moments, and the fullest decides: when the forward pass has ended (all activations, the head's
//! gradient and one piece of its logits), when the backward pass is in its last layer (what that layer needs, and most
//! gradients), when it has ended (all gradients), and when gradients are summed and weights updated. `docs/performance-cuda.md` compares this with what GPUs really used. What the driver and the
//! libraries take for themselves is not counted; leave a few GiB for them.

mod activations;
mod search;

#[cfg(test)]
mod tests;

use bridge_core::layout::{LayoutSpec, PipelineSplit, Place, RankCoords, ShardRule, local_slice};
use bridge_core::{CanonicalTensor, DecoderConfig};
use serde::Serialize;

use self::activations::{LayerBytes, layer_bytes};
use crate::error::{Error, Result};

pub use search::{Fit, SearchLimits, layouts_that_fit};

/// Most memory that logits take at once: the head works on tokens piece by piece.
const LOGITS_PIECE: u64 = 512 << 20;

/// What is kept of a layer between its forward and its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Everything the backward pass needs.
    None,
    /// All but the outputs of norms and of activation functions.
    Selective,
    /// The layer's input.
    Full,
}

/// Bytes that each weight takes in a rank's memory, by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateBytes {
    /// The weight in the dtype of the computation, which is that of activations as well.
    pub weight: u64,
    /// Its gradient.
    pub gradient: u64,
    /// What completes the weight to fp32.
    pub master: u64,
    /// The optimizer's two moments together.
    pub moments: u64,
}

impl StateBytes {
    /// Everything in fp32.
    pub fn fp32() -> Self {
        Self {
            weight: 4,
            gradient: 4,
            master: 0,
            moments: 8,
        }
    }

    /// bf16 weights and activations, the rest fp32; change fields for gradients and moments that are narrower. Of the fp32 weight only the 16 bits that the bf16 weight lacks are kept,
    /// unless data-parallel ranks `divide` the state among them, and each keeps its part of the fp32 weights whole.
    pub fn bf16(divide: bool) -> Self {
        Self {
            weight: 2,
            gradient: 4,
            master: if divide { 4 } else { 2 },
            moments: 8,
        }
    }
}

/// How a model is trained, as far as memory goes.
#[derive(Debug, Clone, PartialEq)]
pub struct MemorySpec {
    /// Samples that go through the model at once.
    pub micro_batch: usize,
    /// Tokens of a sample, over all context-parallel ranks.
    pub seq: usize,
    /// Micro-batches of a step on each data-parallel rank: a pipeline holds several at once.
    pub num_micro_batches: usize,
    /// Bytes of each weight's state.
    pub state: StateBytes,
    /// What is kept of a layer.
    pub recompute: Recompute,
    /// Whether data-parallel ranks divide the optimizer's state among them.
    pub distributed_optimizer: bool,
    /// Whether they divide gradients as well (ZeRO-2).
    pub shard_grads: bool,
    /// Whether they divide weights and gradients as well, and hold whole ones of the segments at work alone (ZeRO-3).
    pub shard_params: bool,
    /// Gradient elements that are summed together over data-parallel ranks.
    pub bucket_size: usize,
    /// Which stage has which layers; an even split if `None`.
    pub split: Option<PipelineSplit>,
}

impl MemorySpec {
    /// Whether data-parallel ranks divide the optimizer's state, with or without the rest.
    fn divides_state(&self) -> bool {
        self.distributed_optimizer || self.divides_gradients()
    }

    /// Whether they divide gradients, with or without weights.
    fn divides_gradients(&self) -> bool {
        self.shard_grads || self.shard_params
    }
}

/// Bytes that one rank needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RankMemory {
    /// Weights in the dtype of the computation. Where ranks divide them, the whole ones of two segments that follow each
    /// other, one of which is on its way (and this rank's part of all, where that is not the optimizer's).
    pub weights: u64,
    /// Gradients, all of them at once. Where ranks divide them, this rank's part, and two segments' whole.
    pub gradients: u64,
    /// What completes weights to fp32, and the moments.
    pub optimizer: u64,
    /// What the tapes keep when they keep most.
    pub activations: u64,
    /// Most of it in use at one moment: gradients and activations are not at their fullest together, unless gradients
    /// stay from one micro-batch to the next.
    pub peak: u64,
}

/// What the first rank of each pipeline stage needs; the other ranks of a stage need no more.
///
/// # Errors
/// If the layout does not fit the model.
pub fn stage_memory(
    config: &DecoderConfig,
    layout: &LayoutSpec,
    spec: &MemorySpec,
) -> Result<Vec<RankMemory>> {
    let invalid = |error: bridge_core::Error| Error::Invalid(error.to_string());
    let (tensors, layers) = (config.tensors(), config.num_hidden_layers);
    layout.validate(&tensors, layers).map_err(invalid)?;
    let split = match &spec.split {
        Some(split) => split.clone(),
        None => PipelineSplit::even(layout, layers).map_err(invalid)?,
    };
    let of_layer = |index: usize| layer_bytes(config, index, &config.layers[index], layout, spec);
    let per_token: Vec<LayerBytes> = (0..layers).map(of_layer).collect();
    let stage = |stage| {
        let coords = layout.coords(stage * layout.world_size() / layout.pp);
        let state = State::of(&tensors, &split, layout, &coords, spec)?;
        Ok(one_stage(
            config, layout, spec, &split, &per_token, stage, &state,
        ))
    };
    (0..layout.pp).map(stage).collect()
}

fn one_stage(
    config: &DecoderConfig,
    layout: &LayoutSpec,
    spec: &MemorySpec,
    split: &PipelineSplit,
    per_token: &[LayerBytes],
    stage: usize,
    state: &State,
) -> RankMemory {
    let tokens = (spec.micro_batch * spec.seq).div_ceil(layout.cp) as f64;
    let kept: Vec<f64> = (stage..split.num_chunks())
        .step_by(layout.pp)
        .map(|chunk| split.layers(chunk).map(|layer| per_token[layer].kept).sum())
        .collect();
    let own = (0..per_token.len()).filter(|layer| split.stage_of_layer(*layer) == stage);
    let own: Vec<LayerBytes> = own.map(|layer| per_token[layer]).collect();
    let most = |of: fn(&LayerBytes) -> f64| own.iter().map(of).fold(0.0, f64::max) * tokens;
    let working = most(|layer| layer.working);
    let in_flight = chunks_in_flight(layout, stage, spec.num_micro_batches) as f64;
    // Chunks are of like size: the mean of a stage's stands for each.
    let mean = kept.iter().sum::<f64>() / kept.len().max(1) as f64;
    let has_head = split.stages(Place::Last).contains(&stage);

    let hidden = tokens * (config.hidden_size * spec.state.weight as usize) as f64;
    let vocab = config.vocab_size.div_ceil(layout.tp) as f64;
    let logits = (tokens * vocab * spec.state.weight as f64).min(LOGITS_PIECE as f64);
    // Besides the layers': the head's input, its norm's output, and the gradient that goes back; and either the logits at
    // hand or what the last layer makes again.
    let ends = if has_head { 3.0 * hidden } else { hidden };
    let at_head = if has_head {
        logits.max(working)
    } else {
        working
    };
    let activations = (mean * in_flight * tokens + at_head + ends) as u64;

    let RankState {
        weights,
        gradients,
        optimizer,
        head_gradient,
        embedding_gradient,
        share,
    } = state.rank;
    let held = weights + optimizer;
    let accumulates = spec.num_micro_batches > 1 || split.num_chunks() > 1;
    let so_far = match (accumulates, has_head) {
        (true, _) => gradients,
        (false, true) => head_gradient,
        (false, false) => 0,
    };
    let forward_end = held + activations + so_far;
    // A bucket is put together from the gradients in it, and summed in fp32.
    let in_fp32 = gradients / spec.state.gradient * 4;
    let bucket = match state.summed {
        true => (spec.bucket_size as u64 * 4).min(in_fp32),
        false => 0,
    };
    if spec.divides_gradients() {
        // A segment's gradients go as they come: there is no moment with more than what every moment needs.
        return RankMemory {
            weights,
            gradients,
            optimizer,
            activations,
            peak: held + activations + gradients,
        };
    }
    let last_layer =
        most(|layer| layer.kept + layer.working) as u64 + gradients - embedding_gradient;
    let backward_end = held + last_layer.max(gradients + bucket.max(hidden as u64));
    let update = if spec.distributed_optimizer && state.summed {
        // Each rank's part beside the whole, then the new weights beside the part.
        let part = in_fp32 / share;
        held + (gradients + part).max(part + weights)
    } else {
        held + gradients
    };
    RankMemory {
        weights,
        gradients,
        optimizer,
        activations,
        peak: forward_end.max(backward_end).max(update),
    }
}

/// What a rank holds of a model, whatever goes through it.
struct State {
    rank: RankState,
    /// Whether gradients are summed with those of other ranks.
    summed: bool,
}

#[derive(Clone, Copy, Default)]
struct RankState {
    weights: u64,
    gradients: u64,
    optimizer: u64,
    /// The gradient of the output matrix alone, which is there before all others.
    head_gradient: u64,
    /// The gradient of an embedding that is not the output matrix, which comes last.
    embedding_gradient: u64,
    /// Ranks that divide the optimizer's state.
    share: u64,
}

impl State {
    fn of(
        tensors: &[CanonicalTensor],
        split: &PipelineSplit,
        layout: &LayoutSpec,
        coords: &RankCoords,
        spec: &MemorySpec,
    ) -> Result<Self> {
        let edp = layout.tp * layout.cp * layout.dp / (layout.etp * layout.ep);
        let replicas = layout.dp * layout.cp;
        let bytes = spec.state;
        let mut rank = RankState {
            share: if spec.divides_state() {
                replicas as u64
            } else {
                1
            },
            ..RankState::default()
        };
        // By segment (the embedding, each layer, the head): elements of its whole weights here.
        let num_layers = split.layers(split.num_chunks() - 1).end;
        let mut segments = vec![0; num_layers + 2];
        let is_here = |tensor: &&CanonicalTensor| split.stages(tensor.place).contains(&coords.pp);
        for tensor in tensors.iter().filter(is_here) {
            let slice = local_slice(&tensor.shard, &tensor.shape, layout, coords)
                .map_err(|error| Error::Invalid(error.to_string()))?;
            let Some(slice) = slice else { continue };
            let count: u64 = slice.local_shape.iter().map(|dim| *dim as u64).product();
            let copies = if is_expert(&tensor.shard) {
                edp
            } else {
                replicas
            };
            let share = if spec.divides_state() {
                copies as u64
            } else {
                1
            };
            if spec.divides_gradients() {
                let (first, last) = (0, num_layers + 1);
                let users = match tensor.place {
                    Place::First => [Some(first), None],
                    Place::Layer(layer) => [Some(layer + 1), None],
                    Place::Last => [Some(last), None],
                    Place::FirstAndLast => [Some(first), Some(last)],
                };
                for segment in users.into_iter().flatten() {
                    segments[segment] += count;
                }
                // Sums over micro-batches are kept in fp32.
                rank.gradients += (count * 4).div_ceil(share);
            } else {
                rank.gradients += count * bytes.gradient;
            }
            rank.weights += match (spec.shard_params, bytes.master) {
                (false, _) => count * bytes.weight,
                // The fp32 weights of this rank's part are the weights themselves, or the optimizer's.
                (true, 0) => (count * bytes.weight).div_ceil(share),
                (true, _) => 0,
            };
            rank.optimizer += (count * (bytes.master + bytes.moments)).div_ceil(share);
            if matches!(tensor.place, Place::Last | Place::FirstAndLast)
                && matches!(tensor.shard, ShardRule::Vocab { .. })
            {
                rank.head_gradient = count * bytes.gradient;
            }
            if tensor.place == Place::First && matches!(tensor.shard, ShardRule::Vocab { .. }) {
                rank.embedding_gradient = count * bytes.gradient;
            }
        }
        if spec.divides_gradients() {
            let pairs = segments.windows(2).map(|pair| pair.iter().sum::<u64>());
            let two = pairs.max().unwrap_or(0);
            // The gradient of one while that of the one before it travels.
            rank.gradients += two * 4;
            if spec.shard_params {
                rank.weights += two * bytes.weight;
            }
        }
        Ok(Self {
            rank,
            summed: replicas > 1,
        })
    }
}

fn is_expert(rule: &ShardRule) -> bool {
    matches!(
        rule,
        ShardRule::Expert { .. } | ShardRule::StackedExperts { .. }
    )
}

/// How many (micro-batch, chunk) pairs a stage holds at its fullest moment, under 1F1B or its interleaved form.
fn chunks_in_flight(layout: &LayoutSpec, stage: usize, micro_batches: usize) -> usize {
    let (pp, vpp) = (layout.pp, layout.vpp);
    let total = micro_batches.max(1) * vpp;
    let warm_up = if vpp == 1 {
        pp - stage - 1
    } else {
        (pp - stage - 1) * 2 + (vpp - 1) * pp
    };
    (warm_up + 1).min(total)
}
