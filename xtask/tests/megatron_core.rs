//! The checkpoints that we write for Megatron-Core are models for it: it loads them at any layout and computes the same, and
//! what it saves of them is what we wrote.
//!
//! Needs a Python with megatron-core and torch: `python3`, or what `BRIDGE_TEST_PYTHON` names. `BRIDGE_TEST_MEGATRON` may
//! list folders with other versions of megatron-core (`pip install --no-deps --target DIR megatron-core==...`), divided as
//! in `PATH`, which are tried as well. Without any the test says so and passes, since nothing of this workspace depends on
//! Python.

mod support;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bridge_core::checkpoint::Checkpoint;
use serde_json::Value;
use support::{arg, fixture, xtask};

/// What the logits may differ by: the same numbers, added in another order.
const LOGITS: f64 = 1e-5;

/// A version of Megatron-Core: the folder to find it in, if it is not Python's own.
struct Version(Option<OsString>);

impl Version {
    fn script(&self, arguments: &[&str]) -> std::io::Result<Output> {
        let python = std::env::var_os("BRIDGE_TEST_PYTHON").unwrap_or_else(|| "python3".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/megatron_core.py");
        let mut command = Command::new(python);
        if let Some(folder) = &self.0 {
            command.env("PYTHONPATH", folder);
        }
        command.arg(script).args(arguments).output()
    }

    /// Its number, or why it cannot be imported.
    fn number(&self) -> Result<String, String> {
        match self.script(&["available"]) {
            Ok(output) if output.status.success() => {
                Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
            }
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                Err(said.lines().last().unwrap_or_default().to_owned())
            }
            Err(error) => Err(error.to_string()),
        }
    }
}

/// The versions that can be imported; says which cannot.
fn versions() -> Vec<(String, Version)> {
    let listed = std::env::var_os("BRIDGE_TEST_MEGATRON").unwrap_or_default();
    let folders = std::env::split_paths(&listed).map(PathBuf::into_os_string);
    let folders = folders.filter(|folder| !folder.is_empty()).map(Some);
    let mut found = Vec::new();
    for version in std::iter::once(None).chain(folders).map(Version) {
        match version.number() {
            Ok(number) => found.push((number, version)),
            Err(reason) => eprintln!(
                "skipped: no megatron-core in {:?} ({reason}); name a Python with it in BRIDGE_TEST_PYTHON, or \
                 folders with it in BRIDGE_TEST_MEGATRON",
                version.0
            ),
        }
    }
    found
}

/// Layouts and ways to save, and the families that are loaded and saved so. Megatron-Core ties the embeddings of pipeline stages on a GPU only.
/// Gemma 2 and 3 and OLMoE need parts of Megatron-Bridge.
const CASES: [(&[&str], &[&str]); 16] = [
    (
        &[],
        &[
            "llama2",
            "llama3_2",
            "qwen2",
            "qwen3",
            "mistral",
            "gemma",
            "nemotron",
            "qwen3_moe",
            "glm4_moe",
            "gpt_oss",
            "deepseek_v2",
            "deepseek_v2_lite",
            "deepseek_v3",
            "moonlight",
        ],
    ),
    (
        &["--tp", "2"],
        &["llama3_2", "qwen3", "qwen3_moe", "deepseek_v3"],
    ),
    (&["--pp", "2"], &["gpt_oss"]),
    (&["--pp", "3"], &["llama2"]),
    (&["--ep", "2"], &["qwen3_moe", "deepseek_v3", "gpt_oss"]),
    // Virtual stages: of one layer each, and of unequal ones where there are three layers.
    (
        &["--pp", "2", "--vpp", "2"],
        &["llama2", "qwen3_moe", "deepseek_v3", "gpt_oss"],
    ),
    // A name for each expert, and for the halves of gated MLPs.
    (
        &["--ep", "2", "--singleton"],
        &["qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss"],
    ),
    (&["--tp", "2", "--singleton"], &["llama2", "nemotron"]),
    // Beside all that a training run keeps. What is shared out in the way of one version is refused by others.
    (&["--dp", "2", "--optimizer", "plain"], &["llama2"]),
    (
        &["--ep", "2", "--dp", "2", "--optimizer", "dp_reshardable"],
        &["qwen3_moe", "deepseek_v3"],
    ),
    (
        &["--dp", "2", "--optimizer", "fully_reshardable"],
        &["llama2", "qwen3_moe"],
    ),
    (
        &[
            "--ep",
            "2",
            "--dp",
            "2",
            "--optimizer",
            "fully_sharded_model_space",
        ],
        &["qwen3_moe"],
    ),
    // Training runs' own models, without what they compute: Transformer Engine's layers, experts in one product, state
    // spaces, delta nets, layers that differ. Where the same family is above, this is about its names.
    (
        &["--stand-ins"],
        &[
            "qwen3",
            "deepseek_v2",
            "moonlight",
            "nemotron_h",
            "nemotron_h_moe",
            "llama_nemotron_super",
            "qwen3_next",
        ],
    ),
    (
        &["--stand-ins", "--tp", "2"],
        &["nemotron_h", "deepseek_v3", "qwen3_next"],
    ),
    (
        &["--stand-ins", "--ep", "2", "--singleton"],
        &["qwen3_moe", "deepseek_v3", "qwen3_next"],
    ),
    (
        &["--stand-ins", "--ep", "2", "--legacy-experts"],
        &["qwen3_moe"],
    ),
];

