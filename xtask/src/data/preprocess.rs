//! `data preprocess`: text and JSONL files to indexed datasets.

use std::path::PathBuf;
use std::time::Instant;

use bridge_data::preprocess::{PreprocessOptions, TextDocuments, preprocess};
use serde_json::json;

use super::in_new_folder;
use crate::failure::Result;
use crate::model::tokenizer;
use crate::progress::ByteProgress;
use crate::report::Report;

/// Tokenizes text and JSONL files into Megatron-Core indexed datasets (.bin and .idx).
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask data preprocess --input books.jsonl --output data/books --tokenizer meta-llama/Llama-3.2-1B\n  \
    cargo xtask data preprocess --input notes.txt --output data/notes --tokenizer bytes --documents paragraphs")]
pub(crate) struct Args {
    /// Files to read: .jsonl with the text under a key, anything else is plain text.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Where to write: PREFIX_KEY_document.bin and .idx.
    #[arg(long, value_name = "PREFIX")]
    output: PathBuf,
    /// Tokenizer: a folder, a hub id, `bytes`, or `null:SIZE`.
    #[arg(long, value_name = "TOKENIZER")]
    tokenizer: String,
    /// Keys of the JSON objects that hold texts; each makes a dataset of its own.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "text",
        value_name = "KEY"
    )]
    json_keys: Vec<String>,
    /// How plain text is divided into documents.
    #[arg(long, value_enum, default_value_t = Documents::Files)]
    documents: Documents,
    /// Leave out the end-of-text token after each document.
    #[arg(long)]
    no_eod: bool,
    /// Put the begin-of-text token before each document.
    #[arg(long)]
    prepend_bos: bool,
    /// Replace datasets of the same name.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Documents {
    /// A file is a document.
    Files,
    /// A line is a document.
    Lines,
    /// Documents are separated by empty lines.
    Paragraphs,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let tokenizer = tokenizer(&args.tokenizer)?;
    let options = PreprocessOptions {
        json_keys: args.json_keys,
        text_documents: match args.documents {
            Documents::Files => TextDocuments::File,
            Documents::Lines => TextDocuments::Line,
            Documents::Paragraphs => TextDocuments::Separator(String::new()),
        },
        append_eod: !args.no_eod,
        prepend_bos: args.prepend_bos,
        overwrite: args.overwrite,
        ..PreprocessOptions::new(args.input, args.output)
    };
    let started = Instant::now();
    let written = {
        let shown = ByteProgress::new("tokenizing");
        in_new_folder(&options.output_prefix, || {
            Ok(preprocess(&options, &tokenizer, &mut |p| {
                shown.update(p.bytes, p.total_bytes, "")
            })?)
        })?
    };
    let seconds = started.elapsed().as_secs_f64();
    for dataset in &written {
        report.text(format!(
            "{}: {} documents, {} tokens as {}",
            dataset.prefix.display(),
            dataset.documents,
            dataset.tokens,
            dataset.dtype.name()
        ))?;
    }
    let datasets: Vec<_> = written
        .iter()
        .map(|d| json!({"prefix": d.prefix, "documents": d.documents, "tokens": d.tokens, "dtype": d.dtype.name()}))
        .collect();
    report.json(&json!({
        "datasets": datasets,
        "documents": written.iter().map(|d| d.documents).sum::<u64>(),
        "tokens": written.iter().map(|d| d.tokens).sum::<u64>(),
        "seconds": seconds,
    }))
}
