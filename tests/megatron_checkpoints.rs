//! Checkpoints that Megatron-Core wrote, against the Hugging Face models they were made from; and the way back.

use std::path::{Path, PathBuf};

use bridge_core::Registry;
use bridge_core::checkpoint::Checkpoint;
use bridge_core::convert::{ExportOptions, ModelPlace, convert};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn registry() -> Registry {
    bridge_models::registry()
}

fn run(from: &ModelPlace, to: &ModelPlace) {
    convert(from, to, &registry(), &ExportOptions::default(), &()).unwrap();
}

/// Every tensor of `found` equals, bit for bit, the one of `expected`, and none is missing.
#[track_caller]
fn same_tensors(found: &Path, expected: &Path) {
    let (found, expected) = (
        Checkpoint::open(found).unwrap(),
        Checkpoint::open(expected).unwrap(),
    );
    assert_eq!(found.tensors().len(), expected.tensors().len());
    for info in expected.tensors() {
        let own = found.tensor(&info.name).unwrap();
        assert_eq!(
            (own.dtype, &own.shape),
            (info.dtype, &info.shape),
            "{}",
            info.name
        );
        assert!(
            found.read(own).unwrap() == expected.read(info).unwrap(),
            "tensor {} differs",
            info.name
        );
    }
}

/// Fixture of Megatron-Core, and the Hugging Face model it was made from.
const CASES: [(&str, &str); 4] = [
    ("core016_qwen3_tp2", "qwen3"),
    ("core019_llama3_2_tp2", "llama3_2"),
    ("core019_qwen3_moe_tp2ep2", "qwen3_moe"),
    ("core019_qwen3_tp1_nonhomogeneous", "qwen3"),
];

#[test]
fn what_megatron_core_wrote_converts_to_the_hugging_face_model_bit_by_bit() {
    for (megatron, family) in CASES {
        let hf = fixtures().join(family);
        let work = tempfile::tempdir().unwrap();
        let from = ModelPlace::Megatron {
            dir: fixtures().join("megatron").join(megatron),
            hf_config: Some(hf.clone()),
        };
        // Straight, and by way of a native checkpoint.
        let straight = work.path().join("straight");
        run(&from, &ModelPlace::Hf(straight.clone()));
        same_tensors(&straight, &hf);
        let (native, back) = (work.path().join("native"), work.path().join("back"));
        run(&from, &ModelPlace::Native(native.clone()));
        run(&ModelPlace::Native(native), &ModelPlace::Hf(back.clone()));
        same_tensors(&back, &hf);
    }
}

#[test]
fn what_is_written_for_megatron_core_comes_back_bit_by_bit() {
    let families = std::fs::read_dir(fixtures()).unwrap();
    let mut written = 0;
    for hf in families.map(|entry| entry.unwrap().path()) {
        if !hf.join("config.json").is_file() {
            continue;
        }
        let work = tempfile::tempdir().unwrap();
        let (megatron, back) = (work.path().join("megatron"), work.path().join("back"));
        let place = ModelPlace::Megatron {
            dir: megatron,
            hf_config: None,
        };
        let options = ExportOptions::default();
        match convert(
            &ModelPlace::Hf(hf.clone()),
            &place,
            &registry(),
            &options,
            &(),
        ) {
            Ok(_) => {
                run(&place, &ModelPlace::Hf(back.clone()));
                let model = bridge_core::convert::HfModel::open(
                    &hf,
                    &registry(),
                    &bridge_core::LayoutSpec::default(),
                )
                .unwrap();
                // What a source stores besides its weights, quantized or twice, has no place in the other format.
                let plain = !model.plan().is_quantized()
                    && model.plan().ignored.is_empty()
                    && model.plan().tied.iter().all(|tied| !tied.present);
                if plain {
                    same_tensors(&back, &hf);
                }
                written += 1;
            }
            // Models that Megatron-Core's GPT model has no layers for.
            Err(error) => {
                let text = error.to_string();
                assert!(
                    text.contains("Megatron-Core's GPT model cannot hold"),
                    "{}: {text}",
                    hf.display()
                );
            }
        }
    }
    assert!(written >= 12, "{written} families were written");
}

#[test]
fn a_checkpoint_without_a_config_says_what_it_needs() {
    let work = tempfile::tempdir().unwrap();
    let from = ModelPlace::Megatron {
        dir: fixtures().join("megatron").join("core019_llama3_2_tp2"),
        hf_config: None,
    };
    let to = ModelPlace::Hf(work.path().join("out"));
    let error = convert(&from, &to, &registry(), &ExportOptions::default(), &()).unwrap_err();
    assert!(error.to_string().contains("--hf-config"), "{error}");
    assert!(!work.path().join("out").exists());
}

#[test]
fn a_config_of_another_model_is_refused_before_anything_is_written() {
    let work = tempfile::tempdir().unwrap();
    let from = ModelPlace::Megatron {
        dir: fixtures().join("megatron").join("core019_llama3_2_tp2"),
        hf_config: Some(fixtures().join("qwen3")),
    };
    let to = ModelPlace::Native(work.path().join("out"));
    let error = convert(&from, &to, &registry(), &ExportOptions::default(), &()).unwrap_err();
    assert!(error.to_string().contains("layernorm"), "{error}");
    assert!(!work.path().join("out").exists());
}
