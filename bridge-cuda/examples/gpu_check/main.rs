//! Runs every check of the CUDA backend against the CPU backend, one line a group, and with `--bench` times the kernels.
//!
//! ```text
//! gpu_check [--bench] [--only NAME] [--dtype f32|bf16|f16] [--no-check]
//! ```

#[path = "../../tests/checks/mod.rs"]
mod checks;

mod bench;

use std::time::Instant;

use bridge_cuda::CudaDevice;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let value = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(at + 1)
    };
    let (only, dtype_wanted) = (value("--only"), value("--dtype"));

    print!("{}", bridge_cuda::probe());
    let start = Instant::now();
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: no CUDA device: {error}");
            return;
        }
    };
    println!("device opened in {:.2} s", start.elapsed().as_secs_f32());

    let mut failed = 0;
    if !has("--no-check") {
        // Failures are printed below; the default message would repeat them.
        std::panic::set_hook(Box::new(|_| {}));
        for group in checks::groups() {
            if only.is_some_and(|only| !group.name.contains(only.as_str())) {
                continue;
            }
            for &dtype in group.dtypes {
                let name = format!("{dtype:?}");
                if dtype_wanted.is_some_and(|wanted| !name.eq_ignore_ascii_case(wanted)) {
                    continue;
                }
                let start = Instant::now();
                let (count, failures) = checks::run(&group, dtype, device);
                let verdict = if failures.is_empty() { "ok" } else { "FAILED" };
                println!(
                    "{verdict:7}{} {dtype:?}: {count} results, {:.1} s",
                    group.name,
                    start.elapsed().as_secs_f32()
                );
                failed += failures.len();
                for failure in failures.iter().take(6) {
                    println!("       {failure}");
                }
                if failures.len() > 6 {
                    println!("       and {} more", failures.len() - 6);
                }
            }
        }
        let _ = std::panic::take_hook();
        println!(
            "{failed} failures in {:.1} s",
            start.elapsed().as_secs_f32()
        );
    }
    if has("--bench") {
        bench::run(device, only.map(String::as_str));
    }
    if failed > 0 {
        std::process::exit(1);
    }
}
