//! The `model` section as a typed config, and back.

use serde_json::{Map, Value, json};

use super::fields::{self, Reader, Writer};
use super::yaml;
use crate::config::{
    Activation, AttentionLayer, ClampedSwiglu, DecoderConfig, Ffn, GroupScoring, LayerConfig,
    LayerRope, Mamba2Config, Mixer, MlaConfig, MlpLayer, MoeConfig, NormKind, QkNorm, RopeConfig,
    RopeScaling, RopeStyle, RouterGroups, RouterScoring,
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
const GPT: &str = "megatron.bridge.models.gpt_provider.GPTModelProvider";
const LATENT: &str = "megatron.bridge.models.mla_provider.MLAModelProvider";
const GEMMA: &str = "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider";
const GEMMA2: &str = "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider";
const GEMMA3: &str = "megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider";
const HYBRID: &str = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider";
/// Classes that set defaults alone, which their files spell out.
const SAME_AS_GPT: [&str; 1] =
    ["megatron.bridge.models.mistral.mistral_provider.MistralModelProvider"];
const SAME_AS_HYBRID: [&str; 1] =
    ["megatron.bridge.models.mamba.mamba_provider.MambaModelProvider"];
/// Norms of queries and keys over their whole width.
const FULL_WIDTH_SPECS: [&str; 2] = [
    "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec",
    "megatron.bridge.models.olmoe.olmoe_bridge.olmoe_layer_spec",
];
/// Specs whose layers are what the other keywords say.
const PLAIN_SPECS: [&str; 6] = [
    "megatron.bridge.models.gpt_provider.default_layer_spec",
    "megatron.bridge.models.gpt_provider.transformer_engine_layer_spec",
    "megatron.bridge.models.gpt_provider.local_layer_spec",
    "megatron.bridge.models.gemma.gemma2_provider.gemma2_layer_spec",
    "megatron.bridge.models.gemma.gemma3_provider.gemma3_layer_spec",
    DECODER_BLOCK,
];
/// What builds layers that differ.
const DECODER_BLOCK: &str = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec";

const ACTIVATIONS: [(&str, Activation); 9] = [
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
const QUICK_GELU: &str = "megatron.core.fusions.fused_bias_geglu.quick_gelu";
/// The gain of quick GELU, which no keyword states.
const QUICK_GELU_GAIN: f64 = 1.702;
/// Llama 3's numbers, of which the keywords state the factor alone.
const LLAMA3: (f64, f64, usize) = (1.0, 4.0, 8192);

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
        let config = read(&mut reader);
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
        let model = write(&self.model, self.dtype)?;
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

fn read(reader: &mut Reader<'_>) -> RunConfig {
    let target = reader.name("_target_").unwrap_or_default().to_owned();
    let hybrid = target == HYBRID || SAME_AS_HYBRID.contains(&target.as_str());
    let gemma = [GEMMA, GEMMA2, GEMMA3].contains(&target.as_str());
    let known = hybrid || gemma || target == GPT || target == LATENT;
    if !known && !SAME_AS_GPT.contains(&target.as_str()) {
        reader.wrong("_target_", "a class of Megatron-Bridge that is known here");
    }
    let mut config = DecoderConfig {
        intermediate_size: 0,
        ..DecoderConfig::plain()
    };
    config.gated_mlp = false;
    config.norm.eps = 1e-5;
    fields::decoder(reader, &mut config);
    let heads = config.num_attention_heads;
    if config.num_key_value_heads == 0 {
        config.num_key_value_heads = heads;
    }
    if config.head_dim == 0 {
        config.head_dim = config.hidden_size.checked_div(heads).unwrap_or(0);
    }
    if config.intermediate_size == 0 {
        config.intermediate_size = config.hidden_size.saturating_mul(4);
    }
    match reader.name("normalization") {
        Some("RMSNorm") => {}
        Some("LayerNorm") | None => {
            config.norm.kind = NormKind::LayerNorm;
            config.norm.bias = true;
        }
        Some(_) => reader.wrong("normalization", "RMSNorm or LayerNorm"),
    }
    config.activation = activation(reader);
    let bias = reader.is_true("add_bias_linear");
    config.attention_bias = bias || reader.is_true("add_qkv_bias");
    config.attention_output_bias = bias;
    config.mlp_bias = bias;
    config.attention_sinks = match reader.name("softmax_type") {
        None | Some("vanilla") => false,
        Some("learnable") => true,
        Some(_) => {
            reader.wrong("softmax_type", "vanilla or learnable");
            false
        }
    };
    config.attention_scale = reader.number_of("softmax_scale");
    if reader.is_true("multi_latent_attention") {
        read_latent(reader, &mut config);
    } else if reader.is_true("qk_layernorm") {
        config.qk_norm = Some(QkNorm::PerHead);
    }
    match reader.name("transformer_layer_spec") {
        None => {}
        Some(spec) if PLAIN_SPECS.contains(&spec) => {}
        Some(spec) if FULL_WIDTH_SPECS.contains(&spec) => config.qk_norm = Some(QkNorm::FullWidth),
        Some(_) => reader.wrong("transformer_layer_spec", "a spec that is known here"),
    }
    if reader.value("experimental_attention_variant").is_some() {
        reader.wrong(
            "experimental_attention_variant",
            "nothing: no such layers are read",
        );
    }
    if reader.value("moe_latent_size").is_some() {
        reader.wrong(
            "moe_latent_size",
            "nothing: experts in a latent space are not read",
        );
    }
    read_rope(reader, &mut config, &target);
    if let (Some(mla), Some(rope)) = (&config.mla, &config.rope) {
        // Megatron-Core computes it, and passes over the keyword.
        config.attention_scale = mla.attention_scale(rope);
    }
    if reader.value("num_moe_experts").is_some() {
        config.moe = Some(read_experts(reader, &mut config, bias));
    }
    if gemma {
        config.embedding_scale = Some((config.hidden_size as f64).sqrt());
    }
    if target == GEMMA2 {
        config.attention_softcap = reader.number_of("attn_logit_softcapping");
        config.final_logit_softcap = reader.number_of("final_logit_softcapping");
        let scalar = reader.number_of("query_pre_attn_scalar");
        config.attention_scale = scalar.map(|scalar| scalar.powf(-0.5));
    }
    config.attention_output_norm = target == GEMMA2 || target == GEMMA3;
    config.mlp_output_norm = config.attention_output_norm;
    if hybrid {
        read_hybrid(reader, &mut config);
    } else {
        read_layers(reader, &mut config, &target);
    }
    let dtype = match reader.name("params_dtype") {
        _ if reader.is_true("bf16") => Some(DType::BF16),
        _ if reader.is_true("fp16") => Some(DType::F16),
        Some("torch.bfloat16") => Some(DType::BF16),
        Some("torch.float16") => Some(DType::F16),
        Some("torch.float32") => Some(DType::F32),
        _ => None,
    };
    RunConfig {
        model: config,
        dtype,
    }
}

fn activation(reader: &mut Reader<'_>) -> Activation {
    let name = reader
        .name("activation_func")
        .unwrap_or("torch.nn.functional.gelu");
    let found = ACTIVATIONS.iter().find(|(known, _)| *known == name);
    match found {
        Some((_, activation)) => *activation,
        None => {
            reader.wrong("activation_func", "a function that is known here");
            Activation::Silu
        }
    }
}

fn read_latent(reader: &mut Reader<'_>, config: &mut DecoderConfig) {
    let mut mla = MlaConfig {
        q_lora_rank: None,
        kv_lora_rank: 512,
        qk_nope_head_dim: 128,
        qk_rope_head_dim: 64,
        v_head_dim: 128,
        norm_eps: config.norm.eps,
    };
    fields::latent(reader, &mut mla);
    config.head_dim = mla.qk_head_dim();
    config.num_key_value_heads = config.num_attention_heads;
    config.rope_style = RopeStyle::Pairs;
    config.mla = Some(mla);
}

fn read_rope(reader: &mut Reader<'_>, config: &mut DecoderConfig, target: &str) {
    let kind = match reader.name("position_embedding_type") {
        _ if config.mla.is_some() => reader.name("rope_type").unwrap_or("yarn"),
        Some(kind) => kind,
        None => "none",
    };
    if kind == "none" {
        config.rope = None;
        return;
    }
    if target == GEMMA3 {
        // Local, then global.
        let bases = reader.value("rotary_base").and_then(Value::as_array);
        let bases = bases.map(|bases| bases.iter().filter_map(Value::as_f64).collect::<Vec<_>>());
        match bases.as_deref() {
            Some(&[local, global]) => {
                config.rope_local = Some(RopeConfig::new(local));
                let factor = reader.number_of("rope_scaling_factor").unwrap_or(1.0);
                let mut rope = RopeConfig::new(global);
                if factor != 1.0 {
                    rope.scaling = RopeScaling::Linear { factor };
                }
                config.rope = Some(rope);
            }
            _ => reader.wrong("rotary_base", "two numbers"),
        }
        return;
    }
    let mut rope = RopeConfig::new(reader.number_of("rotary_base").unwrap_or(10_000.0));
    let interpolation = reader.number_of("seq_len_interpolation_factor");
    match kind {
        "rope" if reader.is_true("rope_scaling") => {
            let (low_freq_factor, high_freq_factor, original_max_position_embeddings) = LLAMA3;
            rope.scaling = RopeScaling::Llama3 {
                factor: reader.number_of("rope_scaling_factor").unwrap_or(8.0),
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            };
        }
        "rope" => {
            if let Some(factor) = interpolation {
                rope.scaling = RopeScaling::Linear { factor };
            }
        }
        // Models of latent attention without scaling are stretched by nothing.
        "yarn"
            if config.mla.is_some() && reader.number_of("rotary_scaling_factor") == Some(1.0) => {}
        "yarn" => {
            // Latent attention has keywords of its own, without the prefix and with other defaults.
            let (prefix, factor, mscale) = match config.mla {
                Some(_) => ("", 40.0, Some(1.0)),
                None => ("yarn_", 1.0, None),
            };
            let mut of = |key: &str| reader.number_of(&format!("{prefix}{key}"));
            rope.scaling = RopeScaling::Yarn {
                factor: of("rotary_scaling_factor").unwrap_or(factor),
                original_max_position_embeddings: of("original_max_position_embeddings")
                    .unwrap_or(4096.0) as usize,
                beta_fast: of("beta_fast").unwrap_or(32.0),
                beta_slow: of("beta_slow").unwrap_or(1.0),
                mscale: of("mscale").or(mscale),
                mscale_all_dim: of("mscale_all_dim").or(mscale.map(|_| 0.0)),
                attention_factor: None,
                truncate: reader.value("yarn_correction_range_round_to_int")
                    != Some(&Value::Bool(false)),
            };
        }
        _ => reader.wrong("position_embedding_type", "rope, yarn or none"),
    }
    config.rope = Some(rope);
}

fn read_experts(reader: &mut Reader<'_>, config: &mut DecoderConfig, bias: bool) -> MoeConfig {
    let mut moe = MoeConfig::plain();
    moe.num_experts_per_tok = 2;
    moe.intermediate_size = config.intermediate_size;
    fields::experts(reader, &mut moe);
    moe.expert_projection_bias = bias;
    moe.router.bias = bias;
    // Dense layers beside such experts are not known.
    config.mlp_bias = false;
    moe.router.score = match reader.name("moe_router_score_function") {
        None | Some("softmax") => RouterScoring::Softmax,
        Some("sigmoid") => RouterScoring::Sigmoid,
        Some(_) => {
            reader.wrong("moe_router_score_function", "softmax or sigmoid");
            RouterScoring::Softmax
        }
    };
    moe.router.normalize =
        moe.router.score == RouterScoring::Sigmoid || !reader.is_true("moe_router_pre_softmax");
    let groups = reader.size_of("moe_router_num_groups");
    let picked = reader.size_of("moe_router_group_topk");
    if let (Some(n_group), Some(topk_group)) = (groups, picked) {
        let score = match moe.router.score {
            RouterScoring::Softmax => GroupScoring::Max,
            RouterScoring::Sigmoid => GroupScoring::SumOfTopTwo,
        };
        moe.router.groups = (n_group != 1).then_some(RouterGroups {
            n_group,
            topk_group,
            score,
        });
    }
    if let Some(limit) = reader.number_of("activation_func_clamp_value") {
        moe.clamped_swiglu = Some(ClampedSwiglu {
            alpha: QUICK_GELU_GAIN,
            limit,
        });
        // It is what quick GELU, clamped, makes of a gated unit.
        config.activation = Activation::Silu;
    }
    moe
}

/// Which layers have experts, and which see a window alone.
fn read_layers(reader: &mut Reader<'_>, config: &mut DecoderConfig, target: &str) {
    let count = config.num_hidden_layers;
    if count > crate::config::MAX_LAYERS {
        return reader.wrong("num_layers", "a number of layers");
    }
    let experts = flags(reader, "moe_layer_freq", count, |every, index| {
        index % every == 0
    });
    let window = match reader.value("window_size") {
        None => None,
        // [tokens before the own one, tokens after it], or the number of tokens in all.
        Some(Value::Array(sides)) => match sides.first().and_then(Value::as_u64) {
            Some(before) => Some(before as usize + 1),
            None => {
                reader.wrong("window_size", "two sizes");
                None
            }
        },
        Some(_) => reader.size_of("window_size"),
    };
    let windowed: Vec<bool> = match target {
        GEMMA2 => (0..count).map(|index| index % 2 == 0).collect(),
        GEMMA3 => {
            let pattern = reader
                .value("interleaved_attn_pattern")
                .and_then(Value::as_array);
            let pattern = pattern.map(|pattern| pattern.iter().filter_map(Value::as_u64).sum());
            let period = pattern.filter(|sum| *sum > 0).unwrap_or(6) as usize;
            (1..=count).map(|number| number % period != 0).collect()
        }
        _ => flags(reader, "window_attn_skip_freq", count, |every, index| {
            every < 2 || !(index + 1).is_multiple_of(every)
        }),
    };
    config.layers = (0..count)
        .map(|index| {
            let own = window.filter(|_| windowed[index]);
            let local = target == GEMMA3 && own.is_some();
            LayerConfig {
                mixer: Mixer::Attention(AttentionLayer {
                    window: own,
                    rope: if local {
                        LayerRope::Local
                    } else {
                        LayerRope::Global
                    },
                    num_key_value_heads: None,
                }),
                ffn: if config.moe.is_some() && experts[index] {
                    Ffn::Moe
                } else {
                    Ffn::Mlp(MlpLayer::default())
                },
            }
        })
        .collect();
}

/// A flag per layer: a list of them, or a number that `at` makes one of; true where there is neither.
fn flags(
    reader: &mut Reader<'_>,
    key: &str,
    count: usize,
    at: impl Fn(usize, usize) -> bool,
) -> Vec<bool> {
    match reader.value(key) {
        None => vec![true; count],
        Some(Value::Array(list)) if list.len() == count => list
            .iter()
            .map(|flag| flag.as_u64() == Some(1) || flag == &Value::Bool(true))
            .collect(),
        Some(Value::Number(every)) if every.as_u64().is_some_and(|every| every > 0) => {
            let every = every.as_u64().unwrap_or(1) as usize;
            (0..count).map(|index| at(every, index)).collect()
        }
        Some(_) => {
            reader.wrong(key, &format!("a number above 0 or {count} flags"));
            vec![true; count]
        }
    }
}

/// The parts of a hybrid model's layers, by letter.
const PATTERN: [(char, fn() -> LayerConfig); 4] = [
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

fn read_hybrid(reader: &mut Reader<'_>, config: &mut DecoderConfig) {
    let key = if reader.value("hybrid_layer_pattern").is_some() {
        "hybrid_layer_pattern"
    } else {
        "hybrid_override_pattern"
    };
    let pattern = reader.name(key).unwrap_or_default();
    // Bars divide pipeline stages.
    let letters = pattern.chars().filter(|letter| *letter != '|');
    let layers = letters.take(crate::config::MAX_LAYERS + 1).map(|letter| {
        let found = PATTERN.iter().find(|(known, _)| *known == letter);
        found.map(|(_, layer)| layer())
    });
    match layers.collect::<Option<Vec<_>>>() {
        Some(layers) if !layers.is_empty() => config.layers = layers,
        _ => reader.wrong(key, "letters M, *, - and E, one for each layer"),
    }
    config.num_hidden_layers = config.layers.len();
    let hidden = config.hidden_size;
    let head_dim = reader.size_of("mamba_head_dim").unwrap_or(64);
    let heads = reader.size_of("mamba_num_heads");
    config.mamba2 = Some(Mamba2Config {
        num_heads: heads.unwrap_or_else(|| (2 * hidden).checked_div(head_dim).unwrap_or(0)),
        head_dim,
        num_groups: reader.size_of("mamba_num_groups").unwrap_or(8),
        state_size: reader.size_of("mamba_state_dim").unwrap_or(128),
        conv_kernel: 4,
        conv_bias: true,
        proj_bias: false,
        chunk_size: reader.size_of("mamba_chunk_size").unwrap_or(128),
        time_step_min: 0.001,
    });
}

fn write(config: &DecoderConfig, dtype: Option<DType>) -> Result<Map<String, Value>, Problems> {
    let mut config = config.clone();
    let mut problems = Problems::new();
    let mut writer = Writer(Map::new());
    let hybrid = config
        .layers
        .iter()
        .any(|layer| layer.mixer == Mixer::Mamba2);
    let target = match &config {
        _ if hybrid => HYBRID,
        config if config.mla.is_some() => LATENT,
        config if config.rope_local.is_some() => GEMMA3,
        config if config.attention_output_norm => GEMMA2,
        config if config.embedding_scale.is_some() => GEMMA,
        _ => GPT,
    };
    writer.set("_target_", target);
    fields::decoder(&mut writer, &mut config);
    let norm = match config.norm.kind {
        NormKind::RmsNorm => "RMSNorm",
        NormKind::LayerNorm => "LayerNorm",
    };
    writer.set("normalization", norm);
    let activation = ACTIVATIONS
        .iter()
        .find(|(_, known)| *known == config.activation);
    let clamp = config.moe.as_ref().and_then(|moe| moe.clamped_swiglu);
    let activation = match (clamp, activation) {
        (Some(_), _) => QUICK_GELU,
        (None, Some((name, _))) => name,
        (None, None) => {
            problems.push(format!("activation {}", config.activation.hf_name()));
            ""
        }
    };
    writer.set(
        "activation_func",
        json!({"_target_": activation, "_call_": false}),
    );
    let experts = config.moe.as_ref();
    let bias = config.mlp_bias || experts.is_some_and(|moe| moe.expert_projection_bias);
    writer.set("add_bias_linear", bias);
    writer.set("add_qkv_bias", config.attention_bias && !bias);
    writer.set(
        "qk_layernorm",
        config.qk_norm.is_some() || config.mla.is_some(),
    );
    let softmax = if config.attention_sinks {
        "learnable"
    } else {
        "vanilla"
    };
    writer.set("softmax_type", softmax);
    if let Some(scale) = config
        .attention_scale
        .filter(|_| target != GEMMA2 && target != LATENT)
    {
        writer.set("softmax_scale", scale);
    }
    if let Some(mla) = &mut config.mla {
        writer.set("multi_latent_attention", true);
        fields::latent(&mut writer, mla);
    }
    write_rope(&mut writer, &config, target, &mut problems);
    if let Some(moe) = &config.moe {
        write_experts(&mut writer, &config, moe);
    }
    if target == GEMMA2 {
        for (key, value) in [
            ("attn_logit_softcapping", config.attention_softcap),
            ("final_logit_softcapping", config.final_logit_softcap),
            (
                "query_pre_attn_scalar",
                config
                    .attention_scale
                    // The rounding undoes that of the square root.
                    .map(|scale| (scale.powi(-2) * 1e6).round() / 1e6),
            ),
        ] {
            writer.set(key, value);
        }
    }
    if hybrid {
        write_hybrid(&mut writer, &config, &mut problems);
    } else {
        write_layers(&mut writer, &config, target);
    }
    let (name, bf16, fp16) = match dtype {
        Some(DType::BF16) => ("torch.bfloat16", true, false),
        Some(DType::F16) => ("torch.float16", false, true),
        _ => ("torch.float32", false, false),
    };
    writer.set("params_dtype", json!({"_target_": name, "_call_": false}));
    writer.set("bf16", bf16);
    writer.set("fp16", fp16);
    for key in ["hidden_dropout", "attention_dropout"] {
        writer.set(key, 0.0);
    }
    // Rows are stored as the model has them.
    writer.set("should_pad_vocab", false);
    for key in [
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ] {
        writer.set(key, 1);
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // What the keywords cannot say is lost, and reading them shows it.
    let mut reader = Reader::new(&writer.0);
    let again = read(&mut reader).model;
    let stated = DecoderConfig {
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        ..config
    };
    if again == stated {
        return Ok(writer.0);
    }
    for (key, found, expected) in differences(&again, &stated) {
        problems.push(format!("{key} would be {found}, and is {expected}"));
    }
    Err(problems)
}

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

fn write_rope(writer: &mut Writer, config: &DecoderConfig, target: &str, problems: &mut Problems) {
    let Some(rope) = &config.rope else {
        return writer.set("position_embedding_type", "none");
    };
    let latent = config.mla.is_some();
    writer.set("rotary_base", rope.theta);
    writer.set("position_embedding_type", "rope");
    if latent {
        writer.set("rope_type", "rope");
    }
    match (&rope.scaling, &config.rope_local) {
        (scaling, Some(local)) if target == GEMMA3 => {
            writer.set("rotary_base", json!([local.theta, rope.theta]));
            match scaling {
                RopeScaling::Default => {}
                RopeScaling::Linear { factor } => writer.set("rope_scaling_factor", *factor),
                other => problems.push(format!("rotary embeddings scaled by {}", other.name())),
            }
        }
        (RopeScaling::Default, _) => {}
        (RopeScaling::Linear { factor }, _) => writer.set("seq_len_interpolation_factor", *factor),
        (RopeScaling::Llama3 { factor, .. }, _) => {
            writer.set("rope_scaling", true);
            writer.set("rope_scaling_factor", *factor);
        }
        (
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                mscale,
                mscale_all_dim,
                attention_factor: _,
                truncate,
            },
            _,
        ) => {
            let prefix = if latent { "" } else { "yarn_" };
            writer.set(
                if latent {
                    "rope_type"
                } else {
                    "position_embedding_type"
                },
                "yarn",
            );
            let mut set = |key: &str, value: Value| writer.set(&format!("{prefix}{key}"), value);
            set("rotary_scaling_factor", json!(factor));
            set(
                "original_max_position_embeddings",
                json!(original_max_position_embeddings),
            );
            set("beta_fast", json!(beta_fast));
            set("beta_slow", json!(beta_slow));
            set("mscale", json!(mscale));
            set("mscale_all_dim", json!(mscale_all_dim));
            if !latent {
                writer.set("yarn_correction_range_round_to_int", *truncate);
            }
        }
        (other, _) => problems.push(format!("rotary embeddings scaled by {}", other.name())),
    }
}

fn write_experts(writer: &mut Writer, config: &DecoderConfig, moe: &MoeConfig) {
    let mut moe = moe.clone();
    fields::experts(writer, &mut moe);
    let (score, pre_softmax) = match moe.router.score {
        RouterScoring::Softmax => ("softmax", !moe.router.normalize),
        RouterScoring::Sigmoid => ("sigmoid", false),
    };
    writer.set("moe_router_score_function", score);
    writer.set("moe_router_pre_softmax", pre_softmax);
    if let Some(groups) = &moe.router.groups {
        writer.set("moe_router_num_groups", groups.n_group);
        writer.set("moe_router_group_topk", groups.topk_group);
    }
    if let Some(clamp) = &moe.clamped_swiglu {
        writer.set("activation_func_clamp_value", clamp.limit);
        writer.set("glu_linear_offset", 1.0);
    }
    writer.set("moe_grouped_gemm", true);
    writer.set("moe_token_dispatcher_type", "alltoall");
    writer.set("moe_router_load_balancing_type", "none");
    if config.qk_norm == Some(QkNorm::FullWidth) {
        let spec = json!({"_target_": FULL_WIDTH_SPECS[0], "_call_": false});
        writer.set("transformer_layer_spec", spec);
    }
}

fn write_layers(writer: &mut Writer, config: &DecoderConfig, target: &str) {
    let of =
        |test: &dyn Fn(&LayerConfig) -> bool| config.layers.iter().map(test).collect::<Vec<_>>();
    let experts = of(&|layer| layer.ffn == Ffn::Moe);
    if config.moe.is_some() && experts.contains(&false) {
        let flags: Vec<u8> = experts.iter().map(|flag| u8::from(*flag)).collect();
        writer.set("moe_layer_freq", flags);
        writer.set(
            "transformer_layer_spec",
            json!({"_target_": DECODER_BLOCK, "_partial_": true, "use_transformer_engine": true}),
        );
    }
    let window_of = |layer: &LayerConfig| layer.attention().and_then(|own| own.window);
    let Some(window) = config.layers.iter().find_map(window_of) else {
        return;
    };
    if target == GEMMA3 {
        writer.set("window_size", window);
        let full = config
            .layers
            .iter()
            .position(|layer| window_of(layer).is_none());
        writer.set("interleaved_attn_pattern", json!([full.unwrap_or(5), 1]));
        return;
    }
    writer.set("window_size", json!([window - 1, 0]));
    let windowed = of(&|layer| window_of(layer).is_some());
    if target != GEMMA2 && windowed.contains(&false) {
        let flags: Vec<u8> = windowed.iter().map(|flag| u8::from(*flag)).collect();
        writer.set("window_attn_skip_freq", flags);
    }
}

fn write_hybrid(writer: &mut Writer, config: &DecoderConfig, problems: &mut Problems) {
    let letter = |layer: &LayerConfig| {
        let found = PATTERN.iter().find(|(_, known)| known() == *layer);
        found.map(|(letter, _)| *letter)
    };
    match config.layers.iter().map(letter).collect::<Option<String>>() {
        Some(pattern) => writer.set("hybrid_layer_pattern", pattern),
        None => problems.push("layers that differ in more than their kind"),
    }
    if let Some(mamba2) = &config.mamba2 {
        writer.set("mamba_num_heads", mamba2.num_heads);
        writer.set("mamba_head_dim", mamba2.head_dim);
        writer.set("mamba_num_groups", mamba2.num_groups);
        writer.set("mamba_state_dim", mamba2.state_size);
        writer.set("mamba_chunk_size", mamba2.chunk_size);
    }
    writer.set("is_hybrid_model", true);
}
