//! Rotary embedding keys of a `config.json`, in the two spellings that are about: `rope_theta` with `rope_scaling`, and
//! `rope_parameters` of transformers 5, which may be split by layer type.

use serde_json::{Map, Value, json};

use super::{ConfigReader, RopeConfig, RopeScaling};

/// What a family's config class assumes where `config.json` is silent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeDefaults {
    /// Base of the wavelengths.
    pub theta: f64,
    /// The model's `max_position_embeddings`, in tokens: the fallback of `original_max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// Share of each head that is rotated.
    pub partial_rotary_factor: f64,
}

impl RopeDefaults {
    /// What transformers assumes for most families: base 10000, every element rotated.
    pub fn new(max_position_embeddings: usize) -> Self {
        Self {
            theta: 10_000.0,
            max_position_embeddings,
            partial_rotary_factor: 1.0,
        }
    }
}

impl ConfigReader<'_> {
    /// The model's one rotary embedding and its `partial_rotary_factor`, from either spelling.
    ///
    /// Where both `rope_scaling` and `rope_parameters` are there, `rope_scaling` wins, as in transformers 5.
    /// An unknown rope type is a finding that names the known ones.
    pub fn rope(&self, defaults: RopeDefaults) -> (RopeConfig, f64) {
        // An empty `rope_scaling` says nothing.
        let scaled = self
            .get("rope_scaling")
            .is_some_and(|value| value.as_object().is_none_or(|keys| !keys.is_empty()));
        self.rope_under(
            self.section(if scaled {
                "rope_scaling"
            } else {
                "rope_parameters"
            }),
            defaults,
        )
    }

    /// The rotary embedding of one layer type ("full_attention", "sliding_attention") where `rope_parameters` is split
    /// by layer type; `None` where it is not split or says nothing about that type.
    pub fn rope_of_layer_type(
        &self,
        layer_type: &str,
        defaults: RopeDefaults,
    ) -> Option<(RopeConfig, f64)> {
        if !matches!(
            self.get("rope_parameters")
                .and_then(|all| all.get(layer_type)),
            Some(Value::Object(_))
        ) {
            return None;
        }
        let all = self.section("rope_parameters")?;
        let own = all.section(layer_type);
        let found = self.rope_under(own, defaults);
        self.absorb(all);
        Some(found)
    }

    fn rope_under(
        &self,
        section: Option<ConfigReader<'_>>,
        defaults: RopeDefaults,
    ) -> (RopeConfig, f64) {
        let theta = self.number_or("rope_theta", defaults.theta);
        let partial = self.number_or("partial_rotary_factor", defaults.partial_rotary_factor);
        let Some(keys) = section else {
            return (RopeConfig::new(theta), partial);
        };
        let theta = keys.number_or("rope_theta", theta);
        let partial = keys.number_or("partial_rotary_factor", partial);
        // `rope_type` is the newer word for `type`; both are found in one file at times.
        let type_key = if keys.has("rope_type") {
            "rope_type"
        } else {
            "type"
        };
        let original = self
            .size_opt("original_max_position_embeddings")
            .or_else(|| keys.size_opt("original_max_position_embeddings"))
            .unwrap_or(defaults.max_position_embeddings);
        let scaling = match keys.text_opt(type_key).unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: keys.number("factor"),
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: keys.number("factor"),
                max_position_embeddings: defaults.max_position_embeddings,
            },
            "yarn" => RopeScaling::Yarn {
                // A null factor means the ratio of the two context lengths.
                factor: if keys.map().get("factor").is_some_and(Value::is_null) {
                    defaults.max_position_embeddings as f64 / original as f64
                } else {
                    keys.number("factor")
                },
                original_max_position_embeddings: original,
                beta_fast: keys
                    .number_opt("beta_fast")
                    .filter(|beta| *beta != 0.0)
                    .unwrap_or(32.0),
                beta_slow: keys
                    .number_opt("beta_slow")
                    .filter(|beta| *beta != 0.0)
                    .unwrap_or(1.0),
                mscale: keys.number_opt("mscale"),
                mscale_all_dim: keys.number_opt("mscale_all_dim"),
                attention_factor: keys.number_opt("attention_factor"),
                truncate: keys.flag_or("truncate", true),
            },
            "llama3" => RopeScaling::Llama3 {
                factor: keys.number("factor"),
                low_freq_factor: keys.number("low_freq_factor"),
                high_freq_factor: keys.number("high_freq_factor"),
                original_max_position_embeddings: original,
            },
            unknown => {
                let known = RopeScaling::NAMES;
                let nearest = crate::registry::nearest(unknown, known)
                    .map(|n| format!("; did you mean {n}?"));
                keys.problem(format!(
                    "{} is {unknown:?}, a rope type that is not supported; known: {}{}",
                    keys.path_of(type_key),
                    known.join(", "),
                    nearest.unwrap_or_default()
                ));
                RopeScaling::Default
            }
        };
        self.absorb(keys);
        (RopeConfig { theta, scaling }, partial)
    }
}

impl RopeConfig {
    /// The `rope_theta` and `rope_scaling` values of a `config.json` in the hub's spelling, which every version of
    /// transformers reads. `rope_scaling` is `null` where nothing is stretched.
    pub fn to_hf(&self) -> (Value, Value) {
        let mut scaling = Map::new();
        let mut set = |key: &str, value: Value| {
            scaling.insert(key.to_owned(), value);
        };
        match &self.scaling {
            RopeScaling::Default => return (json!(self.theta), Value::Null),
            RopeScaling::Linear { factor } => set("factor", json!(factor)),
            RopeScaling::Dynamic {
                factor,
                max_position_embeddings: _,
            } => set("factor", json!(factor)),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                attention_factor,
                truncate,
            } => {
                set("factor", json!(factor));
                set(
                    "original_max_position_embeddings",
                    json!(original_max_position_embeddings),
                );
                set("beta_fast", json!(beta_fast));
                set("beta_slow", json!(beta_slow));
                for (key, value) in [
                    ("mscale", mscale),
                    ("mscale_all_dim", mscale_all_dim),
                    ("attention_factor", attention_factor),
                ] {
                    if let Some(value) = value {
                        set(key, json!(value));
                    }
                }
                set("truncate", json!(truncate));
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                set("factor", json!(factor));
                set("low_freq_factor", json!(low_freq_factor));
                set("high_freq_factor", json!(high_freq_factor));
                set(
                    "original_max_position_embeddings",
                    json!(original_max_position_embeddings),
                );
            }
        }
        set("rope_type", json!(self.scaling.name()));
        (json!(self.theta), Value::Object(scaling))
    }
}
