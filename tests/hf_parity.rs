//! The models compute what the reference implementation computes: logits, loss, every gradient, greedy text.

use std::fs;
use std::path::Path;

use bridge_core::HfConfig;
use bridge_models::registry;
use bridge_models::verify::{VerifyOptions, verify};
use bridge_tests::{FAMILIES, fixture};
use burn_flex::Flex;

/// Compares the model in `hf` with the reference `name`, with the tolerances that users get.
#[track_caller]
fn agrees(hf: &Path, name: &str) {
    let report = verify::<Flex>(
        &registry(),
        hf,
        &fixture(name),
        &VerifyOptions::default(),
        &Default::default(),
        "cpu",
    );
    let report = report.unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(report.passed, "{name}: {report}");
    let compared = [
        report.logits_max_abs_diff.is_some(),
        report.loss.is_some(),
        report.grad_norm_max_rel_diff.is_some(),
        report.greedy_match.is_some(),
    ];
    assert_eq!(compared, [true; 4], "{name}: something was not compared");
}

/// A copy of a fixture's weights with its config as the hub spells it.
fn in_hub_spelling(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(fixture(name)).expect("the fixture").flatten() {
        if entry.file_name().to_string_lossy().starts_with("model") {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("a copy");
        }
    }
    // Families of which transformers has no class are spelt in one way only.
    let other = fixture(name).join("config.hub.json");
    let spelling = if other.is_file() {
        other
    } else {
        fixture(name).join("config.json")
    };
    fs::copy(spelling, dir.path().join("config.json")).expect("the other spelling");
    dir
}

#[test]
fn every_family_agrees_with_the_reference() {
    for name in FAMILIES {
        agrees(&fixture(name), name);
    }
}

#[test]
fn every_family_agrees_when_its_config_is_spelt_as_on_the_hub() {
    for name in FAMILIES {
        agrees(in_hub_spelling(name).path(), name);
    }
}

#[test]
fn both_spellings_are_one_typed_config() {
    for name in FAMILIES {
        let typed = |dir: &Path| {
            let config = HfConfig::load(dir).expect("a config");
            registry()
                .detect(&config)
                .expect("a family")
                .config(&config)
                .expect("a typed config")
        };
        assert_eq!(
            typed(&fixture(name)),
            typed(in_hub_spelling(name).path()),
            "{name}"
        );
    }
}
