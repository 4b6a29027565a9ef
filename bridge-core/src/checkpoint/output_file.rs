//! Safetensors files while they are written: headers first, then tensors in any order, from any thread.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::copy::{copy_range, reserve, write_all_at};
use super::coverage::Coverage;
use super::error::{CheckpointError, IoContext, Result, quote};
use super::header::Header;
use super::source::RangeReader;
use super::staging::Durability;
use crate::error::Problems;

/// A set of files in which every byte of every tensor is to be written exactly once.
#[derive(Debug, Default)]
pub(super) struct OutputFiles {
    files: Vec<OutputFile>,
    tensors: Vec<OutputTensor>,
    /// Writes that failed: the output cannot be complete after one, even if its caller carries on.
    failures: Mutex<Problems>,
}

#[derive(Debug)]
struct OutputFile {
    file: File,
    path: PathBuf,
}

#[derive(Debug)]
struct OutputTensor {
    name: String,
    file: usize,
    /// First byte in the file.
    start: u64,
    len: u64,
    written: Mutex<Coverage>,
}

impl OutputFiles {
    /// Creates a safetensors file with the given header (`bytes`: all that stands before the first tensor), takes its
    /// room on the disk, and appends its tensors, in header order, to those known.
    pub(super) fn add(&mut self, path: PathBuf, bytes: &[u8], header: &Header) -> Result<()> {
        let len = header.data_start + header.data_len();
        let tensors = header.entries.iter().map(|entry| {
            let start = header.data_start + entry.offset;
            (entry.spec.name.clone(), start, entry.len)
        });
        let file = self.add_raw(path, len, tensors)?;
        self.write_raw(file, 0, bytes)
    }

    /// Creates a file of `len` bytes, takes its room on the disk, and appends the tensors (name, first byte, length) that
    /// lie in it to those known. Returns its number.
    pub(super) fn add_raw(
        &mut self,
        path: PathBuf,
        len: u64,
        tensors: impl Iterator<Item = (String, u64, u64)>,
    ) -> Result<usize> {
        let file =
            File::create_new(&path).map_err(|error| CheckpointError::write(&path, len, error))?;
        reserve(&file, len).map_err(|error| CheckpointError::write(&path, len, error))?;
        let index = self.files.len();
        self.tensors
            .extend(tensors.map(|(name, start, len)| OutputTensor {
                name,
                file: index,
                start,
                len,
                written: Mutex::default(),
            }));
        self.files.push(OutputFile { file, path });
        Ok(index)
    }

    /// Writes bytes of a file that belong to no tensor.
    pub(super) fn write_raw(&self, file: usize, at: u64, bytes: &[u8]) -> Result<()> {
        let OutputFile { file, path } = &self.files[file];
        write_all_at(file, at, bytes)
            .map_err(|error| CheckpointError::write(path, bytes.len() as u64, error))
    }

    /// Number of the file that a tensor lies in.
    pub(super) fn file_of(&self, tensor: usize) -> usize {
        self.tensors[tensor].file
    }

    pub(super) fn write_at(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let (file, at) = self.claim(tensor, offset, bytes.len() as u64)?;
        let written = write_all_at(&file.file, at, bytes);
        self.note(
            tensor,
            written.map_err(|error| CheckpointError::write(&file.path, bytes.len() as u64, error)),
        )
    }

    pub(super) fn copy_from(
        &self,
        tensor: usize,
        offset: u64,
        source: &dyn RangeReader,
        source_offset: u64,
        len: u64,
    ) -> Result<()> {
        let (file, at) = self.claim(tensor, offset, len)?;
        self.note(
            tensor,
            copy_range(source, source_offset, &file.file, &file.path, at, len),
        )
    }

    /// The file and position of bytes about to be written, which no one else may write.
    fn claim(&self, tensor: usize, offset: u64, len: u64) -> Result<(&OutputFile, u64)> {
        let tensor = &self.tensors[tensor];
        let Some(end) = offset.checked_add(len).filter(|&end| end <= tensor.len) else {
            let problem = format!(
                "a write of {len} bytes at byte {offset} leaves its {} bytes",
                tensor.len
            );
            return Err(CheckpointError::BadRange {
                name: tensor.name.clone(),
                problem,
            });
        };
        if !lock(&tensor.written).claim(offset, end) {
            return Err(CheckpointError::WrittenTwice {
                name: tensor.name.clone(),
                start: offset,
                end,
            });
        }
        Ok((&self.files[tensor.file], tensor.start + offset))
    }

    fn note(&self, tensor: usize, result: Result<()>) -> Result<()> {
        if let Err(error) = &result {
            lock(&self.failures).push(format!(
                "tensor {}: {error}",
                quote(&self.tensors[tensor].name)
            ));
        }
        result
    }

    /// Checks that every byte is there, and synchronises the files when asked to.
    ///
    /// # Errors
    /// [`CheckpointError::Incomplete`], with every tensor that lacks bytes; `path` is the output as a whole.
    pub(super) fn finish(self, path: &Path, durability: Durability) -> Result<()> {
        let mut problems = self
            .failures
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        for tensor in self.tensors {
            let written = tensor
                .written
                .into_inner()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some((start, end)) = written.first_gap(tensor.len) {
                let (name, len) = (quote(&tensor.name), tensor.len);
                problems.push(format!(
                    "tensor {name}: bytes {start}..{end} of {len} were never written"
                ));
            }
        }
        if !problems.is_empty() {
            return Err(CheckpointError::Incomplete {
                path: path.to_path_buf(),
                problems,
            });
        }
        if durability == Durability::Synced {
            for OutputFile { file, path } in &self.files {
                file.sync_all().context("synchronise", path)?;
            }
        }
        Ok(())
    }
}

/// The state behind the lock is valid after every step, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
