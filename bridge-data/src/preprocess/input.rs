//! Documents from files, as a stream of pieces.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{PreprocessOptions, TextDocuments};
use crate::error::{DataError, Result};

/// Longest line read, in bytes.
const MAX_LINE: usize = 1 << 30;

/// Plain text of a document tokenized in one piece, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// Consecutive text of a document.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Which of the keys it belongs to.
    pub(super) key: usize,
    /// Whether the document ends with it.
    pub(super) ends_document: bool,
}

/// The documents of all inputs.
pub(super) struct Input {
    waiting: VecDeque<PathBuf>,
    keys: Vec<String>,
    text_documents: TextDocuments,
    current: Option<Lines>,
    /// Text of the current document that is not handed out yet.
    pending: String,
    /// Whether some of the current document has been read.
    in_document: bool,
    total_bytes: u64,
    bytes_read: u64,
}

/// A file, line by line.
struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: u64,
    is_json: bool,
}

impl Input {
    pub(super) fn open(options: &PreprocessOptions) -> Result<Self> {
        let bad = |option, value: String, reason: &str| DataError::BadOption {
            option,
            value,
            reason: reason.into(),
        };
        if options.inputs.is_empty() {
            return Err(bad("input", "nothing".into(), "name at least one file"));
        }
        let mut keys = options.json_keys.clone();
        keys.sort();
        keys.dedup();
        if keys.is_empty() || keys.len() != options.json_keys.len() {
            return Err(bad(
                "json_keys",
                format!("{:?}", options.json_keys),
                "name at least one key, each once",
            ));
        }
        if let Some(key) = keys.iter().find(|key| key.contains(['/', '\\', '\0'])) {
            return Err(bad(
                "json_keys",
                format!("{key:?}"),
                "the key becomes part of a file name; rename it in the data",
            ));
        }
        let mut total_bytes = 0;
        for path in &options.inputs {
            // Opened now so that a missing file is known before hours of work.
            let metadata = File::open(path)
                .and_then(|file| file.metadata())
                .map_err(DataError::io("read", path))?;
            if metadata.is_dir() {
                return Err(bad(
                    "input",
                    path.display().to_string(),
                    "it is a folder; name the files in it",
                ));
            }
            if !is_json(path) && options.json_keys != ["text"] {
                return Err(bad(
                    "json_keys",
                    format!("{:?}", options.json_keys),
                    "plain-text inputs have the key `text` alone",
                ));
            }
            total_bytes += metadata.len();
        }
        Ok(Self {
            waiting: options.inputs.iter().cloned().collect(),
            keys: options.json_keys.clone(),
            text_documents: options.text_documents.clone(),
            current: None,
            pending: String::new(),
            in_document: false,
            total_bytes,
            bytes_read: 0,
        })
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Pieces of about `bytes` bytes together; none at the end.
    pub(super) fn next_batch(&mut self, bytes: usize) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut size = 0;
        while size < bytes {
            let Some(mut lines) = self.current.take() else {
                let Some(path) = self.waiting.pop_front() else {
                    break;
                };
                self.current = Some(Lines::open(path)?);
                continue;
            };
            let before = pieces.len();
            match lines.next()? {
                None => self.end_document(&mut pieces),
                Some((text, read)) => {
                    self.bytes_read += read;
                    if lines.is_json {
                        self.json_line(&lines, &text, &mut pieces)?;
                    } else {
                        self.text_line(text, &mut pieces);
                    }
                    self.current = Some(lines);
                }
            }
            // A share for the piece itself, so that many empty texts fill a batch too.
            size += pieces[before..]
                .iter()
                .map(|piece| piece.text.len() + size_of::<Piece>())
                .sum::<usize>();
        }
        Ok(pieces)
    }

    fn json_line(&self, lines: &Lines, text: &str, pieces: &mut Vec<Piece>) -> Result<()> {
        if text.trim().is_empty() {
            return Ok(());
        }
        let mut object = match serde_json::from_str(text) {
            Ok(Value::Object(object)) => object,
            Ok(other) => {
                return Err(lines.bad(format!(
                    "expected one JSON object a line, found {}",
                    kind(&other)
                )));
            }
            Err(error) => return Err(lines.bad(format!("not a JSON object on one line: {error}"))),
        };
        for (index, key) in self.keys.iter().enumerate() {
            match object.remove(key) {
                Some(Value::String(text)) => pieces.push(Piece {
                    text,
                    key: index,
                    ends_document: true,
                }),
                Some(other) => {
                    return Err(lines.bad(format!("`{key}` is {}, expected a text", kind(&other))));
                }
                None => {
                    let known = object
                        .keys()
                        .take(8)
                        .map(|key| format!("`{key}`"))
                        .collect::<Vec<_>>()
                        .join(", ");
                    return Err(lines.bad(format!(
                        "the object has no key `{key}`; it has {known} (choose with json_keys)"
                    )));
                }
            }
        }
        Ok(())
    }

    fn text_line(&mut self, line: String, pieces: &mut Vec<Piece>) {
        let content = line.strip_suffix('\n').map_or(line.as_str(), |rest| {
            rest.strip_suffix('\r').unwrap_or(rest)
        });
        match &self.text_documents {
            TextDocuments::Line => {
                if !content.is_empty() {
                    pieces.push(Piece {
                        text: content.to_owned(),
                        key: 0,
                        ends_document: true,
                    });
                }
            }
            TextDocuments::Separator(separator) if content == separator => {
                self.end_document(pieces)
            }
            _ => {
                self.in_document = true;
                self.pending.push_str(&line);
                if self.pending.len() >= PIECE_BYTES {
                    pieces.push(Piece {
                        text: std::mem::take(&mut self.pending),
                        key: 0,
                        ends_document: false,
                    });
                }
            }
        }
    }

    fn end_document(&mut self, pieces: &mut Vec<Piece>) {
        if std::mem::take(&mut self.in_document) {
            pieces.push(Piece {
                text: std::mem::take(&mut self.pending),
                key: 0,
                ends_document: true,
            });
        }
    }
}

fn is_json(path: &Path) -> bool {
    let extension = path
        .extension()
        .map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| ["jsonl", "ndjson", "json"].contains(&extension.as_str()))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

impl Lines {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(DataError::io("read", &path))?;
        Ok(Self {
            is_json: is_json(&path),
            reader: BufReader::with_capacity(1 << 18, file),
            path,
            line: 0,
        })
    }

    /// The next line with its end, without a byte-order mark, and the bytes it took in the file.
    fn next(&mut self) -> Result<Option<(String, u64)>> {
        let mut bytes = Vec::new();
        let read = self
            .reader
            .by_ref()
            .take(MAX_LINE as u64 + 1)
            .read_until(b'\n', &mut bytes);
        let read = read.map_err(DataError::io("read", &self.path))?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        if bytes.len() > MAX_LINE {
            return Err(self.bad(format!(
                "the line is longer than {MAX_LINE} bytes; break it up"
            )));
        }
        if self.line == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
            bytes.drain(..3);
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some((text, read as u64))),
            Err(error) => {
                let at = error.utf8_error().valid_up_to() + 1;
                Err(self.bad(format!(
                    "byte {at} of the line is not UTF-8; convert the file first"
                )))
            }
        }
    }

    fn bad(&self, reason: String) -> DataError {
        DataError::BadLine {
            path: self.path.clone(),
            line: self.line,
            reason,
        }
    }
}
