//! What a dense family is made of: a config map, a weight map and named sizes, all data.

use bridge_core::config::ConfigReader;
use bridge_core::{DecoderConfig, Error, HfConfig, ModelBridge, Problems, Result, WeightMap};
use serde_json::{Map, Value};

/// One key of a `config.json` and the part of a [`DecoderConfig`] that it speaks of, readable in both directions.
///
/// Most keys are made by the macros of this module: [`size`], [`number`], [`flag`], [`activation`].
pub struct ConfigKey {
    /// The key, as the hub spells it.
    pub key: &'static str,
    /// Puts what the file says into the config. Keys are read in the order of the table, so that one may fall back on
    /// what an earlier one has set.
    pub read: fn(&ConfigReader<'_>, &mut DecoderConfig),
    /// What a new file says; `None` leaves the key out.
    pub write: fn(&DecoderConfig) -> Option<Value>,
}

/// A named size.
#[derive(Clone, Copy)]
pub struct Preset {
    /// Name, such as `llama32_1b`.
    pub name: &'static str,
    /// The hub repository whose `config.json` has these numbers; empty for made-up sizes.
    pub hub_id: &'static str,
    /// The numbers.
    pub config: fn() -> DecoderConfig,
}

/// A family of dense decoders. Implements [`ModelBridge`].
pub struct FamilySpec {
    /// Name of the family.
    pub name: &'static str,
    /// The `architectures` of a `config.json` that it handles.
    pub architectures: &'static [&'static str],
    /// The `model_type` that it writes.
    pub model_type: &'static str,
    /// A config with everything that no key of the file says; the keys fill in the rest.
    pub base: fn() -> DecoderConfig,
    /// The config map.
    pub config: &'static [ConfigKey],
    /// The weight map.
    pub weights: fn(&DecoderConfig) -> WeightMap,
    /// Named sizes, the published ones first.
    pub presets: &'static [Preset],
}

impl ModelBridge for FamilySpec {
    fn name(&self) -> &'static str {
        self.name
    }

    fn architectures(&self) -> &'static [&'static str] {
        self.architectures
    }

    fn config(&self, config: &HfConfig) -> Result<DecoderConfig> {
        let keys = config.reader();
        let mut decoder = (self.base)();
        for key in self.config {
            (key.read)(&keys, &mut decoder);
        }
        keys.finish()?;
        decoder.validate(config.origin())?;
        Ok(decoder)
    }

    fn hf_config(&self, config: &DecoderConfig) -> Result<Map<String, Value>> {
        let origin = format!("config.json of a new {} model", self.name);
        config.validate(&origin)?;
        let mut json = Map::new();
        json.insert(
            "architectures".to_owned(),
            Value::from(vec![self.architectures[0]]),
        );
        json.insert("model_type".to_owned(), Value::from(self.model_type));
        for key in self.config {
            if let Some(value) = (key.write)(config) {
                json.insert(key.key.to_owned(), value);
            }
        }
        // Reading back what was written finds everything that this family's keys cannot say.
        let read = self.config(&HfConfig::from_json(json.clone(), origin.clone()))?;
        let lost = differences(config, &read);
        if lost.is_empty() {
            Ok(json)
        } else {
            Err(Error::Config {
                file: origin,
                problems: lost,
            })
        }
    }

    fn weights(&self, config: &DecoderConfig) -> WeightMap {
        (self.weights)(config)
    }
}

/// Every field of `asked` that a config file turns into another value.
fn differences(asked: &DecoderConfig, read: &DecoderConfig) -> Problems {
    let mut problems = Problems::new();
    let fields = |config: &DecoderConfig| match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        other => unreachable!("a config serializes to an object, found {other:?}"),
    };
    let read = fields(read);
    for (name, asked) in fields(asked) {
        let says = read.get(&name).unwrap_or(&Value::Null);
        if *says != asked {
            problems.push(format!(
                "the family's config.json cannot say {name} = {asked}; it would be read as {says}"
            ));
        }
    }
    problems
}

/// A whole number: `size!(key, field)` is required, `size!(key, field, |config| default)` is not.
macro_rules! size {
    ($key:literal, $($field:ident).+) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| config.$($field).+ = keys.size($key),
            write: |config| Some(config.$($field).+.into()),
        }
    };
    ($key:literal, $($field:ident).+, $default:expr) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| {
                let default: fn(&bridge_core::DecoderConfig) -> usize = $default;
                config.$($field).+ = keys.size_or($key, default(config));
            },
            write: |config| Some(config.$($field).+.into()),
        }
    };
}

/// A number: `number!(key, field, default)`.
macro_rules! number {
    ($key:literal, $($field:ident).+, $default:expr) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| config.$($field).+ = keys.number_or($key, $default),
            write: |config| Some(config.$($field).+.into()),
        }
    };
}

/// `true` or `false`: `flag!(key, default, field, more fields that the same key sets...)`.
macro_rules! flag {
    ($key:literal, $default:expr, $field:ident $(, $also:ident)*) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| {
                config.$field = keys.flag_or($key, $default);
                $(config.$also = config.$field;)*
            },
            write: |config| Some(config.$field.into()),
        }
    };
}

/// The MLP's non-linearity: `activation!(key, default)`.
macro_rules! activation {
    ($key:literal, $default:expr) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |keys, config| config.activation = keys.activation_or($key, $default),
            write: |config| Some(config.activation.hf_name().into()),
        }
    };
}

/// A key that new files hold with a fixed value and that says nothing about the model.
macro_rules! constant {
    ($key:literal, $value:expr) => {
        $crate::families::spec::ConfigKey {
            key: $key,
            read: |_, _| (),
            write: |_| Some(serde_json::json!($value)),
        }
    };
}

pub(super) use {activation, constant, flag, number, size};
