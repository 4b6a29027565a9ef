//! `doctor`: what this machine has.

use std::fs;
use std::path::Path;
use std::thread::available_parallelism;

use serde_json::{Value, json};

use crate::failure::Result;
use crate::report::{Report, bytes, table};

/// Says what this machine has: cores, memory, instruction sets, GPUs.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  cargo xtask doctor")]
pub(crate) struct Args {}

pub(crate) fn run(_args: Args, report: Report) -> Result {
    let cores = available_parallelism().map(usize::from).ok();
    let memory = memory();
    let simd = instruction_sets();
    let driver = nvidia_driver();
    let gpus = nvidia_gpus();
    let threads = rayon::current_num_threads();

    let unknown = || "unknown".to_owned();
    let mut rows = vec![
        vec![
            "system".to_owned(),
            format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        ],
        vec![
            "cores".to_owned(),
            cores.map_or_else(unknown, |n| {
                format!("{n} (this process uses {threads} threads)")
            }),
        ],
        vec![
            "memory".to_owned(),
            memory.map_or_else(unknown, |(total, free)| {
                format!("{}, {} available", bytes(total), bytes(free))
            }),
        ],
        vec![
            "instructions".to_owned(),
            if simd.is_empty() {
                "baseline".to_owned()
            } else {
                simd.join(" ")
            },
        ],
    ];
    match &driver {
        Some(version) => rows.push(vec!["NVIDIA driver".to_owned(), version.clone()]),
        None => rows.push(vec![
            "NVIDIA driver".to_owned(),
            "none found; the CPU backend needs none (for a GPU: https://www.nvidia.com/drivers, \
             or start the container with --gpus all)"
                .to_owned(),
        ]),
    }
    rows.extend(gpus.iter().map(|gpu| vec!["GPU".to_owned(), gpu.clone()]));
    rows.push(vec!["backends".to_owned(), "cpu".to_owned()]);
    report.text(table(&["what", "found"], &rows))?;
    report.json(&json!({
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cores": cores,
        "threads": threads,
        "memory_total_bytes": memory.map(|m| m.0),
        "memory_available_bytes": memory.map(|m| m.1),
        "instruction_sets": simd,
        "nvidia_driver": driver.map_or(Value::Null, Value::from),
        "gpus": gpus,
        "backends": ["cpu"],
    }))
}

/// Total and available memory in bytes.
fn memory() -> Option<(u64, u64)> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = info.lines().find_map(|l| l.strip_prefix(name))?;
        Some(
            line.trim_start_matches(':')
                .split_whitespace()
                .next()?
                .parse::<u64>()
                .ok()?
                * 1024,
        )
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

/// The instruction sets that the CPU kernels can gain from.
fn instruction_sets() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let found = [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
        (
            "avx512bf16",
            std::arch::is_x86_feature_detected!("avx512bf16"),
        ),
    ];
    #[cfg(target_arch = "aarch64")]
    let found = [("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found: [(&str, bool); 0] = [];
    found
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(name, _)| name)
        .collect()
}

/// First line of the loaded driver's description.
fn nvidia_driver() -> Option<String> {
    let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    Some(text.lines().next()?.trim().to_owned())
}

/// Models of the GPUs that the driver lists.
fn nvidia_gpus() -> Vec<String> {
    let mut gpus: Vec<String> = fs::read_dir(Path::new("/proc/driver/nvidia/gpus"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path().join("information")).ok())
        .filter_map(|text| {
            Some(
                text.lines()
                    .find_map(|l| l.strip_prefix("Model:"))?
                    .trim()
                    .to_owned(),
            )
        })
        .collect();
    gpus.sort();
    gpus
}
