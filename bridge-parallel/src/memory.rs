//! How much memory each rank of a layout needs in training, from the shapes alone.
//!
//! Weights, gradients and optimizer state are exact. Activations are what tapes keep of each layer for its backward pass,
//! counted from the layer's weights: a matrix whose outputs are divided keeps its whole input (once for all matrices that
//! share it) and its part of the output; one whose inputs are divided keeps its part of the input; a norm keeps its
//! input. What lives for a moment only, the logits of one piece of the head and the libraries' own buffers are not
//! counted; leave a few GiB for them.

use std::collections::HashSet;

use bridge_core::CanonicalTensor;
use bridge_core::layout::{LayoutSpec, PipelineSplit, Place, RankCoords, ShardRule, local_slice};
use serde::Serialize;

use crate::error::{Error, Result};

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

/// How a model is trained, as far as memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySpec {
    /// Samples that go through the model at once.
    pub micro_batch: usize,
    /// Tokens of a sample, over all context-parallel ranks.
    pub seq: usize,
    /// Micro-batches of a step on each data-parallel rank: a pipeline holds several at once.
    pub num_micro_batches: usize,
    /// Bytes of a weight and of an activation: 2 for bf16, 4 for fp32. With 2, the optimizer keeps fp32 masters.
    pub bytes: usize,
    /// What is kept of a layer.
    pub recompute: Recompute,
    /// Whether data-parallel ranks divide the optimizer's state among them.
    pub distributed_optimizer: bool,
    /// Experts that each token goes to, in a model that has experts.
    pub experts_per_token: usize,
}

/// Bytes that one rank needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct RankMemory {
    /// Weights in the dtype of the computation.
    pub weights: u64,
    /// fp32 gradients.
    pub gradients: u64,
    /// fp32 masters where weights are narrower, and the two moments.
    pub optimizer: u64,
    /// What the tapes keep at the fullest moment.
    pub activations: u64,
}

impl RankMemory {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations
    }
}

/// What the first rank of each pipeline stage needs; the other ranks of a stage need no more.
///
/// # Errors
/// If the layout does not fit the model.
pub fn stage_memory(
    tensors: &[CanonicalTensor],
    num_layers: usize,
    layout: &LayoutSpec,
    spec: &MemorySpec,
) -> Result<Vec<RankMemory>> {
    let invalid = |error: bridge_core::Error| Error::Invalid(error.to_string());
    layout.validate(tensors, num_layers).map_err(invalid)?;
    let split = PipelineSplit::even(layout, num_layers).map_err(invalid)?;
    let tokens = (spec.micro_batch * spec.seq).div_ceil(layout.cp) as u64;
    let per_token = layer_elements(tensors, num_layers, layout, spec)?;
    let mut stages = Vec::with_capacity(layout.pp);
    for stage in 0..layout.pp {
        let coords = layout.coords(stage * layout.world_size() / layout.pp);
        let mut memory = state_memory(tensors, &split, layout, &coords, spec)?;
        let bytes = |elements: u64| elements * tokens * spec.bytes as u64;
        let chunks = (stage..split.num_chunks()).step_by(layout.pp);
        let kept: Vec<u64> = chunks
            .map(|chunk| split.layers(chunk).map(|layer| per_token[layer].kept).sum())
            .collect();
        let layers = (0..num_layers).filter(|layer| split.stage_of_layer(*layer) == stage);
        let working = layers
            .map(|layer| per_token[layer].working)
            .max()
            .unwrap_or(0);
        let in_flight = chunks_in_flight(layout, stage, spec.num_micro_batches) as u64;
        // Chunks are of like size: the mean of a stage's stands for each.
        let mean = kept.iter().sum::<u64>() / kept.len().max(1) as u64;
        memory.activations = bytes(mean * in_flight + working);
        stages.push(memory);
    }
    Ok(stages)
}

/// Weights, gradients and optimizer state of one rank.
fn state_memory(
    tensors: &[CanonicalTensor],
    split: &PipelineSplit,
    layout: &LayoutSpec,
    coords: &RankCoords,
    spec: &MemorySpec,
) -> Result<RankMemory> {
    let masters = if spec.bytes < 4 { 4 } else { 0 };
    let edp = layout.tp * layout.cp * layout.dp / (layout.etp * layout.ep);
    let mut memory = RankMemory::default();
    for tensor in tensors
        .iter()
        .filter(|tensor| split.stages(tensor.place).contains(&coords.pp))
    {
        let slice = local_slice(&tensor.shard, &tensor.shape, layout, coords)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let Some(slice) = slice else { continue };
        let count: u64 = slice.local_shape.iter().map(|dim| *dim as u64).product();
        let copies = if is_expert(&tensor.shard) {
            edp
        } else {
            layout.dp * layout.cp
        };
        let share = if spec.distributed_optimizer {
            copies as u64
        } else {
            1
        };
        memory.weights += count * spec.bytes as u64;
        memory.gradients += count * 4;
        memory.optimizer += (count * (8 + masters)).div_ceil(share);
    }
    Ok(memory)
}

