use bridge_core::ModelBridge;
use bridge_core::config::{Ffn, MlpLayer};
use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("llama33_nemotron_super_49b", 49_867_145_216),
            ("llama31_nemotron_ultra_253b", 253_401_268_224),
        ],
    );
}

fn with_block(block: Value) -> Value {
    let mut json = written(&SPEC, &presets::tiny());
    json["block_configs"] = json!([block]);
    json["num_hidden_layers"] = json!(1);
    json
}

#[test]
fn widths_are_rounded_up_to_multiples_of_256() {
    // hidden_size 48: 2/3 of the multiple times 48, rounded down, then up.
    for (multiple, width) in [
        (1.0, 256),
        (8.0, 256),
        (8.04, 512),
        (2.625, 256),
        (15.99, 512),
    ] {
        let block = json!({"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": multiple}});
        let config = parse(&SPEC, with_block(block)).unwrap();
        assert_eq!(config.mlp_intermediate_size(0), width, "{multiple}");
        assert_eq!(config.layer_key_value_heads(0), 3);
    }
    let stated =
        json!({"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 100}});
    let config = parse(&SPEC, with_block(stated)).unwrap();
    assert_eq!(
        (
            config.mlp_intermediate_size(0),
            config.layer_key_value_heads(0)
        ),
        (100, 2)
    );
}

#[test]
fn what_cannot_be_read_is_refused() {
    let ffn = json!({"ffn_mult": 1.0});
    for (block, expected) in [
        (
            json!({"attention": {"n_heads_in_group": 4}, "ffn": ffn}),
            "block_configs[0].attention.n_heads_in_group is 4, expected a divisor of num_attention_heads=6",
        ),
        (
            json!({"attention": {"n_heads_in_group": 2, "window_length": 8}, "ffn": ffn}),
            "attention.window_length is 8, which is not supported",
        ),
        (
            json!({"attention": {"no_op": true}, "ffn": {"no_op": false}}),
            "ffn.ffn_mult is null, expected a number above 0",
        ),
        (
            json!({"attention": {"no_op": "yes"}, "ffn": ffn}),
            "attention.no_op is \"yes\", expected true or false",
        ),
        (json!({"ffn": ffn}), "block_configs[0].attention is missing"),
        (
            json!({"attention": {"no_op": true}, "ffn": {"ffn_mult": 1e300}}),
            "intermediate_size",
        ),
    ] {
        let error = parse(&SPEC, with_block(block)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut json = written(&SPEC, &presets::tiny());
    json["num_hidden_layers"] = json!(7);
    let error = parse(&SPEC, json.clone()).unwrap_err().to_string();
    assert!(error.contains("block_configs lists 5 layers"), "{error}");
    json.as_object_mut().unwrap().remove("block_configs");
    let error = parse(&SPEC, json).unwrap_err().to_string();
    assert!(error.contains("block_configs is missing"), "{error}");
}

#[test]
fn widths_that_no_multiple_says_are_refused() {
    let mut config = presets::tiny();
    config.layers[1].ffn = Ffn::Mlp(MlpLayer {
        intermediate_size: Some(100),
    });
    let error = SPEC.hf_config(&config).unwrap_err().to_string();
    assert!(error.contains("cannot say layers"), "{error}");
}

#[test]
fn the_reference_is_matched() {
    check_reference("llama_nemotron_super");
}
