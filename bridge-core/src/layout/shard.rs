//! How a tensor is divided among the ranks of a pipeline stage.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{LayoutSpec, RankCoords};
use crate::error::{Error, Result};

/// How a canonical tensor is divided among the ranks of one pipeline stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardRule {
    /// Every rank holds it whole.
    Replicated,
    /// Cut evenly along `dim` by tensor parallelism: 0 is column parallel, 1 row parallel.
    Split {
        /// Dimension that is cut.
        dim: usize,
    },
    /// Vocabulary rows, padded at the end until they cut evenly.
    Vocab {
        /// Dimension that counts the vocabulary.
        dim: usize,
        /// Each rank's share is a multiple of this.
        multiple: usize,
    },
    /// Whole heads along `dim`; where tensor parallelism exceeds `heads`, each head is held by several ranks.
    Heads {
        /// Dimension that lists the heads.
        dim: usize,
        /// Number of heads; the dimension is a multiple of it.
        heads: usize,
    },
    /// Experts stacked along dimension 0: cut among expert parallel ranks, each expert by `inner` among the ranks of
    /// expert tensor parallelism.
    StackedExperts {
        /// Dimension cut inside an expert (counted in the stacked tensor), if any.
        inner: Option<usize>,
    },
    /// One expert of `count` in a tensor of its own, held by one expert parallel rank and cut as above.
    Expert {
        /// Which expert this is.
        index: usize,
        /// How many experts there are.
        count: usize,
        /// Dimension cut by expert tensor parallelism, if any.
        inner: Option<usize>,
    },
}

/// The part of a canonical tensor that a rank holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalSlice {
    /// Range of each dimension in the canonical tensor. An empty range means that the rank holds only padding.
    pub ranges: Vec<Range<usize>>,
    /// Shape on the rank: the extents of `ranges`, plus padding at the end where vocabulary rows were padded.
    pub local_shape: Vec<usize>,
    /// Whether this rank is the first of those that hold this part, and so the one to write it.
    pub owner: bool,
}

impl LocalSlice {
    /// How many elements of the canonical tensor the rank holds, padding not counted.
    pub fn numel(&self) -> usize {
        self.ranges.iter().map(|range| range.len()).product()
    }
}

impl ShardRule {
    /// What must divide what: (axis, degree, extent, what the extent counts).
    pub(super) fn demands(
        &self,
        layout: &LayoutSpec,
        shape: &[usize],
    ) -> Vec<(&'static str, usize, usize, &'static str)> {
        let extent = |dim: usize| shape.get(dim).copied().unwrap_or(0);
        let inner = |dim: &Option<usize>| {
            dim.map(|dim| ("etp", layout.etp, extent(dim), "rows or columns"))
        };
        match self {
            ShardRule::Replicated | ShardRule::Vocab { .. } => vec![],
            ShardRule::Split { dim } => vec![("tp", layout.tp, extent(*dim), "rows or columns")],
            ShardRule::Heads { heads, .. } => vec![("tp", layout.tp, *heads, "heads")],
            ShardRule::StackedExperts { inner: dim } => {
                let mut demands = vec![("ep", layout.ep, extent(0), "experts")];
                demands.extend(inner(dim));
                demands
            }
            ShardRule::Expert {
                count, inner: dim, ..
            } => {
                let mut demands = vec![("ep", layout.ep, *count, "experts")];
                demands.extend(inner(dim));
                demands
            }
        }
    }
}

/// The part of a tensor of `shape` that the rank at `coords` holds, given that its pipeline stage holds the tensor;
/// `None` if the rank holds nothing of it (another rank's expert).
///
/// # Errors
/// If the tensor cannot be cut that way; [`LayoutSpec::validate`] finds this for a whole model, with advice.
pub fn local_slice(
    rule: &ShardRule,
    shape: &[usize],
    layout: &LayoutSpec,
    coords: &RankCoords,
) -> Result<Option<LocalSlice>> {
    let first_copy = coords.cp == 0 && coords.dp == 0;
    let mut slice = LocalSlice {
        ranges: shape.iter().map(|extent| 0..*extent).collect(),
        local_shape: shape.to_vec(),
        owner: first_copy && coords.tp == 0,
    };
    let mut cut = |dim: usize, parts: usize, index: usize| -> Result<()> {
        let extent = shape.get(dim).copied().unwrap_or(0);
        if parts == 0 || extent % parts != 0 {
            return Err(Error::InvalidArgument(format!(
                "dimension {dim} of a tensor of shape {shape:?} cannot be cut into {parts} equal parts"
            )));
        }
        let size = extent / parts;
        slice.ranges[dim] = index * size..(index + 1) * size;
        slice.local_shape[dim] = size;
        Ok(())
    };
    match rule {
        ShardRule::Replicated => {}
        ShardRule::Split { dim } => {
            cut(*dim, layout.tp, coords.tp)?;
            slice.owner = first_copy;
        }
        ShardRule::Heads { dim, heads } => {
            if layout.tp <= *heads {
                // Whole heads per rank: a cut through the middle of a head must not pass.
                let parts_fit = heads % layout.tp == 0;
                cut(*dim, if parts_fit { layout.tp } else { 0 }, coords.tp)?;
                slice.owner = first_copy;
            } else {
                let copies = if *heads > 0 && layout.tp.is_multiple_of(*heads) {
                    layout.tp / heads
                } else {
                    0
                };
                cut(
                    *dim,
                    if copies > 0 { *heads } else { 0 },
                    coords.tp / copies.max(1),
                )?;
                slice.owner = first_copy && coords.tp.is_multiple_of(copies.max(1));
            }
        }
        ShardRule::Vocab { dim, multiple } => {
            let Some(extent) = shape.get(*dim).copied() else {
                return Err(Error::InvalidArgument(format!(
                    "tensor of shape {shape:?} has no dimension {dim}"
                )));
            };
            let multiple = (*multiple).max(1);
            let share = extent.div_ceil(layout.tp).div_ceil(multiple) * multiple;
            let start = (coords.tp * share).min(extent);
            slice.ranges[*dim] = start..(start + share).min(extent);
            slice.local_shape[*dim] = share;
            slice.owner = first_copy;
        }
        ShardRule::StackedExperts { inner } => {
            cut(0, layout.ep, coords.ep)?;
            if let Some(dim) = inner {
                cut(*dim, layout.etp, coords.etp)?;
            }
            slice.owner = coords.edp == 0 && (inner.is_some() || coords.etp == 0);
        }
        ShardRule::Expert {
            index,
            count,
            inner,
        } => {
            if *count == 0 || count % layout.ep != 0 {
                return Err(Error::InvalidArgument(format!(
                    "{count} experts cannot be divided among ep={} ranks",
                    layout.ep
                )));
            }
            if index / (count / layout.ep) != coords.ep {
                return Ok(None);
            }
            if let Some(dim) = inner {
                cut(*dim, layout.etp, coords.etp)?;
            }
            slice.owner = coords.edp == 0 && (inner.is_some() || coords.etp == 0);
        }
    }
    Ok(Some(slice))
}