/// Elements per token that a layer keeps until its backward pass, and those that it needs besides while that runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct LayerElements {
    kept: u64,
    working: u64,
}

fn layer_elements(
    tensors: &[CanonicalTensor],
    num_layers: usize,
    layout: &LayoutSpec,
    spec: &MemorySpec,
) -> Result<Vec<LayerElements>> {
    let mut layers: Vec<Vec<&CanonicalTensor>> = vec![Vec::new(); num_layers];
    for tensor in tensors {
        if let Place::Layer(layer) = tensor.place
            && let Some(layer) = layers.get_mut(layer)
        {
            layer.push(tensor);
        }
    }
    let hidden = tensors
        .iter()
        .find(|tensor| tensor.name == "embedding.weight")
        .and_then(|tensor| tensor.shape.last().copied())
        .ok_or_else(|| {
            Error::Invalid("the model has no `embedding.weight` that says how wide it is".into())
        })?;
    let per_rank = if layout.sp { layout.tp } else { 1 };
    let input = (hidden / per_rank) as u64;
    let count = |layer: Vec<&CanonicalTensor>| {
        let all = elements(&layer, layout, spec, Recompute::None);
        match spec.recompute {
            Recompute::None => LayerElements {
                kept: all,
                working: 0,
            },
            Recompute::Selective => {
                let kept = elements(&layer, layout, spec, Recompute::Selective);
                LayerElements {
                    kept,
                    working: all - kept,
                }
            }
            Recompute::Full => LayerElements {
                kept: input,
                working: all,
            },
        }
    };
    Ok(layers.into_iter().map(count).collect())
}

/// Elements per token that the tape of one layer keeps.
fn elements(
    layer: &[&CanonicalTensor],
    layout: &LayoutSpec,
    spec: &MemorySpec,
    recompute: Recompute,
) -> u64 {
    let norms_split = if layout.sp { layout.tp } else { 1 };
    let mut inputs: HashSet<(&str, usize)> = HashSet::new();
    let (mut total, mut experts) = (0.0, 0.0);
    for tensor in layer {
        let parent = tensor.name.rsplitn(3, '.').nth(2).unwrap_or_default();
        let weight = tensor.name.ends_with(".weight");
        match (&tensor.shard, tensor.shape.as_slice()) {
            // A norm over the hidden state keeps its input. One over single heads keeps about what its projection made.
            (ShardRule::Replicated, [size]) if weight && !parent.ends_with("attention") => {
                total += *size as f64 / norms_split as f64;
            }
            (ShardRule::Split { dim: 0 } | ShardRule::Heads { dim: 0, .. }, [out, input])
                if weight =>
            {
                total += *out as f64 / layout.tp as f64;
                if inputs.insert((parent, *input)) && recompute == Recompute::None {
                    total += *input as f64;
                }
            }
            // What the MLP's last matrix takes in is the output of the activation function.
            (ShardRule::Split { dim: 1 } | ShardRule::Heads { dim: 1, .. }, [_, input])
                if weight && (recompute == Recompute::None || !parent.ends_with("mlp")) =>
            {
                total += *input as f64 / layout.tp as f64;
            }
            // Of the experts a token meets a few. Each rank's experts see as many tokens as a rank has, times those few.
            (ShardRule::Expert { count, .. }, [out, input]) if weight => {
                experts += (out + input) as f64 / (layout.etp * count) as f64;
            }
            (ShardRule::StackedExperts { .. }, [_, out, input]) => {
                experts += (out + input) as f64 / layout.etp as f64;
            }
            // A router, and other small matrices that every rank holds.
            (ShardRule::Replicated, [out, input]) if weight => {
                total += *out as f64;
                if inputs.insert((parent, *input)) && recompute == Recompute::None {
                    total += *input as f64;
                }
            }
            _ => {}
        }
    }
    (total + experts * spec.experts_per_token as f64).ceil() as u64
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

/// A layout that fits, and what its fullest rank needs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// The layout.
    pub layout: LayoutSpec,
    /// What is kept of a layer.
    pub recompute: Recompute,
    /// Micro-batches per step on each data-parallel rank.
    pub num_micro_batches: usize,
    /// The fullest rank's need.
    pub memory: RankMemory,
}

