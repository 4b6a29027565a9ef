use bridge_core::config::Ffn;
use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("qwen3_30b_a3b", 30_532_122_624),
            ("qwen3_235b_a22b", 235_093_634_560),
        ],
    );
}

#[test]
fn layers_without_experts_are_listed_or_stepped_over() {
    let experts = |list: serde_json::Value, step: usize| {
        let mut json = written(&SPEC, &presets::tiny());
        json["mlp_only_layers"] = list;
        json["decoder_sparse_step"] = json!(step);
        let config = parse(&SPEC, json)?;
        assert_eq!(parse(&SPEC, written(&SPEC, &config)).unwrap(), config);
        let moe = config.layers.iter().map(|layer| layer.ffn == Ffn::Moe);
        Ok::<_, bridge_core::Error>(moe.collect::<Vec<_>>())
    };
    assert_eq!(experts(json!([]), 1).unwrap(), [true; 3]);
    assert_eq!(experts(json!(null), 1).unwrap(), [true; 3]);
    assert_eq!(experts(json!([1]), 1).unwrap(), [true, false, true]);
    assert_eq!(experts(json!([]), 2).unwrap(), [false, true, false]);
    assert!(experts(json!([-1]), 1).is_err());
    assert!(experts(json!([]), 0).is_err());
}

#[test]
fn both_words_for_the_number_of_experts_are_read() {
    let mut json = written(&SPEC, &presets::tiny());
    let count = json.as_object_mut().unwrap().remove("num_experts").unwrap();
    json["num_local_experts"] = count;
    assert_eq!(parse(&SPEC, json).unwrap(), presets::tiny());
}

#[test]
fn more_experts_per_token_than_there_are_is_refused() {
    let mut json = written(&SPEC, &presets::tiny());
    json["num_experts_per_tok"] = json!(9);
    let error = parse(&SPEC, json).unwrap_err().to_string();
    assert!(
        error.contains("num_experts_per_tok is 9, expected 1 to the 8"),
        "{error}"
    );
}

#[test]
fn the_reference_is_matched() {
    check_reference("qwen3_moe");
}
