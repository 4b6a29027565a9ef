//! Looking at data: what a dataset holds and what a model is shown.

use bridge_tokenizers::{SpecialTokens, Tokenizer};

use crate::batch::{IGNORE_INDEX, Sample};
use crate::dataset::Dataset;
use crate::error::Result;
use crate::indexed::{IndexedDataset, TokenDtype};
use crate::token_source::TokenSource;

/// Numbers that describe an indexed dataset.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Path without extension.
    pub prefix: String,
    /// How tokens are stored, as NumPy calls it.
    pub dtype: &'static str,
    /// Number of documents.
    pub documents: u64,
    /// Number of sequences.
    pub sequences: u64,
    /// Number of tokens.
    pub tokens: u64,
    /// Length of the shortest sequence, in tokens.
    pub shortest: u64,
    /// Length of the longest sequence, in tokens.
    pub longest: u64,
    /// Whether sequences have modes (multimodal data).
    pub has_modes: bool,
}

/// Describes an indexed dataset, from its index alone.
///
/// # Errors
/// If the index changed since it was opened.
pub fn summarize(dataset: &IndexedDataset) -> Result<Summary> {
    let index = dataset.index();
    let mut summary = Summary {
        prefix: dataset.describe(),
        dtype: TokenDtype::name(index.dtype()),
        documents: index.documents(),
        sequences: index.sequences(),
        tokens: 0,
        shortest: if index.sequences() == 0 { 0 } else { u64::MAX },
        longest: 0,
        has_modes: index.mode(0).is_some(),
    };
    for sequence in 0..index.sequences() {
        let len = dataset.document_len(sequence)?;
        summary.tokens += len;
        summary.shortest = summary.shortest.min(len);
        summary.longest = summary.longest.max(len);
    }
    Ok(summary)
}

impl Summary {
    /// The numbers for people, a line each.
    pub fn lines(&self) -> Vec<String> {
        let mean = self.tokens as f64 / self.sequences.max(1) as f64;
        vec![
            format!("dataset    {}", self.prefix),
            format!("documents  {}", self.documents),
            format!(
                "sequences  {} ({} to {} tokens, {mean:.1} on average)",
                self.sequences, self.shortest, self.longest
            ),
            format!(
                "tokens     {} ({}{})",
                self.tokens,
                self.dtype,
                if self.has_modes { ", with modes" } else { "" }
            ),
        ]
    }
}

/// A sample of a dataset for people: a line for each of the first `limit` tokens, with a rule where a document begins.
///
/// ```text
/// sample 5 of books: 64 tokens, 63 with loss
///  place  position       id  token            predicts
///      0         0      840  "The"         ->  "the capital"...
/// ```
///
/// # Errors
/// If the sample cannot be read, or an id is outside the tokenizer's vocabulary.
pub fn sample_lines(
    dataset: &dyn Dataset,
    tokenizer: &Tokenizer,
    index: u64,
    limit: usize,
) -> Result<Vec<String>> {
    let sample = dataset.sample(index)?;
    let with_loss = sample
        .labels
        .iter()
        .filter(|&&label| label != IGNORE_INDEX)
        .count();
    let head = format!(
        "sample {index} of {}: {} tokens, {with_loss} with loss",
        dataset.describe(),
        sample.tokens.len()
    );
    let mut lines = vec![head];
    lines.extend(window_lines(&sample, tokenizer, limit)?);
    Ok(lines)
}

/// The tokens of a sample, a line each; see [`sample_lines`].
///
/// # Errors
/// If an id is outside the tokenizer's vocabulary.
pub fn window_lines(sample: &Sample, tokenizer: &Tokenizer, limit: usize) -> Result<Vec<String>> {
    let piece = |id: i64| -> Result<String> {
        let id = u32::try_from(id).unwrap_or(u32::MAX);
        let text = tokenizer.decode(&[id], SpecialTokens::Add)?;
        // Part of a character says nothing as text; the vocabulary's spelling does.
        let text = if text.contains('\u{fffd}') {
            tokenizer.id_to_token(id).unwrap_or(text)
        } else {
            text
        };
        Ok(format!("{text:?}"))
    };
    let mut lines = vec![format!(
        "{:>6} {:>9} {:>8}  {:<20} predicts",
        "place", "position", "id", "token"
    )];
    for place in 0..sample.tokens.len().min(limit) {
        if place > 0 && sample.boundaries.contains(&place) {
            lines.push(format!("{:->6} document", ""));
        }
        let label = match sample.labels[place] {
            IGNORE_INDEX => "(no loss)".into(),
            label => piece(label)?,
        };
        let (position, id) = (sample.position_ids[place], sample.tokens[place]);
        lines.push(format!(
            "{place:>6} {position:>9} {id:>8}  {:<20} {label}",
            piece(id)?
        ));
    }
    if sample.tokens.len() > limit {
        lines.push(format!("       and {} more", sample.tokens.len() - limit));
    }
    Ok(lines)
}
