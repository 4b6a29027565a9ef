//! Where tokens come from: documents by number.

use std::ops::Range;

use bridge_tokenizers::{SpecialTokens, Tokenizer};

use crate::dataset::Fingerprint;
use crate::error::{DataError, Result};

/// Tokenized documents with random access.
///
/// "Document" is the unit that is split and shuffled: one sequence of an indexed dataset, as in Megatron-Core's GPT dataset.
pub trait TokenSource: Send + Sync {
    /// Number of documents.
    fn documents(&self) -> u64;

    /// Length of a document in tokens, its end-of-document token included.
    ///
    /// # Errors
    /// If there is no such document.
    fn document_len(&self, document: u64) -> Result<u64>;

    /// Appends the tokens `range` of a document to `out`.
    ///
    /// # Errors
    /// If there is no such document or range, the data cannot be read, or a value is not a token id.
    fn read(&self, document: u64, range: Range<u64>, out: &mut Vec<u32>) -> Result<()>;

    /// Name for messages.
    fn describe(&self) -> String;
}

/// The fingerprint of the sizes of a source.
pub(crate) fn fingerprint(
    source: &dyn TokenSource,
    documents: Range<u64>,
    tokens: u64,
) -> Fingerprint {
    Fingerprint::new("tokens")
        .number(source.documents())
        .number(documents.start)
        .number(documents.end)
        .number(tokens)
}

/// Tokenized documents in memory.
#[derive(Clone, Debug)]
pub struct MemoryTokens {
    name: String,
    tokens: Vec<u32>,
    /// Where each document begins, and the end: `[documents + 1]`.
    starts: Vec<usize>,
}

impl MemoryTokens {
    /// Documents that are tokenized already.
    pub fn new(name: impl Into<String>, documents: impl IntoIterator<Item = Vec<u32>>) -> Self {
        let mut tokens = Vec::new();
        let mut starts = vec![0];
        for document in documents {
            tokens.extend(document);
            starts.push(tokens.len());
        }
        Self {
            name: name.into(),
            tokens,
            starts,
        }
    }

    /// Tokenizes texts on all cores, ending each with the tokenizer's end-of-text token if it has one.
    ///
    /// # Errors
    /// If a text cannot be encoded.
    pub fn tokenize<S: AsRef<str> + Sync>(
        name: impl Into<String>,
        texts: impl IntoIterator<Item = S>,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        let texts = texts.into_iter().collect::<Vec<_>>();
        let mut documents = tokenizer.encode_batch(&texts, SpecialTokens::Omit)?;
        for document in &mut documents {
            document.extend(tokenizer.eos_id());
        }
        Ok(Self::new(name, documents))
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    fn bounds(&self, document: u64) -> Result<Range<usize>> {
        let index = usize::try_from(document).unwrap_or(usize::MAX);
        match (
            self.starts.get(index),
            self.starts.get(index.saturating_add(1)),
        ) {
            (Some(&start), Some(&end)) => Ok(start..end),
            _ => Err(DataError::NoSequence {
                place: self.name.clone(),
                index: document,
                count: self.documents(),
            }),
        }
    }
}

impl TokenSource for MemoryTokens {
    fn documents(&self) -> u64 {
        self.starts.len() as u64 - 1
    }

    fn document_len(&self, document: u64) -> Result<u64> {
        self.bounds(document).map(|bounds| bounds.len() as u64)
    }

    fn read(&self, document: u64, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        let tokens = &self.tokens[self.bounds(document)?];
        let part = usize::try_from(range.start)
            .ok()
            .zip(usize::try_from(range.end).ok());
        let part = part
            .and_then(|(start, end)| tokens.get(start..end))
            .ok_or_else(|| DataError::NoTokens {
                place: self.name.clone(),
                index: document,
                len: tokens.len() as u64,
                start: range.start,
                end: range.end,
            })?;
        out.extend_from_slice(part);
        Ok(())
    }

    fn describe(&self) -> String {
        self.name.clone()
    }
}
