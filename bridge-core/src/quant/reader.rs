//! A quantized tensor seen as a file of bf16 values.

use super::{MXFP4_BLOCK, QuantScheme, Quantized, fp8, mxfp4};
use crate::checkpoint::{Checkpoint, CheckpointError, RangeReader, TensorInfo};

/// Codes decoded at a time: what a processor's second-level cache holds.
const CHUNK: usize = 64 << 10;

/// The bf16 values of a quantized tensor, in row-major order, computed as they are read.
pub(crate) struct DequantizingReader<'a> {
    scheme: QuantScheme,
    numel: usize,
    /// Extent of the last dimension.
    cols: usize,
    values: Part<'a>,
    scales: Part<'a>,
}

/// A stored tensor.
struct Part<'a> {
    reader: &'a dyn RangeReader,
    base: u64,
    name: &'a str,
}

impl<'a> Part<'a> {
    fn of(checkpoint: &'a Checkpoint, info: &'a TensorInfo) -> Self {
        Self {
            reader: checkpoint.reader(info),
            base: info.offset,
            name: &info.name,
        }
    }

    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), CheckpointError> {
        self.reader.read_exact_at(self.base + offset as u64, buf)
    }
}

impl<'a> DequantizingReader<'a> {
    /// The tensor stored as `quantized` in `checkpoint`; `None` if the checkpoint lacks a part.
    pub(crate) fn new(checkpoint: &'a Checkpoint, quantized: &Quantized) -> Option<Self> {
        let values = checkpoint.get(&quantized.values.name)?;
        let scales = checkpoint.get(&quantized.scales.name)?;
        let codes: usize = values.shape.iter().product();
        let (numel, cols) = match quantized.scheme {
            QuantScheme::Fp8Block { .. } => (codes, *values.shape.last()?),
            QuantScheme::Mxfp4 => (2 * codes, MXFP4_BLOCK),
        };
        Some(Self {
            scheme: quantized.scheme,
            numel,
            cols,
            values: Part::of(checkpoint, values),
            scales: Part::of(checkpoint, scales),
        })
    }

    fn fp8(
        &self,
        [rows, cols]: [usize; 2],
        mut at: usize,
        mut out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let blocks = self.cols.div_ceil(cols);
        let mut codes = vec![0; CHUNK.min(out.len() / 2)];
        let (mut stored, mut scales) = (vec![0; blocks * 4], vec![0.0; blocks]);
        let mut scale_row = None;
        while !out.is_empty() {
            let count = CHUNK.min(out.len() / 2);
            let codes = &mut codes[..count];
            self.values.read(at, codes)?;
            let mut codes: &[u8] = codes;
            while !codes.is_empty() {
                let (row, col) = (at / self.cols, at % self.cols);
                if scale_row != Some(row / rows) {
                    self.scales.read(row / rows * blocks * 4, &mut stored)?;
                    scale_row = Some(row / rows);
                    for (scale, bytes) in scales.iter_mut().zip(stored.as_chunks::<4>().0) {
                        *scale = f32::from_le_bytes(*bytes);
                    }
                }
                let run = (self.cols - col).min(codes.len());
                let (now, later) = codes.split_at(run);
                let (target, rest) = out.split_at_mut(2 * run);
                fp8::decode_row(now, col, cols, &scales, target);
                (codes, out, at) = (later, rest, at + run);
            }
        }
        Ok(())
    }

    fn mxfp4(&self, start: usize, out: &mut [u8]) -> Result<(), CheckpointError> {
        const BYTES: usize = 2 * MXFP4_BLOCK;
        let end = start + out.len() / 2;
        let (first, last) = (start / MXFP4_BLOCK, end.div_ceil(MXFP4_BLOCK));
        let step = (CHUNK / MXFP4_BLOCK).min(last - first).max(1);
        let (mut codes, mut scales) = (vec![0; step * 16], vec![0; step]);
        let mut edge = Vec::new();
        for block in (first..last).step_by(step) {
            let count = step.min(last - block);
            let (codes, scales) = (&mut codes[..count * 16], &mut scales[..count]);
            self.values.read(block * 16, codes)?;
            self.scales.read(block, scales)?;
            let own = block * MXFP4_BLOCK..(block + count) * MXFP4_BLOCK;
            if own.start >= start && own.end <= end {
                let at = 2 * (own.start - start);
                mxfp4::decode(codes, scales, &mut out[at..at + count * BYTES]);
                continue;
            }
            edge.resize(count * BYTES, 0);
            mxfp4::decode(codes, scales, &mut edge);
            let wanted = own.start.max(start)..own.end.min(end);
            let from = 2 * (wanted.start - own.start);
            let to = 2 * (wanted.start - start);
            let len = 2 * wanted.len();
            out[to..to + len].copy_from_slice(&edge[from..from + len]);
        }
        Ok(())
    }
}

impl RangeReader for DequantizingReader<'_> {
    fn len(&self) -> u64 {
        2 * self.numel as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let beyond = || CheckpointError::Io {
            action: "read",
            path: self.describe().into(),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        };
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| *end <= self.len())
            .ok_or_else(beyond)?;
        if !offset.is_multiple_of(2) || !end.is_multiple_of(2) {
            // Half an element: nothing in this crate asks for that, and other readers may.
            let (from, to) = (offset & !1, end.next_multiple_of(2));
            let mut whole = vec![0; (to - from) as usize];
            self.read_exact_at(from, &mut whole)?;
            buf.copy_from_slice(&whole[(offset - from) as usize..][..buf.len()]);
            return Ok(());
        }
        let start = (offset / 2) as usize;
        match self.scheme {
            QuantScheme::Fp8Block { rows, cols } => self.fp8([rows, cols], start, buf),
            QuantScheme::Mxfp4 => self.mxfp4(start, buf),
        }
    }

    fn describe(&self) -> String {
        format!("{} in {}", self.values.name, self.values.reader.describe())
    }
}
