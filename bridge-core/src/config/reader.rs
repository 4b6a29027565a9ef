//! Typed access to the keys of a `config.json`, collecting every finding so that a user sees them all at once.

use std::cell::RefCell;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::hf_json::{as_number, json_kind};
use super::{Activation, HfConfig};
use crate::dtype::DType;
use crate::error::{Error, Problems, Result};

/// Most decoder layers that a config may ask for: far above every published model, so that a list with an entry per
/// layer stays small whatever the file says.
pub const MAX_LAYERS: usize = 4096;

/// Reads keys of one JSON object. A missing or wrong key yields a harmless placeholder and a finding;
/// [`ConfigReader::finish`] turns the findings into one error. A key that holds `null` counts as absent.
///
/// ```
/// use bridge_core::HfConfig;
/// let config = HfConfig::from_slice(br#"{"hidden_size": 48, "hidden_act": "silu"}"#, "config.json")?;
/// let keys = config.reader();
/// let (hidden, heads) = (keys.size("hidden_size"), keys.size("num_attention_heads"));
/// let layers = keys.size_or("num_hidden_layers", 2);
/// assert_eq!((hidden, heads, layers), (48, 0, 2));
/// assert_eq!(keys.finish().unwrap_err().to_string(), "config.json: key num_attention_heads is missing");
/// # Ok::<(), bridge_core::Error>(())
/// ```
pub struct ConfigReader<'a> {
    map: &'a Map<String, Value>,
    origin: &'a str,
    /// Path of `map` inside the file, with a dot at its end; empty for the file's own object.
    prefix: String,
    problems: RefCell<Problems>,
}

impl<'a> ConfigReader<'a> {
    pub(super) fn new(config: &'a HfConfig) -> Self {
        Self::of(config.json(), config.origin(), String::new())
    }

    fn of(map: &'a Map<String, Value>, origin: &'a str, prefix: String) -> Self {
        Self {
            map,
            origin,
            prefix,
            problems: RefCell::default(),
        }
    }

