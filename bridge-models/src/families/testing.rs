//! What every family's tests share.

use std::path::PathBuf;

use bridge_core::dtype::DType;
use bridge_core::plan::plan_from_shapes;
use bridge_core::{DecoderConfig, HfConfig, LayoutSpec, ModelBridge};
use burn_flex::Flex;
use serde_json::Value;

use super::spec::FamilySpec;
use crate::registry;
use crate::verify::{VerifyOptions, verify};

/// Compares the model in `tests/fixtures/<name>` with the reference numbers beside it, with its `config.json` in the
/// spelling of transformers 5 and in that of the hub.
#[track_caller]
pub(super) fn check_reference(name: &str) {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name);
    let options = VerifyOptions::default();
    let check = |dir: &std::path::Path| {
        let report = verify::<Flex>(
            &registry(),
            dir,
            &fixture,
            &options,
            &Default::default(),
            "cpu",
        );
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(report.passed, "{name}: {report}");
        assert!(
            report.greedy_match.is_some() && report.grad_norm_max_rel_diff.is_some(),
            "{name}: nothing compared"
        );
    };
    check(&fixture);

    let hub = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&fixture).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap();
        if file.starts_with("model") {
            std::fs::copy(&path, hub.path().join(file)).unwrap();
        }
    }
    let spelling = fixture.join("config.hub.json");
    if !spelling.is_file() {
        return; // a family with one spelling only
    }
    std::fs::copy(spelling, hub.path().join("config.json")).unwrap();
    check(hub.path());
}

/// Reads a config file.
pub(super) fn parse(family: &FamilySpec, json: Value) -> bridge_core::Result<DecoderConfig> {
    let Value::Object(keys) = json else {
        panic!("a config file holds an object")
    };
    family.config(&HfConfig::from_json(keys, "config.json"))
}

/// The config file of a new model.
#[track_caller]
pub(super) fn written(family: &FamilySpec, config: &DecoderConfig) -> Value {
    Value::Object(family.hf_config(config).unwrap())
}

/// Every named size has the parameters of the published checkpoint (a tied head counted once), can be written to a
/// config file and read back, and has a place for each of its weights. Made-up sizes have no published count.
#[track_caller]
pub(super) fn check_presets(family: &FamilySpec, published: &[(&str, u64)]) {
    let named = family
        .presets
        .iter()
        .filter(|preset| !preset.hub_id.is_empty())
        .map(|preset| preset.name);
    assert!(
        named.eq(published.iter().map(|(name, _)| *name)),
        "{}: a preset has no published count",
        family.name
    );
    for preset in family.presets {
        let config = (preset.config)();
        let tensors = config.tensors();
        let parameters: u64 = tensors.iter().map(|tensor| tensor.numel() as u64).sum();
        if let Some((_, expected)) = published.iter().find(|(name, _)| *name == preset.name) {
            assert_eq!(parameters, *expected, "{}", preset.name);
        }
        assert_eq!(
            parse(family, written(family, &config)).unwrap(),
            config,
            "{}",
            preset.name
        );
        // Made-up headers stand for the published checkpoint: every name and shape is covered, with no weights present.
        let json = written(family, &config);
        let Value::Object(keys) = json else {
            panic!("a config file holds an object")
        };
        let hf = HfConfig::from_json(keys, "config.json");
        let plan = plan_from_shapes(family, &hf, DType::BF16, &LayoutSpec::default())
            .unwrap_or_else(|problems| panic!("{}: {problems}", preset.name));
        assert_eq!(plan.parameters, parameters, "{}", preset.name);
    }
}
