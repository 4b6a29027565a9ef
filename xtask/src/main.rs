//! `cargo xtask <verb>`; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    xtask::main("cargo xtask")
}
