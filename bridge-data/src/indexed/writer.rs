//! Writing an indexed dataset.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::{MAGIC, TokenDtype, VERSION, index_path, tokens_path};
use crate::error::{DataError, Result};

/// Whether existing files may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existing {
    Refuse,
    Replace,
}

/// Writes an indexed dataset as its documents come.
///
/// Memory does not grow with the dataset: lengths and borders wait in temporary files beside the target. Nothing appears under the
/// final names before [`finish`](Self::finish), and the index last, so that a dataset with an index is complete; a writer
/// dropped before leaves nothing behind.
///
/// ```no_run
/// use bridge_data::{IndexedDataset, IndexedWriter, TokenDtype};
///
/// let mut writer = IndexedWriter::create("books_text_document", TokenDtype::for_vocab(32_000))?;
/// writer.write_document(&[1, 15, 27, 2])?;
/// writer.write_document(&[1, 99, 2])?;
/// writer.finish()?;
/// assert_eq!(IndexedDataset::open("books_text_document")?.index().sequences(), 2);
/// # Ok::<(), bridge_data::DataError>(())
/// ```
#[derive(Debug)]
pub struct IndexedWriter {
    prefix: PathBuf,
    dtype: TokenDtype,
    existing: Existing,
    tokens: Spool,
    /// i32 a sequence.
    lengths: Spool,
    /// i64 a document: the sequences up to its end.
    borders: Spool,
    modes: Option<Spool>,
    sequences: u64,
    documents: u64,
    token_count: u64,
    /// Tokens of the sequence being written.
    open_sequence: u64,
    buffer: Vec<u8>,
}

/// What a finished dataset holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenDataset {
    /// Path without extension.
    pub prefix: PathBuf,
    /// Number of documents.
    pub documents: u64,
    /// Number of sequences.
    pub sequences: u64,
    /// Number of tokens.
    pub tokens: u64,
    /// How they are stored.
    pub dtype: TokenDtype,
}

/// A temporary file beside the target.
#[derive(Debug)]
struct Spool {
    file: BufWriter<NamedTempFile>,
}

impl Spool {
    fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::Builder::new()
            .prefix(".dataset-")
            .suffix(".tmp")
            .tempfile_in(folder);
        let file = file.map_err(DataError::io("create a file in", folder))?;
        Ok(Self {
            file: BufWriter::with_capacity(1 << 18, file),
        })
    }

    fn into_file(self) -> io::Result<NamedTempFile> {
        self.file.into_inner().map_err(|error| error.into_error())
    }

    /// The file, ready to be read from its start.
    fn rewound(self) -> io::Result<BufReader<File>> {
        let mut file = self.into_file()?.into_file();
        file.rewind()?;
        Ok(BufReader::with_capacity(1 << 18, file))
    }
}

impl IndexedWriter {
    /// Begins a dataset `PREFIX.bin`, `PREFIX.idx`.
    ///
    /// # Errors
    /// If one of the two exists, the folder does not or cannot be written to, or the dtype holds no ids.
    pub fn create(prefix: impl Into<PathBuf>, dtype: TokenDtype) -> Result<Self> {
        Self::begin(prefix.into(), dtype, Existing::Refuse)
    }

    /// Begins a dataset that replaces one of the same name when it is finished.
    ///
    /// # Errors
    /// If the folder does not exist or cannot be written to, or the dtype holds no ids.
    pub fn replace(prefix: impl Into<PathBuf>, dtype: TokenDtype) -> Result<Self> {
        Self::begin(prefix.into(), dtype, Existing::Replace)
    }

