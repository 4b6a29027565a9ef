//! Reading config keys: both spellings, wrong types, hostile input.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::super::{RopeConfig, RopeDefaults, RopeScaling};
use super::*;

fn config(json: Value) -> HfConfig {
    HfConfig::from_slice(json.to_string().as_bytes(), "config.json").unwrap()
}

#[track_caller]
fn check_problem(json: Value, read: impl Fn(&ConfigReader<'_>), expected: &str) {
    let config = config(json);
    let reader = config.reader();
    read(&reader);
    let error = reader.finish().unwrap_err();
    assert!(error.is_input());
    assert_eq!(error.to_string(), format!("config.json: {expected}"));
}

#[test]
fn missing_and_wrong_keys_are_named() {
    let read_size = |keys: &ConfigReader<'_>| assert_eq!(keys.size("hidden_size"), 0);
    check_problem(json!({}), read_size, "key hidden_size is missing");
    check_problem(
        json!({"hidden_size": null}),
        read_size,
        "key hidden_size is missing",
    );
    for (value, shown) in [
        (json!("64"), "the string \"64\""),
        (json!(-1), "-1"),
        (json!(1.5), "1.5"),
        (json!(true), "true"),
        (json!([1, 2]), "a list of 2 items"),
        (json!({"a": 1}), "an object"),
        (json!(1e300), "1e+300"),
    ] {
        let expected = format!("hidden_size is {shown}, expected a whole number of at least 0");
        check_problem(json!({ "hidden_size": value }), read_size, &expected);
    }
    check_problem(
        json!({"num_hidden_layers": 1_000_000_000_000u64}),
        |keys| assert_eq!(keys.num_layers("num_hidden_layers"), 1),
        "num_hidden_layers is 1000000000000, expected 1 to 4096",
    );
    check_problem(
        json!({"hidden_act": "geul"}),
        |keys| {
            assert_eq!(
                keys.activation_or("hidden_act", Activation::Silu),
                Activation::Silu
            )
        },
        "hidden_act is \"geul\", an activation that is not supported; known: silu, gelu, gelu_pytorch_tanh, \
         quick_gelu, relu, relu2, sigmoid, tanh; did you mean gelu?",
    );
    check_problem(
        json!({"text_config": {"hidden_size": "x"}}),
        |keys| {
            let section = keys.section("text_config").unwrap();
            section.size("hidden_size");
            keys.absorb(section);
        },
        "text_config.hidden_size is the string \"x\", expected a whole number of at least 0",
    );
}

#[test]
fn every_finding_is_reported() {
    let config =
        config(json!({"tie_word_embeddings": 1, "rms_norm_eps": "small", "layer_types": ["a"]}));
    let keys = config.reader();
    keys.size("hidden_size");
    keys.flag_or("tie_word_embeddings", false);
    keys.number_or("rms_norm_eps", 1e-6);
    keys.layer_types(2, &["a"]);
    let text = keys.finish().unwrap_err().to_string();
    assert_eq!(
        text,
        "config.json: 4 problems\n  - key hidden_size is missing\n  - tie_word_embeddings is 1, expected true or \
         false\n  - rms_norm_eps is the string \"small\", expected a number\n  - layer_types has 1 entries, expected \
         2 from num_hidden_layers"
    );
}

#[test]
fn lenient_where_files_differ() {
    let config = config(json!({
        "max_position_embeddings": 4096.0, "eos_token_id": [1, 2], "bos_token_id": 7, "pad": null,
        "torch_dtype": "torch.bfloat16", "layer_types": ["a", "b"], "hidden_act": "swish",
    }));
    let keys = config.reader();
    assert_eq!(keys.size("max_position_embeddings"), 4096);
    assert_eq!(keys.token_ids("eos_token_id"), [1, 2]);
    assert_eq!(keys.token_ids("bos_token_id"), [7]);
    assert!(keys.token_ids("pad").is_empty());
    assert_eq!(keys.dtype(), Some(DType::BF16));
    assert_eq!(keys.layer_types(2, &["a", "b"]), Some(vec!["a", "b"]));
    assert_eq!(
        keys.activation_or("hidden_act", Activation::Gelu),
        Activation::Silu
    );
    keys.finish().unwrap();
}

#[test]
fn python_spellings_of_infinity_are_numbers() {
    let text =
        br#"{"limit": [0.0, Infinity], "low": -Infinity, "nan": NaN, "text": "Infinity \" NaN"}"#;
    let config = HfConfig::from_slice(text, "config.json").unwrap();
    assert_eq!(config.raw(), text);
    let keys = config.reader();
    assert_eq!(keys.number("low"), f64::NEG_INFINITY);
    assert!(keys.number("nan").is_nan());
    assert_eq!(keys.text_opt("text"), Some("Infinity \" NaN"));
    keys.finish().unwrap();
}

#[test]
fn files_that_are_no_json_objects_are_refused() {
    for (bytes, expected) in [
        (
            &b""[..],
            "config.json: is not valid JSON: EOF while parsing a value at line 1 column 0",
        ),
        (
            b"[]",
            "config.json: holds a list of 0 items, expected a JSON object",
        ),
        (
            b"{\"a\": 1",
            "config.json: is not valid JSON: EOF while parsing an object at line 1 column 7",
        ),
        (
            b"\xff\xfe",
            "config.json: is not valid JSON: expected value at line 1 column 1",
        ),
    ] {
        assert_eq!(
            HfConfig::from_slice(bytes, "config.json")
                .unwrap_err()
                .to_string(),
            expected
        );
    }
    let deep = "[".repeat(100_000);
    assert!(HfConfig::from_slice(deep.as_bytes(), "config.json").is_err());
    let long = vec![b' '; crate::config::MAX_CONFIG_BYTES as usize + 1];
    assert!(
        HfConfig::from_slice(&long, "config.json")
            .unwrap_err()
            .to_string()
            .contains("larger than")
    );
    assert!(
        HfConfig::load(std::path::Path::new("/nonexistent/model"))
            .unwrap_err()
            .is_input()
    );
}

#[track_caller]
fn check_rope(json: Value, expected: RopeConfig, partial: f64) {
    let config = config(json);
    let keys = config.reader();
    let found = keys.rope(RopeDefaults::new(512));
    keys.finish().unwrap();
    assert_eq!(found, (expected, partial));
}

#[test]
fn both_spellings_of_rope_are_one_config() {
    check_rope(json!({}), RopeConfig::new(10_000.0), 1.0);
    check_rope(
        json!({"rope_theta": 5e5, "rope_scaling": null}),
        RopeConfig::new(5e5),
        1.0,
    );
    check_rope(
        json!({"rope_theta": 5e5, "rope_scaling": {}}),
        RopeConfig::new(5e5),
        1.0,
    );
    check_rope(
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}}),
        RopeConfig::new(77.0),
        0.5,
    );
    let linear = RopeConfig {
        theta: 77.0,
        scaling: RopeScaling::Linear { factor: 4.0 },
    };
    for json in [
        json!({"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 4}}),
        json!({"rope_theta": 77.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4}}),
        json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 4.0}}),
        json!({"rope_scaling": {"rope_type": "linear", "rope_theta": 77.0, "factor": 4.0},
               "rope_parameters": {"rope_type": "yarn"}}),
    ] {
        check_rope(json, linear.clone(), 1.0);
    }
    let yarn = |factor, original| RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: None,
            mscale_all_dim: None,
            attention_factor: None,
            truncate: true,
        },
    };
    check_rope(
        json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
        yarn(4.0, 512),
        1.0,
    );
    check_rope(
        json!({"rope_scaling": {"type": "yarn", "factor": null, "beta_fast": 0,
                                "original_max_position_embeddings": 128}}),
        yarn(4.0, 128),
        1.0,
    );
}

