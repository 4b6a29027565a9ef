//! Parallel layouts as plain numbers: which rank holds which part of which tensor.
//!
//! Ranks are counted as Megatron-Core counts them: tensor parallel fastest, then context, then data, then pipeline.
//! Expert parallelism folds over the same ranks: inside a pipeline stage, expert-tensor parallel is fastest, then
//! expert parallel, and what remains is the experts' data parallelism.

mod pipeline;
mod pipeline_text;
mod shard;

pub use pipeline::{PipelineSplit, Place};
pub use shard::{LocalSlice, ShardRule, local_slice};

use std::fmt;

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
        Self {
            tp: 1,
            pp: 1,
            vpp: 1,
            cp: 1,
            ep: 1,
            etp: 1,
            dp: 1,
            sp: false,
        }
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

impl LayoutSpec {
    /// Tensor and pipeline parallel only.
    pub fn tp_pp(tp: usize, pp: usize) -> Self {
        Self {
            tp,
            pp,
            ..Self::default()
        }
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
        assert!(
            rank < self.world_size(),
            "rank {rank} of a layout of {} ranks",
            self.world_size()
        );
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
        Err(Error::Layout {
            layout: self.to_string(),
            problems,
        })
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
            problems.push(format!(
                "it has {} ranks, more than {MAX_RANKS}; lower dp or cp",
                self.world_size()
            ));
        }
        if self.pp * self.vpp > num_layers {
            problems.push(format!(
                "pp={} times vpp={} is more than the model's {num_layers} layers; the most is {}",
                self.pp,
                self.vpp,
                if self.vpp > 1 {
                    format!("vpp={}", (num_layers / self.pp).max(1))
                } else {
                    format!("pp={num_layers}")
                },
            ));
        }
        if self.vpp > 1 && self.pp == 1 {
            problems.push(format!(
                "vpp={} needs pipeline stages to interleave; set pp above 1, or vpp=1",
                self.vpp
            ));
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
                let legal = nearest_legal(degree, |d| {
                    extent % d == 0 || (what == "heads" && d % extent.max(1) == 0)
                });
                problems.push(format!(
                    "{axis}={degree} does not divide the {extent} {what} of `{}`; the nearest legal is {legal}",
                    tensor.name
                ));
            }
            has_experts |= matches!(
                tensor.shard,
                ShardRule::Expert { .. } | ShardRule::StackedExperts { .. }
            );
        }
        if !has_experts && self.ep > 1 {
            problems.push(format!(
                "ep={} on a model without experts; set ep=1",
                self.ep
            ));
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

#[cfg(test)]
mod tests;
