//! `plan`: what a conversion would do, from the config and the headers alone.

use bridge_core::checkpoint::Checkpoint;
use bridge_core::plan::{Plan, TensorHeader, plan_import};
use bridge_core::{HfConfig, LayoutSpec};
use serde_json::to_value;

use crate::failure::{Blame, Result};
use crate::flags::{LayoutFlags, hugging_face_folder};
use crate::report::Report;

/// Shows the conversion plan and what each rank of a layout would hold, from the headers alone.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  cargo xtask plan --hf meta-llama/Llama-3.2-1B --tp 2 --pp 2")]
pub(crate) struct Args {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    hf: String,
    #[command(flatten)]
    layout: LayoutFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let folder = hugging_face_folder(&args.hf)?;
    let plan = plan_of(&folder, &args.layout.spec())?;
    report.text(plan.to_string().trim_end())?;
    if report.is_json() {
        report.json(&to_value(&plan).running("cannot write the plan as JSON")?)?;
    }
    Ok(())
}

/// Plans the import of the folder at a layout.
pub(crate) fn plan_of(folder: &std::path::Path, layout: &LayoutSpec) -> Result<Plan> {
    let config = HfConfig::load(folder)?;
    let bridge = bridge_models::registry().detect(&config)?;
    let checkpoint = Checkpoint::open(folder)?;
    let headers: Vec<TensorHeader> = checkpoint.tensors().iter().map(TensorHeader::from).collect();
    Ok(plan_import(bridge, &config, &headers, layout)?)
}