#[test]
fn exported_rope_keys_read_back() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 32,
    };
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 128,
        beta_fast: 16.0,
        beta_slow: 2.0,
        mscale: Some(0.7),
        mscale_all_dim: None,
        attention_factor: Some(1.5),
        truncate: false,
    };
    let dynamic = RopeScaling::Dynamic {
        factor: 2.0,
        max_position_embeddings: 512,
    };
    for scaling in [
        RopeScaling::Default,
        RopeScaling::Linear { factor: 2.5 },
        dynamic,
        llama3,
        yarn,
    ] {
        let rope = RopeConfig {
            theta: 1234.5,
            scaling,
        };
        let (theta, scaling) = rope.to_hf();
        check_rope(
            json!({"rope_theta": theta, "rope_scaling": scaling}),
            rope,
            1.0,
        );
    }
}

#[test]
fn rope_by_layer_type() {
    let config = config(json!({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}));
    let keys = config.reader();
    let defaults = RopeDefaults::new(512);
    let full = keys
        .rope_of_layer_type("full_attention", defaults)
        .unwrap()
        .0;
    assert_eq!(
        full,
        RopeConfig {
            theta: 1e6,
            scaling: RopeScaling::Linear { factor: 8.0 }
        }
    );
    assert_eq!(
        keys.rope_of_layer_type("sliding_attention", defaults)
            .unwrap()
            .0,
        RopeConfig::new(1e4)
    );
    assert_eq!(keys.rope_of_layer_type("chunked_attention", defaults), None);
    keys.finish().unwrap();
}

