//! Ids written as text.
//!
//! For data that is tokenized already, and for benchmarks: `"12 7 99"` is `[12, 7, 99]`. As in Megatron-Core's
//! tokenizer of the same name, one id past the given size ends a document.

use crate::error::{Result, TokenizerError};

/// Reads and writes ids separated by white space.
#[derive(Clone, Debug)]
pub(crate) struct NullTokenizer {
    /// Ids below this are ordinary; this one ends a document.
    size: u32,
}

impl NullTokenizer {
    pub(crate) fn new(size: u32) -> Self {
        Self { size }
    }

    pub(crate) fn eos_id(&self) -> u32 {
        self.size
    }

    /// Ordinary ids and the one that ends a document.
    pub(crate) fn vocab_size(&self) -> usize {
        self.size as usize + 1
    }

    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let limit = self.size.saturating_add(1);
        text.split_whitespace()
            .enumerate()
            .map(|(index, word)| match word.parse::<u32>() {
                Ok(id) if id < limit => Ok(id),
                _ => Err(TokenizerError::NotAnId {
                    word: word.chars().take(40).collect(),
                    position: index + 1,
                    limit,
                }),
            })
            .collect()
    }

    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
    }
}
