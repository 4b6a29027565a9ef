//! Bulk casts between floating-point types, over the raw little-endian bytes of a tensor.

use rayon::prelude::*;

use super::convert::{self, BLOCK};
use super::{DType, float8};

/// Elements below which a cast stays on the calling thread: starting the others costs more than it saves.
const PARALLEL_THRESHOLD: usize = 1 << 17;
/// Elements that one task converts: a multiple of the block, and small enough to spread over many cores.
const TASK: usize = 1 << 15;
const _: () = assert!(TASK.is_multiple_of(BLOCK));

/// Why a cast was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CastError {
    /// The pair of types is not one that this crate converts.
    #[error(
        "cannot cast {from} to {to}: supported are casts from F64, F32, F16, BF16 and the 8-bit floats to F64, F32, \
         F16 and BF16; other types can only be copied"
    )]
    Unsupported {
        /// Type of the source elements.
        from: DType,
        /// Type asked for.
        to: DType,
    },
    /// A buffer does not hold the number of elements that the other one does.
    #[error(
        "cannot cast {from} to {to}: {from_bytes} source bytes need {expected} bytes of output, found {to_bytes}"
    )]
    Length {
        /// Type of the source elements.
        from: DType,
        /// Type asked for.
        to: DType,
        /// Bytes in the source.
        from_bytes: usize,
        /// Bytes in the output buffer.
        to_bytes: usize,
        /// Bytes that the output should have.
        expected: usize,
    },
    /// The source ends inside an element.
    #[error("{bytes} bytes are not a whole number of {dtype} elements")]
    Ragged {
        /// Type of the source elements.
        dtype: DType,
        /// Bytes in the source.
        bytes: usize,
    },
}

/// Writes the elements of `src` (of type `from`) to `out` as type `to`.
///
/// Rounds once, to nearest, ties to even; values too large become infinite; NaN stays NaN and keeps its sign. When
/// the types are equal the bytes are copied, whatever the type. Large inputs are spread over rayon's threads.
///
/// # Errors
/// [`CastError`] when the pair is not supported (integers are never converted) or the buffers do not fit together.
pub fn cast_bytes(src: &[u8], from: DType, to: DType, out: &mut [u8]) -> Result<(), CastError> {
    if from == to {
        if src.len() != out.len() {
            let expected = src.len();
            return Err(CastError::Length {
                from,
                to,
                from_bytes: src.len(),
                to_bytes: out.len(),
                expected,
            });
        }
        out.copy_from_slice(src);
        return Ok(());
    }
    let unsupported = CastError::Unsupported { from, to };
    let decode = Decode::new(from, to).ok_or(unsupported)?;
    let encode = encoder(to).ok_or(unsupported)?;
    let (from_size, to_size) = (
        from.bytes().ok_or(unsupported)?,
        to.bytes().ok_or(unsupported)?,
    );
    if !src.len().is_multiple_of(from_size) {
        return Err(CastError::Ragged {
            dtype: from,
            bytes: src.len(),
        });
    }
    let elements = src.len() / from_size;
    if out.len() != elements * to_size {
        let expected = elements * to_size;
        return Err(CastError::Length {
            from,
            to,
            from_bytes: src.len(),
            to_bytes: out.len(),
            expected,
        });
    }
    let convert = |src: &[u8], out: &mut [u8]| {
        let mut block = [0f32; BLOCK];
        for (src, out) in src
            .chunks(BLOCK * from_size)
            .zip(out.chunks_mut(BLOCK * to_size))
        {
            let block = &mut block[..src.len() / from_size];
            decode.run(src, block);
            encode(block, out);
        }
    };
    if elements < PARALLEL_THRESHOLD {
        convert(src, out);
    } else {
        let tasks = src
            .par_chunks(TASK * from_size)
            .zip(out.par_chunks_mut(TASK * to_size));
        tasks.for_each(|(src, out)| convert(src, out));
    }
    Ok(())
}

/// Reads the elements of `src` as f32, as [`cast_bytes`] would.
///
/// # Errors
/// As [`cast_bytes`].
pub fn decode_f32(src: &[u8], from: DType, out: &mut [f32]) -> Result<(), CastError> {
    let to = DType::F32;
    let unsupported = CastError::Unsupported { from, to };
    let decode = Decode::new(from, to).ok_or(unsupported)?;
    let size = from.bytes().ok_or(unsupported)?;
    if !src.len().is_multiple_of(size) {
        return Err(CastError::Ragged {
            dtype: from,
            bytes: src.len(),
        });
    }
    if src.len() / size != out.len() {
        let expected = src.len() / size * 4;
        return Err(CastError::Length {
            from,
            to,
            from_bytes: src.len(),
            to_bytes: out.len() * 4,
            expected,
        });
    }
    if out.len() < PARALLEL_THRESHOLD {
        decode.run(src, out);
    } else {
        src.par_chunks(TASK * size)
            .zip(out.par_chunks_mut(TASK))
            .for_each(|(src, out)| decode.run(src, out));
    }
    Ok(())
}

/// Writes `src` to `out` as type `to`, as [`cast_bytes`] would.
///
/// # Errors
/// As [`cast_bytes`].
pub fn encode_f32(src: &[f32], to: DType, out: &mut [u8]) -> Result<(), CastError> {
    let from = DType::F32;
    let unsupported = CastError::Unsupported { from, to };
    let encode = encoder(to).ok_or(unsupported)?;
    let size = to.bytes().ok_or(unsupported)?;
    if src.len() * size != out.len() {
        let expected = src.len() * size;
        return Err(CastError::Length {
            from,
            to,
            from_bytes: src.len() * 4,
            to_bytes: out.len(),
            expected,
        });
    }
    if src.len() < PARALLEL_THRESHOLD {
        encode(src, out);
    } else {
        src.par_chunks(TASK)
            .zip(out.par_chunks_mut(TASK * size))
            .for_each(|(src, out)| encode(src, out));
    }
    Ok(())
}

/// How a block of source bytes becomes f32.
///
/// Every source but F64 fits in f32 exactly. F64 is cut to f32 in the way that makes the step after it round as if
/// from the f64 itself.
enum Decode {
    Plain(fn(&[u8], &mut [f32])),
    Table(Box<[f32; 256]>),
}

impl Decode {
    fn new(from: DType, to: DType) -> Option<Self> {
        Some(match (from, to) {
            (DType::F32, _) => Decode::Plain(convert::f32_from_bytes),
            (DType::F16, _) => Decode::Plain(convert::f16_to_f32),
            (DType::BF16, _) => Decode::Plain(convert::bf16_to_f32),
            (DType::F64, DType::F32) => Decode::Plain(convert::f64_to_f32),
            (DType::F64, _) => Decode::Plain(convert::f64_to_f32_round_to_odd),
            _ => Decode::Table(Box::new(float8::table(from)?)),
        })
    }

    fn run(&self, src: &[u8], out: &mut [f32]) {
        match self {
            Decode::Plain(decode) => decode(src, out),
            Decode::Table(table) => {
                for (out, &code) in out.iter_mut().zip(src) {
                    *out = table[code as usize];
                }
            }
        }
    }
}

/// How f32 becomes bytes of `to`.
fn encoder(to: DType) -> Option<fn(&[f32], &mut [u8])> {
    Some(match to {
        DType::F64 => convert::f32_to_f64,
        DType::F32 => convert::f32_to_bytes,
        DType::F16 => convert::f32_to_f16,
        DType::BF16 => convert::f32_to_bf16,
        _ => return None,
    })
}

#[cfg(test)]
#[path = "cast_tests.rs"]
mod tests;
