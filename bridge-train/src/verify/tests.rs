use std::path::PathBuf;

use burn::backend::Flex;

use super::parts::{GradientPart, LogitsPart, Parts, gather};
use super::*;

fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(family)
}

fn open(reference: &Path, layout: LayoutSpec) -> Result<Verification> {
    Verification::open(
        &bridge_models::registry(),
        &fixture("llama2"),
        reference,
        &VerifyOptions::default(),
        &layout,
        &ParallelOptions::default(),
    )
}

fn run(reference: &Path, layout: LayoutSpec) -> VerifyReport {
    let timeout = Duration::from_secs(60);
    open(reference, layout)
        .and_then(|found| found.on_threads::<Flex>(timeout, "cpu"))
        .unwrap()
}

#[test]
fn a_wrong_number_is_found_at_any_layout() {
    let dp2_pp2 = LayoutSpec {
        dp: 2,
        ..LayoutSpec::tp_pp(1, 2)
    };
    let changed = tempfile::tempdir().unwrap();
    for file in ["oracle.json", "oracle.safetensors"] {
        std::fs::copy(fixture("llama2").join(file), changed.path().join(file)).unwrap();
    }
    let path = changed.path().join("oracle.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let norm = &mut json["grads"]["model.layers.1.mlp.up_proj.weight"][0];
    *norm = (norm.as_f64().unwrap() * 1.002).into();
    json["loss"] = (json["loss"].as_f64().unwrap() + 2e-5).into();
    std::fs::write(path, json.to_string()).unwrap();
    for layout in [LayoutSpec::default(), LayoutSpec::tp_pp(2, 1), dp2_pp2] {
        assert!(run(&fixture("llama2"), layout).passed);
        let report = run(changed.path(), layout);
        assert!(!report.passed);
        let failed = report.comparisons.iter().filter(|c| !c.passed);
        let failed: Vec<&str> = failed.map(|c| c.what.as_str()).collect();
        assert_eq!(failed.len(), 2, "{failed:?}");
        assert!(failed[0].starts_with("loss") && failed[1].starts_with("norms of"));
    }
}

#[test]
fn texts_are_compared_where_a_model_is_divided_by_heads_alone() {
    assert_eq!(
        run(&fixture("llama2"), LayoutSpec::tp_pp(2, 1)).greedy_match,
        Some(true)
    );
    assert_eq!(
        run(&fixture("llama2"), LayoutSpec::tp_pp(1, 2)).greedy_match,
        None
    );
    // Without logits that is all there is.
    let partial = tempfile::tempdir().unwrap();
    let json = "oracle.json";
    std::fs::copy(fixture("llama2").join(json), partial.path().join(json)).unwrap();
    assert!(run(partial.path(), LayoutSpec::default()).passed);
    let error = open(partial.path(), LayoutSpec::tp_pp(1, 2)).err().unwrap();
    assert!(
        error.is_input() && error.to_string().contains("holds no logits"),
        "{error}"
    );
}

#[test]
fn parts_of_all_ranks_make_a_whole() {
    let part = |rows: std::ops::Range<usize>, values: &[f32]| GradientPart {
        name: "weight".to_owned(),
        global_shape: vec![2, 3],
        ranges: vec![rows, 0..3],
        values: values.to_vec(),
    };
    let together = |parts: fn(usize) -> Option<(std::ops::Range<usize>, [f32; 3])>| {
        let layout = LayoutSpec {
            dp: 3,
            ..LayoutSpec::default()
        };
        run_threads::<Flex, _, Error>(layout, Duration::from_secs(20), move |parallel| {
            let rank = parallel.rank();
            let own = parts(rank).map(|(rows, values)| part(rows, &values));
            let own = Parts {
                loss: 1.5,
                logits: (rank == 1).then(|| LogitsPart {
                    values: vec![7.0, 8.0],
                }),
                gradients: own.into_iter().collect(),
            };
            gather(&parallel, own)
        })
    };
    let ranks = together(|rank| {
        Some(match rank {
            0 => (1..2, [4.0, 5.0, 6.0]),
            1 => (0..1, [1.0, 2.0, 3.0]),
            _ => (0..1, [1.0, 2.0, 3.5]),
        })
    });
    let ranks = ranks.unwrap();
    assert!(ranks[1].is_none() && ranks[2].is_none());
    let found = ranks[0].as_ref().unwrap();
    assert_eq!(found.gradients["weight"], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert!((found.apart - 0.5 / 14f64.sqrt()).abs() < 1e-9);
    assert!(found.logits[0].is_none());
    assert_eq!(found.logits[1].as_ref().unwrap().values, [7.0, 8.0]);
    let error = together(|rank| (rank == 2).then_some((1..2, [0.0; 3])));
    let text = error.err().unwrap().to_string();
    assert!(
        text.contains("no rank has element 0 of the gradient of `weight`"),
        "{text}"
    );
}
