use bridge_core::config::Activation;
use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[("gemma_2b", 2_506_172_416), ("gemma_7b", 8_537_680_896)],
    );
}

#[test]
fn gelu_means_its_tanh_approximation() {
    let mut json = written(&SPEC, &presets::tiny());
    for (act, activation) in [
        ("gelu", Value::Null),
        ("gelu", json!("gelu_pytorch_tanh")),
        ("relu", json!("gelu")),
    ] {
        (json["hidden_act"], json["hidden_activation"]) = (json!(act), activation);
        assert_eq!(
            parse(&SPEC, json.clone()).unwrap().activation,
            Activation::GeluTanh
        );
    }
}

#[test]
fn embeddings_are_scaled_by_the_width() {
    let mut json = written(&SPEC, &presets::tiny());
    json["hidden_size"] = json!(64);
    assert_eq!(parse(&SPEC, json).unwrap().embedding_scale, Some(8.0));
}

#[test]
fn the_reference_is_matched() {
    check_reference("gemma");
}
