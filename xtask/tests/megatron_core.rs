//! The checkpoints that we write for Megatron-Core are models for it: it loads them at any layout and computes the same.
//!
//! Needs a Python with megatron-core and torch: `python3`, or what `BRIDGE_TEST_PYTHON` names. Without one the test says so
//! and passes, since nothing of this workspace depends on Python.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use support::{arg, fixture, xtask};

fn script(arguments: &[&str]) -> std::io::Result<Output> {
    let python = std::env::var_os("BRIDGE_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/megatron_core.py");
    Command::new(python).arg(script).args(arguments).output()
}

/// Whether Megatron-Core can be imported; says so if not.
fn megatron_core_is_there() -> bool {
    let missing = match script(&["available"]) {
        Ok(output) if output.status.success() => return true,
        Ok(output) => String::from_utf8_lossy(&output.stderr)
            .lines()
            .last()
            .unwrap_or_default()
            .to_owned(),
        Err(error) => error.to_string(),
    };
    eprintln!("skipped: no Python with megatron-core ({missing}); name one in BRIDGE_TEST_PYTHON");
    false
}

#[test]
fn megatron_core_computes_the_same_with_what_is_written_for_it() {
    if !megatron_core_is_there() {
        return;
    }
    let work = tempfile::tempdir().expect("a temporary folder");
    for (port, (family, layout)) in [
        ("llama2", ["--tp", "1", "--pp", "1"]),
        ("llama2", ["--tp", "2", "--pp", "1"]),
        ("llama2", ["--tp", "1", "--pp", "3"]),
        // Tied: Megatron-Core ties stages on a GPU only.
        ("qwen2", ["--tp", "1", "--pp", "1"]),
        ("qwen3", ["--tp", "2", "--pp", "1"]),
        ("qwen3_moe", ["--tp", "1", "--pp", "1"]),
        ("qwen3_moe", ["--tp", "2", "--pp", "1"]),
    ]
    .into_iter()
    .enumerate()
    {
        let (hf, checkpoint) = (fixture(family), work.path().join(family));
        if !checkpoint.exists() {
            xtask(&format!(
                "convert --from hf:{} --to megatron:{}",
                arg(&hf),
                arg(&checkpoint)
            ))
            .ok();
        }
        let iteration = checkpoint.join("iter_0000000");
        let port = (29_600 + port + std::process::id() as usize % 2000).to_string();
        let mut arguments = vec![
            "check",
            iteration.to_str().expect("a plain path"),
            hf.to_str().expect("a plain path"),
            "--port",
            &port,
        ];
        arguments.extend(layout);
        let output = script(&arguments).expect("it started before");
        assert!(
            output.status.success(),
            "{family} {layout:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
