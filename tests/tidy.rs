//! Housekeeping that a compiler does not do: dependencies point one way, files stay readable, nothing unfinished is left.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The crates from the bottom up; none may use one that stands after it.
const ORDER: [&str; 13] = [
    "bridge-core",
    "bridge-hub",
    "bridge-ops",
    "bridge-cuda",
    "bridge-parallel",
    "bridge-models",
    "bridge-peft",
    "bridge-tokenizers",
    "bridge-data",
    "bridge-train",
    "bridge-recipes",
    "xtask",
    "bridge-tests",
];

/// Crates that must stay free of tensors and devices.
const WITHOUT_BURN: [&str; 4] = [
    "bridge-core",
    "bridge-hub",
    "bridge-tokenizers",
    "bridge-data",
];

/// Lines after which a source file is too long to read in one go.
const LONGEST_FILE: usize = 700;

/// The largest file that may be tracked, in bytes.
const LARGEST_FILE: u64 = 5 << 20;

/// Folders whose `unsafe` is expected: a backend's kernels, system calls, mapped files.
const UNSAFE_ALLOWED: [&str; 6] = [
    "bridge-cuda/",
    "bridge-parallel/src/comm/nccl/",
    "bridge-ops/src/cpu/",
    "bridge-core/src/checkpoint/",
    "bridge-core/src/simd.rs",
    "bridge-data/src/indexed/",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests lie in the workspace")
        .to_owned()
}

/// Folders of the workspace's crates.
fn crates() -> Vec<(String, PathBuf)> {
    let manifest: toml::Table = fs::read_to_string(root().join("Cargo.toml"))
        .expect("root manifest")
        .parse()
        .expect("toml");
    let members = manifest["workspace"]["members"]
        .as_array()
        .expect("members")
        .clone();
    members
        .iter()
        .map(|member| {
            let folder = root().join(member.as_str().expect("a folder"));
            let manifest: toml::Table = fs::read_to_string(folder.join("Cargo.toml"))
                .expect("manifest")
                .parse()
                .expect("toml");
            (
                manifest["package"]["name"]
                    .as_str()
                    .expect("a name")
                    .to_owned(),
                folder,
            )
        })
        .collect()
}

/// Every file below the workspace, build output left out, with its path relative to the root.
fn files() -> Vec<(String, PathBuf)> {
    const SKIPPED: [&str; 5] = ["target", ".git", "out", "runs", "__pycache__"];
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                if !SKIPPED.iter().any(|s| entry.file_name() == *s) {
                    folders.push(path);
                }
                continue;
            }
            let relative = path
                .strip_prefix(root())
                .expect("below the root")
                .to_string_lossy()
                .into_owned();
            found.push((relative, path));
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let source = |(name, path): (String, PathBuf)| {
        let kind = Path::new(&name)
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        let wanted = matches!(kind, "rs" | "cu" | "cuh" | "toml" | "md");
        wanted.then(|| (name, fs::read_to_string(path).expect("readable text")))
    };
    files().into_iter().filter_map(source).collect()
}

#[track_caller]
fn none(what: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{what}:\n  {}", findings.join("\n  "));
}

fn dependencies(folder: &Path) -> BTreeSet<String> {
    let manifest: toml::Table = fs::read_to_string(folder.join("Cargo.toml"))
        .expect("manifest")
        .parse()
        .expect("toml");
    let names = |table: Option<&toml::Value>| -> Vec<String> {
        table
            .and_then(toml::Value::as_table)
            .map(|t| t.keys().cloned().collect())
            .unwrap_or_default()
    };
    let mut all: BTreeSet<String> = names(manifest.get("dependencies")).into_iter().collect();
    all.extend(names(manifest.get("build-dependencies")));
    all
}

#[test]
fn dependencies_never_point_up() {
    let rank = |name: &str| ORDER.iter().position(|n| *n == name);
    let mut wrong = Vec::new();
    for (name, folder) in crates() {
        let Some(own) = rank(&name) else {
            wrong.push(format!("{name} has no place in the order of crates; add it to this test and docs/architecture.md"));
            continue;
        };
        for dependency in dependencies(&folder) {
            if rank(&dependency).is_some_and(|theirs| theirs >= own) {
                wrong.push(format!("{name} uses {dependency}, which stands above it"));
            }
        }
    }
    none("dependencies that point the wrong way", wrong);
}

