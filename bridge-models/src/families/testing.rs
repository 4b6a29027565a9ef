//! What every family's tests share.

use std::path::PathBuf;

use burn_flex::Flex;

use crate::registry;
use crate::verify::{VerifyOptions, verify};

/// Compares the model in `tests/fixtures/<name>` with the reference numbers beside it, with its `config.json` in the
/// spelling of transformers 5 and in that of the hub.
#[track_caller]
pub(super) fn check_reference(name: &str) {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
    let options = VerifyOptions::default();
    let check = |dir: &std::path::Path| {
        let report = verify::<Flex>(&registry(), dir, &fixture, &options, &Default::default(), "cpu");
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(report.passed, "{name}: {report}");
        assert!(report.greedy_match.is_some() && report.grad_norm_max_rel_diff.is_some(), "{name}: nothing compared");
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
    std::fs::copy(fixture.join("config.hub.json"), hub.path().join("config.json")).unwrap();
    check(hub.path());
}
