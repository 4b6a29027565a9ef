//! Quantized checkpoints: tensors that are stored as small codes with scales of their own, read as bf16 and written back
//! byte for byte.
//!
//! Two schemes are known:
//!
//! - **FP8 in blocks** (DeepSeek-V3): `x.weight` holds 8-bit floats, `x.weight_scale_inv` one fp32 factor per block of
//!   (usually) 128 x 128 of them.
//! - **MXFP4** (gpt-oss): `x_blocks` holds 4-bit floats, two in a byte, the lower half first, 32 in a block;
//!   `x_scales` one power of two per block. Source: OCP Microscaling Formats (MX) Specification 1.0.
//!
//! To the rest of this crate such a pair is one bf16 tensor. MXFP4 values are bf16 values exactly. FP8 values times an
//! fp32 factor are rounded to bf16, which keeps twice as many digits as the codes have; so with the factors at hand
//! (an import keeps them, they are small) the codes come back from the rounded values. Where a block was changed
//! meanwhile, as by training, it gets a new scale.

mod fp8;
mod mxfp4;
mod reader;
mod write;

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use crate::bridge::CanonicalTensor;
use crate::checkpoint::quote;
use crate::config::HfConfig;
use crate::dtype::DType;
use crate::error::{Error, Problems, Result};
use crate::mapping::WeightMap;
use crate::plan::TensorHeader;

pub(crate) use reader::DequantizingReader;
pub(crate) use write::{Band, quantize_band};

/// How values are made small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantScheme {
    /// E4M3 codes with an fp32 factor per block of `rows` x `cols`.
    Fp8Block {
        /// Rows of a block.
        rows: usize,
        /// Columns of a block.
        cols: usize,
    },
    /// E2M1 codes with a power of two for every 32 along the last dimension.
    Mxfp4,
}

impl QuantScheme {
    /// FP8 in blocks of 128 x 128, as DeepSeek-V3 is published.
    pub const FP8: Self = Self::Fp8Block {
        rows: 128,
        cols: 128,
    };

    /// `quantization_config` of a model that is quantized so.
    pub(crate) fn settings(self) -> Value {
        match self {
            Self::Fp8Block { rows, cols } => json!({
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [rows, cols],
            }),
            Self::Mxfp4 => json!({
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
                "quant_method": "mxfp4",
            }),
        }
    }
}

/// Values in one block of MXFP4.
pub(crate) const MXFP4_BLOCK: usize = 32;

/// A stored tensor that is part of a quantized one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPart {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
}

/// How one tensor is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantized {
    /// The scheme.
    pub scheme: QuantScheme,
    /// The codes.
    pub values: StoredPart,
    /// The scales.
    pub scales: StoredPart,
}

/// A tensor as the rest of the crate sees it, and how it is stored if that is another matter.
#[derive(Debug, Clone)]
pub(crate) struct Folded {
    pub(crate) header: TensorHeader,
    pub(crate) quantized: Option<Quantized>,
}

/// Sees codes and scales as the tensors that they stand for. Findings go to `problems`.
pub(crate) fn fold(
    config: &HfConfig,
    headers: &[TensorHeader],
    problems: &mut Problems,
) -> Vec<Folded> {
    let plain = |header: &TensorHeader| Folded {
        header: header.clone(),
        quantized: None,
    };
    let Some(scheme) = scheme_of(config, problems) else {
        return headers.iter().map(plain).collect();
    };
    let by_name: HashMap<&str, &TensorHeader> =
        headers.iter().map(|h| (h.name.as_str(), h)).collect();
    let mut scales: HashSet<String> = HashSet::new();
    let mut folded = Vec::with_capacity(headers.len());
    for header in headers {
        let (name, scale_name) = match scheme {
            QuantScheme::Fp8Block { .. } if header.dtype == DType::F8E4M3 => {
                (header.name.clone(), format!("{}_scale_inv", header.name))
            }
            QuantScheme::Mxfp4 if header.dtype == DType::U8 => {
                match header.name.strip_suffix("_blocks") {
                    Some(name) => (name.to_owned(), format!("{name}_scales")),
                    None => {
                        folded.push(plain(header));
                        continue;
                    }
                }
            }
            _ => {
                folded.push(plain(header));
                continue;
            }
        };
        let Some(scale) = by_name.get(scale_name.as_str()) else {
            problems.push(format!(
                "{} is quantized, but its scales {} are missing from the checkpoint",
                header.shown(),
                quote(&scale_name)
            ));
            continue;
        };
        let (shape, expected) = match shapes(scheme, &header.shape) {
            Ok(shapes) => shapes,
            Err(problem) => {
                problems.push(format!("{} {problem}", header.shown()));
                continue;
            }
        };
        let scale_dtype = match scheme {
            QuantScheme::Fp8Block { .. } => DType::F32,
            QuantScheme::Mxfp4 => DType::U8,
        };
        if scale.shape != expected || scale.dtype != scale_dtype {
            problems.push(format!(
                "{} is {} {:?}, expected {scale_dtype} {expected:?} as the scales of {}",
                scale.shown(),
                scale.dtype,
                scale.shape,
                header.shown()
            ));
            continue;
        }
        let part = |header: &TensorHeader| StoredPart {
            name: header.name.clone(),
            dtype: header.dtype,
            shape: header.shape.clone(),
        };
        scales.insert(scale_name);
        folded.push(Folded {
            header: TensorHeader {
                name,
                dtype: DType::BF16,
                shape,
                file: header.file.clone(),
            },
            quantized: Some(Quantized {
                scheme,
                values: part(header),
                scales: part(scale),
            }),
        });
    }
    folded.retain(|tensor| !scales.contains(&tensor.header.name));
    folded
}

