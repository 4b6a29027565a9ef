use super::SPEC;
use crate::families::testing::{check_presets, check_reference};

#[test]
fn presets_have_the_published_sizes_and_survive_their_config_file() {
    check_presets(
        &SPEC,
        &[
            ("glm45_air", 109_227_216_128),
            ("glm45", 356_785_898_368),
        ],
    );
}

#[test]
fn the_reference_is_matched() {
    check_reference("glm4_moe");
}
