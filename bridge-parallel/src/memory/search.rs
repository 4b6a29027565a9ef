//! Which layouts fit a number of GPUs and their memory.

use bridge_core::DecoderConfig;
use bridge_core::layout::LayoutSpec;
use serde::Serialize;

use super::{MemorySpec, RankMemory, Recompute, stage_memory};
use crate::error::{Error, Result};

/// What a search looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchLimits {
    /// Number of ranks.
    pub ranks: usize,
    /// Ranks of one host: tensor parallelism stays within the fast links inside it.
    pub per_host: usize,
    /// Bytes that a rank may need.
    pub bytes: u64,
    /// Samples of a step over all ranks, of which each data-parallel rank gets an equal number of micro-batches.
    pub global_batch: usize,
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

/// Layouts in which every rank stays within `limits`, the likeliest to be fast first: those that recompute less, then those
/// that divide the model less (tensor parallelism costs more than expert, context and pipeline parallelism), then those
/// that need less memory. Pipeline stages get an even split, whatever `spec` says.
///
/// # Errors
/// If the model fits no layout at all for another reason than memory.
pub fn layouts_that_fit(
    config: &DecoderConfig,
    limits: &SearchLimits,
    spec: &MemorySpec,
) -> Result<Vec<Fit>> {
    let SearchLimits {
        ranks,
        per_host,
        bytes,
        global_batch,
    } = *limits;
    let divisors = |n: usize| (1..=n).filter(move |d| n.is_multiple_of(*d));
    let mut found = Vec::new();
    let mut legal = 0;
    for tp in divisors(ranks).filter(|tp| *tp <= per_host) {
        for pp in divisors(ranks / tp).filter(|pp| *pp <= config.num_hidden_layers) {
            for cp in
                divisors(ranks / tp / pp).filter(|cp| spec.seq.is_multiple_of(2 * cp) || *cp == 1)
            {
                let dp = ranks / tp / pp / cp;
                if !global_batch.is_multiple_of(dp * spec.micro_batch) {
                    continue;
                }
                let num_micro_batches = global_batch / (dp * spec.micro_batch);
                for ep in divisors(tp * cp * dp).filter(|ep| config.moe.is_some() || *ep == 1) {
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
                            split: None,
                            ..spec.clone()
                        };
                        let Ok(stages) = stage_memory(config, &layout, &spec) else {
                            break;
                        };
                        legal += 1;
                        let Some(memory) = stages.into_iter().max_by_key(|stage| stage.peak) else {
                            break;
                        };
                        if memory.peak <= bytes {
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
        (fit.recompute, cost, fit.memory.peak)
    });
    Ok(found)
}
