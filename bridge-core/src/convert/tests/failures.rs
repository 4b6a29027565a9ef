//! What is refused, stopped or missing leaves nothing behind and is named.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

#[test]
fn nothing_is_overwritten_unasked() {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(json!({}));
    let hf = write_hf(root.path(), &config, specs(&config, DType::F32, &[]), WHOLE);
    let (native, out) = (root.path().join("native"), root.path().join("out"));
    let (refuse, replace) = (
        ConvertOptions::default(),
        ConvertOptions {
            existing: Existing::Replace,
            ..ConvertOptions::default()
        },
    );
    import(&hf, &native, &registry(), &refuse, &()).unwrap();
    let error = import(&hf, &native, &registry(), &refuse, &()).unwrap_err();
    assert!(
        error.is_input() && error.to_string().contains("exists already"),
        "{error}"
    );
    import(&hf, &native, &registry(), &replace, &()).unwrap();
    // A training run is never replaced by an import.
    fs::create_dir(native.join("iter_0000007")).unwrap();
    let error = import(&hf, &native, &registry(), &replace, &()).unwrap_err();
    assert!(error.is_input(), "{error}");
    fs::remove_dir(native.join("iter_0000007")).unwrap();

    let options = |existing| ExportOptions {
        convert: ConvertOptions {
            existing,
            ..ConvertOptions::default()
        },
        ..ExportOptions::default()
    };
    export(&native, &out, &registry(), &options(Existing::Refuse), &()).unwrap();
    assert!(
        export(&native, &out, &registry(), &options(Existing::Refuse), &())
            .unwrap_err()
            .is_input()
    );
    export(&native, &out, &registry(), &options(Existing::Replace), &()).unwrap();
}

/// Counts, and stops after a number of steps.
struct Stopper {
    left: AtomicU64,
    bytes: AtomicU64,
    expected: AtomicU64,
}

impl Stopper {
    fn after(steps: u64) -> Self {
        Self {
            left: AtomicU64::new(steps),
            bytes: AtomicU64::new(0),
            expected: AtomicU64::new(0),
        }
    }
}

impl Progress for Stopper {
    fn begin(&self, _stage: &str, total_bytes: u64) {
        self.expected.fetch_add(total_bytes, Ordering::Relaxed);
    }

    fn advance(&self, tensor: &str, bytes: u64) -> bool {
        assert!(!tensor.is_empty());
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .is_ok()
    }
}

#[test]
fn a_stop_leaves_nothing_behind_and_progress_adds_up() {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(json!({"fused": true}));
    let hf = write_hf(root.path(), &config, specs(&config, DType::F32, &[]), WHOLE);
    let native = root.path().join("native");
    for threads in [1, 2, 5] {
        let options = ConvertOptions {
            threads,
            ..ConvertOptions::default()
        };
        let error = import(&hf, &native, &registry(), &options, &Stopper::after(3)).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        assert!(!error.is_input());
        assert_eq!(names(root.path()), ["hf"]);
        let error = roundtrip(
            &hf,
            &registry(),
            &LayoutSpec::tp_pp(2, 1),
            None,
            &options,
            &Stopper::after(40),
        );
        assert!(matches!(error, Err(Error::Cancelled)));
        assert_eq!(names(root.path()), ["hf"]);
    }
    let all = Stopper::after(u64::MAX);
    roundtrip(
        &hf,
        &registry(),
        &LayoutSpec::tp_pp(2, 1),
        None,
        &ConvertOptions::default(),
        &all,
    )
    .unwrap();
    assert_eq!(
        all.bytes.load(Ordering::Relaxed),
        all.expected.load(Ordering::Relaxed)
    );
}

#[test]
fn hostile_tensor_names_never_become_paths() {
    for name in [
        "../x",
        "/etc/passwd",
        "a/../../b",
        "x\u{1b}[31m",
        "..",
        &"n".repeat(1024),
    ] {
        let root = tempfile::tempdir().unwrap();
        let config = test_config(json!({}));
        let extra = TensorSpec::new(name, DType::F32, [2]);
        let hf = write_hf(
            root.path(),
            &config,
            specs(&config, DType::F32, &[extra]),
            WHOLE,
        );
        let error = import(
            &hf,
            &root.path().join("native"),
            &registry(),
            &ConvertOptions::default(),
            &(),
        )
        .unwrap_err();
        assert!(error.is_input());
        let text = error.to_string();
        assert!(
            text.contains("is not part of the model")
                && text.len() < 600
                && !text.contains('\u{1b}'),
            "{text}"
        );
        assert_eq!(names(root.path()), ["hf"]);
    }
}

#[test]
fn what_is_missing_is_named() {
    let root = tempfile::tempdir().unwrap();
    let run = |hf: &Path| {
        import(
            hf,
            &root.path().join("native"),
            &registry(),
            &ConvertOptions::default(),
            &(),
        )
    };
    let error = run(&root.path().join("nothing")).unwrap_err();
    assert!(
        error.is_input() && error.to_string().contains("nothing"),
        "{error}"
    );

    let config = test_config(json!({}));
    let hf = write_hf(root.path(), &config, specs(&config, DType::F32, &[]), WHOLE);
    fs::write(
        hf.join("config.json"),
        r#"{"architectures": ["TsetForCausalLM"]}"#,
    )
    .unwrap();
    let error = run(&hf).unwrap_err();
    assert!(error.is_input());
    assert_eq!(
        error.to_string(),
        format!(
            "{}: architecture \"TsetForCausalLM\" is not supported; supported architectures: TestForCausalLM; did you \
             mean TestForCausalLM?",
            hf.join("config.json").display()
        )
    );
    fs::write(hf.join("config.json"), "{}").unwrap();
    let error = run(&hf).unwrap_err().to_string();
    assert!(error.contains("names no architecture"), "{error}");

    // An export of a checkpoint without config.json, as a careless copy would leave.
    fs::write(hf.join("config.json"), config.raw()).unwrap();
    let native = run(&hf).unwrap().dir;
    fs::remove_file(native.join("hf/config.json")).unwrap();
    let error = export(
        &native,
        &root.path().join("out"),
        &registry(),
        &ExportOptions::default(),
        &(),
    )
    .unwrap_err();
    assert!(
        error.is_input() && error.to_string().contains("config.json"),
        "{error}"
    );
}
