//! What each rank of a layout holds.

use std::collections::HashMap;

use serde::Serialize;

use super::PlannedTensor;
use crate::error::Result;
use crate::layout::{LayoutSpec, PipelineSplit, RankCoords, ShardRule, local_slice};

/// What one rank holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RankPlan {
    /// Global rank.
    pub rank: usize,
    /// Where it stands on each axis.
    pub coords: RankCoords,
    /// Number of tensors of which it holds a part.
    pub tensors: usize,
    /// Bytes of the checkpoint that it reads; padding is not counted.
    pub bytes: u64,
}

/// Ranks that agree on these hold the same: (stage, tp rank) for dense tensors, (stage, etp rank, ep rank) for experts.
#[derive(PartialEq, Eq, Hash)]
enum Class {
    Dense(usize, usize),
    Experts(usize, usize, usize),
}

pub(super) fn plan_ranks(
    tensors: &[PlannedTensor],
    num_layers: usize,
    layout: &LayoutSpec,
) -> Result<Vec<RankPlan>> {
    let split = PipelineSplit::even(layout, num_layers)?;
    let mut by_stage: Vec<Vec<&PlannedTensor>> = vec![Vec::new(); layout.pp];
    for tensor in tensors {
        for stage in split.stages(tensor.place) {
            by_stage[stage].push(tensor);
        }
    }
    // Thousands of ranks hold the same few sets, so each set is measured once.
    let mut measured: HashMap<Class, (usize, u64)> = HashMap::new();
    let mut ranks = Vec::with_capacity(layout.world_size());
    for rank in 0..layout.world_size() {
        let coords = layout.coords(rank);
        let mut plan = RankPlan {
            rank,
            coords,
            tensors: 0,
            bytes: 0,
        };
        for experts in [false, true] {
            let class = if experts {
                Class::Experts(coords.pp, coords.etp, coords.ep)
            } else {
                Class::Dense(coords.pp, coords.tp)
            };
            let (count, bytes) = match measured.get(&class) {
                Some(known) => *known,
                None => {
                    let sum = measure(&by_stage[coords.pp], experts, layout, &coords)?;
                    measured.insert(class, sum);
                    sum
                }
            };
            plan.tensors += count;
            plan.bytes += bytes;
        }
        ranks.push(plan);
    }
    Ok(ranks)
}

fn measure(
    tensors: &[&PlannedTensor],
    experts: bool,
    layout: &LayoutSpec,
    coords: &RankCoords,
) -> Result<(usize, u64)> {
    let is_expert = |rule: &ShardRule| {
        matches!(
            rule,
            ShardRule::Expert { .. } | ShardRule::StackedExperts { .. }
        )
    };
    let mut sum = (0, 0);
    for tensor in tensors
        .iter()
        .filter(|tensor| is_expert(&tensor.shard) == experts)
    {
        if let Some(slice) = local_slice(&tensor.shard, &tensor.shape, layout, coords)? {
            sum.0 += usize::from(slice.numel() > 0);
            sum.1 += slice.numel() as u64 * tensor.dtype.bits() as u64 / 8;
        }
    }
    Ok(sum)
}