    /// The value of `key`; `None` if it is absent or `null`.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there with a value other than `null`.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether the key is there with the value `null`, for keys whose absence means something else.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Adds a finding of the caller's own.
    pub fn problem(&self, problem: impl Into<String>) {
        self.problems.borrow_mut().push(problem);
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`Error::Config`] with everything found wrong so far.
    pub fn finish(&self) -> Result<()> {
        let problems = self.problems.borrow();
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Config {
            file: self.origin.to_owned(),
            problems: problems.clone(),
        })
    }

    /// A reader of the object under `key`, such as `text_config`; `None` if there is none. Its findings are its own:
    /// pass it to [`ConfigReader::absorb`] in the end.
    pub fn section(&self, key: &str) -> Option<ConfigReader<'a>> {
        match self.get(key)? {
            Value::Object(map) => {
                Some(Self::of(map, self.origin, format!("{}{key}.", self.prefix)))
            }
            other => {
                self.wrong(key, "an object", other);
                None
            }
        }
    }

    /// Takes over the findings of a [`ConfigReader::section`].
    pub fn absorb(&self, section: ConfigReader<'_>) {
        self.problems
            .borrow_mut()
            .extend("", section.problems.into_inner());
    }

    /// A required whole number of at least 0; 0 after a finding.
    pub fn size(&self, key: &str) -> usize {
        self.required(key, self.size_opt(key), 0)
    }

    /// A whole number of at least 0, or `default`.
    pub fn size_or(&self, key: &str, default: usize) -> usize {
        self.size_opt(key).unwrap_or(default)
    }

    /// A whole number of at least 0, if there.
    pub fn size_opt(&self, key: &str) -> Option<usize> {
        self.typed(key, "a whole number of at least 0", as_size)
    }

    /// A required whole number within `range`; the range's start after a finding. For numbers that size a list.
    pub fn size_in(&self, key: &str, range: RangeInclusive<usize>) -> usize {
        let value = self.size_opt(key);
        let found = self.required(key, value, *range.start());
        if range.contains(&found) {
            return found;
        }
        self.problem(format!(
            "{}{key} is {found}, expected {} to {}",
            self.prefix,
            range.start(),
            range.end()
        ));
        *range.start()
    }

    /// The number of decoder layers under `key`: 1 to [`MAX_LAYERS`].
    pub fn num_layers(&self, key: &str) -> usize {
        self.size_in(key, 1..=MAX_LAYERS)
    }

    /// A required number; 0 after a finding.
    pub fn number(&self, key: &str) -> f64 {
        self.required(key, self.number_opt(key), 0.0)
    }

    /// A number, or `default`.
    pub fn number_or(&self, key: &str, default: f64) -> f64 {
        self.number_opt(key).unwrap_or(default)
    }

    /// A number, if there.
    pub fn number_opt(&self, key: &str) -> Option<f64> {
        self.typed(key, "a number", as_number)
    }

    /// `true` or `false`, or `default`.
    pub fn flag_or(&self, key: &str, default: bool) -> bool {
        self.typed(key, "true or false", Value::as_bool)
            .unwrap_or(default)
    }

    /// A string, if there.
    pub fn text_opt(&self, key: &str) -> Option<&'a str> {
        let value = self.get(key)?;
        let text = value.as_str();
        if text.is_none() {
            self.wrong(key, "a string", value);
        }
        text
    }

    /// A list of strings, if there.
    pub fn texts_opt(&self, key: &str) -> Option<Vec<&'a str>> {
        let value = self.get(key)?;
        let texts = value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_str).collect());
        if texts.is_none() {
            self.wrong(key, "a list of strings", value);
        }
        texts
    }

    /// A token id, if there.
    pub fn token_id(&self, key: &str) -> Option<u32> {
        self.typed(key, "a token id", as_token)
    }

    /// One token id or a list of them; empty if absent.
    pub fn token_ids(&self, key: &str) -> Vec<u32> {
        let one_or_many = |value: &Value| match value {
            Value::Array(items) => items.iter().map(as_token).collect(),
            one => as_token(one).map(|id| vec![id]),
        };
        self.typed(key, "a token id or a list of them", one_or_many)
            .unwrap_or_default()
    }

    /// The MLP's non-linearity under `key`, or `default`.
    pub fn activation_or(&self, key: &str, default: Activation) -> Activation {
        let Some(name) = self.text_opt(key) else {
            return default;
        };
        Activation::from_hf_name(name).unwrap_or_else(|| {
            let known = Activation::ALL.map(Activation::hf_name);
            let nearest =
                crate::registry::nearest(name, known).map(|n| format!("; did you mean {n}?"));
            self.problem(format!(
                "{}{key} is {name:?}, an activation that is not supported; known: {}{}",
                self.prefix,
                known.join(", "),
                nearest.unwrap_or_default()
            ));
            default
        })
    }

    /// The dtype of the weights (`dtype`, or `torch_dtype` of older files), if stated.
    pub fn dtype(&self) -> Option<DType> {
        let key = if self.has("dtype") {
            "dtype"
        } else {
            "torch_dtype"
        };
        let name = self.text_opt(key)?;
        let dtype = torch_dtype(name);
        if dtype.is_none() {
            self.problem(format!(
                "{}{key} is {name:?}, expected a torch dtype such as bfloat16",
                self.prefix
            ));
        }
        dtype
    }

    /// `layer_types`, checked to have one entry per layer, each one of `known`.
    pub fn layer_types(&self, num_layers: usize, known: &[&str]) -> Option<Vec<&'a str>> {
        let types = self.texts_opt("layer_types")?;
        if types.len() != num_layers {
            self.problem(format!(
                "{}layer_types has {} entries, expected {num_layers} from num_hidden_layers",
                self.prefix,
                types.len()
            ));
            return None;
        }
        if let Some((layer, found)) = types
            .iter()
            .enumerate()
            .find(|(_, found)| !known.contains(found))
        {
            self.problem(format!(
                "{}layer_types[{layer}] is {found:?}, expected one of {}",
                self.prefix,
                known.join(", ")
            ));
            return None;
        }
        Some(types)
    }

    pub(super) fn map(&self) -> &'a Map<String, Value> {
        self.map
    }

    pub(super) fn path_of(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) {
        self.problem(format!(
            "{}{key} is {}, expected {expected}",
            self.prefix,
            json_kind(found)
        ));
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.get(key)?;
        let converted = convert(value);
        if converted.is_none() {
            self.wrong(key, expected, value);
        }
        converted
    }

    /// A placeholder for a missing key, with a finding; a key of the wrong type has been reported already.
    fn required<T>(&self, key: &str, value: Option<T>, placeholder: T) -> T {
        if value.is_none() && !self.has(key) {
            self.problem(format!("key {}{key} is missing", self.prefix));
        }
        value.unwrap_or(placeholder)
    }
}

/// A whole number; a float without a fraction counts, as some exporters write `4096.0`.
fn as_size(value: &Value) -> Option<usize> {
    if let Some(whole) = value.as_u64() {
        return usize::try_from(whole).ok();
    }
    let float = value.as_f64()?;
    (float >= 0.0 && float.fract() == 0.0 && float < (1u64 << 53) as f64).then_some(float as usize)
}

fn as_token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// The dtype of a torch dtype name, with or without `torch.` before it.
fn torch_dtype(name: &str) -> Option<DType> {
    Some(match name.strip_prefix("torch.").unwrap_or(name) {
        "float64" | "double" => DType::F64,
        "float32" | "float" => DType::F32,
        "float16" | "half" => DType::F16,
        "bfloat16" => DType::BF16,
        "float8_e4m3fn" => DType::F8E4M3,
        "float8_e5m2" => DType::F8E5M2,
        _ => return None,
    })
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
