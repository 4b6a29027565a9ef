//! Tensors that lie in blocks, anywhere in a set of files: what formats other than safetensors come down to.

use super::error::{CheckpointError, Result};
use super::folder::nearest;
use super::region::Region;
use super::source::{FileReader, RangeReader};
use crate::dtype::DType;
use std::path::PathBuf;

/// A box of a tensor, and where its elements are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlock {
    /// Which elements of the tensor.
    pub region: Region,
    /// Distance between neighbours along each dim, in elements.
    pub strides: Vec<usize>,
    /// Which of the store's files holds them.
    pub file: usize,
    /// Byte of the block's first element in that file.
    pub offset: u64,
}

/// A tensor as blocks that hold each of its elements once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Dims, outermost first.
    pub shape: Vec<usize>,
    /// The blocks.
    pub blocks: Vec<StoredBlock>,
}

/// The tensors of a checkpoint in a format other than safetensors, all descriptions read and checked.
pub struct BlockStore {
    place: String,
    files: Vec<(String, Box<dyn RangeReader>)>,
    tensors: Vec<StoredTensor>,
}

impl BlockStore {
    /// A store called `place` in messages. Tensors may come in any order.
    pub(crate) fn new(
        place: impl Into<String>,
        files: Vec<(String, Box<dyn RangeReader>)>,
        mut tensors: Vec<StoredTensor>,
    ) -> Self {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            place: place.into(),
            files,
            tensors,
        }
    }

    /// What to call the checkpoint in messages.
    pub fn describe(&self) -> &str {
        &self.place
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<&StoredTensor> {
        let found = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        found.ok().map(|position| &self.tensors[position])
    }

    /// A tensor by name, or an error that names the nearest one.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownTensor`].
    pub fn tensor(&self, name: &str) -> Result<&StoredTensor> {
        self.get(name)
            .ok_or_else(|| CheckpointError::UnknownTensor {
                place: self.place.clone(),
                name: name.to_owned(),
                nearest: nearest(name, self.tensors.iter().map(|tensor| tensor.name.as_str())),
            })
    }

    /// The bytes of the file that holds `block`.
    ///
    /// # Panics
    /// When `block` is of another store with more files.
    pub fn reader(&self, block: &StoredBlock) -> &dyn RangeReader {
        &*self.files[block.file].1
    }

    /// Name of the file that holds `block`.
    ///
    /// # Panics
    /// As [`BlockStore::reader`].
    pub fn file_name(&self, block: &StoredBlock) -> &str {
        &self.files[block.file].0
    }

    /// Keeps the first `rows` rows of a tensor, as where a vocabulary was padded. Does nothing to a tensor that has no
    /// more.
    pub fn cut_rows(&mut self, name: &str, rows: usize) {
        let found = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name));
        let Ok(position) = found else { return };
        let tensor = &mut self.tensors[position];
        if tensor.shape.first().is_none_or(|first| *first <= rows) {
            return;
        }
        tensor.shape[0] = rows;
        tensor
            .blocks
            .retain(|block| block.region.offset[0] < rows || block.region.shape[0] == 0);
        for block in &mut tensor.blocks {
            let kept = rows.saturating_sub(block.region.offset[0]);
            block.region.shape[0] = block.region.shape[0].min(kept);
        }
    }
}

impl std::fmt::Debug for BlockStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockStore")
            .field("place", &self.place)
            .field("files", &self.files.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}

/// Files that are kept open at once; a checkpoint of thousands of ranks has more files than a process may hold.
const MAX_OPEN_FILES: usize = 256;

/// Opens `paths`: each once, or, where there are very many, each time it is read.
pub(super) fn open_files(
    paths: Vec<(String, PathBuf)>,
) -> Result<Vec<(String, Box<dyn RangeReader>)>> {
    let many = paths.len() > MAX_OPEN_FILES;
    let open = |(name, path): (String, PathBuf)| {
        let file = FileReader::open(&path)?;
        let reader: Box<dyn RangeReader> = if many {
            Box::new(ReopenedFile {
                len: file.len(),
                path,
            })
        } else {
            Box::new(file)
        };
        Ok((name, reader))
    };
    paths.into_iter().map(open).collect()
}

/// A file that is open only while it is read.
struct ReopenedFile {
    path: PathBuf,
    len: u64,
}

impl RangeReader for ReopenedFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        FileReader::open(&self.path)?.read_exact_at(offset, buf)
    }

    fn describe(&self) -> String {
        self.path.display().to_string()
    }
}
