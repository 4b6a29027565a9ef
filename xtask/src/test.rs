//! `test`: everything that continuous integration checks.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;

use crate::failure::{Blame, Failure, Result};
use crate::report::{Report, table};

/// Runs everything CI checks: format, lint, tests, documentation tests.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  cargo xtask test\n  cargo xtask test --only format,lint")]
pub(crate) struct Args {
    /// Only these steps, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "STEP")]
    only: Vec<Step>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Step {
    /// `cargo fmt --check`.
    Format,
    /// `cargo clippy` with warnings as errors.
    Lint,
    /// Unit and integration tests.
    Test,
    /// The examples in the documentation.
    Doc,
}

impl Step {
    const ALL: [Self; 4] = [Self::Format, Self::Lint, Self::Test, Self::Doc];

    fn name(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::Lint => "lint",
            Self::Test => "test",
            Self::Doc => "doc",
        }
    }

    /// Arguments for cargo. Everything is built as for release, so that one build of the dependencies serves the program,
    /// its tests and the lints; numerics on a CPU would be far too slow otherwise.
    fn cargo(self) -> &'static [&'static str] {
        match self {
            Self::Format => &["fmt", "--all", "--check"],
            Self::Lint => &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--release",
                "--",
                "-D",
                "warnings",
            ],
            Self::Test => &[
                "test",
                "--workspace",
                "--release",
                "--no-fail-fast",
                "--lib",
                "--bins",
                "--tests",
            ],
            Self::Doc => &["test", "--workspace", "--release", "--doc"],
        }
    }
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let root = workspace_root()?;
    let steps: Vec<Step> = Step::ALL
        .into_iter()
        .filter(|s| args.only.is_empty() || args.only.contains(s))
        .collect();
    let mut outcomes = Vec::new();
    for step in steps {
        eprintln!("== {}: cargo {}", step.name(), step.cargo().join(" "));
        let started = Instant::now();
        let status = Command::new(cargo())
            .args(step.cargo())
            .current_dir(&root)
            // stdout is for the result of this verb.
            .stdout(Stdio::from(std::io::stderr()))
            .status()
            .running(format!("cannot start cargo {}", step.cargo()[0]))?;
        outcomes.push((step, status.success(), started.elapsed().as_secs_f64()));
    }
    let gpu = gpu_tests();
    let rows: Vec<Vec<String>> = outcomes
        .iter()
        .map(|(step, ok, s)| {
            vec![
                step.name().into(),
                if *ok { "passed" } else { "FAILED" }.into(),
                format!("{s:.1} s"),
            ]
        })
        .collect();
    report.text(table(&["step", "result", "time"], &rows))?;
    report.text(format!("GPU tests: {gpu}"))?;
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|(_, ok, _)| !ok)
        .map(|(step, ..)| step.name())
        .collect();
    if failed.is_empty() {
        let steps: Vec<_> = outcomes
            .iter()
            .map(|(step, ok, s)| json!({"step": step.name(), "passed": ok, "seconds": s}))
            .collect();
        return report.json(&json!({"steps": steps, "gpu_tests": gpu, "passed": true}));
    }
    Err(Failure::check(format!(
        "{} did not pass; the output above says why",
        failed.join(", ")
    )))
}

/// Whether tests that need a GPU could run here; they skip themselves where there is none.
fn gpu_tests() -> &'static str {
    if Path::new("/proc/driver/nvidia/version").exists() || Path::new("/dev/nvidiactl").exists() {
        "ran (an NVIDIA driver is present)"
    } else {
        "skipped (no NVIDIA driver on this machine)"
    }
}

fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

/// The checkout that the current folder belongs to.
fn workspace_root() -> Result<PathBuf> {
    let located = Command::new(cargo())
        .args(["locate-project", "--workspace", "--message-format", "plain"])
        .output()
        .running("cannot start cargo, which `test` needs; install Rust from https://rustup.rs")?;
    let manifest = PathBuf::from(String::from_utf8_lossy(&located.stdout).trim());
    match manifest.parent() {
        Some(root) if root.join("bridge-core/Cargo.toml").is_file() => Ok(root.to_owned()),
        _ => Err(Failure::input(
            "`test` checks this project's source; run it inside a checkout",
        )),
    }
}
