//! Conversions of small checkpoints on disk: nothing is lost, and nothing is left behind when something fails.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Checkpoint, Existing, ShardedWriter, TensorSpec, WriterOptions};
use crate::config::HfConfig;
use crate::dtype::{DType, cast_bytes};
use crate::error::Error;
use crate::layout::{LayoutSpec, local_slice};
use crate::plan::plan_from_shapes;
use crate::registry::Registry;
use crate::test_model::{TestBridge, test_config};

fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(&TestBridge);
    registry
}

/// Bytes of a tensor that depend on its name, so that no two tensors and no two elements agree by chance. Every pair
/// of bytes is a finite number in each of the 16-bit types, and every four in 32 bits.
fn content(name: &str, len: u64) -> Vec<u8> {
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8 & 0x3f
        })
        .collect()
}

/// The tensors of a complete checkpoint of `config`, and `extra` ones.
fn specs(config: &HfConfig, dtype: DType, extra: &[TensorSpec]) -> Vec<TensorSpec> {
    let plan = plan_from_shapes(&TestBridge, config, dtype, &LayoutSpec::default()).unwrap();
    let mut specs: Vec<TensorSpec> = plan
        .tensors
        .iter()
        .flat_map(|tensor| &tensor.foreign)
        .map(|name| {
            let index = plan.mapping().foreign_index(name).unwrap();
            TensorSpec::new(
                name.as_str(),
                dtype,
                plan.mapping().foreign[index].shape.as_slice(),
            )
        })
        .collect();
    specs.extend(extra.iter().cloned());
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    specs.dedup();
    specs
}

/// A Hugging Face folder `hf` in `root`.
fn write_hf(
    root: &Path,
    config: &HfConfig,
    specs: Vec<TensorSpec>,
    max_shard_bytes: u64,
) -> PathBuf {
    let dir = root.join("hf");
    let options = WriterOptions {
        max_shard_bytes,
        ..WriterOptions::default()
    };
    let writer = ShardedWriter::create(&dir, specs.clone(), options).unwrap();
    for (position, spec) in specs.iter().enumerate() {
        let name = if spec.name == "lm_head.weight" && config.json()["tie_word_embeddings"] == true
        {
            "model.embed_tokens.weight"
        } else {
            &spec.name
        };
        let bytes = content(name, spec.dtype.byte_len(&spec.shape).unwrap());
        writer.write_at(position, 0, &bytes).unwrap();
    }
    // Keys in an odd order and an odd layout: none of it may change.
    let raw = format!(
        "{{\"zz\": [1,2 ],\n\t{}",
        &String::from_utf8(config.raw().to_vec()).unwrap()[1..]
    );
    writer.add_file("config.json", raw.as_bytes()).unwrap();
    writer
        .add_file("tokenizer.json", b"{\"a tokenizer\": 1}")
        .unwrap();
    writer
        .add_file("chat_template.jinja", b"{{ messages }}")
        .unwrap();
    writer.add_file("generation_config.json", b"{}").unwrap();
    writer
        .add_file("modeling_test.py", b"raise SystemExit")
        .unwrap();
    writer.finish().unwrap()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let files = entries.filter(|entry| entry.path().is_file());
    files
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect()
}

/// The names in a folder, hidden ones included.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn check_identical(config: Value, extra: &[TensorSpec], max_shard_bytes: u64) {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(config);
    let hf = write_hf(
        root.path(),
        &config,
        specs(&config, DType::BF16, extra),
        max_shard_bytes,
    );
    let (native, out) = (root.path().join("native"), root.path().join("out"));
    let options = ConvertOptions::default();
    let imported = import(&hf, &native, &registry(), &options, &()).unwrap();
    assert_eq!(imported.skipped_files[0].name, "modeling_test.py");
    assert_eq!(imported.bytes, imported.plan.total_bytes);
    let exported = export(&native, &out, &registry(), &ExportOptions::default(), &()).unwrap();
    assert_eq!(exported.changed_dtype, None);
    let (mut before, after) = (files(&hf), files(&out));
    before.remove("modeling_test.py");
    assert_eq!(
        before.keys().collect::<Vec<_>>(),
        after.keys().collect::<Vec<_>>()
    );
    for (name, bytes) in &before {
        assert!(after[name] == *bytes, "{name} differs");
    }
    assert_eq!(names(root.path()), ["hf", "native", "out"]);
}

