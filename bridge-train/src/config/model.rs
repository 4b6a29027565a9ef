//! The `model` section: the words of a Hugging Face `config.json`, or a folder that holds one.
//!
//! The section is not interpreted here. It becomes a `config.json` in memory, and the family's own bridge reads that as
//! it would read one from disk, so a model described in a recipe and a model imported from a folder pass through the
//! same code.

use std::path::PathBuf;

use bridge_core::{DecoderConfig, HfConfig, ModelBridge, Registry};
use toml::{Table, Value};

use super::section::{Key, Problems, SectionSchema};
use super::value::Kind;

/// Name of the section.
pub const SECTION: &str = "model";

/// The keys that name a whole model.
pub(crate) const WHOLE: &[&str] = &["hf", "preset"];

/// The keys of the section.
pub const SCHEMA: SectionSchema = SectionSchema {
    name: SECTION,
    keys: &[
        key(
            "hf",
            Kind::String,
            "Folder or hub id whose config.json describes the model; the other keys change it.",
        ),
        key(
            "preset",
            Kind::String,
            "Named size, for example llama32_1b (see `models list`); the other keys change it.",
        ),
        key(
            "architecture",
            Kind::String,
            "Hugging Face architecture, for example LlamaForCausalLM.",
        ),
        key(
            "model_type",
            Kind::String,
            "Hugging Face model type, where the architecture does not tell.",
        ),
        key(
            "hidden_size",
            Kind::Integer,
            "Width of the residual stream.",
        ),
        key(
            "intermediate_size",
            Kind::Integer,
            "Inner width of the MLP.",
        ),
        key("num_hidden_layers", Kind::Integer, "Decoder layers."),
        key("num_attention_heads", Kind::Integer, "Query heads."),
        key("num_key_value_heads", Kind::Integer, "Key and value heads."),
        key(
            "head_dim",
            Kind::Integer,
            "Width of a head. Default: hidden_size / num_attention_heads.",
        ),
        key("vocab_size", Kind::Integer, "Rows of the embedding."),
        key(
            "max_position_embeddings",
            Kind::Integer,
            "Longest context, in tokens.",
        ),
        key(
            "hidden_act",
            Kind::String,
            "Activation of the MLP, for example silu.",
        ),
        key(
            "rms_norm_eps",
            Kind::Float,
            "Added to the mean square in RMSNorm.",
        ),
        key(
            "layer_norm_eps",
            Kind::Float,
            "Added to the variance in LayerNorm.",
        ),
        key("num_experts", Kind::Integer, "Routed experts."),
        key(
            "n_routed_experts",
            Kind::Integer,
            "Routed experts, in the words of DeepSeek and GLM.",
        ),
        key(
            "n_shared_experts",
            Kind::Integer,
            "Experts that work on every token.",
        ),
        key(
            "num_experts_per_tok",
            Kind::Integer,
            "Routed experts that work on a token.",
        ),
        key(
            "moe_intermediate_size",
            Kind::Integer,
            "Inner width of a routed expert.",
        ),
        key(
            "first_k_dense_replace",
            Kind::Integer,
            "First layers that have an MLP in the place of experts.",
        ),
        key(
            "norm_topk_prob",
            Kind::Bool,
            "Whether the weights of a token's experts add up to one.",
        ),
        key(
            "num_nextn_predict_layers",
            Kind::Integer,
            "Modules of multi-token prediction.",
        ),
        key("rope_theta", Kind::Float, "Base of the rotary embedding."),
        key(
            "rope_scaling",
            Kind::Table,
            "Scaling of the rotary embedding: rope_type and its parameters.",
        ),
        key(
            "partial_rotary_factor",
            Kind::Float,
            "Share of each head that is rotated.",
        ),
        key(
            "attention_bias",
            Kind::Bool,
            "Biases on the attention projections.",
        ),
        key("mlp_bias", Kind::Bool, "Biases on the MLP projections."),
        key(
            "tie_word_embeddings",
            Kind::Bool,
            "Whether the head is the embedding.",
        ),
        key(
            "sliding_window",
            Kind::Integer,
            "Tokens a windowed layer sees.",
        ),
        key(
            "initializer_range",
            Kind::Float,
            "Standard deviation of fresh weights.",
        ),
        key("bos_token_id", Kind::Integer, "Token that starts a text."),
        key(
            "eos_token_id",
            Kind::Integers,
            "Token or tokens that end a text.",
        ),
        key(
            "pad_token_id",
            Kind::Integer,
            "Token that fills up short samples.",
        ),
    ],
};

const fn key(name: &'static str, kind: Kind, doc: &'static str) -> Key {
    Key { name, kind, doc }
}

/// The model of a run.
#[derive(Clone)]
pub struct ModelConfig {
    /// The section as it was merged.
    pub keys: Table,
    /// The folder that `model.hf` stands for, if it was given.
    pub hf_dir: Option<PathBuf>,
    /// The `config.json` that the section comes to.
    pub hf_config: HfConfig,
    /// What every weight and every layer follows from.
    pub decoder: DecoderConfig,
    /// The family.
    pub bridge: &'static dyn ModelBridge,
}

impl std::fmt::Debug for ModelConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelConfig")
            .field("family", &self.bridge.name())
            .field("decoder", &self.decoder)
            .finish()
    }
}

