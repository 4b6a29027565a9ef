//! What the recurrences share that are computed chunk by chunk: how a batch is cut, and what a block keeps in shared memory.
//! Kernels: `kernels/chunk_tiles.cuh`.

use burn_backend::DType;

use crate::device::{Argument, Gpu};
use crate::tensor::CudaTensor;

/// Threads of a block, `THREADS` of the kernel files.
pub(super) const THREADS: u32 = 256;

/// Tokens of a chunk, `LEN` of the kernel files. Changes rounding only, so it need not be the model's: 64 fill the tensor
/// cores' tiles, and in fp32 half of that leaves room for the states in shared memory.
pub(super) fn chunk_length(dtype: DType) -> usize {
    if dtype == DType::F32 { 32 } else { 64 }
}

/// Chunks whose operands a block that walks a sequence holds at a time: one is computed while the next arrives, where
/// shared memory has the room.
pub(super) fn stages(dtype: DType) -> usize {
    if dtype == DType::F32 { 1 } else { 2 }
}

/// A size filled up to whole tiles, `filled` of the kernel files.
pub(super) fn filled(size: usize) -> usize {
    size.next_multiple_of(16)
}

/// Mirrors `Chunks` in `kernels/chunk_tiles.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Chunks {
    table: u64,
    count: i64,
    seq: i64,
    per_row: i64,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Chunks {}

/// How a batch is cut into sequences and those into chunks.
#[derive(Debug)]
pub(super) struct Cut {
    pub(super) chunks: Chunks,
    /// Number of chunks.
    pub(super) count: usize,
    /// Number of sequences: rows, or documents within them.
    pub(super) sequences: usize,
    /// What `chunks` points at.
    _table: Option<CudaTensor>,
}

impl Cut {
    /// Cuts `[batch, seq]` tokens into chunks of up to `length`. `documents` are offsets into the batch's tokens in row-major
    /// order; each document within a row is a sequence of its own.
    pub(super) fn new(
        gpu: &'static Gpu,
        [batch, seq]: [usize; 2],
        length: usize,
        documents: Option<&[usize]>,
    ) -> Self {
        let per_row = seq.div_ceil(length);
        let Some(documents) = documents else {
            let count = batch * per_row;
            let chunks = Chunks {
                table: 0,
                count: count as i64,
                seq: seq as i64,
                per_row: per_row as i64,
            };
            return Self {
                chunks,
                count,
                sequences: batch,
                _table: None,
            };
        };
        let (mut table, mut first) = table(documents, [batch, seq], length);
        let (count, sequences) = (table.len() / 2, first.len());
        table.append(&mut first);
        table.push(count as i32);
        let table = CudaTensor::from_bytes(
            gpu,
            bytemuck::cast_slice(&table),
            &[table.len()],
            DType::I32,
        );
        Self {
            chunks: Chunks {
                table: table.address(),
                count: count as i64,
                seq: seq as i64,
                per_row: 0,
            },
            count,
            sequences,
            _table: Some(table),
        }
    }
}

/// Start and length of each chunk, one after the other; and the first chunk of each sequence.
fn table(documents: &[usize], [batch, seq]: [usize; 2], length: usize) -> (Vec<i32>, Vec<i32>) {
    let (mut chunks, mut first) = (Vec::new(), Vec::new());
    for row in 0..batch {
        for document in documents.windows(2) {
            let start = document[0].max(row * seq);
            let end = document[1].min((row + 1) * seq);
            if start >= end {
                continue;
            }
            first.push((chunks.len() / 2) as i32);
            for token in (start..end).step_by(length) {
                chunks.extend([token as i32, (end - token).min(length) as i32]);
            }
        }
    }
    (chunks, first)
}

/// Counts the shared memory of a kernel as its `Arena` takes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared {
    element: usize,
    length: usize,
    pub(super) bytes: usize,
}

impl Shared {
    pub(super) fn new(dtype: DType) -> Self {
        Self {
            element: dtype.size(),
            length: chunk_length(dtype),
            bytes: 0,
        }
    }

    /// `count` tiles of `rows` rows.
    pub(super) fn tiles(mut self, count: usize, rows: usize, columns: usize) -> Self {
        self.bytes += count * rows * (columns * self.element + 16);
        self
    }

    /// `count` arrays of `length` floats.
    pub(super) fn floats(mut self, count: usize, length: usize) -> Self {
        self.bytes += count * (length * 4).next_multiple_of(16);
        self
    }

    /// The decays of `count` chunks.
    pub(super) fn decays(mut self, count: usize) -> Self {
        self.bytes += (count * (4 * self.length + 1) * 4).next_multiple_of(16);
        self
    }
}

/// Whether rows of `sizes` elements are whole 16-byte pieces, which move in one instruction. `ALIGNED` of the kernel files.
pub(super) fn whole_pieces(dtype: DType, sizes: [usize; 2]) -> bool {
    sizes
        .iter()
        .all(|size| (size * dtype.size()).is_multiple_of(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_cut_at_rows_and_empty_ones_left_out() {
        let (chunks, first) = table(&[0, 5, 5, 13, 20], [2, 10], 4);
        assert_eq!(chunks, [0, 4, 4, 1, 5, 4, 9, 1, 10, 3, 13, 4, 17, 3]);
        assert_eq!(first, [0, 2, 4, 5]);
    }
}
