//! Adapters compute what Hugging Face PEFT computes, with fixtures of `tests/oracle/make_peft.py`.
//!
//! One test has PEFT itself load what is written here. It needs a Python with peft: `python3`, or what
//! `BRIDGE_TEST_PYTHON` names. Without one the test says so and passes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bridge_core::LayoutSpec;
use bridge_core::checkpoint::Checkpoint;
use bridge_core::convert::HfModel;
use bridge_core::dtype::decode_f32;
use bridge_models::weights::load_hf;
use bridge_models::{Decoder, DtypePolicy, ForwardContext, SegmentedModel, Targets, registry};
use bridge_ops::{Tape, float_from_f32, to_f32_vec};
use bridge_peft::{AdapterKind, AdapterWeights, attach_weights, hf, merge};
use bridge_tests::fixture;
use burn_flex::Flex;

/// As for whole models: the same sums in another order.
const LOGITS: f32 = 2e-4;
/// Relative, of the norm of each tensor's gradient.
const GRADIENTS: f64 = 1e-3;
/// One rounding of a weight near 1, and of the sum before it.
const MERGED: f32 = 2.4e-7;

/// The cases, and the fixtures that they were trained on.
const CASES: [(&str, &str); 4] = [
    ("lora_llama", "llama3_2"),
    ("dora_llama", "llama3_1"),
    ("rslora_qwen3_moe", "qwen3_moe"),
    ("dora_deepseek_v3", "deepseek_v3"),
];

struct Case {
    base: HfModel,
    folder: PathBuf,
    adapter: AdapterWeights,
    expected: Checkpoint,
}

impl Case {
    fn open(name: &str, base: &str) -> Self {
        let folder = fixture("peft").join(name);
        let layout = LayoutSpec::default();
        let base = HfModel::open(&fixture(base), &registry(), &layout).expect("the base");
        let adapter = hf::import(&folder, base.bridge(), base.config());
        let expected = Checkpoint::open_files(&folder, ["expected.safetensors".to_owned()]);
        Self {
            adapter: adapter.unwrap_or_else(|error| panic!("{name}: {error}")),
            expected: expected.expect("the reference"),
            base,
            folder,
        }
    }

    fn model(&self) -> Decoder<Flex> {
        load_hf(&self.base, DtypePolicy::Float32, &Default::default()).expect("the model")
    }

    fn adapted(&self) -> Decoder<Flex> {
        let mut model = self.model();
        attach_weights(&mut model, &self.adapter).expect("the adapter fits");
        model
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = self.expected.tensor(name).expect(name);
        let mut values = vec![0.0; tensor.shape.iter().product()];
        let bytes = self.expected.read(tensor).expect(name);
        decode_f32(&bytes, tensor.dtype, &mut values).expect(name);
        values
    }

    fn integers(&self, name: &str) -> Vec<i64> {
        let bytes = self
            .expected
            .read(self.expected.tensor(name).expect(name))
            .expect(name);
        let (words, _) = bytes.as_chunks();
        words.iter().map(|word| i64::from_le_bytes(*word)).collect()
    }

    fn context(&self) -> ForwardContext<'static, Flex> {
        let ids: Vec<u32> = self
            .integers("input_ids")
            .into_iter()
            .map(|id| id as u32)
            .collect();
        ForwardContext::new(&ids, [2, ids.len() / 2], &Default::default())
    }
}

fn norm(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|v| f64::from(*v).powi(2))
        .sum::<f64>()
        .sqrt()
}

fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

