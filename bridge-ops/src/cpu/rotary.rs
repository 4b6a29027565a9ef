//! Rotary embedding. Maths: `rotary.rs`.

use burn_flex::FlexTensor;

use super::simd::{fma, vectorized};
use super::storage::{contiguous_f32, owned_f32, unique_values, values};
use super::threads::{SharedMut, num_parts, part, run_jobs};
use super::{fast_path, pool};
use crate::primitive::dims;
use crate::rotary::{RotaryDirection, RotaryStyle};

/// A job rotates at least this many elements.
const MIN_PART: usize = 16 << 10;

/// In place when x is not shared. `Err` gives x back when the dtypes are not covered.
pub(super) fn rotary(
    x: FlexTensor,
    cos: &FlexTensor,
    sin: &FlexTensor,
    style: RotaryStyle,
    direction: RotaryDirection,
) -> Result<FlexTensor, FlexTensor> {
    let (Some(cos), Some(sin)) = (contiguous_f32(cos), contiguous_f32(sin)) else {
        return Err(x);
    };
    let mut x = owned_f32(x)?;
    fast_path::took("rotary");

    let shape = dims(&x);
    let table_shape = dims(&cos);
    let (tokens, token_len) = (shape[0] * shape[1], shape[2] * shape[3]);
    let table_rows = table_shape[0] * table_shape[1];
    let rotation = Rotation {
        cos: values(&cos),
        sin: values(&sin),
        half: table_shape[2],
        head_dim: shape[3],
        style,
        sign: if direction == RotaryDirection::Forward {
            1.0
        } else {
            -1.0
        },
    };
    let kernel = |source: Option<&[f32]>, out: &mut [f32]| {
        let jobs = num_parts(out.len(), MIN_PART).min(tokens.max(1));
        let out = SharedMut::new(out);
        run_jobs(jobs, |job| {
            for token in part(tokens, jobs, 1, job) {
                let range = token * token_len..(token + 1) * token_len;
                // SAFETY: each token is handled once.
                let out = unsafe { out.slice(range.clone()) };
                if let Some(source) = source {
                    out.copy_from_slice(&source[range]);
                }
                rotation.apply(token % table_rows, out);
            }
        });
    };
    if let Some(out) = unique_values(&mut x) {
        kernel(None, out);
        return Ok(x);
    }
    Ok(pool::new_f32(&shape, |out| kernel(Some(values(&x)), out)))
}

struct Rotation<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
    head_dim: usize,
    style: RotaryStyle,
    /// Of the sine.
    sign: f32,
}

impl Rotation<'_> {
    /// Rotates the heads of one token by the angles of a row of the table.
    fn apply(&self, row: usize, heads: &mut [f32]) {
        let angles = row * self.half..(row + 1) * self.half;
        let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
        match self.style {
            RotaryStyle::Halves => rotate_halves(heads, self.head_dim, cos, sin, self.sign),
            RotaryStyle::Pairs => rotate_pairs(heads, self.head_dim, cos, sin, self.sign),
        }
    }
}

vectorized! {
    fn rotate_halves(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in heads.chunks_exact_mut(head_dim) {
            let (a, b) = head[..2 * half].split_at_mut(half);
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
                let sin = sign * sin;
                let (x, y) = (*a, *b);
                *a = fma::<FMA>(x, *cos, -y * sin);
                *b = fma::<FMA>(y, *cos, x * sin);
            }
        }
    }
}

vectorized! {
    fn rotate_pairs(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        for head in heads.chunks_exact_mut(head_dim) {
            for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(cos.iter().zip(sin)) {
                let sin = sign * sin;
                let (x, y) = (pair[0], pair[1]);
                pair[0] = fma::<FMA>(x, *cos, -y * sin);
                pair[1] = fma::<FMA>(y, *cos, x * sin);
            }
        }
    }
}