const WHOLE: u64 = u64::MAX;

#[test]
fn an_unchanged_import_is_exported_as_the_same_files() {
    check_identical(json!({}), &[], WHOLE);
    check_identical(json!({}), &[], 20_000);
    check_identical(json!({"fused": true}), &[], WHOLE);
    check_identical(json!({"fused": true, "num_hidden_layers": 2}), &[], 9_000);
    check_identical(json!({"tie_word_embeddings": true}), &[], WHOLE);
}

#[test]
fn tied_copies_and_unused_tensors_come_back_where_the_source_had_them() {
    let head = TensorSpec::new("lm_head.weight", DType::BF16, [131, 48]);
    let unused: Vec<TensorSpec> = (0..3)
        .map(|layer| format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"))
        .map(|name| TensorSpec::new(name, DType::F32, [8]))
        .collect();
    check_identical(
        json!({"tie_word_embeddings": true}),
        std::slice::from_ref(&head),
        WHOLE,
    );
    check_identical(json!({}), &unused, 15_000);
    check_identical(
        json!({"tie_word_embeddings": true}),
        &[unused, vec![head]].concat(),
        15_000,
    );
}

#[test]
fn a_tied_weight_stored_under_its_second_name_alone_comes_back_so() {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(json!({"tie_word_embeddings": true}));
    let head = TensorSpec::new("lm_head.weight", DType::F32, [131, 48]);
    let mut specs = specs(&config, DType::F32, &[head]);
    specs.retain(|spec| spec.name != "model.embed_tokens.weight");
    let hf = write_hf(root.path(), &config, specs, WHOLE);
    let report = roundtrip(
        &hf,
        &registry(),
        &LayoutSpec::tp_pp(2, 3),
        None,
        &ConvertOptions::default(),
        &(),
    )
    .unwrap();
    assert!(report.passed(), "{:?}", report.mismatches);
    assert_eq!((report.identical_files, report.files), (1, 1));
}

#[test]
fn two_copies_of_a_tied_weight_that_differ_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let tied = test_config(json!({"tie_word_embeddings": true}));
    let untied = test_config(json!({}));
    // Contents depend on names, so that the two copies differ in a folder written as untied.
    let hf = write_hf(root.path(), &untied, specs(&untied, DType::F32, &[]), WHOLE);
    fs::write(hf.join("config.json"), tied.raw()).unwrap();
    let error = import(
        &hf,
        &root.path().join("native"),
        &registry(),
        &ConvertOptions::default(),
        &(),
    )
    .unwrap_err();
    assert!(matches!(error, Error::TiedWeightsDiffer(_)), "{error}");
    assert!(error.is_input());
    assert_eq!(names(root.path()), ["hf"]);
}

#[test]
fn round_trips_are_exact_at_every_legal_layout() {
    let root = tempfile::tempdir().unwrap();
    for (case, config) in [
        json!({}),
        json!({"fused": true}),
        json!({"tie_word_embeddings": true, "fused": true}),
    ]
    .into_iter()
    .enumerate()
    {
        let config = test_config(config);
        let dir = root.path().join(case.to_string());
        fs::create_dir(&dir).unwrap();
        let hf = write_hf(&dir, &config, specs(&config, DType::F16, &[]), 12_000);
        for (tp, pp) in [(1, 1), (2, 1), (1, 2), (2, 3)] {
            let layout = LayoutSpec {
                dp: 2,
                ..LayoutSpec::tp_pp(tp, pp)
            };
            let report = roundtrip(
                &hf,
                &registry(),
                &layout,
                None,
                &ConvertOptions::default(),
                &(),
            )
            .unwrap();
            assert!(report.passed(), "{layout}: {:?}", report.mismatches);
            assert!(report.config_identical);
            assert_eq!(report.identical_files, report.files, "{layout}");
            assert_eq!(names(&dir), ["hf"]);
        }
        let error = roundtrip(
            &hf,
            &registry(),
            &LayoutSpec::tp_pp(3, 1),
            None,
            &ConvertOptions::default(),
            &(),
        );
        assert!(matches!(error, Err(Error::Layout { .. })));
    }
}

