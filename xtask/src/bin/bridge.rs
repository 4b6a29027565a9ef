//! `bridge <verb>`: the same command line, installed with `cargo install --path xtask`.

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::main("bridge")
}
