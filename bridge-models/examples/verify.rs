//! Compares models with their reference numbers: `cargo run --release -p bridge-models --example verify -- DIR...`,
//! where each folder holds a checkpoint and the reference made from it.

use std::path::Path;
use std::process::ExitCode;

use bridge_models::registry;
use bridge_models::verify::{VerifyOptions, verify};
use burn_flex::Flex;

fn main() -> ExitCode {
    let mut all_passed = true;
    for dir in std::env::args().skip(1) {
        let path = Path::new(&dir);
        match verify::<Flex>(
            &registry(),
            path,
            path,
            &VerifyOptions::default(),
            &Default::default(),
            "cpu",
        ) {
            Ok(report) => {
                println!("{dir}: {report}");
                all_passed &= report.passed;
            }
            Err(error) => {
                println!("{dir}: {error}");
                all_passed = false;
            }
        }
    }
    if all_passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
