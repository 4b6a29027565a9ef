//! The command line: `cargo xtask <verb>`, installed as `bridge <verb>`. One file per verb.
//!
//! Names, flags, JSON fields and exit codes are a contract that scripts rely on: 0 done, 1 a check did not hold, 2 bad
//! arguments, config or input, 3 failed while running, 130 interrupted after a graceful stop.

mod adapter;
mod backend;
mod bench;
mod cli;
mod conversion;
mod convert;
mod data;
mod doctor;
mod export;
mod failure;
mod finetune;
mod flags;
mod generate;
mod import;
mod job;
mod launch;
mod model;
mod models;
mod plan;
mod pretrain;
mod progress;
mod recipes;
mod report;
mod roundtrip;
mod test;
mod transport;
mod verify;

use std::process::ExitCode;

use report::Report;

/// Runs the command line of this process. `program` is how help texts call it.
pub fn main(program: &'static str) -> ExitCode {
    let cli = cli::parse(program);
    let report = Report::new(cli.json);
    match cli::run(cli, report) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report.failure(&failure);
            failure.exit_code()
        }
    }
}
