//! `data preprocess|inspect|pack`: from text to what a model is shown.

mod inspect;
mod pack;
mod preprocess;

use clap::Subcommand;

use crate::failure::Result;
use crate::report::Report;

/// Makes and looks at training data.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Preprocess(preprocess::Args),
    Inspect(inspect::Args),
    Pack(pack::Args),
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    match args.what {
        What::Preprocess(args) => preprocess::run(args, report),
        What::Inspect(args) => inspect::run(args, report),
        What::Pack(args) => pack::run(args, report),
    }
}
