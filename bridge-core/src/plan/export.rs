//! Planning an export.

use std::collections::{HashMap, HashSet};

use super::TensorHeader;
use super::build::resolve;
use crate::bridge::ModelBridge;
use crate::config::DecoderConfig;
use crate::dtype::DType;
use crate::error::{Error, Problems, Result};
use crate::mapping::{ForeignRole, Mapping};
use crate::quant::{Quantized, StoredPart};

/// A checked plan of an export.
#[derive(Debug, Clone)]
pub struct ExportPlan {
    /// Model family.
    pub family: String,
    /// The correspondence of elements.
    pub mapping: Mapping,
    /// The stored dtype of each canonical tensor, in the order of the mapping.
    pub stored: Vec<DType>,
    /// Whether weights are written in a type that was asked for, so that they may be rounded.
    pub rounds: bool,
    /// The foreign tensors to write.
    pub written: Vec<WrittenTensor>,
}

/// A foreign tensor of an export.
#[derive(Debug, Clone)]
pub struct WrittenTensor {
    /// Index into the mapping's foreign tensors.
    pub foreign: usize,
    /// The dtype to write, or to quantize from.
    pub dtype: DType,
    /// How it is stored, if it is to be quantized.
    pub quantized: Option<Quantized>,
}

impl ExportPlan {
    /// The headers of the tensors to write, in order; a quantized one has two.
    pub fn headers(&self) -> impl Iterator<Item = TensorHeader> + '_ {
        self.written.iter().flat_map(|written| {
            let tensor = &self.mapping.foreign[written.foreign];
            let part = |part: &StoredPart| {
                TensorHeader::new(part.name.as_str(), part.dtype, part.shape.as_slice())
            };
            match &written.quantized {
                None => vec![TensorHeader::new(
                    tensor.name.as_str(),
                    written.dtype,
                    tensor.shape.as_slice(),
                )],
                Some(stored) => vec![part(&stored.values), part(&stored.scales)],
            }
        })
    }
}

/// Plans the export of a model whose canonical tensors are `stored`.
///
/// `dtype` is the type to write floating-point weights as; `None` keeps the stored ones. `source`
/// lists the tensors of the checkpoint that the model came from; it decides in which of its forms the model is written
/// and how tied weights are. Without it the model takes its usual form, and tied weights are written once. What
/// `quantized` names is quantized again, unless `dtype` asks for another type.
///
/// # Errors
/// [`Error::Plan`] with every missing, unexpected and misfit tensor.
pub fn plan_export(
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
    stored: &[TensorHeader],
    dtype: Option<DType>,
    source: Option<&[TensorHeader]>,
    quantized: &HashMap<String, Quantized>,
) -> Result<ExportPlan> {
    let what = format!("cannot export as {}", bridge.name());
    let names: HashSet<&str> = source
        .into_iter()
        .flatten()
        .map(|header| header.name.as_str())
        .collect();
    // The form is that of what is written, whatever the source's was.
    let again = quantized.values().filter(|_| dtype.is_none());
    let stored_as = again.map(|stored| stored.values.name.as_str());
    let form = stored_as.chain(names.iter().copied());
    let (canonical, mapping) = resolve(bridge, config, "the model's config", form)?;
    let had = |name: &str| names.contains(name) || quantized.contains_key(name);
    let had: Option<&dyn Fn(&str) -> bool> = source.is_some().then_some(&had);
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
        let again = quantized.get(&tensor.name).filter(|_| dtype.is_none());
        written.push(WrittenTensor {
            foreign: index,
            // Scales are sought for values of the precision that dequantizing gives.
            dtype: match again {
                Some(_) => DType::BF16,
                None => dtype.unwrap_or(first),
            },
            quantized: again.cloned(),
        });
    }
    if problems.is_empty() {
        return Ok(ExportPlan {
            family: bridge.name().to_owned(),
            mapping,
            stored: dtypes,
            rounds: dtype.is_some(),
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
