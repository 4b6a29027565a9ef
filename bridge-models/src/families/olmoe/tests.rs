use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(&SPEC, &[("olmoe_1b_7b", 6_919_161_856)]);
}

#[test]
fn clipped_projections_are_refused() {
    let mut json = written(&SPEC, &presets::tiny());
    json["clip_qkv"] = json!(8.0);
    let error = parse(&SPEC, json).unwrap_err().to_string();
    assert!(error.contains("clip_qkv is 8"), "{error}");
}

#[test]
fn the_reference_is_matched() {
    check_reference("olmoe");
}