/// Two models are the same if every fact about their weights and arithmetic is.
impl PartialEq for ModelConfig {
    fn eq(&self, other: &Self) -> bool {
        self.bridge.name() == other.bridge.name() && self.decoder == other.decoder
    }
}

/// Reads the section. `hf_folder` turns the value of `model.hf` into a folder.
pub(crate) fn read(
    keys: &Table,
    registry: &Registry,
    hf_folder: &dyn Fn(&str) -> Result<PathBuf, String>,
    problems: &mut Problems,
) -> Option<ModelConfig> {
    let before = problems.len();
    for key in SCHEMA.keys {
        if let Some(value) = keys.get(key.name)
            && let Err(message) = check(value, key.kind)
        {
            problems.add(format!("{SECTION}.{}", key.name), message);
        }
    }
    let hf = keys.get("hf").and_then(Value::as_str);
    let preset = keys.get("preset").and_then(Value::as_str);
    if hf.is_some() && preset.is_some() {
        problems.add("model.preset", "is set together with model.hf; keep one");
    }
    if hf.is_none() && preset.is_none() && !keys.contains_key("architecture") {
        problems.add(
            SECTION,
            "describes no model; set model.hf, model.preset, or model.architecture and the words of a config.json",
        );
    }
    if problems.len() > before {
        return None;
    }
    let attempt = || -> Result<ModelConfig, (&'static str, String)> {
        let in_hf = |message: String| ("model.hf", message);
        let hf_dir = hf.map(hf_folder).transpose().map_err(in_hf)?;
        let config = match (&hf_dir, preset) {
            (Some(dir), _) => HfConfig::load(dir).map_err(|e| in_hf(e.to_string()))?,
            (None, Some(name)) => {
                preset_config(name).map_err(|message| ("model.preset", message))?
            }
            (None, None) => HfConfig::from_json(serde_json::Map::new(), "the [model] section"),
        };
        let config = apply(keys, config);
        let bridge = registry
            .detect(&config)
            .map_err(|e| (SECTION, e.to_string()))?;
        let decoder = bridge
            .config(&config)
            .map_err(|e| (SECTION, e.to_string()))?;
        Ok(ModelConfig {
            keys: keys.clone(),
            hf_dir,
            hf_config: config,
            decoder,
            bridge,
        })
    };
    match attempt() {
        Ok(model) => Some(model),
        Err((key, message)) => {
            problems.add(key, message);
            None
        }
    }
}

fn preset_config(name: &str) -> Result<HfConfig, String> {
    let (family, decoder) = bridge_models::families::preset(name).map_err(|e| e.to_string())?;
    let json = family.hf_config(&decoder).map_err(|e| e.to_string())?;
    Ok(HfConfig::from_json(
        json,
        format!("the preset {name} with the [model] section over it"),
    ))
}

/// Puts the section's words over those of a `config.json`. Without any, the config keeps its bytes.
fn apply(keys: &Table, config: HfConfig) -> HfConfig {
    let mut words = keys
        .iter()
        .filter(|(name, _)| !WHOLE.contains(&name.as_str()))
        .peekable();
    if words.peek().is_none() {
        return config;
    }
    let mut json = config.json().clone();
    for (name, value) in words {
        let value = to_json(value);
        match (
            name.as_str(),
            json.get_mut("rope_parameters")
                .and_then(|rope| rope.as_object_mut()),
        ) {
            ("architecture", _) => {
                json.insert(
                    "architectures".into(),
                    serde_json::Value::Array(vec![value]),
                );
            }
            // Newer files hold both rotary keys in one object, which would win over the older spelling.
            ("rope_theta", Some(rope)) => {
                rope.insert(name.clone(), value);
            }
            ("rope_scaling", Some(rope)) => {
                let theta = rope.remove("rope_theta");
                *rope = value.as_object().cloned().unwrap_or_default();
                rope.extend(theta.map(|theta| ("rope_theta".to_owned(), theta)));
            }
            _ => {
                json.insert(name.clone(), value);
            }
        }
    }
    HfConfig::from_json(
        json,
        format!("{} with the [model] section over it", config.origin()),
    )
}

fn to_json(value: &Value) -> serde_json::Value {
    match value {
        Value::String(text) => text.clone().into(),
        Value::Integer(n) => (*n).into(),
        Value::Float(x) => (*x).into(),
        Value::Boolean(b) => (*b).into(),
        Value::Datetime(d) => d.to_string().into(),
        Value::Array(items) => items.iter().map(to_json).collect(),
        Value::Table(table) => table.iter().map(|(k, v)| (k.clone(), to_json(v))).collect(),
    }
}

fn check(value: &Value, kind: Kind) -> Result<(), String> {
    use super::value::ConfigValue;
    match kind {
        Kind::Bool => bool::from_toml(value).map(drop),
        Kind::Integer => u64::from_toml(value).map(drop),
        Kind::Float => f64::from_toml(value).map(drop),
        Kind::String | Kind::Choice(_) => String::from_toml(value).map(drop),
        Kind::StringList => Vec::<String>::from_toml(value).map(drop),
        Kind::Integers => Vec::<u64>::from_toml(value).map(drop),
        Kind::Table => Table::from_toml(value).map(drop),
    }
}