/// Six query heads on six ranks and two key-value heads: each of those is held by three ranks and written by one.
#[test]
fn replicated_heads_are_written_once() {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(json!({"intermediate_size": 84}));
    let hf = write_hf(root.path(), &config, specs(&config, DType::F32, &[]), WHOLE);
    let report = roundtrip(
        &hf,
        &registry(),
        &LayoutSpec::tp_pp(6, 1),
        None,
        &ConvertOptions::default(),
        &(),
    )
    .unwrap();
    assert!(report.passed(), "{:?}", report.mismatches);
}

#[test]
fn slices_read_from_the_folder_are_those_of_the_whole_tensor() {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(json!({"fused": true}));
    let hf = write_hf(
        root.path(),
        &config,
        specs(&config, DType::BF16, &[]),
        9_000,
    );
    let layout = LayoutSpec::tp_pp(2, 1);
    let model = HfModel::open(&hf, &registry(), &layout).unwrap();
    for tensor in &model.plan().tensors {
        let whole = model.read(&tensor.canonical).unwrap();
        assert_eq!(whole.len() as u64, tensor.bytes);
        for rank in 0..2 {
            let slice = local_slice(&tensor.shard, &tensor.shape, &layout, &layout.coords(rank))
                .unwrap()
                .unwrap();
            let mut view = crate::mapping::View::whole(&tensor.shape);
            for (dim, range) in slice.ranges.iter().enumerate() {
                view = view.slice(dim, range.clone()).unwrap();
            }
            let expected: Vec<u8> = view
                .offsets()
                .flat_map(|at| whole[2 * at..2 * at + 2].to_vec())
                .collect();
            assert_eq!(
                model.read_slice(&tensor.canonical, &slice.ranges).unwrap(),
                expected,
                "{}",
                tensor.canonical
            );
        }
    }
    // The order of the fused rows: group 1 starts with query heads 3, 4 and 5.
    let fused = model
        .source()
        .safetensors()
        .unwrap()
        .tensor("model.layers.0.self_attn.qkv.weight")
        .unwrap();
    let fused = model.source().safetensors().unwrap().read(fused).unwrap();
    let queries = model.read("layers.0.attention.q_proj.weight").unwrap();
    let (row, group) = (2 * 48, (3 + 1 + 1) * 16);
    assert_eq!(
        fused[group * row..][..48 * row],
        queries[48 * row..][..48 * row]
    );
    let error = model
        .read("layers.0.attention.q_prj.weight")
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("did you mean `layers.0.attention.q_proj.weight`?"),
        "{error}"
    );
    assert!(
        model
            .read_slice("embedding.weight", &[0..132, 0..48])
            .is_err()
    );
    assert!(
        model
            .read_slice("final_norm.weight", &[0..13, 0..1])
            .is_err()
    );
}

