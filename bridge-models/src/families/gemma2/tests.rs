use serde_json::{Value, json};

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("gemma2_2b", 2_614_341_888),
            ("gemma2_9b", 9_241_705_984),
            ("gemma2_27b", 27_227_128_320),
        ],
    );
}

#[test]
fn caps_are_on_unless_null() {
    let mut json = written(&SPEC, &presets::tiny());
    let map = json.as_object_mut().unwrap();
    map.remove("attn_logit_softcapping");
    map.insert("final_logit_softcapping".to_owned(), Value::Null);
    let config = parse(&SPEC, json).unwrap();
    assert_eq!(
        (config.attention_softcap, config.final_logit_softcap),
        (Some(50.0), None)
    );
    assert_eq!(parse(&SPEC, written(&SPEC, &config)).unwrap(), config);
}

#[test]
fn a_whole_query_scalar_is_written_as_the_integer_that_transformers_demands() {
    let config = presets::tiny();
    let json = written(&SPEC, &config);
    assert_eq!(json["query_pre_attn_scalar"], json!(40));
    assert_eq!(parse(&SPEC, json).unwrap(), config);
}

#[test]
fn every_second_layer_slides_unless_the_file_says_which() {
    let windows = |json: &Value| {
        let config = parse(&SPEC, json.clone()).unwrap();
        config
            .layers
            .iter()
            .map(|layer| layer.attention().unwrap().window)
            .collect::<Vec<_>>()
    };
    let mut json = written(&SPEC, &presets::tiny());
    json.as_object_mut().unwrap().remove("layer_types");
    assert_eq!(windows(&json), [Some(7), None, Some(7)]);
    json["layer_types"] = json!(["full_attention", "full_attention", "sliding_attention"]);
    assert_eq!(windows(&json), [None, None, Some(7)]);
    json["sliding_window"] = Value::Null;
    assert!(
        parse(&SPEC, json)
            .unwrap_err()
            .to_string()
            .contains("sliding_window is null")
    );
}

#[test]
fn the_reference_is_matched() {
    check_reference("gemma2");
}
