//! Planning an import.

use std::collections::HashSet;

use super::ranks::plan_ranks;
use super::{IgnoredTensor, Plan, PlannedTensor, TensorHeader, TiedTensor, sources};
use crate::bridge::{CanonicalTensor, ModelBridge};
use crate::checkpoint::quote;
use crate::config::{DecoderConfig, HfConfig};
use crate::dtype::DType;
use crate::error::{Error, MAX_LISTED_PROBLEMS, Problems, Result};
use crate::layout::LayoutSpec;
use crate::mapping::{ForeignRole, Mapping};
use crate::quant::{Folded, Quantized, fold};
use crate::registry::nearest;

/// Plans the import of a checkpoint with the given tensor headers at `layout`.
///
/// # Errors
/// [`Error::Config`] if the config is wrong, [`Error::Layout`] if the layout cannot hold the model, [`Error::Plan`]
/// with every missing, unexpected and misfit tensor.
pub fn plan_import(
    bridge: &dyn ModelBridge,
    config: &HfConfig,
    headers: &[TensorHeader],
    layout: &LayoutSpec,
) -> Result<Plan> {
    let typed = bridge.config(config)?;
    let names = headers.iter().map(|header| header.name.as_str());
    let (canonical, mapping) = resolve(bridge, &typed, config.origin(), names)?;
    layout.validate(&canonical, typed.num_hidden_layers)?;

    let mut problems = Problems::new();
    let folded = fold(config, headers, &mut problems);
    let mut found: Vec<Option<&TensorHeader>> = vec![None; mapping.foreign.len()];
    let mut quantized: Vec<Option<Quantized>> = vec![None; mapping.foreign.len()];
    let mut ignored = Vec::new();
    let mut unexpected = Vec::new();
    let mut seen = HashSet::new();
    for Folded {
        header,
        quantized: stored,
    } in &folded
    {
        if !seen.insert(header.name.as_str()) {
            problems.push(format!("{} is listed twice", header.shown()));
        } else if let Some(index) = mapping.foreign_index(&header.name) {
            found[index] = Some(header);
            quantized[index].clone_from(stored);
            check_shape(&typed, header, &mapping.foreign[index].shape, &mut problems);
        } else if let Some(reason) = mapping.ignored(&header.name) {
            let (name, reason) = (header.name.clone(), reason.to_owned());
            ignored.push(IgnoredTensor {
                name,
                reason,
                bytes: header.bytes(),
            });
        } else {
            unexpected.push(header);
        }
    }
    let present: Vec<bool> = found.iter().map(Option::is_some).collect();
    let missing = missing(&mapping, &present);
    report_gaps(&mapping, &missing, &unexpected, &mut problems);

    let mut tensors = Vec::with_capacity(canonical.len());
    for (index, tensor) in canonical.iter().enumerate() {
        let mut headers: Vec<(&TensorHeader, &'static str)> = Vec::new();
        for piece in sources(&mapping, &present, index) {
            let op = match quantized[piece.foreign] {
                Some(_) => "dequantized",
                None => mapping.ops[piece.foreign],
            };
            if let Some(header) = found[piece.foreign]
                .filter(|h| headers.iter().all(|(known, _)| known.name != h.name))
            {
                headers.push((header, op));
            }
        }
        // What is missing has been reported.
        if let Some(((first, op), others)) = headers.split_first() {
            check_dtypes(
                tensor,
                first,
                others.iter().map(|(header, _)| *header),
                &mut problems,
            );
            tensors.push(PlannedTensor {
                canonical: tensor.name.clone(),
                foreign: headers
                    .iter()
                    .map(|(header, _)| header.name.clone())
                    .collect(),
                shape: tensor.shape.clone(),
                dtype: first.dtype,
                op,
                shard: tensor.shard.clone(),
                place: tensor.place,
                bytes: first.dtype.byte_len(&tensor.shape).unwrap_or(u64::MAX),
            });
        }
    }
    check_tied_dtypes(&mapping, &found, &mut problems);
    if !problems.is_empty() {
        return Err(Error::Plan {
            what: format!(
                "cannot import as {} with {}",
                bridge.name(),
                config.origin()
            ),
            problems,
        });
    }
    let tied = mapping
        .foreign
        .iter()
        .zip(&present)
        .filter_map(|(tensor, present)| match tensor.role {
            ForeignRole::Weight => None,
            ForeignRole::TiedCopy { of } => Some(TiedTensor {
                name: tensor.name.clone(),
                canonical: canonical[of].name.clone(),
                present: *present,
            }),
        });
    Ok(Plan {
        family: bridge.name().to_owned(),
        layout: *layout,
        parameters: canonical.iter().map(|tensor| tensor.numel() as u64).sum(),
        total_bytes: tensors.iter().map(|tensor| tensor.bytes).sum(),
        ranks: plan_ranks(&tensors, typed.num_hidden_layers, layout)?,
        tied: tied.collect(),
        tensors,
        ignored,
        config: typed,
        mapping,
        present,
        quantized,
    })
}

/// Plans an import of a checkpoint that need not exist: one that holds exactly what `config` implies, as `dtype`.
///
/// # Errors
/// As [`plan_import`].
pub fn plan_from_shapes(
    bridge: &dyn ModelBridge,
    config: &HfConfig,
    dtype: DType,
    layout: &LayoutSpec,
) -> Result<Plan> {
    let typed = bridge.config(config)?;
    let (_, mapping) = resolve(bridge, &typed, config.origin(), std::iter::empty())?;
    let own = mapping
        .foreign
        .iter()
        .filter(|tensor| tensor.role == ForeignRole::Weight);
    let headers: Vec<TensorHeader> = own
        .map(|tensor| TensorHeader::new(tensor.name.as_str(), dtype, tensor.shape.as_slice()))
        .collect();
    plan_import(bridge, config, &headers, layout)
}

/// The canonical tensors and the checked mapping of a model whose foreign checkpoint holds tensors called `names`.
pub(crate) fn resolve<'n>(
    bridge: &dyn ModelBridge,
    config: &DecoderConfig,
    origin: &str,
    names: impl Iterator<Item = &'n str> + Clone,
) -> Result<(Vec<CanonicalTensor>, Mapping)> {
    config.validate(origin)?;
    let canonical = bridge.tensors(config);
    let mapping = bridge
        .weights(config)
        .for_stored(names)
        .resolve(&canonical)
        .map_err(|problems| Error::Plan {
            what: format!(
                "the weight map of {} does not fit the model of {origin}",
                bridge.name()
            ),
            problems,
        })?;
    Ok((canonical, mapping))
}