/// The shape that codes of `stored` stand for, and that of their scales.
fn shapes(scheme: QuantScheme, stored: &[usize]) -> Result<(Vec<usize>, Vec<usize>), String> {
    match (scheme, stored) {
        (QuantScheme::Fp8Block { rows, cols }, [out, inner]) => Ok((
            stored.to_vec(),
            vec![out.div_ceil(rows), inner.div_ceil(cols)],
        )),
        (QuantScheme::Mxfp4, [outer @ .., blocks, 16]) => {
            let last = blocks
                .checked_mul(MXFP4_BLOCK)
                .ok_or_else(|| "is too large".to_owned())?;
            let shape = outer.iter().copied().chain([last]).collect();
            let scales = outer.iter().copied().chain([*blocks]).collect();
            Ok((shape, scales))
        }
        _ => Err(format!(
            "has shape {stored:?}, which the scheme {scheme:?} does not have"
        )),
    }
}

/// What can be quantized by `scheme` of the tensors that `map` writes, by name: with FP8 the projections of layers, with
/// MXFP4 what the map has an own form for.
///
/// # Errors
/// If the family has nothing of the kind.
pub(crate) fn quantizable(
    scheme: QuantScheme,
    map: &WeightMap,
    tensors: &[CanonicalTensor],
    family: &str,
) -> Result<HashMap<String, Quantized>> {
    let packed = match scheme {
        QuantScheme::Fp8Block { .. } => None,
        QuantScheme::Mxfp4 => map.form_with_suffix("_blocks"),
    };
    let mapping = packed.as_ref().unwrap_or(map).resolve(tensors);
    let mapping = mapping.map_err(|problems| Error::Plan {
        what: format!("the weight map of {family} does not fit the model"),
        problems,
    })?;
    let mut found = HashMap::new();
    for tensor in &mapping.foreign {
        let (name, shape) = (&tensor.name, &tensor.shape);
        let part =
            |name: String, dtype: DType, shape: Vec<usize>| StoredPart { name, dtype, shape };
        let quantized = match (scheme, shape.as_slice()) {
            (QuantScheme::Fp8Block { rows, cols }, [out, inner])
                if name.contains("_proj")
                    && name.ends_with(".weight")
                    && !name.contains("eh_proj") =>
            {
                let blocks = vec![out.div_ceil(rows), inner.div_ceil(cols)];
                Quantized {
                    scheme,
                    values: part(name.clone(), DType::F8E4M3, shape.clone()),
                    scales: part(format!("{name}_scale_inv"), DType::F32, blocks),
                }
            }
            (QuantScheme::Mxfp4, [experts, rows, cols])
                if packed.is_some() && cols.is_multiple_of(MXFP4_BLOCK) =>
            {
                let blocks = vec![*experts, *rows, cols / MXFP4_BLOCK];
                let codes = blocks.iter().copied().chain([MXFP4_BLOCK / 2]).collect();
                Quantized {
                    scheme,
                    values: part(format!("{name}_blocks"), DType::U8, codes),
                    scales: part(format!("{name}_scales"), DType::U8, blocks),
                }
            }
            _ => continue,
        };
        found.insert(name.clone(), quantized);
    }
    if found.is_empty() {
        return Err(Error::InvalidArgument(format!(
            "a model of family {family} has no weights that are written in {}",
            match scheme {
                QuantScheme::Fp8Block { .. } => "fp8",
                QuantScheme::Mxfp4 => "mxfp4; it is a form of gpt-oss",
            }
        )));
    }
    Ok(found)
}

/// The scheme that `quantization_config` names. An unknown one is a finding.
fn scheme_of(config: &HfConfig, problems: &mut Problems) -> Option<QuantScheme> {
    let settings = config
        .json()
        .get("quantization_config")
        .filter(|value| !value.is_null())?;
    let method = settings.get("quant_method").and_then(Value::as_str);
    match method {
        Some("mxfp4") => return Some(QuantScheme::Mxfp4),
        Some("fp8") => {
            let sizes: Option<Vec<usize>> = settings
                .get("weight_block_size")
                .and_then(Value::as_array)
                .and_then(|sizes| {
                    let size = |n: &Value| n.as_u64().and_then(|n| usize::try_from(n).ok());
                    sizes.iter().map(size).collect()
                });
            match sizes.as_deref() {
                Some(&[rows, cols]) if rows > 0 && cols > 0 => {
                    return Some(QuantScheme::Fp8Block { rows, cols });
                }
                _ => problems.push(
                    "the checkpoint is quantized to fp8 without weight_block_size; only fp8 in blocks, such as \
                     [128, 128], is read",
                ),
            }
        }
        other => problems.push(format!(
            "the checkpoint is quantized ({}), which is not read; known are fp8 in blocks and mxfp4; use such a \
             checkpoint, or one in bf16, fp16 or fp32",
            quote(other.unwrap_or("unknown method"))
        )),
    }
    None
}

#[cfg(test)]
mod tests;
