//! Checkpoints that Megatron-Core wrote, against the Hugging Face models they were made from; and the way back.

use std::path::{Path, PathBuf};

use bridge_core::checkpoint::Checkpoint;
use bridge_core::checkpoint::megatron::RunConfig;
use bridge_core::convert::{ExportOptions, ModelPlace, convert};
use bridge_core::dtype::DType;
use bridge_core::{DecoderConfig, HfConfig, Registry};

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
const CASES: [(&str, &str); 6] = [
    ("core016_qwen3_tp2", "qwen3"),
    ("core019_llama3_2_tp2", "llama3_2"),
    ("core019_qwen3_moe_tp2ep2", "qwen3_moe"),
    ("core019_qwen3_tp1_nonhomogeneous", "qwen3"),
    ("core016_qwen3_moe_ep2_singleton", "qwen3_moe"),
    ("core016_qwen3_next_tp2", "qwen3_next"),
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
        run(&ModelPlace::Hf(hf.clone()), &place);
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
    assert!(written >= 25, "{written} families were written");
}

#[test]
fn a_weight_that_would_not_come_back_is_refused_by_name_unless_it_may_be_rounded() {
    let work = tempfile::tempdir().unwrap();
    let (hf, megatron) = (work.path().join("hf"), work.path().join("megatron"));
    std::fs::create_dir(&hf).unwrap();
    for entry in std::fs::read_dir(fixtures().join("qwen3_next")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, hf.join(path.file_name().unwrap())).unwrap();
    }
    // Stored less one, 0.1 has too few digits left.
    let name = "model.layers.1.linear_attn.norm.weight";
    let checkpoint = Checkpoint::open(&hf).unwrap();
    let info = checkpoint.tensor(name).unwrap();
    let (file, offset) = (
        hf.join(checkpoint.files()[info.file].name()),
        info.offset as usize,
    );
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[offset + 4..offset + 8].copy_from_slice(&0.1_f32.to_le_bytes());
    drop(checkpoint);
    std::fs::write(file, bytes).unwrap();
    let (from, to) = (
        ModelPlace::Hf(hf),
        ModelPlace::Megatron {
            dir: megatron.clone(),
            hf_config: None,
        },
    );
    let options = ExportOptions::default();
    let error = convert(&from, &to, &registry(), &options, &()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("decoder.layers.1.self_attention.out_norm.weight")
            && text.contains("less one has no exact F32"),
        "{text}"
    );
    assert!(!megatron.exists());
    let options = ExportOptions {
        dtype: Some(DType::F32),
        ..ExportOptions::default()
    };
    convert(&from, &to, &registry(), &options, &()).unwrap();
}

/// A model's config as a `run_config.yaml` can say it: without the tokens that begin and end a text.
fn typed(hf: &Path) -> (&'static str, DecoderConfig) {
    let config = HfConfig::load(hf).unwrap();
    let family = registry().detect(&config).unwrap();
    let typed = DecoderConfig {
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        ..family.config(&config).unwrap()
    };
    (family.name(), typed)
}

/// Models that the keywords of Megatron-Bridge's classes cannot say, and what they lack.
const NOT_SAID: [(&str, &str); 5] = [
    // It has the factor of Llama 3's rope scaling alone, and these were made with a shorter original context.
    ("llama3_1", "rope"),
    ("llama3_2", "rope"),
    ("llama_nemotron_nano", "rope"),
    ("llama_nemotron_super", "rope"),
    ("qwen3_next", "layers"),
];

#[test]
fn a_run_config_says_all_of_a_model_or_is_not_written() {
    for hf in std::fs::read_dir(fixtures()).unwrap() {
        let hf = hf.unwrap().path();
        if !hf.join("config.json").is_file() {
            continue;
        }
        let name = hf.file_name().unwrap().to_str().unwrap().to_owned();
        let (_, model) = typed(&hf);
        let run = RunConfig {
            model,
            dtype: Some(DType::BF16),
        };
        match run.to_yaml() {
            Ok(yaml) => {
                let again = RunConfig::parse(yaml.as_bytes());
                assert_eq!(again.map_err(|p| p.listed().join("; ")), Ok(run), "{name}");
            }
            Err(problems) => {
                let known = NOT_SAID.iter().find(|(model, _)| *model == name);
                let listed = problems.listed().join("; ");
                let (_, part) = known.unwrap_or_else(|| panic!("{name}: {listed}"));
                assert!(listed.contains(part), "{name}: {listed}");
            }
        }
    }
}

