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
                rotation.apply(token % table_rows, source.map(|x| &x[range]), out);
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
    /// Rotates the heads of one token, in place if there is no source, by the angles of a row of the table.
    fn apply(&self, row: usize, source: Option<&[f32]>, out: &mut [f32]) {
        let angles = row * self.half..(row + 1) * self.half;
        let (cos, sin) = (&self.cos[angles.clone()], &self.sin[angles]);
        match (self.style, source) {
            (RotaryStyle::Halves, None) => {
                halves_in_place(out, self.head_dim, cos, sin, self.sign);
            }
            (RotaryStyle::Halves, Some(source)) => {
                halves_of(source, out, self.head_dim, cos, sin, self.sign);
            }
            (RotaryStyle::Pairs, source) => {
                if let Some(source) = source {
                    out.copy_from_slice(source);
                }
                rotate_pairs(out, self.head_dim, cos, sin, self.sign);
            }
        }
    }
}

vectorized! {
    fn halves_in_place(heads: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
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
    // Copying a token first and rotating it in place would be shorter, but the copy of a few kilobytes takes several
    // times as long as the arithmetic on processors whose string moves suffer from page aliasing (AMD Zen 3 and 4).
    fn halves_of(source: &[f32], out: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for (source, out) in source.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            let (x, rest) = source.split_at(half);
            let (y, rest) = rest.split_at(half);
            let (a, unrotated) = out.split_at_mut(half);
            let (b, unrotated) = unrotated.split_at_mut(half);
            let outputs = a.iter_mut().zip(b);
            for ((a, b), ((x, y), (cos, sin))) in outputs.zip(x.iter().zip(y).zip(cos.iter().zip(sin))) {
                let sin = sign * sin;
                *a = fma::<FMA>(*x, *cos, -y * sin);
                *b = fma::<FMA>(*y, *cos, x * sin);
            }
            unrotated.iter_mut().zip(rest).for_each(|(out, x)| *out = *x);
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
