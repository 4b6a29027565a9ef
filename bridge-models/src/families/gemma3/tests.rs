use bridge_core::config::{LayerRope, RopeConfig, RopeScaling};
use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[("gemma3_270m", 268_098_176), ("gemma3_1b", 999_885_952)],
    );
}

#[test]
fn each_kind_of_layer_has_its_rotary_embedding() {
    let mut json = written(&SPEC, &presets::tiny());
    let map = json.as_object_mut().unwrap();
    map.remove("layer_types");
    map.remove("rope_theta");
    map.remove("rope_local_base_freq");
    map.insert("sliding_window_pattern".to_owned(), json!(3));
    map.insert(
        "rope_scaling".to_owned(),
        json!({"rope_type": "linear", "factor": 8.0}),
    );
    let hub = parse(&SPEC, json.clone()).unwrap();
    let full: Vec<bool> = hub
        .layers
        .iter()
        .map(|layer| layer.attention().unwrap().rope == LayerRope::Global)
        .collect();
    assert_eq!(full, [false, false, true, false, false, true, false]);
    assert_eq!(
        hub.rope,
        Some(RopeConfig {
            theta: 1e6,
            scaling: RopeScaling::Linear { factor: 8.0 }
        })
    );
    assert_eq!(hub.rope_local, Some(RopeConfig::new(1e4)));
    assert_eq!(parse(&SPEC, written(&SPEC, &hub)).unwrap(), hub);

    json.as_object_mut().unwrap().remove("rope_scaling");
    json["rope_parameters"] = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    assert_eq!(parse(&SPEC, json).unwrap(), hub);
}

#[test]
fn what_would_be_another_model_is_refused() {
    for (key, value) in [
        ("use_bidirectional_attention", json!(true)),
        ("sliding_window_pattern", json!(0)),
    ] {
        let mut json = written(&SPEC, &presets::tiny());
        json[key] = value;
        assert!(parse(&SPEC, json).unwrap_err().to_string().contains(key));
    }
}

#[test]
fn the_reference_is_matched() {
    check_reference("gemma3_text");
}
