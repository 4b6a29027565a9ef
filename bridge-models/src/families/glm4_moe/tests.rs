use super::SPEC;
use crate::families::testing::{check_presets, check_reference};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            // The hub counts embedding and head of the multi-token prediction module again: 110,468,824,832 and
            // 358,337,791,296.
            ("glm45_air", 109_227_310_848),
            ("glm45", 356_785_898_816),
        ],
    );
}

#[test]
fn the_reference_is_matched() {
    check_reference("glm4_moe");
}