#[test]
fn megatron_core_computes_the_same_with_what_is_written_for_it() {
    let work = tempfile::tempdir().expect("a temporary folder");
    let mut port = 29_600 + std::process::id() as usize % 2000;
    for (number, version) in versions() {
        for (layout, families) in CASES {
            let mut models = Vec::new();
            for family in families {
                let (hf, checkpoint) = (fixture(family), work.path().join(family));
                if !checkpoint.exists() {
                    let (from, to) = (arg(&hf), arg(&checkpoint));
                    xtask(&format!("convert --from hf:{from} --to megatron:{to}")).ok();
                }
                let saved = format!("{family}-{number}{}", layout.concat());
                models.push(format!(
                    "{},{},{}",
                    checkpoint.join("iter_0000000").display(),
                    hf.display(),
                    work.path().join(saved).display()
                ));
            }
            port += 1;
            let port = port.to_string();
            let mut arguments = vec!["check", "--port", &port];
            arguments.extend(layout);
            arguments.extend(models.iter().map(String::as_str));
            let output = version.script(&arguments).expect("it started before");
            let (said, errors) = (
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
            );
            assert!(
                output.status.success(),
                "{number} {layout:?}: {said} {errors}"
            );
            let results: Vec<Value> = said
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect();
            assert_eq!(
                results.len(),
                families.len(),
                "{number} {layout:?}: {said} {errors}"
            );
            for (result, (family, model)) in results.iter().zip(families.iter().zip(&models)) {
                if let Some(reason) = result["unsupported"].as_str() {
                    eprintln!("skipped: {family} with megatron-core {number} ({reason})");
                    continue;
                }
                if !layout.contains(&"--stand-ins") {
                    let difference = result["logits_max_abs_diff"].as_f64();
                    let difference = difference.unwrap_or(f64::INFINITY);
                    eprintln!(
                        "megatron-core {number}, {family} {layout:?}: logits differ by {difference:.1e}"
                    );
                    assert!(
                        difference <= LOGITS,
                        "{number} {family} {layout:?}: {difference}"
                    );
                }
                if let Some(reason) = result["not_saved"].as_str() {
                    eprintln!(
                        "skipped: megatron-core {number} cannot save {family} {layout:?} ({reason})"
                    );
                    continue;
                }
                let saved = model.rsplit(',').next().unwrap_or_default();
                same_again(Path::new(saved), &fixture(family));
            }
        }
    }
}

/// What Megatron-Core saved converts to the Hugging Face model that it came from, bit for bit.
#[track_caller]
fn same_again(saved: &Path, hf: &Path) {
    // A version's number has points, which is no extension.
    let back = PathBuf::from(format!("{}-back", saved.display()));
    xtask(&format!(
        "convert --from megatron:{} --hf-config {} --to hf:{}",
        arg(saved),
        arg(hf),
        arg(&back)
    ))
    .ok();
    let (found, expected) = (
        Checkpoint::open(&back).expect("a checkpoint"),
        Checkpoint::open(hf).expect("a checkpoint"),
    );
    assert_eq!(found.tensors().len(), expected.tensors().len());
    for info in expected.tensors() {
        let own = found.tensor(&info.name).expect("the same names");
        assert!(
            found.read(own).expect("bytes") == expected.read(info).expect("bytes"),
            "tensor {} of {} differs",
            info.name,
            hf.display()
        );
    }
}
