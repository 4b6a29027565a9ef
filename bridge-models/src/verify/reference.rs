//! Reading a reference folder: `oracle.json` with numbers, `oracle.safetensors` with tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bridge_core::checkpoint::{Checkpoint, TensorInfo};
use bridge_core::dtype::{DType, decode_f32};
use serde::Deserialize;

use crate::context::IGNORED_TARGET;
use crate::decoder::check_token_ids;
use crate::error::{Error, Result};

const JSON_FILE: &str = "oracle.json";
const TENSOR_FILE: &str = "oracle.safetensors";
/// Tensors whose names start with this are gradients in full.
const GRADIENT_PREFIX: &str = "grad.";
/// Logits of multi-token prediction.
const MTP_LOGITS: &str = "mtp_logits";
/// Largest `oracle.json` that is read, in bytes. One with a line per tensor of a large model stays far below.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// Reference numbers of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// The folder.
    pub path: PathBuf,
    /// Inputs and the logits that they lead to.
    pub logits: Option<LogitsReference>,
    /// Mean loss over the labels that count.
    pub loss: Option<f64>,
    /// Of every gradient of that loss, by name on disk.
    pub gradients: BTreeMap<String, GradientStats>,
    /// Some gradients in full, by name on disk.
    pub full_gradients: BTreeMap<String, Vec<f32>>,
    /// A prompt and its greedy continuation.
    pub greedy: Option<GreedyReference>,
}

/// Inputs and the logits that they lead to.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitsReference {
    /// Number of rows.
    pub batch: usize,
    /// Tokens in a row.
    pub seq: usize,
    /// `[batch, seq]`.
    pub input_ids: Vec<u32>,
    /// `[batch, seq]`, not shifted, -100 for no loss.
    pub labels: Vec<i64>,
    /// `[batch, seq, vocab]`.
    pub logits: Vec<f32>,
    /// Of the first multi-token prediction module, which is not told what follows the last token:
    /// `[batch, seq - 1, vocab]`.
    pub mtp_logits: Option<Vec<f32>>,
}

/// A gradient in three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(from = "(f64, f64, usize)")]
pub struct GradientStats {
    /// Euclidean norm.
    pub norm: f64,
    /// Sum of the elements.
    pub sum: f64,
    /// Number of elements.
    pub numel: usize,
}

impl From<(f64, f64, usize)> for GradientStats {
    fn from((norm, sum, numel): (f64, f64, usize)) -> Self {
        Self { norm, sum, numel }
    }
}

/// A prompt and its greedy continuation.
#[derive(Debug, Clone, PartialEq)]
pub struct GreedyReference {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The tokens after it.
    pub token_ids: Vec<u32>,
}

/// The part of `oracle.json` that is compared with; the rest says how it was made.
#[derive(Deserialize)]
struct Numbers {
    loss: Option<f64>,
    #[serde(default)]
    grads: BTreeMap<String, GradientStats>,
    gen_prompt: Option<Vec<u32>>,
    gen_ids: Option<Vec<u32>>,
}

impl Reference {
    /// Reads a reference folder. Either of its two files may be missing.
    ///
    /// # Errors
    /// If neither file is there, or one does not follow the format.
    pub fn load(dir: &Path) -> Result<Self> {
        let (json, tensors) = (dir.join(JSON_FILE), dir.join(TENSOR_FILE));
        if !json.is_file() && !tensors.is_file() {
            let problem = format!(
                "holds neither {JSON_FILE} nor {TENSOR_FILE}; is it a folder of reference numbers?"
            );
            return Err(Error::reference(dir, problem));
        }
        let numbers = if json.is_file() {
            Some(read_numbers(&json)?)
        } else {
            None
        };
        let mut reference = Self {
            path: dir.to_path_buf(),
            logits: None,
            loss: None,
            gradients: BTreeMap::new(),
            full_gradients: BTreeMap::new(),
            greedy: None,
        };
        if let Some(numbers) = numbers {
            reference.loss = numbers.loss;
            reference.gradients = numbers.grads;
            reference.greedy = match (numbers.gen_prompt, numbers.gen_ids) {
                (Some(prompt), Some(token_ids)) => Some(GreedyReference { prompt, token_ids }),
                (None, None) => None,
                _ => {
                    return Err(Error::reference(
                        json,
                        "has one of gen_prompt and gen_ids, expected both or neither",
                    ));
                }
            };
        }
        if tensors.is_file() {
            reference.read_tensors(dir, &tensors)?;
        }
        Ok(reference)
    }

