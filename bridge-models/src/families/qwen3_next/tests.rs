use bridge_core::ModelBridge;
use bridge_core::config::{Ffn, Mixer};
use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(&SPEC, &[("qwen3_next_80b_a3b", 79_674_391_296)]);
}

fn with(pairs: &[(&str, Value)]) -> Value {
    let mut json = written(&SPEC, &presets::tiny());
    let keys = json.as_object_mut().unwrap();
    for (key, value) in pairs {
        keys.insert((*key).to_owned(), value.clone());
    }
    json
}

#[test]
fn an_interval_says_what_a_list_of_layers_says() {
    let listed = parse(&SPEC, with(&[])).unwrap();
    let absent = with(&[("layer_types", Value::Null)]);
    assert_eq!(parse(&SPEC, absent).unwrap(), listed);
    let every_second = with(&[
        ("layer_types", Value::Null),
        ("full_attention_interval", json!(2)),
    ]);
    let config = parse(&SPEC, every_second).unwrap();
    let recurrent: Vec<bool> = config
        .layers
        .iter()
        .map(|layer| layer.mixer == Mixer::GatedDeltaNet)
        .collect();
    assert_eq!(recurrent, [true, false, true, false]);
    let irregular = json!([
        "full_attention",
        "linear_attention",
        "linear_attention",
        "full_attention"
    ]);
    let config = parse(&SPEC, with(&[("layer_types", irregular)])).unwrap();
    assert_eq!(parse(&SPEC, written(&SPEC, &config)).unwrap(), config);
}

#[test]
fn multi_token_prediction_is_trained_where_the_file_asks_for_it_and_kept_elsewhere() {
    let mut config = presets::qwen3_next_80b_a3b();
    config.num_mtp_layers = 1;
    // What the hub counts.
    let parameters: usize = config.tensors().iter().map(|tensor| tensor.numel()).sum();
    assert_eq!(parameters, 81_324_862_720);
    let mapping = SPEC.weights(&config).resolve(&config.tensors()).unwrap();
    for name in [
        "mtp.fc.weight",
        "mtp.norm.weight",
        "mtp.pre_fc_norm_embedding.weight",
        "mtp.pre_fc_norm_hidden.weight",
        "mtp.layers.0.input_layernorm.weight",
        "mtp.layers.0.self_attn.q_proj.weight",
        "mtp.layers.0.mlp.experts.511.down_proj.weight",
        "mtp.layers.0.mlp.shared_expert_gate.weight",
    ] {
        assert!(mapping.foreign_index(name).is_some(), "{name}");
    }
    assert_eq!(parse(&SPEC, written(&SPEC, &config)).unwrap(), config);

    config.num_mtp_layers = 0;
    let mapping = SPEC.weights(&config).resolve(&config.tensors()).unwrap();
    let why = mapping.ignored("mtp.layers.0.mlp.experts.7.up_proj.weight");
    assert!(why.is_some_and(|why| why.contains("kept for the export")));
}

#[test]
fn layers_without_experts_are_read() {
    let config = parse(&SPEC, with(&[("mlp_only_layers", json!([1]))])).unwrap();
    let dense: Vec<bool> = config
        .layers
        .iter()
        .map(|layer| layer.ffn != Ffn::Moe)
        .collect();
    assert_eq!(dense, [false, true, false, false]);
}

#[test]
fn what_cannot_be_read_is_refused() {
    for (pairs, expected) in [
        (
            vec![
                ("layer_types", Value::Null),
                ("full_attention_interval", json!(0)),
            ],
            "full_attention_interval is 0",
        ),
        (
            vec![("layer_types", json!(["full_attention"]))],
            "1 entries, expected 4",
        ),
        (
            vec![("linear_num_key_heads", json!(3))],
            "gated_delta_net: num_value_heads=4 is not a multiple of num_key_heads=3",
        ),
        (
            vec![("num_nextn_predict_layers", json!(2))],
            "num_nextn_predict_layers is 2, expected 0 or 1",
        ),
        (
            vec![("linear_conv_kernel_dim", json!(0))],
            "gated_delta_net: conv_kernel is 0",
        ),
    ] {
        let error = parse(&SPEC, with(&pairs)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_reference_is_matched() {
    check_reference("qwen3_next");
}
