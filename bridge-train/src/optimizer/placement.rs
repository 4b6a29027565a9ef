//! Which of the ranks that hold a weight does what about it: counts it in a norm, writes it to disk, sums its gradient.

use std::collections::HashMap;

use bridge_ops::{GradReduction, Ops, Param};
use bridge_parallel::{Axis, ParallelContext};

use crate::error::{Error, Result};

/// What this rank is to a weight that it holds, or holds a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// The group whose ranks hold the same elements and have seen other data: data and context parallel, or the experts'
    /// data parallel.
    pub replicas: Axis,
    /// Whether the elements here are counted in norms and written to disk by this rank's replica group, rather than by
    /// tensor-parallel neighbours or another pipeline stage that hold them as well.
    pub counts: bool,
    /// Whether this rank is the first of its replica group.
    pub first_replica: bool,
    /// Whether another pipeline stage holds the weight as well, as of a tied embedding.
    pub tied_across_stages: bool,
    /// Whether the gradient needs a sum over other ranks than replicas before it is complete.
    pub incomplete: bool,
}

impl Placement {
    /// Whether this rank writes the elements here.
    pub fn writes(&self) -> bool {
        self.counts && self.first_replica
    }
}

/// The placement of each of `params`. Every rank calls this, with all weights it holds.
///
/// # Errors
/// If the ranks do not hold what they should.
pub fn placements<B: Ops>(
    params: &[Param<B>],
    parallel: &ParallelContext<B>,
) -> Result<Vec<Placement>> {
    let shared = shared_between_stages(params, parallel)?;
    let mut found: Vec<Placement> = params
        .iter()
        .zip(&shared)
        .map(|(param, shared)| {
            let reduction = param.shard().map_or(GradReduction::None, |s| s.reduction);
            let replicas = if reduction.is_expert() {
                Axis::Edp
            } else {
                Axis::DpCp
            };
            Placement {
                replicas,
                counts: false,
                first_replica: parallel.group(replicas).rank() == 0,
                tied_across_stages: shared.is_some(),
                incomplete: shared.is_some()
                    || !matches!(reduction, GradReduction::None | GradReduction::Expert),
            }
        })
        .collect();
    let coords = parallel.coords();
    let alone = (coords.tp, coords.cp, coords.dp) == (0, 0, 0);
    let owned = |param: &Param<B>| param.shard().map_or(alone, |shard| shard.owner);
    for axis in [Axis::DpCp, Axis::Edp] {
        let of_axis: Vec<usize> = (0..params.len())
            .filter(|index| found[*index].replicas == axis)
            .collect();
        let group = parallel.group(axis);
        let line = |index: &usize| {
            let param = &params[*index];
            let owned = if owned(param) { 'o' } else { '-' };
            format!("{owned} {} {:?}", param.name(), param.shape())
        };
        let own: Vec<String> = of_axis.iter().map(line).collect();
        if group.size() == 1 {
            for index in of_axis {
                found[index].counts = owned(&params[index]);
            }
            continue;
        }
        // Whether a replica group owns its elements is what its first rank says: the others are copies.
        let all = group.all_gather_bytes(own.join("\n").as_bytes())?;
        let first = String::from_utf8_lossy(&all[0]).into_owned();
        let first: Vec<&str> = if first.is_empty() {
            Vec::new()
        } else {
            first.split('\n').collect()
        };
        let same = first.len() == own.len()
            && first
                .iter()
                .zip(&own)
                .all(|(a, b)| a.get(1..) == b.get(1..));
        if !same {
            return Err(Error::Parallel(format!(
                "ranks {} and {} are copies of each other along {} but hold different weights; every rank must be given \
                 the same model and configuration",
                group.ranks()[0],
                parallel.rank(),
                axis.name()
            )));
        }
        for (index, line) in of_axis.into_iter().zip(first) {
            found[index].counts = line.starts_with('o');
        }
    }
    for (placement, shared) in found.iter_mut().zip(shared) {
        placement.counts &= shared.is_none_or(|first| first == coords.pp);
    }
    Ok(found)
}

/// For each weight, the first stage that holds it, if several do.
fn shared_between_stages<B: Ops>(
    params: &[Param<B>],
    parallel: &ParallelContext<B>,
) -> Result<Vec<Option<usize>>> {
    let stages = parallel.layout().pp;
    if stages == 1 {
        return Ok(vec![None; params.len()]);
    }
    let own: Vec<&str> = params.iter().map(Param::name).collect();
    let all = parallel
        .group(Axis::Pp)
        .all_gather_bytes(own.join("\n").as_bytes())?;
    let mut holders: HashMap<String, Vec<usize>> = HashMap::new();
    for (stage, names) in all.iter().enumerate() {
        for name in String::from_utf8_lossy(names).lines() {
            holders.entry(name.to_owned()).or_default().push(stage);
        }
    }
    own.iter()
        .map(|name| match holders.get(*name).map(Vec::as_slice) {
            None | Some([_]) => Ok(None),
            Some([0, last]) if last + 1 == stages => Ok(Some(0)),
            Some(stages) => Err(Error::Parallel(format!(
                "weight `{name}` is held by the pipeline stages {stages:?}; only the first and the last may share one"
            ))),
        })
        .collect()
}
