//! `data inspect`: what a dataset holds and what a model is shown of it.

use std::path::PathBuf;
use std::sync::Arc;

use bridge_data::inspect::{sample_lines, summarize};
use bridge_data::{Dataset, GptDataset, GptOptions, IndexedDataset, TokenSource};
use bridge_tokenizers::SpecialTokens;
use serde_json::{json, to_value};

use crate::failure::{Blame, Failure, Result};
use crate::model::tokenizer;
use crate::report::Report;

/// Describes an indexed dataset, and shows documents or training samples with their labels.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask data inspect --data data/books_text_document\n  \
    cargo xtask data inspect --data data/books_text_document --tokenizer bytes --sample 5 --seq-length 64")]
pub(crate) struct Args {
    /// The dataset: its path without .bin or .idx.
    #[arg(long, value_name = "PREFIX")]
    data: PathBuf,
    /// Tokenizer for showing text: a folder, a hub id, `bytes`, or `null:SIZE`.
    #[arg(long, value_name = "TOKENIZER")]
    tokenizer: Option<String>,
    /// Show this document's text.
    #[arg(
        long,
        value_name = "N",
        requires = "tokenizer",
        conflicts_with = "sample"
    )]
    document: Option<u64>,
    /// Show this training sample, token by token.
    #[arg(long, value_name = "N", requires = "tokenizer")]
    sample: Option<u64>,
    /// Tokens in a training sample.
    #[arg(long, value_name = "N", default_value_t = 64)]
    seq_length: usize,
    /// Seed of the sample order, as data.seed.
    #[arg(long, value_name = "S", default_value_t = 1234)]
    seed: u64,
    /// Most tokens to show.
    #[arg(long, value_name = "N", default_value_t = 256)]
    limit: usize,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let dataset = IndexedDataset::open(&args.data)?;
    let summary = summarize(&dataset)?;
    report.text(summary.lines().join("\n"))?;
    let mut result = to_value(&summary).running("cannot write the summary as JSON")?;
    if let Some(tokenizer) = args.tokenizer.as_deref().map(tokenizer).transpose()? {
        if let Some(document) = args.document {
            let length = dataset.document_len(document)?.min(args.limit as u64);
            let mut ids = Vec::new();
            dataset.read(document, 0..length, &mut ids)?;
            let text = tokenizer.decode(&ids, SpecialTokens::Add)?;
            report.text(format!("document {document}, {length} tokens:\n{text}"))?;
            result["document"] = json!({"number": document, "token_ids": ids, "text": text});
        } else if let Some(number) = args.sample {
            let options = GptOptions {
                eod: tokenizer.eos_id(),
                ..GptOptions::new(args.seq_length, args.seed)
            };
            let documents = 0..dataset.documents();
            let windows = GptDataset::new(Arc::new(dataset), documents, options)?;
            let count = windows.samples_per_epoch();
            if number >= count {
                return Err(Failure::input(format!(
                    "--sample {number}: an epoch has {count} samples of {} tokens",
                    args.seq_length
                )));
            }
            report.text(sample_lines(&windows, &tokenizer, number, args.limit)?.join("\n"))?;
            let sample = windows.sample(number)?;
            result["sample"] =
                json!({"number": number, "tokens": sample.tokens, "labels": sample.labels});
        }
    }
    report.json(&result)
}
