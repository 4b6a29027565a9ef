//! The files of a native checkpoint that are written side by side.

use std::path::PathBuf;

use rayon::prelude::*;

use super::transfer::Sink;
use crate::checkpoint::RangeReader;
use crate::checkpoint::native::{Group, NativeWriter, PieceSpec, PieceWriter};
use crate::error::Result;

/// All files of a checkpoint's model; tensors are numbered through.
pub(super) struct PieceFiles {
    files: Vec<PieceWriter>,
    /// File and piece of each number.
    places: Vec<(usize, usize)>,
}

impl PieceFiles {
    /// Makes a file of each part. All at once, because file systems in memory take as long to give room as to be written.
    pub(super) fn create(writer: &NativeWriter, parts: Vec<Vec<PieceSpec>>) -> Result<Self> {
        let places = parts
            .iter()
            .enumerate()
            .flat_map(|(part, pieces)| (0..pieces.len()).map(move |piece| (part, piece)))
            .collect();
        let files = parts
            .into_par_iter()
            .enumerate()
            .map(|(part, pieces)| writer.piece_file(Group::Model, part, pieces))
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self { files, places })
    }

    /// Checks that everything is there, and publishes the checkpoint. Returns its folder.
    pub(super) fn finish(self, writer: NativeWriter) -> Result<PathBuf> {
        let parts = self.files.len();
        for file in self.files {
            file.finish()?;
        }
        Ok(writer.finish(parts, 0)?)
    }
}

impl Sink for PieceFiles {
    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let (file, piece) = self.places[tensor];
        Ok(self.files[file].write_at(piece, offset, bytes)?)
    }

    fn copy(
        &self,
        tensor: usize,
        offset: u64,
        reader: &dyn RangeReader,
        start: u64,
        len: u64,
    ) -> Result<()> {
        let (file, piece) = self.places[tensor];
        Ok(self.files[file].copy_from(piece, offset, reader, start, len)?)
    }

    fn file(&self, tensor: usize) -> usize {
        self.places[tensor].0
    }
}
