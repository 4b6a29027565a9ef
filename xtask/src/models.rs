//! `models list|show`: the model families that can be converted, trained and run.

use bridge_core::ModelBridge;
use bridge_core::dtype::DType;
use bridge_core::plan::plan_from_shapes;
use bridge_core::{HfConfig, LayoutSpec};
use clap::Subcommand;
use serde_json::{json, to_value};

use crate::cli::unknown_name;
use crate::failure::{Blame, Result};
use crate::report::{Report, table};

/// Lists the supported model families, or shows how one maps to Hugging Face.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists the model families.
    #[command(after_help = "Example:\n  cargo xtask models list")]
    List,
    /// Shows a family's presets and weight map.
    #[command(after_help = "Example:\n  cargo xtask models show llama")]
    Show {
        /// Name of the family.
        name: String,
    },
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let registry = bridge_models::registry();
    match args.what {
        What::List => {
            let rows: Vec<Vec<String>> =
                registry.iter().map(|b| vec![b.name().to_owned(), b.architectures().join(", ")]).collect();
            report.text(table(&["family", "architectures"], &rows))?;
            let list: Vec<_> =
                registry.iter().map(|b| json!({"name": b.name(), "architectures": b.architectures()})).collect();
            report.json(&json!({"models": list}))
        }
        What::Show { name } => {
            let known = registry.iter().map(|b| b.name());
            let bridge = registry.get(&name).ok_or_else(|| unknown_name("model", &name, known))?;
            show(bridge, report)
        }
    }
}