/// Layouts of `ranks` ranks in which every rank needs at most `limit` bytes, the likeliest to be fast first: those that
/// recompute less, then those that divide the model less (tensor parallelism costs more than expert, context and
/// pipeline parallelism), then those that need less memory.
///
/// `per_host` bounds tensor parallelism, which wants the fast links inside a host. Of `global_batch` samples each
/// data-parallel rank gets an equal number of micro-batches.
///
/// # Errors
/// If the model fits no layout at all for another reason than memory.
pub fn layouts_that_fit(
    tensors: &[CanonicalTensor],
    num_layers: usize,
    ranks: usize,
    per_host: usize,
    limit: u64,
    global_batch: usize,
    spec: &MemorySpec,
) -> Result<Vec<Fit>> {
    let has_experts = tensors.iter().any(|tensor| is_expert(&tensor.shard));
    let divisors = |n: usize| (1..=n).filter(move |d| n.is_multiple_of(*d));
    let mut found = Vec::new();
    let mut legal = 0;
    for tp in divisors(ranks).filter(|tp| *tp <= per_host) {
        for pp in divisors(ranks / tp).filter(|pp| *pp <= num_layers) {
            for cp in
                divisors(ranks / tp / pp).filter(|cp| spec.seq.is_multiple_of(2 * cp) || *cp == 1)
            {
                let dp = ranks / tp / pp / cp;
                if !global_batch.is_multiple_of(dp * spec.micro_batch) {
                    continue;
                }
                let num_micro_batches = global_batch / (dp * spec.micro_batch);
                for ep in divisors(tp * cp * dp).filter(|ep| has_experts || *ep == 1) {
                    let layout = LayoutSpec {
                        tp,
                        pp,
                        cp,
                        dp,
                        ep,
                        sp: tp > 1,
                        ..LayoutSpec::default()
                    };
                    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
                        let spec = MemorySpec {
                            recompute,
                            num_micro_batches,
                            ..*spec
                        };
                        let Ok(stages) = stage_memory(tensors, num_layers, &layout, &spec) else {
                            break;
                        };
                        legal += 1;
                        let Some(memory) = stages.into_iter().max_by_key(RankMemory::total) else {
                            break;
                        };
                        if memory.total() <= limit {
                            found.push(Fit {
                                layout,
                                recompute,
                                num_micro_batches,
                                memory,
                            });
                            break;
                        }
                    }
                }
            }
        }
    }
    if legal == 0 {
        return Err(Error::Invalid(format!(
            "no layout of {ranks} ranks fits this model and a global batch of {global_batch}; try another number of ranks, or \
             a batch with more divisors"
        )));
    }
    found.sort_by_key(|fit| {
        let l = &fit.layout;
        // Parallel degrees weighed by what their communication usually costs.
        let cost = (l.tp - 1) * 4 + (l.pp - 1) * 2 + (l.cp - 1) * 3 + (l.ep - 1);
        (fit.recompute, cost, fit.memory.total())
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: MemorySpec = MemorySpec {
        micro_batch: 1,
        seq: 128,
        num_micro_batches: 8,
        bytes: 2,
        recompute: Recompute::None,
        distributed_optimizer: false,
        experts_per_token: 0,
    };

    /// Hidden 48, 6 heads of 16, 2 kv heads, inner 80, 131 tokens.
    fn model(layers: usize) -> Vec<CanonicalTensor> {
        let vocab = || ShardRule::Vocab {
            dim: 0,
            multiple: 1,
        };
        let mut all = vec![CanonicalTensor::new("embedding.weight", [131, 48], vocab())];
        for l in 0..layers {
            let name = |leaf: &str| format!("layers.{l}.{leaf}.weight");
            all.extend([
                CanonicalTensor::new(name("input_norm"), [48], ShardRule::Replicated),
                CanonicalTensor::new(
                    name("attention.q_proj"),
                    [96, 48],
                    ShardRule::Heads { dim: 0, heads: 6 },
                ),
                CanonicalTensor::new(
                    name("attention.k_proj"),
                    [32, 48],
                    ShardRule::Heads { dim: 0, heads: 2 },
                ),
                CanonicalTensor::new(
                    name("attention.v_proj"),
                    [32, 48],
                    ShardRule::Heads { dim: 0, heads: 2 },
                ),
                CanonicalTensor::new(
                    name("attention.o_proj"),
                    [48, 96],
                    ShardRule::Heads { dim: 1, heads: 6 },
                ),
                CanonicalTensor::new(name("mlp_norm"), [48], ShardRule::Replicated),
                CanonicalTensor::new(name("mlp.gate_proj"), [80, 48], ShardRule::Split { dim: 0 }),
                CanonicalTensor::new(name("mlp.up_proj"), [80, 48], ShardRule::Split { dim: 0 }),
                CanonicalTensor::new(name("mlp.down_proj"), [48, 80], ShardRule::Split { dim: 1 }),
            ]);
        }
        all.push(CanonicalTensor::new(
            "final_norm.weight",
            [48],
            ShardRule::Replicated,
        ));
        all.push(CanonicalTensor::new("lm_head.weight", [131, 48], vocab()));
        all
    }

    fn count(tensors: &[CanonicalTensor]) -> u64 {
        tensors.iter().map(|tensor| tensor.numel() as u64).sum()
    }

    #[track_caller]
    fn memory(layout: LayoutSpec, spec: MemorySpec) -> Vec<RankMemory> {
        stage_memory(&model(4), 4, &layout, &spec).unwrap()
    }

    #[test]
    fn one_rank_holds_everything() {
        let n = count(&model(4));
        let found = memory(LayoutSpec::default(), SPEC);
        // Per token and layer: two norm inputs and two matrix inputs of 48, q, k, v, the attention's output, gate, up and
        // their product.
        let per_token = 4 * 48 + (96 + 32 + 32) + 96 + 3 * 80;
        let expected = RankMemory {
            weights: 2 * n,
            gradients: 4 * n,
            optimizer: 12 * n,
            activations: 2 * 4 * per_token * 128,
        };
        assert_eq!(found, [expected]);
        let fp32 = memory(LayoutSpec::default(), MemorySpec { bytes: 4, ..SPEC })[0];
        assert_eq!((fp32.weights, fp32.optimizer), (4 * n, 8 * n));
    }

    #[test]
    fn recomputation_keeps_less() {
        let kept = |recompute| {
            memory(LayoutSpec::default(), MemorySpec { recompute, ..SPEC })[0].activations
        };
        let tokens = 2 * 128;
        let whole = 4 * 48 + 160 + 96 + 240;
        let selective = 2 * 48 + 160 + 96 + 160;
        assert_eq!(
            kept(Recompute::Selective),
            tokens * (4 * selective + (whole - selective))
        );
        assert_eq!(kept(Recompute::Full), tokens * (4 * 48 + whole));
    }

    #[test]
    fn layouts_divide_what_they_should() {
        let one = memory(LayoutSpec::default(), SPEC)[0];
        // The optimizer's state over data and context parallel ranks, the rest copied; tokens over context parallel ones.
        let spec = MemorySpec {
            distributed_optimizer: true,
            ..SPEC
        };
        let found = memory(
            LayoutSpec {
                dp: 2,
                cp: 2,
                ..LayoutSpec::default()
            },
            spec,
        )[0];
        assert_eq!(
            (found.weights, found.gradients),
            (one.weights, one.gradients)
        );
        assert!(found.optimizer.abs_diff(one.optimizer / 4) < 100);
        assert_eq!(found.activations, one.activations / 2);
        // Sequence parallelism divides the norms' inputs too; the matrices' inputs stay whole.
        let found = memory(
            LayoutSpec {
                sp: true,
                ..LayoutSpec::tp_pp(2, 1)
            },
            SPEC,
        )[0];
        assert_eq!(
            found.activations,
            2 * 4 * 128 * (48 + 2 * 48 + 80 + 48 + 120)
        );
        // The first of two stages holds one more micro-batch than the second.
        let found = memory(LayoutSpec::tp_pp(1, 2), SPEC);
        assert_eq!(
            [found[0].activations, found[1].activations],
            [one.activations, one.activations / 2]
        );
        let few = memory(
            LayoutSpec::tp_pp(1, 2),
            MemorySpec {
                num_micro_batches: 1,
                ..SPEC
            },
        );
        assert_eq!(few[0].activations, one.activations / 2);
    }

    #[test]
    fn the_search_prefers_the_plainest_layout() {
        let tensors = model(4);
        let search = |limit| {
            layouts_that_fit(
                &tensors,
                4,
                8,
                8,
                limit,
                16,
                &MemorySpec {
                    distributed_optimizer: true,
                    ..SPEC
                },
            )
            .unwrap()
        };
        let all = search(u64::MAX);
        assert_eq!(
            all[0].layout,
            LayoutSpec {
                dp: 8,
                ..LayoutSpec::default()
            }
        );
        assert!(
            all.iter()
                .all(|fit| fit.layout.world_size() == 8 && fit.recompute == Recompute::None)
        );
        let plain = all[0].memory.total();
        let tight = search(plain / 2);
        assert!(!tight.is_empty() && tight.iter().all(|fit| fit.memory.total() <= plain / 2));
        assert!(search(1).is_empty());
        let odd = layouts_that_fit(&tensors, 4, 7, 8, u64::MAX, 16, &SPEC);
        assert!(
            odd.unwrap_err()
                .to_string()
                .contains("no layout of 7 ranks")
        );
    }
}
