//! Planning an export.

use std::collections::HashMap;

use super::TensorHeader;
use super::build::resolve;
use crate::bridge::ModelBridge;
use crate::config::DecoderConfig;
use crate::dtype::DType;
use crate::error::{Error, Problems, Result};
use crate::mapping::{ForeignRole, Mapping};

/// A checked plan of an export.
#[derive(Debug, Clone)]
pub struct ExportPlan {
    /// Model family.
    pub family: String,
    /// The correspondence of elements.
    pub mapping: Mapping,
    /// The stored dtype of each canonical tensor, in the order of the mapping.
    pub stored: Vec<DType>,
    /// The foreign tensors to write: index into the mapping's foreign tensors, and the dtype to write.
    pub written: Vec<(usize, DType)>,
}

impl ExportPlan {
    /// The headers of the tensors to write.
    pub fn headers(&self) -> impl Iterator<Item = TensorHeader> + '_ {
        self.written.iter().map(|(index, dtype)| {
            let tensor = &self.mapping.foreign[*index];
            TensorHeader::new(tensor.name.as_str(), *dtype, tensor.shape.as_slice())
        })
    }
}

/// Plans the export of a model whose canonical tensors are `stored`.
///
/// `dtype` is the type to write floating-point weights as; `None` keeps the stored ones. `had` says whether the
/// checkpoint that the model came from held a tensor; it decides how tied weights are written. Without it they are
/// written once.
///
/// # Errors
/// [`Error::Plan`] with every missing, unexpected and misfit tensor.
pub fn plan_export(
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
    stored: &[TensorHeader],
    dtype: Option<DType>,
    had: Option<&dyn Fn(&str) -> bool>,
) -> Result<ExportPlan> {
    let what = format!("cannot export as {}", bridge.name());
    let (canonical, mapping) = resolve(bridge, config, "the model's config")?;
    let mut problems = Problems::new();
    let mut by_name: HashMap<&str, &TensorHeader> =
        stored.iter().map(|h| (h.name.as_str(), h)).collect();
    let mut dtypes = Vec::with_capacity(canonical.len());
    for tensor in &canonical {
        let Some(header) = by_name.remove(tensor.name.as_str()) else {
            problems.push(format!(
                "tensor `{}` of shape {:?} is missing from the checkpoint",
                tensor.name, tensor.shape
            ));
            dtypes.push(DType::F32);
            continue;
        };
        if header.shape != tensor.shape {
            problems.push(format!(
                "{} has shape {:?}, expected {:?}",
                header.shown(),
                header.shape,
                tensor.shape
            ));
        }
        if !(header.dtype.is_float() && header.dtype.bytes().is_some()) {
            problems.push(format!(
                "{} has dtype {}, expected a floating-point type",
                header.shown(),
                header.dtype
            ));
        }
        dtypes.push(header.dtype);
    }
    // Only what the model lacks is left by now; by name, so that the message does not change from run to run.
    let mut unexpected: Vec<&TensorHeader> = by_name.into_values().collect();
    unexpected.sort_by(|a, b| a.name.cmp(&b.name));
    for header in unexpected {
        problems.push(format!(
            "{} of shape {:?} is not part of the model",
            header.shown(),
            header.shape
        ));
    }
    if dtype
        .is_some_and(|dtype| !matches!(dtype, DType::F64 | DType::F32 | DType::F16 | DType::BF16))
    {
        problems.push(format!(
            "dtype {} cannot be written; choose BF16, F16, F32 or F64",
            dtype.map_or("", DType::as_str)
        ));
    }
    let mut written = Vec::new();
    for (index, tensor) in mapping.foreign.iter().enumerate() {
        if !is_written(&mapping, index, had) {
            continue;
        }
        let mut parts = mapping
            .pieces_of_foreign(index)
            .map(|piece| dtypes[piece.canonical]);
        let first = parts.next().unwrap_or(DType::F32);
        let agree = parts.all(|other| other == first);
        if dtype.is_none() && !agree {
            problems.push(format!(
                "the parts of tensor `{}` are stored in different dtypes; choose one with the dtype option",
                tensor.name
            ));
        }
        written.push((index, dtype.unwrap_or(first)));
    }
    if problems.is_empty() {
        return Ok(ExportPlan {
            family: bridge.name().to_owned(),
            mapping,
            stored: dtypes,
            written,
        });
    }
    Err(Error::Plan { what, problems })
}

/// Whether a foreign tensor is written: weights always, unless the source stored them under a tied name only; tied
/// copies if the source had them.
fn is_written(mapping: &Mapping, index: usize, had: Option<&dyn Fn(&str) -> bool>) -> bool {
    let tensor = &mapping.foreign[index];
    let Some(had) = had else {
        return tensor.role == ForeignRole::Weight;
    };
    match tensor.role {
        ForeignRole::TiedCopy { .. } => had(&tensor.name),
        ForeignRole::Weight => {
            let second_name = |piece: &crate::mapping::Piece| {
                let other = &mapping.foreign[piece.foreign];
                other.role != ForeignRole::Weight && had(&other.name)
            };
            let covered =
                |canonical: usize| mapping.pieces_of_canonical(canonical).any(second_name);
            had(&tensor.name)
                || !mapping
                    .pieces_of_foreign(index)
                    .all(|piece| covered(piece.canonical))
        }
    }
}
