//! The `model` section as a typed config.

use serde_json::Value;

use super::fields::{self, Reader};
use super::model::*;
use crate::config::{
    Activation, AttentionLayer, ClampedSwiglu, DecoderConfig, Ffn, GroupScoring, LayerConfig,
    LayerRope, Mamba2Config, Mixer, MlaConfig, MlpLayer, MoeConfig, NormKind, QkNorm, RopeConfig,
    RopeScaling, RopeStyle, RouterGroups, RouterScoring,
};
use crate::dtype::DType;

pub(super) fn read(reader: &mut Reader<'_>) -> RunConfig {
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
