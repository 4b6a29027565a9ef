//! A typed config as the `model` section.

use serde_json::{Map, Value, json};

use super::fields::{self, Reader, Writer};
use super::model::*;
use super::read::read;
use crate::config::{
    DecoderConfig, Ffn, LayerConfig, Mixer, MoeConfig, NormKind, QkNorm, RopeScaling, RouterScoring,
};
use crate::dtype::DType;
use crate::error::Problems;

pub(super) fn write(
    config: &DecoderConfig,
    dtype: Option<DType>,
) -> Result<Map<String, Value>, Problems> {
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