#[test]
fn a_changed_dtype_is_cast_and_stated_and_nothing_else_changes() {
    let root = tempfile::tempdir().unwrap();
    for (case, fused) in [false, true].into_iter().enumerate() {
        let config = test_config(json!({"fused": fused}));
        let dir = root.path().join(case.to_string());
        fs::create_dir(&dir).unwrap();
        let hf = write_hf(&dir, &config, specs(&config, DType::F32, &[]), 30_000);
        let (native, out) = (dir.join("native"), dir.join("out"));
        // A tiny budget, so that tensors are cut into many chunks.
        let convert = ConvertOptions {
            memory_budget: 1,
            ..ConvertOptions::default()
        };
        import(&hf, &native, &registry(), &convert, &()).unwrap();
        let options = ExportOptions {
            dtype: Some(DType::BF16),
            convert,
            ..ExportOptions::default()
        };
        let report = export(&native, &out, &registry(), &options, &()).unwrap();
        assert_eq!(report.changed_dtype, Some(DType::BF16));
        let (before, after) = (
            Checkpoint::open(&hf).unwrap(),
            Checkpoint::open(&out).unwrap(),
        );
        assert_eq!(before.files().len(), after.files().len());
        for (old, new) in before.tensors().iter().zip(after.tensors()) {
            let mut expected = vec![0; old.len as usize / 2];
            cast_bytes(
                &before.read(old).unwrap(),
                DType::F32,
                DType::BF16,
                &mut expected,
            )
            .unwrap();
            assert_eq!(
                (&new.name, new.dtype, &new.shape),
                (&old.name, DType::BF16, &old.shape)
            );
            assert!(after.read(new).unwrap() == expected, "{}", old.name);
        }
        let old = fs::read_to_string(hf.join("config.json")).unwrap();
        let new = fs::read_to_string(out.join("config.json")).unwrap();
        assert_eq!(
            new,
            old.replace(
                "\"torch_dtype\": \"float32\"",
                "\"torch_dtype\": \"bfloat16\""
            )
        );
        let index: Value =
            serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap())
                .unwrap();
        assert_eq!(index["metadata"]["total_size"], after.total_bytes());

        let options = ExportOptions {
            max_shard_bytes: Some(WHOLE),
            ..ExportOptions::default()
        };
        let report = export(&native, &dir.join("one"), &registry(), &options, &()).unwrap();
        assert_eq!(
            (report.files, report.changed_dtype),
            (vec!["model.safetensors".to_owned()], None)
        );
    }
}

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

#[test]
fn a_model_without_a_source_is_exported_too() {
    let root = tempfile::tempdir().unwrap();
    let config = test_config(json!({}));
    let hf = write_hf(
        root.path(),
        &config,
        specs(&config, DType::F32, &[]),
        10_000,
    );
    let native = import(
        &hf,
        &root.path().join("native"),
        &registry(),
        &ConvertOptions::default(),
        &(),
    )
    .unwrap()
    .dir;
    fs::remove_file(native.join("hf/source.json")).unwrap();
    let report = export(
        &native,
        &root.path().join("out"),
        &registry(),
        &ExportOptions::default(),
        &(),
    )
    .unwrap();
    assert_eq!(report.files, ["model.safetensors"]);
    assert_eq!(report.changed_dtype, None);
    let damaged = native.join("hf/source.json");
    for text in [
        "{",
        "{}",
        r#"{"version":9,"files":[],"index":null}"#,
        r#"{"version":1,"files":[{"name":"a.safetensors","header":"{}","data_bytes":18446744073709551615}],"index":null}"#,
    ] {
        fs::write(&damaged, text).unwrap();
        let error = export(
            &native,
            &root.path().join("out2"),
            &registry(),
            &ExportOptions::default(),
            &(),
        );
        assert!(error.unwrap_err().is_input(), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any sizes, any layout that fits them, any budget: the source comes back.
    #[test]
    fn random_models_round_trip(
        hidden in 1usize..20,
        inner in prop::sample::select(vec![1usize, 4, 6, 12, 18]),
        kv_heads in 1usize..4,
        queries_per_kv in 1usize..4,
        half_head in 1usize..4,
        vocab in 1usize..30,
        layers in 1usize..4,
        fused in any::<bool>(),
        tied in any::<bool>(),
        tp in 1usize..4,
        pp in 1usize..4,
        max_shard_bytes in 100u64..5000,
        threads in 1usize..4,
    ) {
        let config = test_config(json!({
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab,
            "num_attention_heads": kv_heads * queries_per_kv, "num_key_value_heads": kv_heads,
            "head_dim": 2 * half_head, "fused": fused, "tie_word_embeddings": tied,
        }));
        let root = tempfile::tempdir().unwrap();
        let hf = write_hf(root.path(), &config, specs(&config, DType::BF16, &[]), max_shard_bytes);
        let options = ConvertOptions { threads, memory_budget: 1, ..ConvertOptions::default() };
        match roundtrip(&hf, &registry(), &LayoutSpec::tp_pp(tp, pp), None, &options, &()) {
            Ok(report) => {
                prop_assert!(report.passed(), "{:?}", report.mismatches);
                prop_assert_eq!(report.identical_files, report.files);
            }
            Err(error) => prop_assert!(matches!(error, Error::Layout { .. }), "{}", error),
        }
    }
}
