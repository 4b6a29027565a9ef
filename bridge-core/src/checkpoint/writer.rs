//! Writes a folder of safetensors files: streamed, in any order, published all at once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::error::{CheckpointError, Result, quote};
use super::folder::INDEX_FILE;
use super::header::{Header, LENGTH_BYTES, TensorSpec};
use super::output_file::OutputFiles;
use super::shards::{DEFAULT_MAX_SHARD_BYTES, Shard, ShardLayout};
use super::source::RangeReader;
use super::staging::{Durability, Existing, Staging, write_file};
use crate::error::Problems;

/// How a [`ShardedWriter`] writes.
#[derive(Debug, Clone)]
pub struct WriterOptions {
    /// Bytes of tensors per file. Default: [`DEFAULT_MAX_SHARD_BYTES`].
    pub max_shard_bytes: u64,
    /// `__metadata__` of the headers made here. Default: `format: pt`, which `transformers` asks for.
    pub metadata: Vec<(String, String)>,
    /// What the finished folder survives.
    pub durability: Durability,
    /// What to do about a folder in the target's place.
    pub existing: Existing,
    /// The files, when they are not to be decided by size: see [`ShardLayout::like`].
    pub layout: Option<ShardLayout>,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self {
            max_shard_bytes: DEFAULT_MAX_SHARD_BYTES,
            metadata: vec![("format".to_owned(), "pt".to_owned())],
            durability: Durability::default(),
            existing: Existing::default(),
            layout: None,
        }
    }
}

/// A folder of safetensors files while it is written.
///
/// All tensors are declared up front, so the headers stand and the room on the disk is taken before the first byte;
/// then every byte is written exactly once, in any order and from any number of threads. The folder appears under its
/// name only in [`ShardedWriter::finish`]; dropped before that, the writer leaves nothing behind.
///
/// ```
/// use bridge_core::checkpoint::{Checkpoint, ShardedWriter, TensorSpec, WriterOptions};
/// use bridge_core::dtype::DType;
///
/// # let folder = tempfile::tempdir()?;
/// let out = folder.path().join("model");
/// let tensors = vec![TensorSpec::new("norm.weight", DType::F32, [3])];
/// let writer = ShardedWriter::create(&out, tensors, WriterOptions::default())?;
/// let values: Vec<u8> = [1f32, 2.0, 3.0].iter().flat_map(|value| value.to_le_bytes()).collect();
/// writer.write_at(0, 4, &values[4..])?;
/// writer.write_at(0, 0, &values[..4])?;
/// writer.add_file("config.json", b"{}")?;
/// writer.finish()?;
///
/// let checkpoint = Checkpoint::open(&out)?;
/// let norm = checkpoint.tensor("norm.weight")?;
/// assert_eq!(checkpoint.read(norm)?, values);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ShardedWriter {
    staging: Staging,
    files: OutputFiles,
    /// For each declared tensor, its place in `files`.
    slots: Vec<usize>,
    tensors: Vec<TensorSpec>,
    by_name: HashMap<String, usize>,
    durability: Durability,
}

impl ShardedWriter {
    /// Lays out `tensors`, creates the files beside `target` and writes their headers.
    ///
    /// # Errors
    /// [`CheckpointError::BadLayout`] for tensors that cannot be written, [`CheckpointError::OutputExists`] or
    /// [`CheckpointError::NotReplaceable`] for the target, [`CheckpointError::DiskFull`] when there is no room.
    pub fn create(target: &Path, tensors: Vec<TensorSpec>, options: WriterOptions) -> Result<Self> {
        let WriterOptions {
            max_shard_bytes,
            metadata,
            durability,
            existing,
            layout,
        } = options;
        let by_name: HashMap<String, usize> = tensors
            .iter()
            .enumerate()
            .map(|(position, spec)| (spec.name.clone(), position))
            .collect();
        if by_name.len() != tensors.len() {
            let mut problems = Problems::new();
            for (position, spec) in tensors
                .iter()
                .enumerate()
                .filter(|(i, spec)| by_name[&spec.name] != *i)
            {
                problems.push(format!(
                    "tensor {} is declared again after position {position}",
                    quote(&spec.name)
                ));
            }
            return Err(CheckpointError::BadLayout { problems });
        }
        let layout = match layout {
            Some(layout) => layout,
            None => ShardLayout::by_size(&tensors, max_shard_bytes)?,
        };
        layout.check(&tensors)?;
        // All headers are made before the first file, so that what cannot be written leaves no trace.
        let headers: Vec<(Vec<u8>, Header)> = layout
            .shards
            .iter()
            .map(|shard| shard_header(shard, &tensors, &metadata))
            .collect::<Result<_>>()?;
        let needed = headers
            .iter()
            .map(|(_, header)| header.data_start.saturating_add(header.data_len()));
        let needed = needed.fold(0, u64::saturating_add);

        let staging = Staging::create(target, existing)?;
        staging.check_room(needed)?;
        let mut files = OutputFiles::default();
        let mut slots = vec![0; tensors.len()];
        let mut slot = 0;
        for (shard, (bytes, header)) in layout.shards.iter().zip(&headers) {
            files.add(staging.dir().join(&shard.file_name), bytes, header)?;
            for &tensor in &shard.tensors {
                slots[tensor] = slot;
                slot += 1;
            }
        }
        if let Some(index) = &layout.index_json {
            write_file(&staging.dir().join(INDEX_FILE), index, durability)?;
        }
        Ok(Self {
            staging,
            files,
            slots,
            tensors,
            by_name,
            durability,
        })
    }

