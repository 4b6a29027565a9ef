//! The Hugging Face config of a model that a `run_config.yaml` describes.

use std::path::Path;

use serde_json::{Map, Value};

use crate::bridge::ModelBridge;
use crate::checkpoint::megatron::{MAX_YAML_BYTES, RunConfig, differences};
use crate::checkpoint::{FileReader, RangeReader};
use crate::config::{DecoderConfig, HfConfig};
use crate::dtype::DType;
use crate::error::{Error, Problems, Result};
use crate::registry::Registry;

/// Reads the file, and finds the family whose `config.json` says the same of the model: its own way of writing one is
/// tried, and read again. Where several can say it, the one registered first is taken.
///
/// # Errors
/// What the file says that is not known, or that no family can say it.
pub(super) fn config_of_run(path: &Path, registry: &Registry) -> Result<HfConfig> {
    let refused = |problems: Problems| Error::Config {
        file: path.display().to_string(),
        problems,
    };
    let one = |problem: String| {
        let mut problems = Problems::new();
        problems.push(problem);
        refused(problems)
    };
    let reader = FileReader::open(path)?;
    if reader.len() > MAX_YAML_BYTES as u64 {
        let found = reader.len();
        return Err(one(format!(
            "it has {found} bytes, more than the {MAX_YAML_BYTES} that are read"
        )));
    }
    let mut bytes = vec![0; reader.len() as usize];
    reader.read_exact_at(0, &mut bytes)?;
    let run = RunConfig::parse(&bytes).map_err(refused)?;
    let mut nearest: Option<(&str, Vec<String>)> = None;
    for family in registry.iter() {
        let Some((config, differences)) = said_by(family, &run) else {
            continue;
        };
        if differences.is_empty() {
            return Ok(config);
        }
        if nearest
            .as_ref()
            .is_none_or(|(_, least)| differences.len() < least.len())
        {
            nearest = Some((family.name(), differences));
        }
    }
    let nearest = nearest.map(|(family, differences)| {
        format!(" (nearest is {family}, where {})", differences.join("; "))
    });
    Err(one(format!(
        "no Hugging Face family here has a config that says the same{}; give the model's own with --hf-config",
        nearest.unwrap_or_default()
    )))
}

/// The config in which `family` says what `run` says, and in what that is something else; `None` if it has none.
fn said_by(family: &dyn ModelBridge, run: &RunConfig) -> Option<(HfConfig, Vec<String>)> {
    let mut keys = family.hf_config(&run.model).ok()?;
    let dtype = match run.dtype {
        Some(DType::BF16) => Some("bfloat16"),
        Some(DType::F16) => Some("float16"),
        Some(DType::F32) => Some("float32"),
        _ => None,
    };
    if let Some(dtype) = dtype {
        keys.insert("torch_dtype".to_owned(), dtype.into());
    }
    let config = parsed(keys)?;
    let again = family.config(&config).ok()?;
    let without_tokens = DecoderConfig {
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        ..again
    };
    let differences = differences(&without_tokens, &run.model).into_iter();
    let differences = differences
        .map(|(key, found, expected)| format!("{key} would be {found}, and is {expected}"));
    Some((config, differences.collect()))
}

fn parsed(mut keys: Map<String, Value>) -> Option<HfConfig> {
    // Tokens that the file does not name are not made up.
    for key in ["bos_token_id", "eos_token_id"] {
        keys.insert(key.to_owned(), Value::Null);
    }
    let mut text = serde_json::to_vec_pretty(&Value::Object(keys)).ok()?;
    text.push(b'\n');
    HfConfig::from_slice(&text, "config.json").ok()
}
