use std::path::PathBuf;

use burn_flex::Flex;

use super::*;
use crate::registry;

fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(family)
}

fn run(hf: &Path, reference: &Path) -> Result<VerifyReport> {
    verify::<Flex>(
        &registry(),
        hf,
        reference,
        &VerifyOptions::default(),
        &Default::default(),
        "cpu",
    )
}

/// Copies a fixture so that it can be changed.
fn copy_of(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(family)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

#[track_caller]
fn edit(dir: &Path, file: &str, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join(file);
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn a_report_has_the_agreed_fields() {
    let report = run(&fixture("llama3_2"), &fixture("llama3_2")).unwrap();
    assert!(report.passed, "{report}");
    let json = serde_json::to_value(&report).unwrap();
    let fields: Vec<&str> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let agreed = [
        "family",
        "layout",
        "backend",
        "dtype",
        "logits_max_abs_diff",
        "loss",
        "loss_reference",
        "grad_norm_max_rel_diff",
        "worst_grad",
        "greedy_match",
        "passed",
    ];
    assert_eq!(fields, agreed);
    assert_eq!(json["family"], "llama");
    assert_eq!(json["greedy_match"], true);
}

#[test]
fn each_check_can_fail() {
    // A model that differs from the reference in one number that the whole forward pass depends on.
    let changed = copy_of("llama2");
    edit(changed.path(), "config.json", |json| {
        json["rms_norm_eps"] = 1e-2.into()
    });
    let report = run(changed.path(), &fixture("llama2")).unwrap();
    assert!(!report.passed);
    let failed: Vec<&str> = report
        .comparisons
        .iter()
        .filter(|c| !c.passed)
        .map(|c| c.what.as_str())
        .collect();
    for what in [
        "logits",
        "loss",
        "norms of",
        "gradient model.embed_tokens.weight",
    ] {
        assert!(
            failed.iter().any(|failed| failed.starts_with(what)),
            "{what} is not among {failed:?}"
        );
    }

    let changed = copy_of("llama2");
    edit(changed.path(), "oracle.json", |json| {
        json["gen_ids"][3] = 1.into()
    });
    let report = run(&fixture("llama2"), changed.path()).unwrap();
    assert_eq!((report.greedy_match, report.passed), (Some(false), false));
    assert!(report.to_string().contains("token 3 is"), "{report}");

    // One gradient's norm, off by more than a thousandth.
    let changed = copy_of("llama2");
    edit(changed.path(), "oracle.json", |json| {
        let norm = &mut json["grads"]["model.layers.1.mlp.up_proj.weight"][0];
        *norm = (norm.as_f64().unwrap() * 1.002).into();
    });
    let report = run(&fixture("llama2"), changed.path()).unwrap();
    assert_eq!(
        report.worst_grad.as_deref(),
        Some("model.layers.1.mlp.up_proj.weight")
    );
    assert!(!report.passed);
}

#[test]
fn what_the_reference_lacks_is_null() {
    let partial = tempfile::tempdir().unwrap();
    std::fs::copy(
        fixture("llama2").join("oracle.json"),
        partial.path().join("oracle.json"),
    )
    .unwrap();
    let report = run(&fixture("llama2"), partial.path()).unwrap();
    assert!(
        report.passed && report.greedy_match == Some(true),
        "{report}"
    );
    assert!(
        report.logits_max_abs_diff.is_none()
            && report.loss.is_none()
            && report.worst_grad.is_none()
    );
}

#[test]
fn references_that_do_not_fit_are_named() {
    let check = |reference: &Path, expected: &str| {
        let error = run(&fixture("llama2"), reference).unwrap_err();
        assert!(
            error.is_input() && error.to_string().contains(expected),
            "{error}"
        );
    };
    let empty = tempfile::tempdir().unwrap();
    check(
        empty.path(),
        "holds neither oracle.json nor oracle.safetensors",
    );

    let changed = copy_of("llama2");
    edit(changed.path(), "oracle.json", |json| {
        json["grads"]
            .as_object_mut()
            .unwrap()
            .remove("lm_head.weight");
    });
    check(changed.path(), "has no gradient of `lm_head.weight`");

    let changed = copy_of("llama2");
    edit(changed.path(), "oracle.json", |json| {
        json["grads"]["model.x.weight"] = serde_json::json!([1.0, 0.0, 4])
    });
    check(
        changed.path(),
        "has a gradient of `model.x.weight`, which the model lacks",
    );

    let changed = copy_of("llama2");
    edit(changed.path(), "oracle.json", |json| {
        json.as_object_mut().unwrap().remove("gen_prompt");
    });
    check(changed.path(), "one of gen_prompt and gen_ids");

    let changed = copy_of("llama2");
    std::fs::write(changed.path().join("oracle.json"), "{").unwrap();
    check(changed.path(), "oracle.json: EOF");
}