    /// The tensors, as declared.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Position of a tensor in the list declared, which is how the other functions name it.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Writes `bytes` at byte `offset` of tensor number `tensor`. May be called from several threads at once.
    ///
    /// # Errors
    /// [`CheckpointError::BadRange`] outside the tensor, [`CheckpointError::WrittenTwice`] for bytes already
    /// written, [`CheckpointError::DiskFull`] or [`CheckpointError::Io`] when the system fails.
    ///
    /// # Panics
    /// When there is no tensor of that number.
    pub fn write_at(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        self.files.write_at(self.slots[tensor], offset, bytes)
    }

    /// Copies `len` bytes of `source`, from `source_offset` on, to byte `offset` of tensor number `tensor`.
    ///
    /// Between files the kernel copies, and the bytes never enter this process. May be called from several threads.
    ///
    /// # Errors
    /// As [`ShardedWriter::write_at`], and [`CheckpointError::Io`] when the source cannot be read.
    ///
    /// # Panics
    /// When there is no tensor of that number.
    pub fn copy_from(
        &self,
        tensor: usize,
        offset: u64,
        source: &dyn RangeReader,
        source_offset: u64,
        len: u64,
    ) -> Result<()> {
        self.files
            .copy_from(self.slots[tensor], offset, source, source_offset, len)
    }

    /// Number of the file that tensor number `tensor` lies in, counted from 0.
    ///
    /// # Panics
    /// When there is no tensor of that number.
    pub fn file_of(&self, tensor: usize) -> usize {
        self.files.file_of(self.slots[tensor])
    }

    /// The temporary folder, into which other files of the checkpoint may be put before [`ShardedWriter::finish`].
    pub fn staging_dir(&self) -> &Path {
        self.staging.dir()
    }

    /// Adds a small file (`config.json`, a tokenizer) to the folder.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], also when a file of that name is there already, and [`CheckpointError::DiskFull`].
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_file(&self.staging.dir().join(name), bytes, self.durability)
    }

    /// Checks that every byte of every tensor has been written, and publishes the folder. Returns its path.
    ///
    /// # Errors
    /// [`CheckpointError::Incomplete`] when bytes are missing, [`CheckpointError::Io`] when the rename fails; the
    /// target is untouched then and the temporary folder is gone.
    pub fn finish(self) -> Result<PathBuf> {
        self.files.finish(self.staging.target(), self.durability)?;
        self.staging.publish(self.durability)
    }
}

/// The bytes before a shard's first tensor, with what they say.
fn shard_header(
    shard: &Shard,
    tensors: &[TensorSpec],
    metadata: &[(String, String)],
) -> Result<(Vec<u8>, Header)> {
    let specs: Vec<TensorSpec> = shard
        .tensors
        .iter()
        .map(|&tensor| tensors[tensor].clone())
        .collect();
    let wrong = |problem| CheckpointError::Header {
        file: shard.file_name.clone(),
        problem,
    };
    let (bytes, made) = Header::encode(&specs, metadata).map_err(wrong)?;
    let Some(json) = &shard.header_json else {
        return Ok((bytes, made));
    };
    let given = Header::parse_json(json, made.data_len()).map_err(wrong)?;
    if given.entries != made.entries {
        let mut problems = Problems::new();
        problems.push(format!(
            "the header given for {} does not describe its tensors in their order",
            shard.file_name
        ));
        return Err(CheckpointError::BadLayout { problems });
    }
    let mut bytes = Vec::with_capacity(LENGTH_BYTES as usize + json.len());
    bytes.extend((json.len() as u64).to_le_bytes());
    bytes.extend(json);
    Ok((bytes, given))
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
