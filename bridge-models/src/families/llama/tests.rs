use bridge_core::config::RopeScaling;
use bridge_core::{HfConfig, ModelBridge};
use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference};

fn parse(json: Value) -> bridge_core::Result<bridge_core::DecoderConfig> {
    let Value::Object(map) = json else {
        panic!("an object")
    };
    SPEC.config(&HfConfig::from_json(map, "config.json"))
}

fn base() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131,
        "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
    })
}

fn with(pairs: &[(&str, Value)]) -> Value {
    let mut json = base();
    for (key, value) in pairs {
        json[key] = value.clone();
    }
    json
}

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("llama2_7b", 6_738_415_616),
            ("llama2_13b", 13_015_864_320),
            ("llama2_70b", 68_976_648_192),
            ("llama3_8b", 8_030_261_248),
            ("llama3_70b", 70_553_706_496),
            ("llama31_8b", 8_030_261_248),
            ("llama31_70b", 70_553_706_496),
            ("llama31_405b", 405_853_388_800),
            ("llama32_1b", 1_235_814_400),
            ("llama32_3b", 3_212_749_824),
            ("llama33_70b", 70_553_706_496),
            ("llama31_nemotron_nano_8b", 8_030_261_248),
            ("llama31_nemotron_nano_4b", 4_512_746_496),
            ("smollm2_135m", 134_515_008),
            ("smollm2_360m", 361_821_120),
            ("smollm2_1_7b", 1_711_376_384),
        ],
    );
}

#[test]
fn absent_keys_have_the_defaults_of_the_reference() {
    let mut json = base();
    for key in [
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
    ] {
        json.as_object_mut().unwrap().remove(key);
    }
    let config = parse(json).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (6, 8));
    assert_eq!(
        (config.max_position_embeddings, config.norm.eps),
        (2048, 1e-6)
    );
    assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert_eq!(config.rope.unwrap().theta, 10_000.0);
}

#[test]
fn biases_follow_the_config() {
    let config = parse(with(&[
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
    ]))
    .unwrap();
    let names: Vec<String> = config
        .tensors()
        .into_iter()
        .map(|tensor| tensor.name)
        .collect();
    for proj in [
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.o",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    ] {
        assert!(
            names.contains(&format!("layers.2.{proj}_proj.bias")),
            "{proj}"
        );
    }
    SPEC.weights(&config).resolve(&config.tensors()).unwrap();
    assert_eq!(
        parse(Value::Object(SPEC.hf_config(&config).unwrap())).unwrap(),
        config
    );
}

#[test]
fn both_spellings_of_rope_agree() {
    let hub = with(&[
        ("rope_theta", json!(500.0)),
        (
            "rope_scaling",
            json!({"rope_type": "linear", "factor": 4.0}),
        ),
    ]);
    let newer = with(&[(
        "rope_parameters",
        json!({"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}),
    )]);
    let (hub, newer) = (parse(hub).unwrap(), parse(newer).unwrap());
    assert_eq!(hub, newer);
    assert_eq!(
        hub.rope.unwrap().scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
}

#[test]
fn what_cannot_be_read_is_refused() {
    for (json, expected) in [
        (
            with(&[(
                "rope_scaling",
                json!({"rope_type": "longrope", "factor": 4.0}),
            )]),
            "longrope",
        ),
        (with(&[("hidden_act", json!("swiglu"))]), "hidden_act"),
        (with(&[("hidden_size", json!("48"))]), "hidden_size"),
        (
            with(&[("hidden_size", Value::Null)]),
            "hidden_size is missing",
        ),
        (
            with(&[("num_key_value_heads", json!(4))]),
            "num_key_value_heads",
        ),
        (
            with(&[("num_hidden_layers", json!(1_000_000_000))]),
            "num_hidden_layers",
        ),
        (with(&[("head_dim", json!(0))]), "head_dim"),
    ] {
        let error = parse(json).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_a_config_file_cannot_say_is_refused() {
    let mut config = presets::tiny();
    config.embedding_scale = Some(2.0);
    let error = SPEC.hf_config(&config).unwrap_err().to_string();
    assert!(error.contains("cannot say embedding_scale"), "{error}");
    let mut config = presets::tiny();
    config.layers[1] = bridge_core::config::LayerConfig::dense_with_window(Some(8));
    assert!(
        SPEC.hf_config(&config)
            .unwrap_err()
            .to_string()
            .contains("cannot say layers")
    );
    let mut config = presets::tiny();
    config.attention_bias = true; // without the output projection's
    assert!(
        SPEC.hf_config(&config)
            .unwrap_err()
            .to_string()
            .contains("cannot say attention_output_bias")
    );
}

#[test]
fn every_weight_is_mapped() {
    for tied in [false, true] {
        let mut config = presets::tiny();
        config.tie_word_embeddings = tied;
        let mapping = SPEC.weights(&config).resolve(&config.tensors()).unwrap();
        assert!(
            mapping
                .foreign_index("model.layers.2.post_attention_layernorm.weight")
                .is_some()
        );
        assert!(mapping.foreign_index("lm_head.weight").is_some());
        assert!(
            mapping
                .ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
                .is_some()
        );
    }
}

#[test]
fn references_are_matched() {
    for name in ["llama2", "llama3_1", "llama3_2", "llama_nemotron_nano"] {
        check_reference(name);
    }
}
