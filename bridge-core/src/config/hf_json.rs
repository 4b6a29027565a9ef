//! A `config.json` as it is on disk: every byte kept, and a bounded parse beside it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value};

use super::ConfigReader;
use crate::error::{Error, Result};

/// Largest `config.json` that is read, in bytes. Published ones are below 100 kB.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// The text that stands for an infinite number after [`quote_non_finite`].
const NON_FINITE: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// A Hugging Face model config: its bytes, and its keys in the order of the file.
#[derive(Debug, Clone)]
pub struct HfConfig {
    raw: Vec<u8>,
    json: Map<String, Value>,
    origin: String,
}

impl HfConfig {
    /// Reads `config.json` of the folder `dir`; a path to a file is read as that file.
    ///
    /// # Errors
    /// If the file cannot be read, is larger than [`MAX_CONFIG_BYTES`], or is not a JSON object.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = if dir.is_dir() {
            dir.join("config.json")
        } else {
            dir.to_path_buf()
        };
        let file = File::open(&path).map_err(|source| Error::io("read", &path, source))?;
        let mut raw = Vec::new();
        file.take(MAX_CONFIG_BYTES + 1)
            .read_to_end(&mut raw)
            .map_err(|source| Error::io("read", &path, source))?;
        Self::from_slice(&raw, path.display().to_string())
    }

    /// Parses the bytes of a `config.json`. `origin` names it in errors.
    ///
    /// Python writes `Infinity` and `NaN`, which JSON does not have; they are accepted as numbers.
    ///
    /// # Errors
    /// If the bytes are more than [`MAX_CONFIG_BYTES`], or not a JSON object.
    pub fn from_slice(raw: &[u8], origin: impl Into<String>) -> Result<Self> {
        let origin = origin.into();
        if raw.len() as u64 > MAX_CONFIG_BYTES {
            return Err(Error::malformed(
                origin,
                format!(
                    "model config is larger than {MAX_CONFIG_BYTES} bytes; this is not a config.json"
                ),
            ));
        }
        // serde_json refuses nesting beyond 128 levels, so hostile depth cannot overflow the stack.
        let parsed = serde_json::from_slice(raw).or_else(|error| match quote_non_finite(raw) {
            Some(quoted) => serde_json::from_slice(&quoted),
            None => Err(error),
        });
        match parsed {
            Ok(Value::Object(json)) => Ok(Self {
                raw: raw.to_vec(),
                json,
                origin,
            }),
            Ok(other) => Err(Error::malformed(
                origin,
                format!("holds {}, expected a JSON object", json_kind(&other)),
            )),
            Err(error) => Err(Error::malformed(
                origin,
                format!("is not valid JSON: {error}"),
            )),
        }
    }

    /// Builds a config from its keys, as for a model that was never on disk. The bytes are the keys pretty-printed, as
    /// `save_pretrained` would write them.
    pub fn from_json(json: Map<String, Value>, origin: impl Into<String>) -> Self {
        let mut raw = format!("{:#}", Value::Object(json.clone())).into_bytes();
        raw.push(b'\n');
        Self {
            raw,
            json,
            origin: origin.into(),
        }
    }

    /// The bytes of the file, unchanged.
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// The keys, in the order of the file.
    pub fn json(&self) -> &Map<String, Value> {
        &self.json
    }

    /// What the config is called in errors: usually its path.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The names in `architectures`; empty if the key is absent or not a list of strings.
    pub fn architectures(&self) -> Vec<&str> {
        let listed = self.json.get("architectures").and_then(Value::as_array);
        listed
            .map(|names| names.iter().filter_map(Value::as_str).collect())
            .unwrap_or_default()
    }

    /// Typed access to the keys.
    pub fn reader(&self) -> ConfigReader<'_> {
        ConfigReader::new(self)
    }
}

/// Puts quotes around Python's `NaN`, `Infinity` and `-Infinity` outside strings; `None` if there are none.
fn quote_non_finite(raw: &[u8]) -> Option<Vec<u8>> {
    let mut quoted = Vec::with_capacity(raw.len() + 16);
    let mut found = false;
    let mut in_string = false;
    let mut at = 0;
    while let Some(&byte) = raw.get(at) {
        if !in_string {
            if let Some(word) = NON_FINITE
                .iter()
                .find(|word| raw[at..].starts_with(word.as_bytes()))
            {
                quoted.push(b'"');
                quoted.extend_from_slice(word.as_bytes());
                quoted.push(b'"');
                at += word.len();
                found = true;
                continue;
            }
        } else if byte == b'\\' {
            quoted.extend_from_slice(&raw[at..raw.len().min(at + 2)]);
            at += 2;
            continue;
        }
        in_string ^= byte == b'"';
        quoted.push(byte);
        at += 1;
    }
    found.then_some(quoted)
}

/// A number, Python's non-finite spellings included.
pub(super) fn as_number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) if NON_FINITE.contains(&text.as_str()) => {
            text.replace("Infinity", "inf").parse().ok()
        }
        _ => None,
    }
}

/// What a JSON value is, for an error message.
pub(super) fn json_kind(value: &Value) -> String {
    const SHOWN: usize = 40;
    match value {
        Value::Null => "null".to_owned(),
        Value::Array(items) => format!("a list of {} items", items.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) => {
            let short: String = text.chars().take(SHOWN).collect();
            let more = if text.chars().count() > SHOWN {
                "..."
            } else {
                ""
            };
            format!("the string {short:?}{more}")
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}
