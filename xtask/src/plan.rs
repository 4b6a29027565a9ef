//! `plan`: what a conversion would do, from the config and the headers alone.

use serde_json::to_value;

use crate::conversion::SourceFlags;
use crate::failure::{Blame, Result};
use crate::flags::LayoutFlags;
use crate::report::Report;

/// Shows the conversion plan and what each rank of a layout would hold, from the headers alone.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  cargo xtask plan --hf meta-llama/Llama-3.2-1B --tp 2 --pp 2")]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceFlags,
    #[command(flatten)]
    layout: LayoutFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let place = args.source.place()?;
    let registry = bridge_models::registry();
    let (model, _) = bridge_core::convert::open(&place, &registry, &args.layout.spec())?;
    let plan = model.plan();
    report.text(plan.to_string().trim_end())?;
    if report.is_json() {
        report.json(&to_value(plan).running("cannot write the plan as JSON")?)?;
    }
    Ok(())
}
