//! Parallel layouts as plain numbers: which rank holds which part of which tensor.
//!
//! Ranks are counted as Megatron-Core counts them: tensor parallel fastest, then context, then data, then pipeline.
//! Expert parallelism folds over the same ranks: inside a pipeline stage, expert-tensor parallel is fastest, then
//! expert parallel, and what remains is the experts' data parallelism.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::bridge::CanonicalTensor;
use crate::error::{Error, Problems, Result};

/// Degrees of parallelism. Every degree is at least 1; the default is one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LayoutSpec {
    /// Tensor parallel size.
    pub tp: usize,
    /// Pipeline parallel size.
    pub pp: usize,
    /// Model chunks per pipeline stage (virtual pipeline, interleaved schedule).
    pub vpp: usize,
    /// Context parallel size.
    pub cp: usize,
    /// Expert parallel size.
    pub ep: usize,
    /// Tensor parallel size inside an expert.
    pub etp: usize,
    /// Data parallel size of everything but the experts.
    pub dp: usize,
    /// Whether activations between tensor-parallel blocks are split along the sequence.
    pub sp: bool,
}

impl Default for LayoutSpec {
    fn default() -> Self {
        Self { tp: 1, pp: 1, vpp: 1, cp: 1, ep: 1, etp: 1, dp: 1, sp: false }
    }
}

impl fmt::Display for LayoutSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let degrees = [
            ("tp", self.tp),
            ("pp", self.pp),
            ("vpp", self.vpp),
            ("cp", self.cp),
            ("ep", self.ep),
            ("etp", self.etp),
            ("dp", self.dp),
        ];
        let mut shown = degrees.iter().filter(|(_, degree)| *degree != 1).peekable();
        if shown.peek().is_none() {
            return f.write_str("single rank");
        }
        for (index, (name, degree)) in shown.enumerate() {
            write!(f, "{}{name}={degree}", if index == 0 { "" } else { " " })?;
        }
        if self.sp { f.write_str(" sp") } else { Ok(()) }
    }
}

/// Where a rank stands on each axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct RankCoords {
    /// Tensor parallel rank.
    pub tp: usize,
    /// Context parallel rank.
    pub cp: usize,
    /// Data parallel rank.
    pub dp: usize,
    /// Pipeline stage.
    pub pp: usize,
    /// Rank inside an expert's tensor parallel group.
    pub etp: usize,
    /// Expert parallel rank.
    pub ep: usize,
    /// Data parallel rank of the experts.
    pub edp: usize,
}

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

/// In which pipeline stage a canonical tensor lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// The first stage (embeddings).
    First,
    /// The stage of a decoder layer.
    Layer(usize),
    /// The last stage (final norm, output head).
    Last,
    /// Both ends, because an embedding is the output head as well.
    FirstAndLast,
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

impl LayoutSpec {
    /// Tensor and pipeline parallel only.
    pub fn tp_pp(tp: usize, pp: usize) -> Self {
        Self { tp, pp, ..Self::default() }
    }

    /// The same layout with the fewest data parallel replicas on which its expert axes fit, at least `dp`.
    pub fn with_room_for_experts(mut self) -> Self {
        let (dense, experts) = (self.tp * self.cp, self.etp * self.ep);
        if dense > 0 && experts > 0 {
            // The smallest dp >= self.dp with experts | dense * dp.
            let step = experts / gcd(experts, dense);
            self.dp = self.dp.div_ceil(step) * step;
        }
        self
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.tp * self.cp * self.dp * self.pp
    }

    /// Ranks of one pipeline stage.
    fn stage_size(&self) -> usize {
        self.tp * self.cp * self.dp
    }

    /// Where global rank `rank` stands.
    ///
    /// # Panics
    /// If `rank` is not below [`LayoutSpec::world_size`].
    pub fn coords(&self, rank: usize) -> RankCoords {
        assert!(rank < self.world_size(), "rank {rank} of a layout of {} ranks", self.world_size());
        let in_stage = rank % self.stage_size();
        RankCoords {
            tp: in_stage % self.tp,
            cp: in_stage / self.tp % self.cp,
            dp: in_stage / (self.tp * self.cp),
            pp: rank / self.stage_size(),
            etp: in_stage % self.etp,
            ep: in_stage / self.etp % self.ep,
            edp: in_stage / (self.etp * self.ep),
        }
    }

