use bridge_core::ModelBridge;
use serde_json::json;

use super::{SPEC, presets};
use crate::families::testing::{check_presets, check_reference, parse, written};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("gpt_oss_20b", 20_914_757_184),
            ("gpt_oss_120b", 116_829_156_672),
        ],
    );
}

#[test]
fn a_file_without_a_word_on_positions_has_the_published_ones() {
    let mut json = written(&SPEC, &presets::tiny());
    let keys = json.as_object_mut().unwrap();
    for key in ["rope_theta", "rope_scaling", "layer_types"] {
        keys.remove(key);
    }
    assert_eq!(parse(&SPEC, json).unwrap(), presets::tiny());
    // Said to be none, there is none.
    let mut json = written(&SPEC, &presets::tiny());
    json["rope_scaling"] = json!(null);
    let rope = parse(&SPEC, json).unwrap().rope.unwrap();
    assert_eq!(rope.scaling, bridge_core::config::RopeScaling::Default);
}

#[test]
fn gate_and_up_take_turns_in_the_columns() {
    let config = presets::tiny();
    let mapping = SPEC.weights(&config).resolve(&config.tensors()).unwrap();
    let index = mapping
        .foreign_index("model.layers.0.mlp.experts.gate_up_proj")
        .unwrap();
    assert_eq!(mapping.foreign[index].shape, [8, 64, 64]);
    // Row 1 of expert 0's up_proj is column 3.
    let up = mapping
        .pieces_of_foreign(index)
        .find(|piece| mapping.canonical[piece.canonical].name.contains("up_proj"))
        .unwrap();
    let mut places = up.canonical_view.offsets().zip(up.foreign_view.offsets());
    let (_, foreign) = places.find(|(own, _)| *own == 64 + 5).unwrap();
    assert_eq!(foreign, 5 * 64 + 3);
}

#[test]
fn the_reference_is_matched() {
    check_reference("gpt_oss");
}
