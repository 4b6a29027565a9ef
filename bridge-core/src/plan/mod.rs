//! Conversion plans: what goes where, worked out in milliseconds from a config and tensor headers alone.
//!
//! A plan exists only if everything fits: every foreign tensor is used exactly once or ignored for a stated reason,
//! every canonical tensor is filled, every shape and dtype agrees. Otherwise planning fails with all findings, before a
//! weight byte is read or written.

mod build;
mod export;
mod print;
mod ranks;

use serde::Serialize;

pub use build::{plan_from_shapes, plan_import};
pub use export::{ExportPlan, WrittenTensor, plan_export};
pub use ranks::RankPlan;

use crate::checkpoint::{TensorInfo, quote};
use crate::config::DecoderConfig;
use crate::dtype::DType;
use crate::layout::{LayoutSpec, Place, ShardRule};
use crate::mapping::{ForeignRole, Mapping, Piece};
use crate::quant::Quantized;

/// What a plan needs to know of a stored tensor. Weights are not needed: made-up headers plan as well as real ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorHeader {
    /// Name, as stored.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// File that holds it, for messages.
    pub file: Option<String>,
}

impl TensorHeader {
    /// A header that belongs to no file.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
            file: None,
        }
    }

    /// Size of the tensor's data. Validated headers never overflow; others saturate.
    pub fn bytes(&self) -> u64 {
        self.dtype.byte_len(&self.shape).unwrap_or(u64::MAX)
    }

    /// The tensor in words, for messages: its name, and its file where known.
    pub(crate) fn shown(&self) -> String {
        match &self.file {
            Some(file) => format!("tensor {} in {file}", quote(&self.name)),
            None => format!("tensor {}", quote(&self.name)),
        }
    }
}

/// One canonical tensor of a plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedTensor {
    /// Canonical name.
    pub canonical: String,
    /// Names in the foreign checkpoint of the tensors that hold its elements.
    pub foreign: Vec<String>,
    /// Canonical shape.
    pub shape: Vec<usize>,
    /// Element type as stored on the canonical side.
    pub dtype: DType,
    /// How the two sides correspond: copy, map, fused, stacked, unstacked; dequantized where the other side is
    /// quantized.
    pub op: &'static str,
    /// How ranks divide it.
    pub shard: ShardRule,
    /// Which pipeline stage holds it.
    pub place: Place,
    /// Size of the whole tensor.
    pub bytes: u64,
}

/// A foreign tensor that the model does not use.
#[derive(Debug, Clone, Serialize)]
pub struct IgnoredTensor {
    /// Its name.
    pub name: String,
    /// Why it is not needed.
    pub reason: String,
    /// Its size.
    pub bytes: u64,
}

/// A second name of a tied weight.
#[derive(Debug, Clone, Serialize)]
pub struct TiedTensor {
    /// The name in the foreign checkpoint.
    pub name: String,
    /// The canonical tensor that it repeats.
    pub canonical: String,
    /// Whether the checkpoint holds it.
    pub present: bool,
}

/// A checked plan of an import. Prints as a table; serializes to JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Model family.
    pub family: String,
    /// The layout that `ranks` is about.
    pub layout: LayoutSpec,
    /// Number of parameters, tied ones counted once.
    pub parameters: u64,
    /// Size of the canonical tensors.
    pub total_bytes: u64,
    /// The canonical tensors, in the order of the forward pass.
    pub tensors: Vec<PlannedTensor>,
    /// Second names of tied weights.
    pub tied: Vec<TiedTensor>,
    /// Foreign tensors that are not used.
    pub ignored: Vec<IgnoredTensor>,
    /// What each rank holds.
    pub ranks: Vec<RankPlan>,
    /// The typed config.
    pub config: DecoderConfig,
    #[serde(skip)]
    pub(crate) mapping: Mapping,
    /// For each foreign tensor of the mapping, whether the checkpoint holds it.
    #[serde(skip)]
    pub(crate) present: Vec<bool>,
    /// For each foreign tensor of the mapping, how it is stored if it is quantized.
    #[serde(skip)]
    pub(crate) quantized: Vec<Option<Quantized>>,
}

impl Plan {
    /// The checked correspondence of elements.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Whether the checkpoint holds quantized tensors, which become floating-point ones.
    pub fn is_quantized(&self) -> bool {
        self.quantized.iter().any(Option::is_some)
    }

    /// How each quantized tensor of the checkpoint is stored.
    pub fn quantized_parts(&self) -> impl Iterator<Item = &Quantized> {
        self.quantized.iter().flatten()
    }

    /// The pieces that fill canonical tensor number `canonical` (index into [`Plan::tensors`]), each element once.
    pub fn sources(&self, canonical: usize) -> Vec<&Piece> {
        sources(&self.mapping, &self.present, canonical)
    }
}

/// The pieces that fill a canonical tensor: those of its own foreign tensors if they are there, else those of a tied
/// copy, which holds the same elements.
pub(crate) fn sources<'a>(
    mapping: &'a Mapping,
    present: &[bool],
    canonical: usize,
) -> Vec<&'a Piece> {
    let role = |piece: &Piece| mapping.foreign[piece.foreign].role;
    let own: Vec<&Piece> = mapping
        .pieces_of_canonical(canonical)
        .filter(|piece| role(piece) == ForeignRole::Weight)
        .collect();
    if own.iter().any(|piece| present[piece.foreign]) {
        return own;
    }
    // All tied copies of one tensor hold all of it; the first that is there serves.
    let copies = |piece: &&Piece| role(piece) != ForeignRole::Weight && present[piece.foreign];
    let Some(first) = mapping
        .pieces_of_canonical(canonical)
        .find(copies)
        .map(|piece| piece.foreign)
    else {
        return own;
    };
    mapping
        .pieces_of_canonical(canonical)
        .filter(|piece| piece.foreign == first)
        .collect()
}

impl From<&TensorInfo> for TensorHeader {
    fn from(info: &TensorInfo) -> Self {
        Self {
            name: info.name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            file: None,
        }
    }
}

#[cfg(test)]
mod tests;
