//! Text to indexed datasets.
//!
//! Reads text and JSONL files as a stream, tokenizes on all cores and writes one dataset a JSON key, named as Megatron-Core's
//! preprocessing names them: `PREFIX_KEY_document.{bin,idx}`. Memory stays bounded however large the files are.

mod input;

use std::path::PathBuf;

use bridge_tokenizers::{SpecialTokens, Tokenizer};

use crate::error::{DataError, Result};
use crate::indexed::{IndexedWriter, TokenDtype, WrittenDataset};
use input::{Input, Piece};

/// What to read and how.
#[derive(Clone, Debug)]
pub struct PreprocessOptions {
    /// The files, in order. `.jsonl`, `.ndjson` and `.json` hold one object a line, with the text under a key; anything else
    /// is plain text in UTF-8.
    pub inputs: Vec<PathBuf>,
    /// Where to write: `PREFIX_KEY_document.bin` and `.idx`.
    pub output_prefix: PathBuf,
    /// Keys of the JSON objects that hold texts; each makes a dataset of its own. Plain text counts as `text`.
    pub json_keys: Vec<String>,
    /// How plain text is divided into documents.
    pub text_documents: TextDocuments,
    /// Whether each document ends with the tokenizer's end-of-text token.
    pub append_eod: bool,
    /// Whether each document begins with the tokenizer's begin-of-text token.
    pub prepend_bos: bool,
    /// Whether existing datasets of the same name may be replaced.
    pub overwrite: bool,
}

impl PreprocessOptions {
    /// The usual case: the key `text`, files as documents, an end-of-text token after each document, nothing overwritten.
    pub fn new(inputs: Vec<PathBuf>, output_prefix: impl Into<PathBuf>) -> Self {
        Self {
            inputs,
            output_prefix: output_prefix.into(),
            json_keys: vec!["text".into()],
            text_documents: TextDocuments::File,
            append_eod: true,
            prepend_bos: false,
            overwrite: false,
        }
    }

    /// The dataset of a key, without extension.
    pub fn dataset(&self, key: &str) -> PathBuf {
        let mut path = self.output_prefix.clone().into_os_string();
        path.push(format!("_{key}_document"));
        path.into()
    }
}

/// How plain text is divided into documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextDocuments {
    /// A file is a document.
    File,
    /// A line is a document, without its line end. Empty lines are none.
    Line,
    /// A line with exactly this text stands between documents; an empty one makes paragraphs documents.
    Separator(String),
}

/// How far a run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of input read.
    pub bytes: u64,
    /// Bytes of input altogether.
    pub total_bytes: u64,
    /// Documents written, over all keys.
    pub documents: u64,
    /// Tokens written, over all keys.
    pub tokens: u64,
}

/// Text tokenized at once, in bytes: enough to keep all cores busy, little enough to hold in memory some times over.
const BATCH_BYTES: usize = 8 << 20;

/// Tokenizes the inputs and writes the datasets, in the order of `json_keys`. Documents without tokens are left out.
///
/// A plain-text document longer than a mebibyte is tokenized in pieces cut at line ends, which for tokenizers that do not
/// join text across line ends (byte-level BPE, bytes) changes nothing.
///
/// # Errors
/// If an input cannot be read or is malformed (the message names the line), a dataset exists, the tokenizer lacks a token
/// asked for, or the disk is full. No dataset is there then that was not complete.
pub fn preprocess(
    options: &PreprocessOptions,
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(Progress),
) -> Result<Vec<WrittenDataset>> {
    let frame = Frame::new(options, tokenizer)?;
    let mut input = Input::open(options)?;
    let dtype = TokenDtype::for_vocab(tokenizer.vocab_size());
    let writers = options.json_keys.iter().map(|key| match options.overwrite {
        true => IndexedWriter::replace(options.dataset(key), dtype),
        false => IndexedWriter::create(options.dataset(key), dtype),
    });
    let mut outputs = writers
        .map(|writer| writer.map(Output::new))
        .collect::<Result<Vec<_>>>()?;
    let mut done = Progress {
        bytes: 0,
        total_bytes: input.total_bytes(),
        documents: 0,
        tokens: 0,
    };
    loop {
        let pieces = input.next_batch(BATCH_BYTES)?;
        if pieces.is_empty() {
            break;
        }
        let ids = tokenizer.encode_batch(&pieces, SpecialTokens::Omit)?;
        for (piece, ids) in pieces.iter().zip(ids) {
            outputs[piece.key].take(&ids, piece.ends_document, &frame)?;
        }
        done.bytes = input.bytes_read();
        done.documents = outputs.iter().map(|output| output.documents).sum();
        done.tokens = outputs.iter().map(|output| output.tokens).sum();
        progress(done);
    }
    outputs
        .into_iter()
        .map(|output| output.writer.finish())
        .collect()
}

/// What goes around each document.
struct Frame {
    first: Option<u32>,
    last: Option<u32>,
}

impl Frame {
    fn new(options: &PreprocessOptions, tokenizer: &Tokenizer) -> Result<Self> {
        let token =
            |wanted: bool, option: &'static str, id: Option<u32>, name: &str| match (wanted, id) {
                (true, None) => {
                    let reason = format!(
                        "the tokenizer ({}) has no {name} token",
                        tokenizer.describe()
                    );
                    Err(DataError::BadOption {
                        option,
                        value: "true".into(),
                        reason,
                    })
                }
                (wanted, id) => Ok(id.filter(|_| wanted)),
            };
        Ok(Self {
            first: token(
                options.prepend_bos,
                "prepend_bos",
                tokenizer.bos_id(),
                "begin-of-text",
            )?,
            last: token(
                options.append_eod,
                "append_eod",
                tokenizer.eos_id(),
                "end-of-text",
            )?,
        })
    }
}

struct Output {
    writer: IndexedWriter,
    /// Whether tokens of the current document have been written.
    open: bool,
    documents: u64,
    tokens: u64,
}

impl Output {
    fn new(writer: IndexedWriter) -> Self {
        Self {
            writer,
            open: false,
            documents: 0,
            tokens: 0,
        }
    }

    fn take(&mut self, ids: &[u32], ends_document: bool, frame: &Frame) -> Result<()> {
        if !self.open && !ids.is_empty() {
            self.open = true;
            self.write(frame.first.as_slice())?;
        }
        self.write(ids)?;
        if ends_document && std::mem::take(&mut self.open) {
            self.write(frame.last.as_slice())?;
            self.writer.end_document()?;
            self.documents += 1;
        }
        Ok(())
    }

    fn write(&mut self, ids: &[u32]) -> Result<()> {
        self.tokens += ids.len() as u64;
        self.writer.write_tokens(ids)
    }
}

impl AsRef<str> for Piece {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests;
