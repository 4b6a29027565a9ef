//! Running the real binary on copies of the fixtures.

// Each test file uses its own part of this module.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The binary under test.
pub(crate) const BRIDGE: &str = env!("CARGO_BIN_EXE_xtask");

/// What a run of the binary left.
pub(crate) struct Outcome {
    /// Exit code; `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// The JSON object on the last line of stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let last = self
            .stdout
            .lines()
            .last()
            .unwrap_or_else(|| panic!("nothing on stdout; stderr: {}", self.stderr));
        serde_json::from_str(last)
            .unwrap_or_else(|e| panic!("{e} in {last:?}; stderr: {}", self.stderr))
    }

    /// Asserts success and gives the outcome back.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(
            self.code,
            Some(0),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// Asserts a clean failure: this exit code, these words on stderr, no panic.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, words: &[&str]) -> Self {
        assert!(
            !self.stderr.contains("panicked"),
            "it panicked: {}",
            self.stderr
        );
        assert_eq!(
            self.code,
            Some(code),
            "stdout: {}\nstderr: {}",
            self.stdout,
            self.stderr
        );
        for word in words {
            assert!(
                self.stderr.contains(word),
                "{word:?} is not in: {}",
                self.stderr
            );
        }
        self
    }
}

/// The binary with its surroundings fixed, so that a developer's own settings do not matter.
pub(crate) fn command() -> Command {
    surroundings(Command::new(BRIDGE))
}

pub(crate) fn surroundings(mut command: Command) -> Command {
    for name in [
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_TOKEN",
        "HF_ENDPOINT",
        "RUST_LOG",
    ] {
        command.env_remove(name);
    }
    // A test that would reach for the network must fail at once.
    command
        .env("HF_HUB_OFFLINE", "1")
        .env("RUST_BACKTRACE", "0")
        .env("RAYON_NUM_THREADS", "2");
    command
}

pub(crate) fn finish(mut command: Command) -> Outcome {
    let output = command.output().expect("the binary starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("utf-8 output");
    Outcome {
        code: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// Runs the binary with the words of `line` as arguments.
pub(crate) fn xtask(line: &str) -> Outcome {
    bridge(&line.split_whitespace().collect::<Vec<_>>())
}

/// Runs the binary with these arguments.
pub(crate) fn bridge<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Outcome {
    let mut command = command();
    command.args(args);
    finish(command)
}

/// A folder under `tests/fixtures`.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name)
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().expect("utf-8 path")
}

/// A temporary folder, and in it `hf`, a copy of a fixture that a test may damage.
pub(crate) struct Workbench {
    pub(crate) dir: tempfile::TempDir,
}

impl Workbench {
    pub(crate) fn new(name: &str) -> Self {
        let bench = Self {
            dir: tempfile::tempdir().expect("a temporary folder"),
        };
        fs::create_dir(bench.hf()).expect("a folder");
        for entry in fs::read_dir(fixture(name)).expect("the fixture").flatten() {
            if entry.path().is_file() {
                fs::copy(entry.path(), bench.hf().join(entry.file_name())).expect("a copy");
            }
        }
        bench
    }

    pub(crate) fn empty() -> Self {
        Self {
            dir: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    pub(crate) fn hf(&self) -> PathBuf {
        self.path("hf")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Names in the temporary folder, to see that a failed command left nothing.
    pub(crate) fn entries(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.dir.path())
            .expect("the folder")
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Rewrites the header of the single safetensors file.
    pub(crate) fn edit_header(&self, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let path = self.hf().join("model.safetensors");
        let (mut header, data) = read_safetensors(&path);
        change(&mut header);
        write_safetensors(&path, &Value::Object(header).to_string(), &data);
    }

    /// Rewrites `config.json`.
    pub(crate) fn edit_config(&self, change: impl FnOnce(&mut Value)) {
        edit_json(&self.hf().join("config.json"), change);
    }
}

pub(crate) fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value =
        serde_json::from_slice(&fs::read(path).expect("json file")).expect("json");
    change(&mut value);
    fs::write(path, value.to_string()).expect("written");
}

/// Header and data of a safetensors file, read without this project's reader.
pub(crate) fn read_safetensors(path: &Path) -> (serde_json::Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).expect("a safetensors file");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a JSON header");
    (
        header.as_object().expect("an object").clone(),
        bytes[8 + length..].to_vec(),
    )
}

pub(crate) fn write_safetensors(path: &Path, header: &str, data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], header.as_bytes(), data].concat()).expect("written");
}

/// Every tensor of a folder's safetensors files: dtype, shape and bytes by name.
pub(crate) fn tensors(folder: &Path) -> BTreeMap<String, (String, Value, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("model") || !name.ends_with(".safetensors") {
            continue;
        }
        let (header, data) = read_safetensors(&entry.path());
        for (tensor, info) in header {
            if tensor == "__metadata__" {
                continue;
            }
            let offset = |i: usize| info["data_offsets"][i].as_u64().expect("an offset") as usize;
            let bytes = data[offset(0)..offset(1)].to_vec();
            let dtype = info["dtype"].as_str().expect("a dtype").to_owned();
            assert!(
                all.insert(tensor, (dtype, info["shape"].clone(), bytes))
                    .is_none(),
                "a tensor stands twice"
            );
        }
    }
    all
}

/// Overrides that make the default recipe a matter of milliseconds a step. All dimensions differ.
const TINY: [&str; 13] = [
    "model.hidden_size=48",
    "model.intermediate_size=80",
    "model.num_hidden_layers=3",
    "model.num_attention_heads=6",
    "model.num_key_value_heads=2",
    "model.head_dim=16",
    "data.seq_length=32",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "eval.eval_interval=0",
    "checkpoint.save_interval=0",
    "logging.plot=false",
    "logging.tensorboard=false",
];

/// `pretrain` of a tiny model into `dir`, with further overrides.
pub(crate) fn pretrain(dir: &Path, overrides: &[&str]) -> Command {
    let mut command = command();
    command
        .arg("pretrain")
        .args(TINY)
        .arg(format!("checkpoint.dir={}", arg(dir)))
        .args(overrides);
    command
}

/// The newest checkpoint of a run, which `latest` names.
#[track_caller]
pub(crate) fn latest(dir: &Path) -> PathBuf {
    let name = fs::read_to_string(dir.join("latest")).expect("a run that saved has `latest`");
    dir.join(name.trim())
}

/// Every tensor of a native checkpoint's weights and optimizer state.
pub(crate) fn native_tensors(checkpoint: &Path) -> BTreeMap<String, (String, Value, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for part in ["model", "optimizer"] {
        for entry in fs::read_dir(checkpoint.join(part))
            .expect("a part of the checkpoint")
            .flatten()
        {
            let (header, data) = read_safetensors(&entry.path());
            for (name, info) in header
                .into_iter()
                .filter(|(name, _)| name != "__metadata__")
            {
                let offset =
                    |i: usize| info["data_offsets"][i].as_u64().expect("an offset") as usize;
                let value = (
                    info["dtype"].to_string(),
                    info["shape"].clone(),
                    data[offset(0)..offset(1)].to_vec(),
                );
                assert!(
                    all.insert(format!("{part}/{name}"), value).is_none(),
                    "{name} stands twice"
                );
            }
        }
    }
    all
}

/// The losses of a run's `metrics.jsonl` by step.
pub(crate) fn losses(dir: &Path) -> BTreeMap<u64, f64> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).expect("metrics");
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a JSON line"))
        .filter_map(|line| Some((line["iteration"].as_u64()?, line["loss"].as_f64()?)))
        .collect()
}
