//! What is known of the classes of Megatron-Bridge, and the two directions.

use serde_json::{Map, Value, json};

use super::fields::Reader;
use super::{read, write, yaml};
use crate::config::{
    Activation, AttentionLayer, DecoderConfig, Ffn, LayerConfig, LayerRope, Mixer,
};
use crate::dtype::DType;
use crate::error::Problems;

/// What a `run_config.yaml` says of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct RunConfig {
    /// The model. It names no tokens that begin or end a text, which these files do not have.
    pub model: DecoderConfig,
    /// Type of the weights.
    pub dtype: Option<DType>,
}

/// The classes of Megatron-Bridge that are known: their dotted name up to the last part, and what is special to them.
pub(super) const GPT: &str = "megatron.bridge.models.gpt_provider.GPTModelProvider";
pub(super) const LATENT: &str = "megatron.bridge.models.mla_provider.MLAModelProvider";
pub(super) const GEMMA: &str = "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider";
pub(super) const GEMMA2: &str = "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider";
pub(super) const GEMMA3: &str = "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider";
pub(super) const HYBRID: &str = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider";
/// Classes that set defaults alone, which their files spell out.
pub(super) const SAME_AS_GPT: [&str; 1] =
    ["megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"];
pub(super) const SAME_AS_HYBRID: [&str; 1] =
    ["megatron.bridge.models.mamba.mamba_provider.MambaModelProvider"];
/// Norms of queries and keys over their whole width.
pub(super) const FULL_WIDTH_SPECS: [&str; 2] = [
    "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec",
    "megatron.bridge.models.olmoe.olmoe_bridge.olmoe_layer_spec",
];
/// Specs whose layers are what the other keywords say.
pub(super) const PLAIN_SPECS: [&str; 6] = [
    "megatron.bridge.models.gpt_provider.default_layer_spec",
    "megatron.bridge.models.gpt_provider.transformer_engine_layer_spec",
    "megatron.bridge.models.gpt_provider.local_layer_spec",
    "megatron.bridge.models.gemma.gemma2_provider.gemma2_layer_spec",
    "megatron.bridge.models.gemma.gemma3_provider.gemma3_layer_spec",
    DECODER_BLOCK,
];
/// What builds layers that differ.
pub(super) const DECODER_BLOCK: &str =
    "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec";

pub(super) const ACTIVATIONS: [(&str, Activation); 9] = [
    ("torch.nn.functional.silu", Activation::Silu),
    ("torch.nn.functional.gelu", Activation::Gelu),
    ("torch._C._nn.gelu", Activation::Gelu),
    ("megatron.core.activations.fast_gelu", Activation::GeluTanh),
    ("megatron.core.activations.squared_relu", Activation::Relu2),
    (QUICK_GELU, Activation::QuickGelu),
    ("torch.nn.functional.relu", Activation::Relu),
    ("torch.sigmoid", Activation::Sigmoid),
    ("torch.tanh", Activation::Tanh),
];
pub(super) const QUICK_GELU: &str = "megatron.core.fusions.fused_bias_geglu.quick_gelu";
/// The gain of quick GELU, which no keyword states.
pub(super) const QUICK_GELU_GAIN: f64 = 1.702;
/// Llama 3's numbers, of which the keywords state the factor alone.
pub(super) const LLAMA3: (f64, f64, usize) = (1.0, 4.0, 8192);

impl RunConfig {
    /// Reads the file's bytes.
    ///
    /// # Errors
    /// The limit that it passes, or what it says that is not known here.
    pub fn parse(bytes: &[u8]) -> Result<Self, Problems> {
        let one = |problem: String| {
            let mut problems = Problems::new();
            problems.push(problem);
            problems
        };
        let document = yaml::parse(bytes).map_err(one)?;
        let model = document.get("model").and_then(Value::as_object);
        let Some(model) = model else {
            return Err(one("it has no section model".to_owned()));
        };
        let mut reader = Reader::new(model);
        let config = read::read(&mut reader);
        if reader.problems.is_empty() {
            let sizes = config.model.validate("run_config.yaml");
            sizes.map_err(|error| match error {
                crate::error::Error::Config { problems, .. } => problems,
                other => one(other.to_string()),
            })?;
            Ok(config)
        } else {
            Err(reader.problems)
        }
    }

    /// The file's text, with which Megatron-Bridge builds the model.
    ///
    /// # Errors
    /// What none of its classes has a keyword for.
    pub fn to_yaml(&self) -> Result<String, Problems> {
        let model = write::write(&self.model, self.dtype)?;
        let document = json!({
            "model": model,
            // What is asked for when it is loaded.
            "checkpoint": {
                "ckpt_format": "torch_dist",
                "save_optim": false,
                "save_rng": false,
                "fully_parallel_save": false,
            },
        });
        Ok(yaml::write(&document))
    }
}

/// The parts of a hybrid model's layers, by letter.
pub(super) const PATTERN: [(char, fn() -> LayerConfig); 4] = [
    ('M', || LayerConfig {
        mixer: Mixer::Mamba2,
        ffn: Ffn::None,
    }),
    ('*', || LayerConfig {
        mixer: Mixer::Attention(AttentionLayer {
            rope: LayerRope::None,
            ..AttentionLayer::default()
        }),
        ffn: Ffn::None,
    }),
    ('-', || LayerConfig {
        mixer: Mixer::None,
        ..LayerConfig::dense()
    }),
    ('E', || LayerConfig {
        mixer: Mixer::None,
        ffn: Ffn::Moe,
    }),
];

/// The fields in which two configs differ, with the value of each.
pub(crate) fn differences(a: &DecoderConfig, b: &DecoderConfig) -> Vec<(String, Value, Value)> {
    let fields = |config| match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let (a, b) = (fields(a), fields(b));
    let of = |fields: &Map<String, Value>, key: &str| fields.get(key).cloned().unwrap_or_default();
    let keys = b.keys().filter(|key| a.get(*key) != b.get(*key));
    keys.map(|key| (key.clone(), of(&a, key), of(&b, key)))
        .collect()
}