    pub(crate) fn begin(prefix: PathBuf, dtype: TokenDtype, existing: Existing) -> Result<Self> {
        let path = tokens_path(&prefix);
        if dtype.max_id().is_none() {
            let what = format!("tokens as {}", dtype.name());
            return Err(DataError::Unwritable {
                path,
                what,
                reason: "token ids are integers".into(),
            });
        }
        for path in [path, index_path(&prefix)] {
            if existing == Existing::Refuse && path.exists() {
                return Err(DataError::Exists { path });
            }
        }
        let folder = match prefix.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let spool = || Spool::new(&folder);
        Ok(Self {
            dtype,
            existing,
            tokens: spool()?,
            lengths: spool()?,
            borders: spool()?,
            modes: None,
            sequences: 0,
            documents: 0,
            token_count: 0,
            open_sequence: 0,
            buffer: Vec::new(),
            prefix,
        })
    }

    /// Adds tokens to the sequence being written.
    ///
    /// # Errors
    /// If an id does not fit the dtype, or the disk is full.
    pub fn write_tokens(&mut self, ids: &[u32]) -> Result<()> {
        let max = self.dtype.max_id().unwrap_or(0);
        if let Some(id) = ids.iter().find(|&&id| id > max) {
            let reason = format!(
                "{} holds ids up to {max}; use a wider dtype",
                self.dtype.name()
            );
            return Err(DataError::Unwritable {
                path: self.path(),
                what: format!("token id {id}"),
                reason,
            });
        }
        self.buffer.clear();
        match self.dtype.size() {
            1 => self.buffer.extend(ids.iter().map(|&id| id as u8)),
            2 => self
                .buffer
                .extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            4 => self
                .buffer
                .extend(ids.iter().flat_map(|&id| id.to_le_bytes())),
            _ => self
                .buffer
                .extend(ids.iter().flat_map(|&id| u64::from(id).to_le_bytes())),
        }
        self.tokens
            .file
            .write_all(&self.buffer)
            .map_err(DataError::io("write", self.path()))?;
        self.open_sequence += ids.len() as u64;
        Ok(())
    }

    /// Ends a sequence. A GPT dataset has one a document; see [`end_document`](Self::end_document).
    ///
    /// # Errors
    /// If it has more than 2^31 - 1 tokens, or the disk is full.
    pub fn end_sequence(&mut self) -> Result<()> {
        let len = i32::try_from(self.open_sequence).map_err(|_| DataError::Unwritable {
            path: self.path(),
            what: format!("a sequence of {} tokens", self.open_sequence),
            reason: "the format allows 2147483647; cut the document into smaller ones".into(),
        })?;
        self.lengths
            .file
            .write_all(&len.to_le_bytes())
            .map_err(DataError::io("write", self.path()))?;
        self.token_count += self.open_sequence;
        self.open_sequence = 0;
        self.sequences += 1;
        Ok(())
    }

    /// Ends a document, and the sequence being written if it has tokens.
    ///
    /// # Errors
    /// As [`end_sequence`](Self::end_sequence).
    pub fn end_document(&mut self) -> Result<()> {
        if self.open_sequence > 0 {
            self.end_sequence()?;
        }
        let border = (self.sequences as i64).to_le_bytes();
        self.borders
            .file
            .write_all(&border)
            .map_err(DataError::io("write", self.path()))?;
        self.documents += 1;
        Ok(())
    }

    /// Writes a document of one sequence.
    ///
    /// # Errors
    /// As [`write_tokens`](Self::write_tokens) and [`end_sequence`](Self::end_sequence).
    pub fn write_document(&mut self, ids: &[u32]) -> Result<()> {
        self.write_tokens(ids)?;
        self.end_sequence()?;
        self.end_document()
    }

    /// Gives the sequence written last a mode: 0 is text, and what else there is depends on the model. Sequences without
    /// one have 0.
    ///
    /// # Errors
    /// If no sequence has been ended yet, or the disk is full.
    pub fn set_mode(&mut self, mode: i8) -> Result<()> {
        let path = self.path();
        if self.sequences == 0 {
            let reason = "no sequence has been ended yet".into();
            return Err(DataError::Unwritable {
                path,
                what: format!("mode {mode}"),
                reason,
            });
        }
        let modes = match &mut self.modes {
            Some(modes) => modes,
            none => none.insert(Spool::new(
                path.parent()
                    .filter(|p| !p.as_os_str().is_empty())
                    .unwrap_or(Path::new(".")),
            )?),
        };
        // One byte a sequence, so the place in the file is the number of the sequence; gaps read as 0.
        let place = io::SeekFrom::Start(self.sequences - 1);
        modes
            .file
            .seek(place)
            .and_then(|_| modes.file.write_all(&mode.to_le_bytes()))
            .map_err(DataError::io("write", path))
    }

