//! `doctor`: what this machine has.

use std::fs;
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
    let cuda = bridge_cuda::probe();
    rows.extend(gpu_rows(&cuda));
    let backends = if cuda.is_ready() {
        vec!["cpu", "cuda"]
    } else {
        vec!["cpu"]
    };
    rows.push(vec!["backends".to_owned(), backends.join(", ")]);
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
        "cuda_version": cuda.driver_version.map(|(major, minor)| format!("{major}.{minor}")),
        "gpus": cuda.gpus.as_ref().map_or_else(|_| Vec::new(), |gpus| gpus.iter().map(|gpu| gpu.name.clone()).collect()),
        "libraries": libraries(&cuda),
        "backends": backends,
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

/// The GPUs as the driver describes them, and each library with its place or with what gets it.
fn gpu_rows(cuda: &bridge_cuda::Report) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    match &cuda.gpus {
        Ok(gpus) if gpus.is_empty() => rows.push(("GPU".to_owned(), "none".to_owned())),
        Ok(gpus) => rows.extend(gpus.iter().map(|gpu| {
            let (major, minor) = gpu.capability;
            let note = if gpu.supported {
                ""
            } else {
                "; too old for the cuda backend, which needs 8.0"
            };
            let text = format!(
                "{}, {}, compute capability {major}.{minor}{note}",
                gpu.name,
                bytes(gpu.memory_bytes)
            );
            (format!("GPU {}", gpu.ordinal), text)
        })),
        Err(bridge_cuda::Error::Library { .. }) => {
            rows.push(("GPU".to_owned(), "none: there is no driver".to_owned()));
        }
        Err(error) => rows.push(("GPU".to_owned(), error.to_string())),
    }
    for info in &cuda.libraries {
        let text = match &info.path {
            Ok(path) => path.display().to_string(),
            Err(_) => format!("missing; {}", info.library.advice()),
        };
        rows.push((info.library.to_string(), text));
    }
    rows.into_iter()
        .map(|(what, found)| vec![what, found])
        .collect()
}

/// The libraries for scripts: name, file (or nothing), and how to get it where it is missing.
fn libraries(cuda: &bridge_cuda::Report) -> Vec<Value> {
    cuda.libraries
        .iter()
        .map(|info| {
            json!({
                "name": info.library.to_string(),
                "path": info.path.as_ref().ok(),
                "advice": info.path.is_err().then(|| info.library.advice()),
            })
        })
        .collect()
}