/// Megatron-Bridge's own files for these models, and the fields that it sets to something else.
const BRIDGE_RUNS: [(&str, &[&str]); 18] = [
    ("deepseek_v2", &["max_position_embeddings"]),
    ("deepseek_v2_lite", &["max_position_embeddings"]),
    ("deepseek_v3", &[]),
    ("deepseek_v3_mtp", &[]),
    ("gemma", &[]),
    ("gemma2", &[]),
    // It takes five layers with a window to one without, whatever the file says.
    ("gemma3_text", &["layers"]),
    ("glm4_moe", &[]),
    ("gpt_oss", &["moe", "rope"]),
    ("gpt_oss_mxfp4", &["moe", "rope"]),
    ("llama2", &[]),
    ("llama3_1", &["rope"]),
    ("llama3_2", &["rope"]),
    ("moonlight", &[]),
    ("nemotron", &[]),
    ("olmoe", &[]),
    ("qwen3", &[]),
    ("qwen3_moe", &[]),
];

#[test]
fn what_megatron_bridge_says_of_a_model_is_what_its_hugging_face_config_says() {
    let mut wrong = Vec::new();
    for (name, other) in BRIDGE_RUNS {
        let hf = fixtures().join(name);
        let (family, expected) = typed(&hf);
        let yaml = fixtures()
            .join("megatron/run_config")
            .join(format!("{name}.yaml"));
        let yaml = std::fs::read(yaml).unwrap();
        let run = RunConfig::parse(&yaml).map_err(|problems| problems.listed().join("; "));
        let found = run
            .unwrap_or_else(|problems| panic!("{name}: {problems}"))
            .model;
        let fields = |config: &DecoderConfig| match serde_json::to_value(config).unwrap() {
            serde_json::Value::Object(fields) => fields,
            other => panic!("{other}"),
        };
        let (found, expected) = (fields(&found), fields(&expected));
        let differ = expected
            .iter()
            .filter(|(key, value)| found.get(*key) != Some(value));
        let differ: Vec<&str> = differ.map(|(key, _)| key.as_str()).collect();
        if differ != other {
            wrong.push(format!("{name} ({family}) in {differ:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_checkpoint_of_megatron_bridge_needs_no_other_config() {
    for name in ["qwen3", "gemma2", "deepseek_v3", "olmoe", "nemotron_h"] {
        let hf = fixtures().join(name);
        let work = tempfile::tempdir().unwrap();
        let place = ModelPlace::Megatron {
            dir: work.path().join("megatron"),
            hf_config: None,
        };
        run(&ModelPlace::Hf(hf.clone()), &place);
        // As Megatron-Bridge lays it out: no folder of ours, its own file, the tokenizer in a folder.
        let iteration = work.path().join("megatron/iter_0000000");
        std::fs::rename(iteration.join("hf"), iteration.join("tokenizer")).unwrap();
        std::fs::remove_file(iteration.join("tokenizer/config.json")).unwrap();
        std::fs::write(iteration.join("tokenizer/tokenizer.json"), "{}").unwrap();
        let theirs = fixtures()
            .join("megatron/run_config")
            .join(format!("{name}.yaml"));
        if theirs.is_file() {
            std::fs::copy(theirs, iteration.join("run_config.yaml")).unwrap();
        }
        let back = work.path().join("back");
        run(&place, &ModelPlace::Hf(back.clone()));
        same_tensors(&back, &hf);
        assert!(back.join("tokenizer.json").is_file());
        assert_eq!(typed(&back), typed(&hf), "{name}");
    }
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
