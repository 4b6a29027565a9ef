//! `finetune`: supervised fine-tuning of a given model, of all its weights or of adapters beside them.

use std::path::PathBuf;

use crate::failure::{Failure, Result};
use crate::flags::{BackendFlags, LayoutFlags};
use crate::pretrain;
use crate::report::Report;

/// Fine-tunes a model on conversations or on prompts with answers, all its weights or adapters alone, as the recipe says.
///
/// Data are JSONL files with one object a line: {"messages": [..]} for the model's chat template, or {"prompt": ..,
/// "completion": ..}. Answers alone count in the loss. See docs/finetune.md.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask finetune llama32_1b_lora --hf meta-llama/Llama-3.2-1B data.data_path=train.jsonl\n  \
    cargo xtask finetune llama32_1b_sft --hf runs/base-hf data.data_path=train.jsonl data.validation_path=test.jsonl\n  \
    cargo xtask finetune llama32_1b_dora --hf runs/base-hf data.data_path=train.jsonl peft.dim=8 --dry-run\n\n\
    A run that was stopped continues when the same command is given again.")]
pub(crate) struct Args {
    /// A recipe (see `recipes list`) and any number of overrides of single keys.
    #[arg(value_name = "RECIPE or key=value", required = true)]
    words: Vec<String>,
    /// The model: a Hugging Face folder or hub id. Default: the recipe's.
    #[arg(long, value_name = "DIR")]
    hf: Option<String>,
    /// TOML file over the recipe.
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    /// Print the configuration with every default filled in, and stop.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    layout: LayoutFlags,
    #[command(flatten)]
    backend: BackendFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let mut words = args.words;
    if words.iter().all(|word| word.contains('=')) && args.config.is_none() {
        return Err(Failure::input(
            "name a recipe (`recipes list`) or give --config".to_owned(),
        ));
    }
    if let Some(hf) = args.hf {
        // Before the overrides, which win.
        let given = ["model.hf", "checkpoint.pretrained", "tokenizer.path"];
        let given = given.map(|key| format!("{key}={hf}"));
        words.splice(0..0, given);
    }
    let args = pretrain::Args {
        words,
        config: args.config,
        dry_run: args.dry_run,
        exposed_comm: false,
        layout: args.layout,
        backend: args.backend,
    };
    pretrain::run(args, report)
}
