//! `data pack`: documents to windows of equal length, once and for all.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bridge_data::indexed::WrittenDataset;
use bridge_data::{
    Dataset, GptDataset, GptOptions, IGNORE_INDEX, IndexedDataset, IndexedWriter, TokenDtype,
    TokenSource,
};
use serde_json::json;

use super::in_new_folder;
use crate::failure::{Failure, Result};
use crate::progress::ByteProgress;
use crate::report::Report;

/// Packs the documents of a dataset into windows of seq-length + 1 tokens, each a document of a new dataset.
///
/// Training packs on the fly, so this is for looking at the windows and for handing them to other programs: a window's
/// first seq-length tokens are the input, its last seq-length tokens what is to be predicted. Windows come in the order of
/// one epoch of training with this seed; the rest that fills no window is left out.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask data pack --data data/books_text_document --output data/books_packed --seq-length 2048"
)]
pub(crate) struct Args {
    /// The dataset: its path without .bin or .idx.
    #[arg(long, value_name = "PREFIX")]
    data: PathBuf,
    /// The dataset to make: its path without .bin or .idx.
    #[arg(long, value_name = "PREFIX")]
    output: PathBuf,
    /// Tokens that a model sees per window.
    #[arg(long, value_name = "N")]
    seq_length: usize,
    /// Seed of the order, as data.seed.
    #[arg(long, value_name = "S", default_value_t = 1234)]
    seed: u64,
    /// Keep the stored order.
    #[arg(long)]
    no_shuffle: bool,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let dataset = IndexedDataset::open(&args.data)?;
    let dtype = dataset.index().dtype();
    let documents = 0..dataset.documents();
    let options = GptOptions {
        shuffle: !args.no_shuffle,
        ..GptOptions::new(args.seq_length, args.seed)
    };
    let windows = GptDataset::new(Arc::new(dataset), documents, options)?;
    let written = in_new_folder(&args.output, || pack(&windows, &args.output, dtype))?;
    let left_out = windows
        .tokens()
        .saturating_sub(written.documents * args.seq_length as u64 + 1);
    report.text(format!(
        "{}: {} windows of {} tokens; {left_out} tokens at the end fill no window",
        written.prefix.display(),
        written.documents,
        args.seq_length + 1
    ))?;
    report.json(&json!({
        "prefix": written.prefix,
        "windows": written.documents,
        "tokens": written.tokens,
        "tokens_left_out": left_out,
    }))
}

/// Writes every window that is full.
fn pack(windows: &GptDataset, output: &Path, dtype: TokenDtype) -> Result<WrittenDataset> {
    let count = windows.samples_per_epoch();
    let mut writer = IndexedWriter::create(output, dtype)?;
    let progress = ByteProgress::new("packing");
    for index in 0..count {
        let sample = windows.sample(index)?;
        // The last label is the one token that the inputs lack; a short window has none.
        if sample
            .labels
            .last()
            .is_some_and(|label| *label != IGNORE_INDEX)
        {
            let ids = sample.tokens.iter().chain(sample.labels.last());
            let ids: Option<Vec<u32>> = ids.map(|id| u32::try_from(*id).ok()).collect();
            let ids =
                ids.ok_or_else(|| Failure::input(format!("window {index} holds a negative id")))?;
            writer.write_document(&ids)?;
        }
        progress.update(index + 1, count, "windows");
    }
    Ok(writer.finish()?)
}
