//! The verbs and what they have in common.

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::failure::{Blame, Failure, Result};
use crate::report::Report;
use crate::{
    adapter, bench, convert, data, doctor, export, finetune, generate, import, job, launch, models,
    plan, pretrain, recipes, roundtrip, test, verify,
};

/// Moves language models between Hugging Face and native sharded checkpoints, trains them, and proves both.
#[derive(Debug, Parser)]
#[command(
    version,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
#[command(
    after_help = "Exit codes: 0 done, 1 a check did not hold, 2 bad arguments, config or input, 3 failed while running, \
                        130 interrupted after a graceful stop."
)]
pub(crate) struct Cli {
    /// Make the last line of stdout one JSON object.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// CPU threads [default: one per core].
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Pretrain(pretrain::Args),
    Finetune(finetune::Args),
    Adapter(adapter::Args),
    Import(import::Args),
    Export(export::Args),
    Convert(convert::Args),
    Roundtrip(roundtrip::Args),
    Plan(plan::Args),
    Verify(verify::Args),
    Generate(generate::Args),
    Models(models::Args),
    Recipes(recipes::Args),
    Data(data::Args),
    Launch(launch::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
    Test(test::Args),
}

/// Reads the arguments of this process; prints help or usage errors (exit code 2) itself.
pub(crate) fn parse(program: &'static str) -> Cli {
    let matches = Cli::command().bin_name(program).get_matches();
    Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
}

pub(crate) fn run(cli: Cli, report: Report) -> Result {
    job::follow_launcher();
    if let Some(threads) = cli.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads));
        pool.build_global().running("cannot start the threads")?;
    }
    match cli.verb {
        Verb::Pretrain(args) => pretrain::run(args, report),
        Verb::Finetune(args) => finetune::run(args, report),
        Verb::Adapter(args) => adapter::run(args, report),
        Verb::Import(args) => import::run(args, report),
        Verb::Export(args) => export::run(args, report),
        Verb::Convert(args) => convert::run(args, report),
        Verb::Roundtrip(args) => roundtrip::run(args, report),
        Verb::Plan(args) => plan::run(args, report),
        Verb::Verify(args) => verify::run(args, report),
        Verb::Generate(args) => generate::run(args, report),
        Verb::Models(args) => models::run(args, report),
        Verb::Recipes(args) => recipes::run(args, report),
        Verb::Data(args) => data::run(args, report),
        Verb::Launch(args) => launch::run(args, report),
        Verb::Bench(args) => bench::run(args, report),
        Verb::Doctor(args) => doctor::run(args, report),
        Verb::Test(args) => test::run(args, report),
    }
}

/// The error for a name that is not in a list, with the nearest that is.
pub(crate) fn unknown_name<'a>(
    kind: &str,
    name: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> Failure {
    let near = bridge_core::registry::nearest(name, known.clone())
        .map(|n| format!("; did you mean `{n}`?"))
        .unwrap_or_default();
    let list = known.collect::<Vec<_>>().join(", ");
    Failure::input(format!(
        "there is no {kind} `{name}`{near} ({kind}s: {list})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_verb_has_help_with_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path} says what it does");
            if command.has_subcommands() {
                command.get_subcommands().for_each(|c| check(c, &path));
            } else {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(help.contains("cargo xtask"), "{path} has an example");
            }
        }
        Cli::command()
            .get_subcommands()
            .for_each(|c| check(c, "xtask"));
    }
}
