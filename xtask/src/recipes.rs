//! `recipes list|show`: the ready configurations.

use bridge_train::config::{ResolveContext, resolve};
use clap::Subcommand;
use serde_json::json;

use crate::failure::Result;
use crate::report::{Report, table};

/// Lists the ready configurations, or shows one resolved.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists the recipes.
    #[command(after_help = "Example:\n  cargo xtask recipes list")]
    List,
    /// Shows a recipe as it is used, every default filled in.
    #[command(after_help = "Example:\n  cargo xtask recipes show llama32_1b > my_run.toml")]
    Show {
        /// Name of the recipe.
        name: String,
    },
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    match args.what {
        What::List => {
            let recipes = bridge_recipes::list()?;
            let rows: Vec<Vec<String>> = recipes
                .iter()
                .map(|r| {
                    vec![
                        r.name.to_owned(),
                        r.family.to_owned(),
                        r.description.clone(),
                    ]
                })
                .collect();
            report.text(table(&["recipe", "family", "what it trains"], &rows))?;
            let list: Vec<_> = recipes
                .iter()
                .map(|r| json!({"name": r.name, "family": r.family, "description": r.description}))
                .collect();
            report.json(&json!({"recipes": list}))
        }
        What::Show { name } => {
            let recipe = bridge_recipes::get(&name)?;
            let layers = bridge_recipes::layers(&name)?;
            let resolved = resolve(
                &layers,
                &ResolveContext::new(&bridge_models::registry(), &name),
            )?;
            let toml = resolved.to_toml();
            report.text(format!(
                "# {}: {}\n{}",
                recipe.name,
                recipe.description,
                toml.trim_end()
            ))?;
            report.json(
                &json!({"name": recipe.name, "description": recipe.description, "toml": toml}),
            )
        }
    }
}