#[test]
fn logits_loss_and_gradients_are_those_of_peft() {
    for (name, base) in CASES {
        let case = Case::open(name, base);
        let model = case.adapted();
        let ctx = case.context();
        let logits = to_f32_vec::<Flex>(model.forward(&ctx));
        let diff = max_diff(&logits, &case.floats("logits"));
        assert!(diff < LOGITS, "{name}: logits differ by {diff}");

        let labels = case.integers("labels");
        let valid = labels.iter().filter(|label| **label >= 0).count() as f32;
        let tape = Tape::new();
        let hidden = model.hidden_states(&tape, &ctx);
        let targets = Targets::new(&labels, &Default::default());
        let losses = model.head_loss(&tape, &hidden, &targets, &ctx);
        let loss = to_f32_vec::<Flex>(losses.value()).iter().sum::<f32>() / valid;
        assert!(
            (loss - case.floats("loss")[0]).abs() < 1e-5,
            "{name}: loss {loss}"
        );
        let seed = float_from_f32::<Flex>(
            &vec![1.0 / valid; labels.len()],
            &[labels.len()],
            &Default::default(),
        );
        tape.backward(vec![(losses, seed)], &[]);

        let modules = hf::modules(case.base.bridge(), case.base.config()).expect("modules");
        let mut compared = 0;
        for param in SegmentedModel::params(&model) {
            let Some((layer, part)) = param.name().rsplit_once(".lora_") else {
                assert!(
                    param.grad().is_none(),
                    "{name}: `{}` is frozen",
                    param.name()
                );
                continue;
            };
            let module = modules[layer].as_ref().expect("a module of its own");
            let part = match part {
                "a" => "lora_A.weight",
                "b" => "lora_B.weight",
                _ => "lora_magnitude_vector",
            };
            let expected = case.floats(&format!("grad.base_model.model.{module}.{part}"));
            let found = to_f32_vec::<Flex>(param.grad().expect("a gradient"));
            let differences: Vec<f32> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
            let diff = norm(&differences) / norm(&expected);
            assert!(
                diff < GRADIENTS,
                "{name}: gradient of `{}` is off by {diff}",
                param.name()
            );
            compared += 1;
        }
        let parts = if case.adapter.config.kind == AdapterKind::Dora {
            3
        } else {
            2
        };
        assert_eq!(compared, parts * case.adapter.layers.len(), "{name}");
    }
}

#[test]
fn merged_weights_are_those_of_peft_within_a_rounding() {
    for (name, base) in CASES {
        let case = Case::open(name, base);
        let modules = hf::modules(case.base.bridge(), case.base.config()).expect("modules");
        let mut compared = 0;
        for (layer, factors) in &case.adapter.layers {
            let module = modules[layer].as_ref().expect("a module of its own");
            if !module.contains(".layers.0.") {
                continue;
            }
            let (canonical, merged) =
                (format!("{layer}.weight"), format!("merged.{module}.weight"));
            let (shape, dtype) = case.base.tensor(&canonical).expect("the weight");
            let mut weight = vec![0.0; shape.iter().product()];
            let bytes = case.base.read(&canonical).expect("the weight");
            decode_f32(&bytes, dtype, &mut weight).expect("floats");
            merge::merge_weight(&mut weight, &case.adapter.config, factors);
            let diff = max_diff(&weight, &case.floats(&merged));
            assert!(diff <= MERGED, "{name}: `{layer}` merged differs by {diff}");
            compared += 1;
        }
        assert!(
            compared >= 4,
            "{name}: only {compared} weights were compared"
        );
    }
}

#[test]
fn a_merged_checkpoint_computes_what_the_adapted_model_computes() {
    for (name, base) in CASES {
        let case = Case::open(name, base);
        let dir = tempfile::tempdir().expect("a folder");
        let out = dir.path().join("merged");
        merge::merge_hf(&fixture(base), &case.adapter, &registry(), &out, &()).expect("merges");
        let merged = HfModel::open(&out, &registry(), &LayoutSpec::default()).expect("a model");
        let merged = load_hf::<Flex>(&merged, DtypePolicy::Float32, &Default::default());
        let logits = to_f32_vec::<Flex>(merged.expect("loads").forward(&case.context()));
        let diff = max_diff(&logits, &case.floats("logits"));
        assert!(diff < LOGITS, "{name}: logits differ by {diff}");
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .expect("the folder")
            .flatten()
            .collect();
        assert_eq!(left.len(), 1, "{name}: only the merged folder is left");
    }
}

