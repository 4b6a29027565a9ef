//! A small Llama-like family for this crate's own tests, with as many quirks of naming as its config asks for.

use serde_json::{Map, Value, json};

use crate::bridge::ModelBridge;
use crate::config::{Activation, ConfigReader, DecoderConfig, HfConfig, LayerConfig, RopeDefaults};
use crate::error::Result;
use crate::mapping::{Fused, WeightMap};

/// The bridge of the test family. With `"fused": true` its files hold fused, interleaved and transposed tensors.
pub(crate) struct TestBridge;

/// A config of the test family: every dimension differs from every other.
pub(crate) fn test_config(changes: Value) -> HfConfig {
    let mut json = json!({
        "architectures": ["TestForCausalLM"],
        "model_type": "test",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 131,
        "max_position_embeddings": 64,
        "tie_word_embeddings": false,
        "torch_dtype": "float32",
        "fused": false,
    });
    if let (Value::Object(json), Value::Object(changes)) = (&mut json, changes) {
        json.extend(changes);
    }
    let Value::Object(json) = json else {
        unreachable!("an object literal")
    };
    HfConfig::from_json(json, "config.json")
}

fn read(keys: &ConfigReader<'_>) -> DecoderConfig {
    let layers = keys.num_layers("num_hidden_layers");
    let max_position_embeddings = keys.size_or("max_position_embeddings", 64);
    let (rope, partial_rotary_factor) = keys.rope(RopeDefaults::new(max_position_embeddings));
    let heads = keys.size("num_attention_heads");
    DecoderConfig {
        hidden_size: keys.size("hidden_size"),
        intermediate_size: keys.size("intermediate_size"),
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: keys.size_or("num_key_value_heads", heads),
        head_dim: keys.size("head_dim"),
        vocab_size: keys.size("vocab_size"),
        max_position_embeddings,
        activation: keys.activation_or("hidden_act", Activation::Silu),
        // The fused flavour has biases, so that one-dimensional tensors are fused as well.
        attention_bias: keys.flag_or("fused", false),
        rope: Some(rope),
        partial_rotary_factor,
        layers: vec![LayerConfig::dense(); layers],
        tie_word_embeddings: keys.flag_or("tie_word_embeddings", false),
        ..DecoderConfig::plain()
    }
}

impl ModelBridge for TestBridge {
    fn name(&self) -> &'static str {
        "test"
    }

    fn architectures(&self) -> &'static [&'static str] {
        &["TestForCausalLM"]
    }

    fn config(&self, config: &HfConfig) -> Result<DecoderConfig> {
        let keys = config.reader();
        let read = read(&keys);
        keys.finish()?;
        read.validate(config.origin())?;
        Ok(read)
    }

    fn hf_config(&self, config: &DecoderConfig) -> Result<Map<String, Value>> {
        Ok(test_config(json!({ "hidden_size": config.hidden_size }))
            .json()
            .clone())
    }

    fn weights(&self, config: &DecoderConfig) -> WeightMap {
        let map = WeightMap::new()
            .copy("embedding.weight", "model.embed_tokens.weight")
            .copy("lm_head.weight", "lm_head.weight")
            .copy("final_norm.weight", "model.norm.weight")
            .copy(
                "layers.{l}.{n:input_norm|mlp_norm}.weight",
                "model.layers.{l}.{n:input_norm|mlp_norm}.weight",
            )
            .tied(
                "lm_head.weight",
                "embedding.weight",
                config.tie_word_embeddings,
            )
            .ignore(
                "model.layers.{l}.self_attn.rotary_emb.inv_freq",
                "recomputed from rope_theta",
            );
        if !config.attention_bias {
            return map
                .copy(
                    "layers.{l}.attention.{p}_proj.weight",
                    "model.layers.{l}.self_attn.{p}_proj.weight",
                )
                .copy(
                    "layers.{l}.mlp.{p}_proj.weight",
                    "model.layers.{l}.mlp.{p}_proj.weight",
                );
        }
        let qkv = |leaf: &str| {
            let part = |p: &str| format!("layers.{{l}}.attention.{p}_proj.{leaf}");
            let parts = [part("q"), part("k"), part("v")];
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            Fused::new(&format!("model.layers.{{l}}.self_attn.qkv.{leaf}"), &parts)
                .groups(config.num_key_value_heads)
        };
        map.fuse(qkv("weight"))
            .fuse(qkv("bias"))
            .map(
                "layers.{l}.attention.o_proj.weight",
                "model.layers.{l}.self_attn.o",
                |view| view.transpose(0, 1),
            )
            .fuse(
                Fused::new(
                    "model.layers.{l}.mlp.gate_up",
                    &[
                        "layers.{l}.mlp.gate_proj.weight",
                        "layers.{l}.mlp.up_proj.weight",
                    ],
                )
                .dim(1)
                .groups(config.intermediate_size)
                .arrange(|view| view.transpose(0, 1)),
            )
            .copy(
                "layers.{l}.mlp.down_proj.weight",
                "model.layers.{l}.mlp.down.weight",
            )
    }
}
