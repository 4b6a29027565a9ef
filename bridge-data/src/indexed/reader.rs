//! Reading an indexed dataset.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::positional::read_exact_at;
use super::{Index, TokenDtype, index_path, tokens_path};
use crate::error::{DataError, Result};
use crate::token_source::TokenSource;

/// An indexed dataset on disk. See the [module](super) for the format.
///
/// The index is memory-mapped, since lengths are looked up in random order; tokens are read from the `.bin` file as they
/// are asked for. May be shared between threads.
#[derive(Debug)]
pub struct IndexedDataset {
    prefix: PathBuf,
    tokens: File,
    index: Index<Mmap>,
}

/// Tokens read from the file at once, so that a long document needs no second copy of itself.
const READ_TOKENS: u64 = 1 << 16;

impl IndexedDataset {
    /// Opens `PREFIX.bin` and `PREFIX.idx` and checks the whole index. A path that ends in `.bin` or `.idx` names the same dataset.
    ///
    /// # Errors
    /// If a file is missing or unreadable, or the index is not valid.
    pub fn open(prefix: impl AsRef<Path>) -> Result<Self> {
        let given = prefix.as_ref();
        let is_file_name = given
            .extension()
            .is_some_and(|extension| extension == "bin" || extension == "idx");
        let prefix = if is_file_name {
            given.with_extension("")
        } else {
            given.to_owned()
        };
        let open = |path: &Path| match File::open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let missing = path
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default();
                Err(DataError::MissingFile {
                    prefix: prefix.clone(),
                    missing,
                })
            }
            result => result.map_err(DataError::io("read", path)),
        };
        let path = index_path(&prefix);
        let index_file = open(&path)?;
        let tokens = open(&tokens_path(&prefix))?;
        let tokens_len = tokens
            .metadata()
            .map_err(DataError::io("read", tokens_path(&prefix)))?
            .len();
        // SAFETY: the mapping is only read, as bytes, so any content is a valid value, and every access is bounds-checked
        // against the mapping's length. A file that another process shortens while it is mapped raises SIGBUS, which no
        // reader can prevent; datasets are replaced by rename, never rewritten in place, so the mapped file stays whole.
        let bytes = unsafe { Mmap::map(&index_file) }.map_err(DataError::io("map", &path))?;
        let index =
            Index::parse(bytes, tokens_len).and_then(|index| match index.dtype().max_id() {
                Some(_) => Ok(index),
                None => Err(format!(
                    "it stores {} values, and token ids are integers",
                    index.dtype().name()
                )),
            });
        let index = index.map_err(|reason| DataError::BadIndex { path, reason })?;
        Ok(Self {
            prefix,
            tokens,
            index,
        })
    }

    /// The index.
    pub fn index(&self) -> &Index<Mmap> {
        &self.index
    }

    /// Path of the dataset without extension.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// All tokens of a sequence.
    ///
    /// # Errors
    /// As [`TokenSource::read`].
    pub fn sequence(&self, sequence: u64) -> Result<Vec<u32>> {
        let len = self.document_len(sequence)?;
        let mut tokens = Vec::new();
        self.read(sequence, 0..len, &mut tokens)?;
        Ok(tokens)
    }

    fn locate(&self, sequence: u64) -> Result<(u64, u64)> {
        self.index.sequence(sequence).map_err(|reason| {
            let (place, count) = (self.describe(), self.index.sequences());
            if sequence >= count {
                DataError::NoSequence {
                    place,
                    index: sequence,
                    count,
                }
            } else {
                DataError::BadIndex {
                    path: index_path(&self.prefix),
                    reason,
                }
            }
        })
    }
}

impl TokenSource for IndexedDataset {
    /// Number of sequences: the unit that Megatron-Core's GPT dataset shuffles too.
    fn documents(&self) -> u64 {
        self.index.sequences()
    }

    fn document_len(&self, document: u64) -> Result<u64> {
        self.locate(document).map(|(len, _)| len)
    }

    fn read(&self, document: u64, range: Range<u64>, out: &mut Vec<u32>) -> Result<()> {
        let (len, offset) = self.locate(document)?;
        if range.start > range.end || range.end > len {
            let (start, end) = (range.start, range.end);
            return Err(DataError::NoTokens {
                place: self.describe(),
                index: document,
                len,
                start,
                end,
            });
        }
        let dtype = self.index.dtype();
        let mut bytes = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let count = READ_TOKENS.min(range.end - at) as usize;
            bytes.resize(count * dtype.size(), 0);
            read_exact_at(&self.tokens, &mut bytes, offset + at * dtype.size() as u64)
                .map_err(DataError::io("read", tokens_path(&self.prefix)))?;
            decode(dtype, &bytes, out).map_err(|(place, value)| DataError::BadToken {
                place: self.describe(),
                index: document,
                position: at + place as u64,
                value,
                limit: format!(" stored as {}", dtype.name()),
            })?;
            at += count as u64;
        }
        Ok(())
    }

    fn describe(&self) -> String {
        self.prefix.display().to_string()
    }
}

/// Appends the ids in `bytes`; the place and value of the first that is none.
fn decode(
    dtype: TokenDtype,
    bytes: &[u8],
    out: &mut Vec<u32>,
) -> std::result::Result<(), (usize, i64)> {
    fn each<const N: usize>(
        bytes: &[u8],
        out: &mut Vec<u32>,
        value: impl Fn([u8; N]) -> i64,
    ) -> std::result::Result<(), (usize, i64)> {
        let (chunks, _) = bytes.as_chunks::<N>();
        out.reserve(chunks.len());
        for (place, chunk) in chunks.iter().enumerate() {
            let value = value(*chunk);
            out.push(u32::try_from(value).map_err(|_| (place, value))?);
        }
        Ok(())
    }
    match dtype {
        TokenDtype::U8 => each(bytes, out, |[b]| b.into()),
        TokenDtype::I8 => each(bytes, out, |b| i8::from_le_bytes(b).into()),
        TokenDtype::I16 => each(bytes, out, |b| i16::from_le_bytes(b).into()),
        TokenDtype::U16 => each(bytes, out, |b| u16::from_le_bytes(b).into()),
        TokenDtype::I32 => each(bytes, out, |b| i32::from_le_bytes(b).into()),
        TokenDtype::I64 => each(bytes, out, i64::from_le_bytes),
        // Refused when the dataset is opened; as an id it is an error in any case.
        TokenDtype::F32 | TokenDtype::F64 => Err((0, i64::MIN)),
    }
}