#[test]
fn an_exported_adapter_is_the_imported_one() {
    for (name, base) in CASES {
        let case = Case::open(name, base);
        let dir = tempfile::tempdir().expect("a folder");
        let out = dir.path().join("adapter");
        let (bridge, config) = (case.base.bridge(), case.base.config());
        hf::export(&case.adapter, bridge, config, base, &out).expect("exports");
        assert_eq!(
            hf::import(&out, bridge, config).expect("imports"),
            case.adapter,
            "{name}"
        );
        let read = |folder: &Path| std::fs::read(folder.join(hf::WEIGHTS_FILE)).expect("weights");
        assert_eq!(read(&out).len(), read(&case.folder).len(), "{name}");
    }
}

#[test]
fn what_is_not_supported_is_refused() {
    let case = Case::open("lora_llama", "llama3_2");
    let dir = tempfile::tempdir().expect("a folder");
    let config = std::fs::read_to_string(case.folder.join(hf::CONFIG_FILE)).expect("a config");
    let copy = dir.path().join(hf::WEIGHTS_FILE);
    std::fs::copy(case.folder.join(hf::WEIGHTS_FILE), copy).expect("a copy");
    for (from, to, expected) in [
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        (
            "\"rank_pattern\": {}",
            "\"rank_pattern\": {\"q_proj\": 8}",
            "rank_pattern",
        ),
        ("\"peft_type\": \"LORA\"", "\"peft_type\": \"IA3\"", "IA3"),
        ("\"r\": 4", "\"r\": 5", "elements"),
        (
            "\"use_dora\": false",
            "\"use_dora\": true",
            "lacks a magnitude vector",
        ),
    ] {
        let changed = config.replace(from, to);
        assert_ne!(changed, config, "{from}");
        std::fs::write(dir.path().join(hf::CONFIG_FILE), changed).expect("a config");
        let error = hf::import(dir.path(), case.base.bridge(), case.base.config());
        let error = error.expect_err(to).to_string();
        assert!(error.contains(expected), "{to}: {error}");
    }
}

fn script(arguments: &[&str]) -> std::io::Result<Output> {
    let python = std::env::var_os("BRIDGE_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("oracle/make_peft.py");
    Command::new(python).arg(script).args(arguments).output()
}

#[test]
fn peft_loads_what_is_written_here() {
    match script(&["available"]) {
        Ok(output) if output.status.success() => {}
        Ok(_) | Err(_) => {
            eprintln!("skipped: no Python with peft; name one in BRIDGE_TEST_PYTHON");
            return;
        }
    }
    for (name, base) in [CASES[0], CASES[1]] {
        let case = Case::open(name, base);
        let dir = tempfile::tempdir().expect("a folder");
        let (adapter, logits) = (
            dir.path().join("adapter"),
            dir.path().join("logits.safetensors"),
        );
        hf::export(
            &case.adapter,
            case.base.bridge(),
            case.base.config(),
            base,
            &adapter,
        )
        .expect("exports");
        let ids = [5u32, 17, 3, 99, 42, 7];
        let arg = |path: &Path| path.to_str().expect("plain text").to_owned();
        let (base, adapter, out) = (arg(&fixture(base)), arg(&adapter), arg(&logits));
        let output =
            script(&["check", &base, &adapter, &format!("{ids:?}"), &out]).expect("python");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let checkpoint = Checkpoint::open_files(dir.path(), ["logits.safetensors".to_owned()]);
        let checkpoint = checkpoint.expect("its logits");
        let tensor = checkpoint.tensor("logits").expect("its logits");
        let mut theirs = vec![0.0; tensor.shape.iter().product()];
        let bytes = checkpoint.read(tensor).expect("its logits");
        decode_f32(&bytes, tensor.dtype, &mut theirs).expect("floats");
        let ctx = ForwardContext::new(&ids, [1, ids.len()], &Default::default());
        let ours = to_f32_vec::<Flex>(case.adapted().forward(&ctx));
        let diff = max_diff(&ours, &theirs);
        assert!(diff < LOGITS, "{name}: logits differ by {diff}");
    }
}
