//! The folders that we export are models for `transformers`: it loads them without a complaint and computes the same.
//!
//! Needs a Python with transformers and torch: `python3`, or what `BRIDGE_TEST_PYTHON` names. Without one the tests say so
//! and pass, since nothing of this workspace depends on Python.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::{Workbench, arg, bridge, fixture, xtask};

fn script(arguments: &[&str]) -> std::io::Result<Output> {
    let python = std::env::var_os("BRIDGE_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/transformers_models.py");
    Command::new(python).arg(script).args(arguments).output()
}

/// Whether transformers can be imported; says so if not.
fn transformers_is_there() -> bool {
    let missing = match script(&["available"]) {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr)
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned(),
        Err(error) => error.to_string(),
    };
    eprintln!("skipped: no Python with transformers ({missing}); name one in BRIDGE_TEST_PYTHON");
    false
}

#[track_caller]
fn must_succeed(arguments: &[&str]) {
    let output = script(arguments).expect("it started before");
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn transformers_computes_the_same_with_what_went_through_a_native_checkpoint() {
    if !transformers_is_there() {
        return;
    }
    // One file and tied weights; shards and an untied head.
    for name in ["llama3_2", "llama3_1"] {
        let bench = Workbench::new(name);
        let (native, back) = (bench.path("native"), bench.path("back"));
        xtask(&format!(
            "import --hf {} --out {}",
            arg(&bench.hf()),
            arg(&native)
        ))
        .ok();
        xtask(&format!(
            "export --checkpoint {} --out {} --max-shard-size 100kB",
            arg(&native),
            arg(&back)
        ))
        .ok();
        must_succeed(&["same", arg(&fixture(name)), arg(&back)]);
    }
}

/// The made-up size of every dense family. Their weights are called the same in memory and on disk, so that gradients can be
/// told apart by name.
const PRESETS: [&str; 8] = [
    "gemma2_tiny",
    "gemma3_text_tiny",
    "gemma_tiny",
    "llama_tiny",
    "mistral_tiny",
    "nemotron_tiny",
    "qwen2_tiny",
    "qwen3_tiny",
];

#[test]
fn transformers_agrees_with_us_on_models_that_were_trained_here() {
    if !transformers_is_there() {
        return;
    }
    for preset in PRESETS {
        let bench = Workbench::empty();
        let (run, hf, reference) = (bench.path("run"), bench.path("hf"), bench.path("reference"));
        let config = bench.path("run.toml");
        let text = format!(
            "model.preset = {preset:?}\noptimizer.lr = 1e-2\ntokenizer.kind = \"null\"\ncheckpoint.dir = {:?}\n\
             data = {{ source = \"mock\", seq_length = 32 }}\n\
             train = {{ train_iters = 3, micro_batch_size = 2, global_batch_size = 2 }}\n",
            arg(&run)
        );
        fs::write(&config, text).expect("written");
        xtask(&format!("pretrain --config {}", arg(&config))).ok();
        xtask(&format!(
            "export --checkpoint {} --out {}",
            arg(&run),
            arg(&hf)
        ))
        .ok();
        must_succeed(&["reference", arg(&hf), arg(&reference)]);
        let args = ["verify", "--hf", arg(&hf), "--reference", arg(&reference)];
        let result = bridge(&[&args[..], &["--grads", "--json"]].concat())
            .ok()
            .json();
        for field in ["logits_max_abs_diff", "loss", "grad_norm_max_rel_diff"] {
            assert!(result[field].is_f64(), "{preset}: {field} in {result}");
        }
        assert_eq!(result["greedy_match"], Value::Bool(true), "{preset}");
    }
}
