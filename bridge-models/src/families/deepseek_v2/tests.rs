use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("deepseek_v2_lite", 15_706_484_224),
            ("deepseek_v2", 235_741_434_880),
        ],
    );
}

#[test]
fn the_scale_of_scores_grows_with_mscale_all_dim() {
    let scale = presets::deepseek_v2_lite().attention_scale();
    let mscale = 0.1 * 0.707 * 40f64.ln() + 1.0;
    assert!((scale - mscale * mscale / 192f64.sqrt()).abs() < 1e-12);
}

#[test]
fn what_the_class_cannot_say_is_refused() {
    for (key, value, expected) in [
        (
            "topk_method",
            json!("noaux_tc"),
            "expected greedy or group_limited_greedy",
        ),
        ("scoring_func", json!("sigmoid"), "expected softmax"),
        ("norm_topk_prob", json!(true), "only false is supported"),
        ("moe_layer_freq", json!(2), "moe_layer_freq is 2"),
        (
            "n_group",
            json!(3),
            "n_group=3 does not divide the 8 experts",
        ),
        ("num_key_value_heads", json!(2), "in latent attention"),
    ] {
        let mut json = written(&SPEC, &presets::tiny());
        json[key] = value;
        let error = parse(&SPEC, json).unwrap_err().to_string();
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn the_references_are_matched() {
    check_reference("deepseek_v2");
    check_reference("deepseek_v2_lite");
}
