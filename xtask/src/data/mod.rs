//! `data preprocess|inspect|pack`: from text to what a model is shown.

mod inspect;
mod pack;
mod preprocess;

use std::fs;
use std::path::Path;

use clap::Subcommand;

use crate::failure::{Blame, Result};
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

/// Makes the folder that `output` is to stand in, runs `work`, and takes an empty folder away again if that fails.
fn in_new_folder<T>(output: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let folder = output.parent().filter(|f| !f.as_os_str().is_empty());
    let Some(folder) = folder.filter(|f| !f.exists()) else {
        return work();
    };
    fs::create_dir_all(folder).input(format!("cannot create {}", folder.display()))?;
    work().inspect_err(|_| {
        // A folder that is not empty stays; what failed is told already.
        let _ = fs::remove_dir(folder);
    })
}