#[test]
fn crates_without_devices_do_not_know_burn() {
    let mut wrong = Vec::new();
    for (name, folder) in crates() {
        if WITHOUT_BURN.contains(&name.as_str()) {
            let burn = dependencies(&folder)
                .into_iter()
                .filter(|d| d.starts_with("burn") || d == "cudarc");
            wrong.extend(burn.map(|d| format!("{name} uses {d}")));
        }
    }
    none("crates that must not compute", wrong);
}

#[test]
fn every_crate_takes_version_lints_and_dependencies_from_the_workspace() {
    let mut wrong = Vec::new();
    for (name, folder) in crates() {
        let manifest: toml::Table = fs::read_to_string(folder.join("Cargo.toml"))
            .expect("manifest")
            .parse()
            .expect("toml");
        let inherits = |value: &toml::Value| {
            value.get("workspace").and_then(toml::Value::as_bool) == Some(true)
        };
        for key in ["version", "edition", "rust-version", "license"] {
            if !manifest["package"].get(key).is_some_and(inherits) {
                wrong.push(format!("{name}: package.{key} is not inherited"));
            }
        }
        if !manifest.get("lints").is_some_and(inherits) {
            wrong.push(format!("{name}: lints are not inherited"));
        }
    }
    none("manifests that go their own way", wrong);
}

#[test]
fn source_files_stay_readable_in_one_go() {
    let long = |(name, text): &(String, String)| {
        let lines = text.lines().count();
        let is_code = [".rs", ".cu", ".cuh"].iter().any(|e| name.ends_with(e));
        (is_code && lines > LONGEST_FILE)
            .then(|| format!("{name}: {lines} lines; look for the seam"))
    };
    none("long files", sources().iter().filter_map(long).collect());
}

#[test]
fn tracked_files_are_small() {
    let large = |(name, path): (String, PathBuf)| {
        let size = path.metadata().map(|m| m.len()).unwrap_or(0);
        (size > LARGEST_FILE).then(|| format!("{name}: {size} bytes"))
    };
    none(
        "files too large to track",
        files().into_iter().filter_map(large).collect(),
    );
}

#[test]
fn nothing_unfinished_and_no_catch_all_file_is_left() {
    let me = "tests/tidy.rs";
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        if name == me {
            continue;
        }
        let file = name.rsplit('/').next().unwrap_or(&name);
        if matches!(
            file,
            "utils.rs" | "util.rs" | "helpers.rs" | "common.rs" | "misc.rs"
        ) {
            wrong.push(format!("{name}: name the file after what it holds"));
        }
        for (i, line) in text.lines().enumerate() {
            let unfinished = ["todo!(", "unimplemented!(", "dbg!(", "FIXME", "XXX"];
            if let Some(word) = unfinished.iter().find(|w| line.contains(**w)) {
                wrong.push(format!("{name}:{}: {word}", i + 1));
            }
            if name.ends_with(".rs") && line.trim_end() != line {
                wrong.push(format!("{name}:{}: trailing space", i + 1));
            }
        }
    }
    none("unfinished or unnamed", wrong);
}

#[test]
fn unsafe_stays_where_it_is_expected() {
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        if !name.ends_with(".rs")
            || name.starts_with("tests/")
            || UNSAFE_ALLOWED.iter().any(|a| name.starts_with(a))
        {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if ["unsafe {", "unsafe fn", "unsafe impl"]
                .iter()
                .any(|w| code.contains(w))
            {
                wrong.push(format!("{name}:{}", i + 1));
            }
        }
    }
    none("`unsafe` outside the kernels and system calls", wrong);
}

#[test]
fn model_code_does_not_ask_which_model_or_backend_it_is() {
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        if !name.starts_with("bridge-models/src/") || !name.ends_with(".rs") {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if code.contains("cfg(feature = \"cuda\")") || code.contains("B::name(") {
                wrong.push(format!("{name}:{}: {}", i + 1, code.trim()));
            }
        }
    }
    none("model code that depends on a backend", wrong);
}

#[test]
fn only_the_command_line_reads_the_environment() {
    let allowed = ["xtask/", "bridge-cuda/", "tests/"];
    let mut wrong = Vec::new();
    for (name, text) in sources() {
        if !name.ends_with(".rs")
            || allowed.iter().any(|a| name.starts_with(a))
            || name.contains("/tests/")
        {
            continue;
        }
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            // The name of a machine is no setting.
            if code.contains("env::var") && !code.contains("COMPUTERNAME") {
                wrong.push(format!("{name}:{}: {}", i + 1, code.trim()));
            }
        }
    }
    none("environment variables read below the command line", wrong);
}
