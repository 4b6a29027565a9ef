use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    // The model cards round them to 4.19 and 8.27 billion.
    check_presets(
        &SPEC,
        &[
            ("minitron_4b", 4_190_509_056),
            ("minitron_8b", 8_271_699_968),
        ],
    );
}

#[test]
fn half_of_each_head_is_rotated_unless_the_file_says_how_much() {
    let mut json = written(&SPEC, &presets::tiny());
    json["partial_rotary_factor"] = json!(0.25);
    assert_eq!(parse(&SPEC, json.clone()).unwrap().rotary_dim(), 4);
    json.as_object_mut()
        .unwrap()
        .remove("partial_rotary_factor");
    assert_eq!(parse(&SPEC, json).unwrap().rotary_dim(), 8);
}

#[test]
fn the_reference_is_matched() {
    check_reference("nemotron");
}
