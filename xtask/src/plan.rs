//! `plan`: what a conversion would do, from the config and the headers alone.

use bridge_parallel::pipeline::Schedule;
use serde_json::to_value;

use crate::conversion::SourceFlags;
use crate::failure::{Blame, Result};
use crate::flags::LayoutFlags;
use crate::report::Report;

/// Shows the conversion plan and what each rank of a layout would hold, from the headers alone.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask plan --hf meta-llama/Llama-3.2-1B --tp 2 --pp 2\n  \
    cargo xtask plan --hf meta-llama/Llama-3.2-1B --pp 4 --vpp 2 --schedule 8"
)]
pub(crate) struct Args {
    #[command(flatten)]
    source: SourceFlags,
    #[command(flatten)]
    layout: LayoutFlags,
    /// Draw the pipeline schedule of a step with so many micro-batches per data-parallel rank.
    #[arg(long, value_name = "MICRO-BATCHES", num_args = 0..=1, default_missing_value = "8")]
    schedule: Option<usize>,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let place = args.source.place()?;
    let registry = bridge_models::registry();
    let (model, _) = bridge_core::convert::open(&place, &registry, &args.layout.spec())?;
    let plan = model.plan();
    report.text(plan.to_string().trim_end())?;
    let layout = args.layout.spec();
    let schedule = args
        .schedule
        .map(|micro_batches| Schedule::training(layout.pp, layout.vpp, micro_batches))
        .transpose()
        .input("--schedule")?;
    if let Some(schedule) = &schedule {
        report.text(format!("\n{schedule}").trim_end())?;
    }
    if report.is_json() {
        let mut plan = to_value(plan).running("cannot write the plan as JSON")?;
        if let Some(schedule) = schedule {
            plan["schedule"] = schedule.to_string().into();
        }
        report.json(&plan)?;
    }
    Ok(())
}
