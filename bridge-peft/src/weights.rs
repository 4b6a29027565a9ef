//! The weights of trained adapters, whole, away from any model.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use bridge_core::DecoderConfig;
use bridge_core::checkpoint::native::{Group, NativeCheckpoint};
use bridge_core::dtype::decode_f32;
use serde_json::Value;

use crate::config::{AdapterConfig, AdapterKind};
use crate::error::{Error, Result};
use crate::low_rank::{LORA_A, LORA_B, MAGNITUDE};
use crate::target::linear_names;

/// Name of the file that makes a native checkpoint one of adapters alone: their config and what they were trained on.
pub const ADAPTER_FILE: &str = "adapter.json";

/// The adapter of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// `[dim, in_features]`.
    pub a: Vec<f32>,
    /// `[out_features, dim]`.
    pub b: Vec<f32>,
    /// `[out_features]`, of DoRA.
    pub magnitude: Option<Vec<f32>>,
}

/// Trained adapters of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterWeights {
    /// What they are like.
    pub config: AdapterConfig,
    /// By the canonical name of the layer.
    pub layers: BTreeMap<String, Factors>,
}

impl AdapterWeights {
    /// Reads a checkpoint of adapters, as training leaves it.
    ///
    /// # Errors
    /// If it is not such a checkpoint or cannot be read.
    pub fn from_native(checkpoint: &NativeCheckpoint) -> Result<Self> {
        let path = checkpoint.dir().join(ADAPTER_FILE);
        let wrong = |problem: String| Error::File {
            path: path.clone(),
            problem,
        };
        if !path.exists() {
            return Err(wrong(
                "is missing, so this is no checkpoint of adapters; `finetune` with a [peft] section makes one".to_owned(),
            ));
        }
        let json: Value = serde_json::from_slice(&checkpoint.read_file(ADAPTER_FILE)?)
            .map_err(|error| wrong(format!("is no JSON: {error}")))?;
        let config: AdapterConfig = serde_json::from_value(json["config"].clone())
            .map_err(|error| wrong(format!("`config`: {error}")))?;
        let mut parts: BTreeMap<String, BTreeMap<String, Vec<f32>>> = BTreeMap::new();
        for (name, tensor) in &checkpoint.index().model {
            let Some((layer, part)) = name.rsplit_once('.') else {
                continue;
            };
            let bytes = checkpoint.read(Group::Model, name)?;
            let mut values = vec![0.0; tensor.shape.iter().product()];
            decode_f32(&bytes, tensor.dtype, &mut values)
                .map_err(|error| wrong(format!("`{name}`: {error}")))?;
            (parts.entry(layer.to_owned()).or_default()).insert(part.to_owned(), values);
        }
        Self::from_parts(config, parts).map_err(wrong)
    }

    /// From tensors by layer and by part (`lora_a`, `lora_b`, `lora_magnitude`).
    pub(crate) fn from_parts(
        config: AdapterConfig,
        parts: BTreeMap<String, BTreeMap<String, Vec<f32>>>,
    ) -> Result<Self, String> {
        let mut layers = BTreeMap::new();
        for (layer, mut parts) in parts {
            let mut take = |part: &str| parts.remove(part);
            let (a, b, magnitude) = (take(LORA_A), take(LORA_B), take(MAGNITUDE));
            let (Some(a), Some(b)) = (a, b) else {
                return Err(format!(
                    "the adapter of `{layer}` lacks one of its two matrices"
                ));
            };
            if magnitude.is_some() != (config.kind == AdapterKind::Dora) {
                return Err(format!(
                    "the adapter of `{layer}` {} a magnitude vector, which {:?} does not fit",
                    if magnitude.is_some() { "has" } else { "lacks" },
                    config.kind
                ));
            }
            if let Some(other) = parts.keys().next() {
                return Err(format!("`{layer}.{other}` is no part of an adapter"));
            }
            layers.insert(layer, Factors { a, b, magnitude });
        }
        if layers.is_empty() {
            return Err("holds no adapters".to_owned());
        }
        Ok(Self { config, layers })
    }

    /// Checks that every adapter belongs to a linear layer of the model, and has its shape.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`] with everything that does not.
    pub fn check(&self, model: &DecoderConfig) -> Result<()> {
        let names = linear_names(model);
        let shapes: BTreeMap<String, Vec<usize>> = model
            .tensors()
            .into_iter()
            .map(|tensor| (tensor.name, tensor.shape))
            .collect();
        let dim = self.config.dim;
        let mut problems = Vec::new();
        for (layer, factors) in &self.layers {
            if !names.contains(layer) {
                problems.push(format!("`{layer}` is no linear layer of the model"));
                continue;
            }
            let shape = &shapes[&format!("{layer}.weight")];
            let found = [
                factors.a.len(),
                factors.b.len(),
                factors.magnitude.as_ref().map_or(shape[0], Vec::len),
            ];
            let expected = [dim * shape[1], shape[0] * dim, shape[0]];
            if found != expected {
                problems.push(format!(
                    "`{layer}` is [{}, {}], for which A, B and magnitude of rank {dim} have {expected:?} elements, not {found:?}",
                    shape[0], shape[1]
                ));
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::DoesNotFit(problems))
        }
    }
}

/// A fingerprint of the weights in a folder of either kind: names and sizes of its safetensors files and samples of their
/// bytes, so that other weights are told from these without reading gigabytes.
///
/// # Errors
/// If a file cannot be read.
pub fn base_fingerprint(dir: &Path) -> Result<String> {
    let mut files = Vec::new();
    collect_files(dir, &mut files)?;
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    for path in files {
        let failed = |error| bridge_core::Error::io("read", &path, error);
        let mut file = std::fs::File::open(&path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        add(path.file_name().unwrap_or_default().as_encoded_bytes());
        add(&size.to_le_bytes());
        // The beginning, the end, and places between tell other weights from these without reading gigabytes.
        let mut buffer = [0; 4096];
        for part in 0..=SAMPLED_PLACES {
            let last = size.saturating_sub(buffer.len() as u64);
            file.seek(SeekFrom::Start(last / SAMPLED_PLACES * part))
                .map_err(failed)?;
            let read = file.read(&mut buffer).map_err(failed)?;
            add(&buffer[..read]);
        }
    }
    Ok(format!("{hash:016x}"))
}

/// Places of a file that are part of its fingerprint.
const SAMPLED_PLACES: u64 = 16;

fn collect_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |error| bridge_core::Error::io("read folder", dir, error);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            collect_files(&path, files)?;
        } else if path
            .extension()
            .is_some_and(|ending| ending == "safetensors")
        {
            files.push(path);
        }
    }
    Ok(())
}
