//! `bench train|convert|generate|ops|comm`: one JSON line a case.

mod comm;
mod convert;
mod generate;
pub(crate) mod memory;
mod ops;
mod synthetic;
mod train;

use clap::Subcommand;

use crate::failure::Result;
use crate::report::Report;

/// Measures speed and memory; every result is one JSON line on stdout.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Train(train::Args),
    Convert(convert::Args),
    Generate(generate::Args),
    Ops(ops::Args),
    Comm(comm::Args),
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    match args.what {
        What::Train(args) => train::run(args, report),
        What::Convert(args) => convert::run(args, report),
        What::Generate(args) => generate::run(args, report),
        What::Ops(args) => ops::run(args, report),
        What::Comm(args) => comm::run(args, report),
    }
}

/// A number with as many decimals as are worth reading.
fn rounded(value: f64, decimals: i32) -> f64 {
    let scale = 10f64.powi(decimals);
    (value * scale).round() / scale
}

/// Pseudo-random token ids below `vocab`, the same in every run.
fn random_ids(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..count)
        .map(|_| {
            // xorshift64, Marsaglia 2003.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 16) % vocab as u64) as u32
        })
        .collect()
}