    /// Writes the index and puts both files in place.
    ///
    /// # Errors
    /// If a sequence was left open, or the disk is full. Nothing of the dataset is left then.
    pub fn finish(mut self) -> Result<WrittenDataset> {
        if self.open_sequence > 0 {
            self.end_document()?;
        }
        let (bin, idx) = (self.path(), index_path(&self.prefix));
        let report = WrittenDataset {
            prefix: self.prefix.clone(),
            documents: self.documents,
            sequences: self.sequences,
            tokens: self.token_count,
            dtype: self.dtype,
        };
        let existing = self.existing;
        let (tokens, index) = self.into_files().map_err(DataError::io("write", &bin))?;
        for path in [&bin, &idx] {
            if existing == Existing::Refuse && path.exists() {
                return Err(DataError::Exists { path: path.clone() });
            }
        }
        // An old index must not meet new tokens, not even for a moment.
        if existing == Existing::Replace && idx.exists() {
            std::fs::remove_file(&idx).map_err(DataError::io("replace", &idx))?;
        }
        let put = |file: NamedTempFile, path: &Path| {
            readable_by_all(file.as_file()).map_err(DataError::io("write", path))?;
            file.persist(path).map_err(|error| DataError::Io {
                action: "write",
                path: path.to_owned(),
                source: error.error,
            })
        };
        put(tokens, &bin)?;
        put(index, &idx)?;
        Ok(report)
    }

    /// The finished files under temporary names, flushed to the disk.
    fn into_files(self) -> io::Result<(NamedTempFile, NamedTempFile)> {
        let folder = self
            .tokens
            .file
            .get_ref()
            .path()
            .parent()
            .unwrap_or(Path::new("."))
            .to_owned();
        let index = tempfile::Builder::new()
            .prefix(".dataset-")
            .suffix(".tmp")
            .tempfile_in(folder)?;
        let mut index = BufWriter::with_capacity(1 << 18, index);
        index.write_all(MAGIC)?;
        index.write_all(&VERSION.to_le_bytes())?;
        index.write_all(&[self.dtype.code()])?;
        index.write_all(&self.sequences.to_le_bytes())?;
        index.write_all(&(self.documents + 1).to_le_bytes())?;

        let mut lengths = self.lengths.rewound()?;
        io::copy(&mut lengths, &mut index)?;
        lengths.rewind()?;
        let (mut offset, mut len) = (0i64, [0; 4]);
        for _ in 0..self.sequences {
            index.write_all(&offset.to_le_bytes())?;
            lengths.read_exact(&mut len)?;
            offset += i64::from(i32::from_le_bytes(len)) * self.dtype.size() as i64;
        }
        index.write_all(&0i64.to_le_bytes())?;
        io::copy(&mut self.borders.rewound()?, &mut index)?;
        if let Some(modes) = self.modes {
            let modes = modes.rewound()?;
            // Sequences after the last one with a mode.
            let rest = io::repeat(0);
            io::copy(&mut modes.chain(rest).take(self.sequences), &mut index)?;
        }
        let index = index.into_inner().map_err(|error| error.into_error())?;
        let tokens = self.tokens.into_file()?;
        tokens.as_file().sync_all()?;
        index.as_file().sync_all()?;
        Ok((tokens, index))
    }

    fn path(&self) -> PathBuf {
        tokens_path(&self.prefix)
    }
}

/// Gives a file the rights that a plainly created one would have mostly had; temporary files are private.
fn readable_by_all(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    #[cfg(not(unix))]
    let _ = file;
    Ok(())
}