#[test]
fn an_unknown_rope_type_is_an_error_that_names_the_known_ones() {
    check_problem(
        json!({"rope_scaling": {"type": "yran", "factor": 2.0}}),
        |keys| {
            keys.rope(RopeDefaults::new(512));
        },
        "rope_scaling.type is \"yran\", a rope type that is not supported; known: default, linear, dynamic, yarn, \
         llama3; did you mean yarn?",
    );
    check_problem(
        json!({"rope_parameters": {"full_attention": {"rope_type": "llama3", "factor": "8"}}}),
        |keys| {
            keys.rope_of_layer_type("full_attention", RopeDefaults::new(512));
        },
        "3 problems\n  - rope_parameters.full_attention.factor is the string \"8\", expected a number\n  - key \
         rope_parameters.full_attention.low_freq_factor is missing\n  - key \
         rope_parameters.full_attention.high_freq_factor is missing",
    );
}

/// Arbitrary JSON, with the keys that the getters look at among its own.
fn json_values() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(vec![
            "default", "yarn", "llama3", "linear", "dynamic", "silu", "bfloat16", "é\0"
        ])
        .prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 64, 8, |inner| {
        let keys = prop::sample::select(vec![
            "hidden_size",
            "num_hidden_layers",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "rope_type",
            "type",
            "factor",
            "original_max_position_embeddings",
            "layer_types",
            "full_attention",
            "eos_token_id",
            "dtype",
            "hidden_act",
            "partial_rotary_factor",
            "architectures",
            "low_freq_factor",
            "high_freq_factor",
            "truncate",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((keys, inner), 0..8).prop_map(|pairs| {
                Value::Object(
                    pairs
                        .into_iter()
                        .map(|(k, v)| (k.to_owned(), v))
                        .collect::<Map<_, _>>(),
                )
            }),
        ]
    })
}

proptest! {
    #[test]
    fn arbitrary_json_never_panics(value in json_values()) {
        if let Ok(config) = HfConfig::from_slice(value.to_string().as_bytes(), "config.json") {
            let keys = config.reader();
            let layers = keys.num_layers("num_hidden_layers");
            keys.size("hidden_size");
            keys.layer_types(layers, &["full_attention"]);
            keys.token_ids("eos_token_id");
            keys.dtype();
            keys.activation_or("hidden_act", Activation::Silu);
            let (rope, _) = keys.rope(RopeDefaults::new(layers));
            keys.rope_of_layer_type("full_attention", RopeDefaults::new(0));
            rope.problems();
            config.architectures();
            if let Err(error) = keys.finish() {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = HfConfig::from_slice(&bytes, "config.json");
    }
}
