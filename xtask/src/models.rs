//! `models list|show`: the model families that can be converted, trained and run.

use bridge_core::dtype::DType;
use bridge_core::plan::{Plan, plan_from_shapes};
use bridge_core::{DecoderConfig, HfConfig, LayoutSpec, ModelBridge};
use bridge_models::families::{FAMILIES, FamilySpec};
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
    /// Shows a family's named sizes and how its weights map to Hugging Face, or one named size.
    #[command(
        after_help = "Examples:\n  cargo xtask models show llama\n  cargo xtask models show llama32_1b"
    )]
    Show {
        /// A family, or one of its named sizes.
        name: String,
    },
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    match args.what {
        What::List => list(report),
        What::Show { name } => show(&name, report),
    }
}

fn list(report: Report) -> Result {
    let sizes = |family: &FamilySpec| family.presets.iter().map(|p| p.name).collect::<Vec<_>>();
    let rows: Vec<Vec<String>> = FAMILIES
        .iter()
        .map(|f| {
            vec![
                f.name.to_owned(),
                f.architectures.join(", "),
                sizes(f).join(", "),
            ]
        })
        .collect();
    report.text(table(&["family", "architectures", "named sizes"], &rows))?;
    let models: Vec<_> = FAMILIES
        .iter()
        .map(|f| json!({"name": f.name, "architectures": f.architectures, "sizes": sizes(f)}))
        .collect();
    report.json(&json!({"models": models}))
}

fn show(name: &str, report: Report) -> Result {
    if let Some(family) = FAMILIES.iter().find(|f| f.name == name) {
        let mut rows = Vec::new();
        let mut sizes = Vec::new();
        for preset in family.presets {
            let parameters = plan_of(family, &(preset.config)())?.parameters;
            rows.push(vec![
                preset.name.to_owned(),
                parameters.to_string(),
                preset.hub_id.to_owned(),
            ]);
            sizes.push(
                json!({"name": preset.name, "parameters": parameters, "hub_id": preset.hub_id}),
            );
        }
        report.text(format!(
            "{} ({})\n",
            family.name,
            family.architectures.join(", ")
        ))?;
        report.text(table(&["named size", "parameters", "on the hub"], &rows))?;
        if let Some(first) = family.presets.first() {
            report.text(format!(
                "\nweights of {}:\n{}",
                first.name,
                plan_of(family, &(first.config)())?.to_string().trim_end()
            ))?;
        }
        return report.json(
            &json!({"name": family.name, "architectures": family.architectures, "sizes": sizes}),
        );
    }
    let all = || {
        FAMILIES
            .iter()
            .flat_map(|f| f.presets.iter().map(move |p| (*f, p)))
    };
    let Some((family, preset)) = all().find(|(_, p)| p.name == name) else {
        let known = FAMILIES
            .iter()
            .map(|f| f.name)
            .chain(all().map(|(_, p)| p.name));
        return Err(unknown_name("model", name, known));
    };
    let plan = plan_of(family, &(preset.config)())?;
    report.text(plan.to_string().trim_end())?;
    let plan = to_value(&plan).running("cannot write the plan as JSON")?;
    report.json(
        &json!({"name": preset.name, "family": family.name, "hub_id": preset.hub_id, "plan": plan}),
    )
}

/// How a bf16 checkpoint of this size would be imported on one rank.
fn plan_of(family: &'static FamilySpec, config: &DecoderConfig) -> Result<Plan> {
    let config = HfConfig::from_json(family.hf_config(config)?, "the named size");
    Ok(plan_from_shapes(
        family,
        &config,
        DType::BF16,
        &LayoutSpec::default(),
    )?)
}