/// Indices of the foreign tensors that ought to be there and are not.
fn missing(mapping: &Mapping, present: &[bool]) -> Vec<usize> {
    let needed = |index: &usize| {
        mapping.pieces_of_foreign(*index).any(|piece| {
            sources(mapping, present, piece.canonical)
                .iter()
                .any(|source| source.foreign == *index)
        })
    };
    (0..present.len())
        .filter(|index| !present[*index] && mapping.foreign[*index].role == ForeignRole::Weight)
        .filter(needed)
        .collect()
}

fn report_gaps(
    mapping: &Mapping,
    missing: &[usize],
    unexpected: &[&TensorHeader],
    problems: &mut Problems,
) {
    const MAX_COMPARED: usize = 2000;
    let lacking: Vec<&str> = missing
        .iter()
        .take(MAX_COMPARED)
        .map(|index| mapping.foreign[*index].name.as_str())
        .collect();
    for index in missing {
        let tensor = &mapping.foreign[*index];
        let tied = if tensor.name.starts_with("lm_head.") {
            "; if the output head is the embedding, set tie_word_embeddings to true in config.json"
        } else {
            ""
        };
        problems.push(format!(
            "tensor {} of shape {:?} is missing from the checkpoint{tied}",
            quote(&tensor.name),
            tensor.shape
        ));
    }
    for header in unexpected {
        // Comparing every unexpected name with every missing one takes minutes where a whole checkpoint of another
        // family is given, so hints are sought for the findings that are shown, among a bounded number of names.
        let shown = problems.len() < MAX_LISTED_PROBLEMS && header.name.len() < 256;
        let near = if shown {
            nearest(&header.name, lacking.iter().copied())
        } else {
            None
        };
        problems.push(format!(
            "{} of shape {:?} is not part of the model{}",
            header.shown(),
            header.shape,
            near.map(|name| format!("; did you mean `{name}`, which is missing?"))
                .unwrap_or_default()
        ));
    }
}

fn check_shape(
    config: &DecoderConfig,
    header: &TensorHeader,
    expected: &[usize],
    problems: &mut Problems,
) {
    if header.shape == expected {
        return;
    }
    let mut reasons: Vec<String> = Vec::new();
    for (dim, extent) in expected.iter().enumerate() {
        if header.shape.get(dim) != Some(extent) {
            let names = config.fields_of_extent(*extent).join(" or ");
            if !names.is_empty() && !reasons.contains(&names) {
                reasons.push(names);
            }
        }
    }
    let from = if reasons.is_empty() {
        String::new()
    } else {
        format!(" from {}", reasons.join(", "))
    };
    problems.push(format!(
        "{} has shape {:?}, expected {expected:?}{from}; check config.json",
        header.shown(),
        header.shape
    ));
}

fn check_dtypes<'a>(
    tensor: &CanonicalTensor,
    first: &TensorHeader,
    others: impl Iterator<Item = &'a TensorHeader>,
    problems: &mut Problems,
) {
    if !(first.dtype.is_float() && first.dtype.bytes().is_some()) {
        problems.push(format!(
            "{} has dtype {}, expected a floating-point type; quantized weights need a family that reads them",
            first.shown(),
            first.dtype
        ));
    }
    for other in others.filter(|other| other.dtype != first.dtype) {
        problems.push(format!(
            "{} has dtype {}, but {}, which is part of `{}` as well, has {}",
            other.shown(),
            other.dtype,
            first.shown(),
            tensor.name,
            first.dtype
        ));
    }
}

fn check_tied_dtypes(mapping: &Mapping, found: &[Option<&TensorHeader>], problems: &mut Problems) {
    for (index, tensor) in mapping.foreign.iter().enumerate() {
        let (ForeignRole::TiedCopy { of }, Some(copy)) = (tensor.role, found[index]) else {
            continue;
        };
        for piece in mapping.pieces_of_canonical(of) {
            if let Some(own) = found[piece.foreign].filter(|own| own.dtype != copy.dtype) {
                problems.push(format!(
                    "{} has dtype {}, but {}, to which it is tied, has {}",
                    copy.shown(),
                    copy.dtype,
                    own.shown(),
                    own.dtype
                ));
            }
        }
    }
}