    /// The global rank at the dense coordinates of `coords` (`tp`, `cp`, `dp`, `pp`).
    pub fn rank(&self, coords: &RankCoords) -> usize {
        ((coords.pp * self.dp + coords.dp) * self.cp + coords.cp) * self.tp + coords.tp
    }

    /// Checks the degrees against each other and against the tensors of a model.
    ///
    /// # Errors
    /// [`Error::Layout`] with every finding, each with the nearest legal degree.
    pub fn validate(&self, tensors: &[CanonicalTensor], num_layers: usize) -> Result<()> {
        let mut problems = Problems::new();
        self.check_degrees(num_layers, &mut problems);
        if problems.is_empty() {
            self.check_tensors(tensors, &mut problems);
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Layout { layout: self.to_string(), problems })
    }

    fn check_degrees(&self, num_layers: usize, problems: &mut Problems) {
        // Beyond any machine, and low enough that the product of all degrees fits 64 bits with ease.
        const MAX_DEGREE: usize = 1 << 14;
        for (name, degree) in [
            ("tp", self.tp),
            ("pp", self.pp),
            ("vpp", self.vpp),
            ("cp", self.cp),
            ("ep", self.ep),
            ("etp", self.etp),
            ("dp", self.dp),
        ] {
            if degree == 0 || degree > MAX_DEGREE {
                problems.push(format!("{name} is {degree}, expected 1 to {MAX_DEGREE}"));
            }
        }
        if !problems.is_empty() {
            return;
        }
        // Plans list every rank.
        const MAX_RANKS: usize = 1 << 20;
        if self.world_size() > MAX_RANKS {
            problems.push(format!("it has {} ranks, more than {MAX_RANKS}; lower dp or cp", self.world_size()));
        }
        if self.pp * self.vpp > num_layers {
            problems.push(format!(
                "pp={} times vpp={} is more than the model's {num_layers} layers; the most is {}",
                self.pp,
                self.vpp,
                if self.vpp > 1 { format!("vpp={}", (num_layers / self.pp).max(1)) } else { format!("pp={num_layers}") },
            ));
        }
        if self.vpp > 1 && self.pp == 1 {
            problems.push(format!("vpp={} needs pipeline stages to interleave; set pp above 1, or vpp=1", self.vpp));
        }
        let experts = self.etp * self.ep;
        if !self.stage_size().is_multiple_of(experts) {
            problems.push(format!(
                "etp={} times ep={} does not divide the {} ranks of a pipeline stage (tp*cp*dp); the nearest is dp={}",
                self.etp,
                self.ep,
                self.stage_size(),
                self.with_room_for_experts().dp
            ));
        }
    }