    /// What to run a model of `vocab_size` tokens on: the inputs, and the token that each position is to predict,
    /// [`IGNORED_TARGET`] where none counts: `[batch, seq]`.
    ///
    /// # Errors
    /// If there are none, or they are not of such a model.
    pub fn inputs(&self, vocab_size: usize) -> Result<(&LogitsReference, Vec<i64>)> {
        let Some(inputs) = &self.logits else {
            return Err(self.lacks("no logits"));
        };
        check_token_ids(&inputs.input_ids, vocab_size).map_err(|error| {
            Error::reference(
                &self.path,
                format!("input_ids: {error}; is this the model's own?"),
            )
        })?;
        // Each token's label is the one after it; the last of a row has none.
        let rows = inputs.labels.chunks(inputs.seq);
        let targets: Vec<i64> = rows
            .flat_map(|row| row[1..].iter().copied().chain([IGNORED_TARGET]))
            .collect();
        let known = |id: i64| usize::try_from(id).is_ok_and(|id| id < vocab_size);
        let bad = targets
            .iter()
            .find(|t| **t != IGNORED_TARGET && !known(**t));
        match bad {
            None => Ok((inputs, targets)),
            Some(bad) => Err(Error::reference(
                &self.path,
                format!("label {bad} lies outside the vocabulary"),
            )),
        }
    }

    /// The error for a reference that `has` nothing which could be compared.
    pub fn lacks(&self, has: &str) -> Error {
        Error::reference(&self.path, format!("holds {has} to compare with"))
    }

    fn read_tensors(&mut self, dir: &Path, path: &Path) -> Result<()> {
        let file = Checkpoint::open_files(dir, [TENSOR_FILE.to_owned()])
            .map_err(bridge_core::Error::from)?;
        for info in file.tensors() {
            if let Some(name) = info.name.strip_prefix(GRADIENT_PREFIX) {
                self.full_gradients
                    .insert(name.to_owned(), floats(&file, info, path)?);
            }
        }
        let known = ["input_ids", "labels", "logits"];
        let [Some(ids), Some(labels), Some(logits)] = known.map(|name| file.get(name)) else {
            return Err(Error::reference(
                path,
                format!("lacks one of {}", known.join(", ")),
            ));
        };
        let mtp = file.get(MTP_LOGITS);
        let stranger = |name: &str| {
            !known.contains(&name) && name != MTP_LOGITS && !name.starts_with(GRADIENT_PREFIX)
        };
        if let Some(info) = file.tensors().iter().find(|info| stranger(&info.name)) {
            let problem = format!(
                "holds the model input `{}`, which text models do not take",
                info.name
            );
            return Err(Error::reference(path, problem));
        }
        let &[batch, seq] = ids.shape.as_slice() else {
            return Err(Error::reference(
                path,
                format!("input_ids has shape {:?}, expected [batch, seq]", ids.shape),
            ));
        };
        let fits = labels.shape == ids.shape
            && logits.shape.len() == 3
            && logits.shape[..2] == [batch, seq];
        if !fits || batch == 0 || seq == 0 {
            let problem = format!(
                "input_ids {:?}, labels {:?} and logits {:?} do not fit together",
                ids.shape, labels.shape, logits.shape
            );
            return Err(Error::reference(path, problem));
        }
        let input_ids = integers(&file, ids, path)?.into_iter().map(|id| {
            u32::try_from(id)
                .map_err(|_| Error::reference(path, format!("input_ids holds {id}, no token id")))
        });
        self.logits = Some(LogitsReference {
            batch,
            seq,
            input_ids: input_ids.collect::<Result<_>>()?,
            labels: integers(&file, labels, path)?,
            logits: floats(&file, logits, path)?,
            mtp_logits: mtp.map(|info| floats(&file, info, path)).transpose()?,
        });
        Ok(())
    }
}

fn read_numbers(path: &Path) -> Result<Numbers> {
    let io = |source| bridge_core::Error::io("read", path, source);
    let size = std::fs::metadata(path).map_err(io)?.len();
    if size > MAX_JSON_BYTES {
        return Err(Error::reference(
            path,
            format!("is {size} bytes large, expected at most {MAX_JSON_BYTES}"),
        ));
    }
    let bytes = std::fs::read(path).map_err(io)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::reference(path, error.to_string()))
}

fn floats(file: &Checkpoint, info: &TensorInfo, path: &Path) -> Result<Vec<f32>> {
    let bytes = file.read(info).map_err(bridge_core::Error::from)?;
    let mut values = vec![0.0; info.shape.iter().product()];
    decode_f32(&bytes, info.dtype, &mut values)
        .map_err(|error| Error::reference(path, format!("tensor `{}`: {error}", info.name)))?;
    Ok(values)
}

fn integers(file: &Checkpoint, info: &TensorInfo, path: &Path) -> Result<Vec<i64>> {
    let bytes = file.read(info).map_err(bridge_core::Error::from)?;
    match info.dtype {
        DType::I64 => Ok(bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| i64::from_le_bytes(*bytes))
            .collect()),
        DType::I32 => Ok(bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into())
            .collect()),
        other => Err(Error::reference(
            path,
            format!(
                "tensor `{}` is {}, expected I64 or I32",
                info.name,
                other.as_str()
            ),
        )),
    }
}
