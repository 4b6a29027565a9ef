use serde_json::Value;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("mistral_7b_v01", 7_241_732_096),
            ("mistral_7b_v03", 7_248_023_552),
            ("mistral_nemo_12b", 12_247_782_400),
            ("mistral_small_24b", 23_572_403_200),
        ],
    );
}

#[test]
fn the_window_is_everywhere_or_nowhere() {
    let windows = |json: &Value| {
        let config = parse(&SPEC, json.clone()).unwrap();
        config
            .layers
            .iter()
            .map(|layer| layer.attention().unwrap().window)
            .collect::<Vec<_>>()
    };
    let mut json = written(&SPEC, &presets::tiny());
    assert_eq!(windows(&json), [Some(7); 3]);
    json["sliding_window"] = Value::Null;
    assert_eq!(windows(&json), [None; 3]);
    json.as_object_mut().unwrap().remove("sliding_window");
    assert_eq!(windows(&json), [Some(4096); 3]);
}

#[test]
fn the_reference_is_matched() {
    check_reference("mistral");
}