    fn check_tensors(&self, tensors: &[CanonicalTensor], problems: &mut Problems) {
        let mut has_experts = false;
        // One finding per cause, not one per layer.
        let mut seen: Vec<(&'static str, usize)> = Vec::new();
        for tensor in tensors {
            for (axis, degree, extent, what) in tensor.shard.demands(self, &tensor.shape) {
                let fits = extent % degree == 0 || (what == "heads" && degree % extent.max(1) == 0);
                if fits || seen.contains(&(axis, extent)) {
                    continue;
                }
                seen.push((axis, extent));
                let legal = nearest_legal(degree, |d| extent % d == 0 || (what == "heads" && d % extent.max(1) == 0));
                problems.push(format!(
                    "{axis}={degree} does not divide the {extent} {what} of `{}`; the nearest legal is {legal}",
                    tensor.name
                ));
            }
            has_experts |= matches!(tensor.shard, ShardRule::Expert { .. } | ShardRule::StackedExperts { .. });
        }
        if !has_experts && self.ep > 1 {
            problems.push(format!("ep={} on a model without experts; set ep=1", self.ep));
        }
    }
}

/// The legal degree closest to `degree`, the lower of two as close; both neighbours if they differ.
fn nearest_legal(degree: usize, legal: impl Fn(usize) -> bool) -> String {
    let below = (1..degree).rev().find(|d| legal(*d)).unwrap_or(1);
    match (degree + 1..=degree.saturating_mul(2)).find(|d| legal(*d)) {
        Some(above) => format!("{below} or {above}"),
        None => below.to_string(),
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl ShardRule {
    /// What must divide what: (axis, degree, extent, what the extent counts).
    fn demands(&self, layout: &LayoutSpec, shape: &[usize]) -> Vec<(&'static str, usize, usize, &'static str)> {
        let extent = |dim: usize| shape.get(dim).copied().unwrap_or(0);
        let inner = |dim: &Option<usize>| dim.map(|dim| ("etp", layout.etp, extent(dim), "rows or columns"));
        match self {
            ShardRule::Replicated | ShardRule::Vocab { .. } => vec![],
            ShardRule::Split { dim } => vec![("tp", layout.tp, extent(*dim), "rows or columns")],
            ShardRule::Heads { heads, .. } => vec![("tp", layout.tp, *heads, "heads")],
            ShardRule::StackedExperts { inner: dim } => {
                let mut demands = vec![("ep", layout.ep, extent(0), "experts")];
                demands.extend(inner(dim));
                demands
            }
            ShardRule::Expert { count, inner: dim, .. } => {
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
                let copies = if *heads > 0 && layout.tp.is_multiple_of(*heads) { layout.tp / heads } else { 0 };
                cut(*dim, if copies > 0 { *heads } else { 0 }, coords.tp / copies.max(1))?;
                slice.owner = first_copy && coords.tp.is_multiple_of(copies.max(1));
            }
        }
        ShardRule::Vocab { dim, multiple } => {
            let Some(extent) = shape.get(*dim).copied() else {
                return Err(Error::InvalidArgument(format!("tensor of shape {shape:?} has no dimension {dim}")));
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
        ShardRule::Expert { index, count, inner } => {
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

/// Which pipeline stage, and which chunk of it, runs which decoder layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineSplit {
    /// First layer of each chunk in the order of the forward pass, and the number of layers at the end:
    /// chunk `c` is run by stage `c % pp`.
    bounds: Vec<usize>,
    pp: usize,
}

impl PipelineSplit {
    /// Chunks of equal length; what does not divide goes one layer each to the earliest chunks, since the last stage
    /// has the output head to run.
    ///
    /// # Errors
    /// If there are more chunks than layers.
    pub fn even(layout: &LayoutSpec, num_layers: usize) -> Result<Self> {
        let chunks = layout.pp * layout.vpp;
        if chunks == 0 || chunks > num_layers {
            return Err(Error::InvalidArgument(format!(
                "{num_layers} layers cannot be divided among pp={} times vpp={} chunks",
                layout.pp, layout.vpp
            )));
        }
        let (share, rest) = (num_layers / chunks, num_layers % chunks);
        let sizes: Vec<usize> = (0..chunks).map(|chunk| share + usize::from(chunk < rest)).collect();
        Self::uneven(layout, num_layers, &sizes)
    }

    /// Chunks of the given lengths, in the order of the forward pass. A chunk may be empty: the first and last also
    /// hold the embedding and the head.
    ///
    /// # Errors
    /// If there is not one length per chunk, or they do not add up to `num_layers`.
    pub fn uneven(layout: &LayoutSpec, num_layers: usize, sizes: &[usize]) -> Result<Self> {
        let chunks = layout.pp * layout.vpp;
        let total: usize = sizes.iter().fold(0, |sum, size| sum.saturating_add(*size));
        if sizes.len() != chunks || total != num_layers {
            return Err(Error::InvalidArgument(format!(
                "pipeline split {sizes:?} has {} chunks of {total} layers, expected {chunks} (pp={} times vpp={}) of \
                 {num_layers}",
                sizes.len(),
                layout.pp,
                layout.vpp
            )));
        }
        let mut bounds = vec![0];
        for size in sizes {
            bounds.push(bounds[bounds.len() - 1] + size);
        }
        Ok(Self { bounds, pp: layout.pp })
    }

    /// Number of chunks: stages times chunks per stage.
    pub fn num_chunks(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The decoder layers of chunk `chunk` (in the order of the forward pass).
    pub fn layers(&self, chunk: usize) -> Range<usize> {
        self.bounds[chunk]..self.bounds[chunk + 1]
    }

    /// The stage that runs `layer`; layers beyond the last belong to the last stage.
    pub fn stage_of_layer(&self, layer: usize) -> usize {
        let chunk = self.bounds.partition_point(|start| *start <= layer);
        chunk.clamp(1, self.num_chunks()).saturating_sub(1) % self.pp
    }

    /// The stages that hold a tensor of `place`, lowest first.
    pub fn stages(&self, place: Place) -> Vec<usize> {
        let last = (self.num_chunks() - 1) % self.pp;
        match place {
            Place::First => vec![0],
            Place::Layer(layer) => vec![self.stage_of_layer(layer)],
            Place::Last => vec![last],
            Place::FirstAndLast if last == 0 => vec![0],
            Place::FirstAndLast => vec![0, last],
        }
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
