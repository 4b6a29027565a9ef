//! RMS norm and layer norm. Maths: `rms_norm.rs`, `layer_norm.rs`.

use burn_flex::FlexTensor;

use super::linear::widened;
use super::reduce::RowBlocks;
use super::simd::{fma, lane_sum, vectorized};
use super::storage::{contiguous_f32, values};
use super::threads::{SharedMut, num_parts, part, run_jobs};
use super::{fast_path, pool};
use crate::primitive::{dims, rows_and_last};
use crate::rms_norm::NormSpec;

/// A job normalizes at least this many elements.
const MIN_PART: usize = 16 << 10;

/// `None` when the dtypes are not covered; so for all functions here.
pub(super) fn rms_norm(x: &FlexTensor, weight: &FlexTensor, spec: NormSpec) -> Option<FlexTensor> {
    let (x, weight) = (contiguous_f32(x)?, factor(weight, spec)?);
    fast_path::took("rms_norm_forward");
    let shape = dims(&x);
    Some(by_rows(&shape, values(&x), |x, y| {
        rms_norm_rows(x, &weight, spec.eps as f32, y)
    }))
}

pub(super) fn rms_norm_backward(
    x: &FlexTensor,
    weight: &FlexTensor,
    dy: &FlexTensor,
    spec: NormSpec,
) -> Option<(FlexTensor, FlexTensor)> {
    let (x, dy, weight) = (
        contiguous_f32(x)?,
        contiguous_f32(dy)?,
        factor(weight, spec)?,
    );
    fast_path::took("rms_norm_backward");
    let (shape, hidden) = (dims(&x), weight.len());
    let blocks = RowBlocks::new(rows_and_last(&shape).0, hidden);
    let (x, dy) = (values(&x), values(&dy));
    let mut dweight = Vec::new();
    let dx = pool::new_f32(&shape, |dx| {
        let dx = SharedMut::new(dx);
        dweight = blocks.sums(hidden, |rows, dweight| {
            let range = rows.start * hidden..rows.end * hidden;
            // SAFETY: blocks of rows are disjoint.
            let dx = unsafe { dx.slice(range.clone()) };
            rms_norm_backward_rows(
                &x[range.clone()],
                &weight,
                &dy[range],
                spec.eps as f32,
                dx,
                dweight,
            );
        });
    });
    Some((
        dx,
        pool::new_f32(&[hidden], |out| out.copy_from_slice(&dweight)),
    ))
}

pub(super) fn layer_norm(
    x: &FlexTensor,
    weight: &FlexTensor,
    bias: Option<&FlexTensor>,
    spec: NormSpec,
) -> Option<FlexTensor> {
    let (x, weight) = (contiguous_f32(x)?, factor(weight, spec)?);
    let bias = match bias {
        Some(bias) => widened(bias)?,
        None => vec![0.0; weight.len()],
    };
    fast_path::took("layer_norm_forward");
    let shape = dims(&x);
    Some(by_rows(&shape, values(&x), |x, y| {
        layer_norm_rows(x, &weight, &bias, spec.eps as f32, y)
    }))
}

pub(super) fn layer_norm_backward(
    x: &FlexTensor,
    weight: &FlexTensor,
    dy: &FlexTensor,
    spec: NormSpec,
) -> Option<(FlexTensor, FlexTensor, FlexTensor)> {
    let (x, dy, weight) = (
        contiguous_f32(x)?,
        contiguous_f32(dy)?,
        factor(weight, spec)?,
    );
    fast_path::took("layer_norm_backward");
    let (shape, hidden) = (dims(&x), weight.len());
    let blocks = RowBlocks::new(rows_and_last(&shape).0, hidden);
    let (x, dy) = (values(&x), values(&dy));
    let mut sums = Vec::new();
    let dx = pool::new_f32(&shape, |dx| {
        let dx = SharedMut::new(dx);
        sums = blocks.sums(2 * hidden, |rows, sums| {
            let range = rows.start * hidden..rows.end * hidden;
            // SAFETY: blocks of rows are disjoint.
            let dx = unsafe { dx.slice(range.clone()) };
            layer_norm_backward_rows(
                &x[range.clone()],
                &weight,
                &dy[range],
                spec.eps as f32,
                dx,
                sums,
            );
        });
    });
    let vector = |from: usize| {
        pool::new_f32(&[hidden], |out| {
            out.copy_from_slice(&sums[from..from + hidden])
        })
    };
    Some((dx, vector(0), vector(hidden)))
}

/// The fp32 factor: the weight, plus one with a unit offset.
fn factor(weight: &FlexTensor, spec: NormSpec) -> Option<Vec<f32>> {
    let mut weight = widened(weight)?;
    if spec.unit_offset {
        weight.iter_mut().for_each(|w| *w += 1.0);
    }
    Some(weight)
}

/// A tensor like x whose rows are a function of the rows of x.
fn by_rows(
    shape: &[usize],
    x: &[f32],
    kernel: impl Fn(&[f32], &mut [f32]) + Send + Sync,
) -> FlexTensor {
    let (rows, hidden) = rows_and_last(shape);
    pool::new_f32(shape, |y| {
        let jobs = num_parts(x.len(), MIN_PART).min(rows.max(1));
        let y = SharedMut::new(y);
        run_jobs(jobs, |job| {
            let rows = part(rows, jobs, 1, job);
            let range = rows.start * hidden..rows.end * hidden;
            // SAFETY: jobs have different rows.
            kernel(&x[range.clone()], unsafe { y.slice(range) });
        });
    })
}

vectorized! {
    fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let hidden = weight.len();
        for (x, y) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)) {
            let r = inverse_rms::<FMA>(x, eps);
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * r * w;
            }
        }
    }
}

vectorized! {
    fn rms_norm_backward_rows(
        x: &[f32],
        weight: &[f32],
        dy: &[f32],
        eps: f32,
        dx: &mut [f32],
        dweight: &mut [f32],
    ) {
        let hidden = weight.len();
        let rows = x.chunks_exact(hidden).zip(dy.chunks_exact(hidden)).zip(dx.chunks_exact_mut(hidden));
        for ((x, dy), dx) in rows {
            let (x, dy, dweight) = (&x[..hidden], &dy[..hidden], &mut dweight[..hidden]);
            let r = inverse_rms::<FMA>(x, eps);
            let dot = lane_sum([dy, weight, x], |[dy, w, x], sum| fma::<FMA>(dy * w, x, sum));
            // mean(g n) r, where n = x r
            let slope = dot * r * r / hidden as f32;
            for i in 0..hidden {
                dx[i] = r * fma::<FMA>(-slope, x[i], dy[i] * weight[i]);
                dweight[i] = fma::<FMA>(dy[i], x[i] * r, dweight[i]);
            }
        }
    }
}

#[inline(always)]
fn inverse_rms<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    let sum = lane_sum([x], |[x], sum| fma::<FMA>(x, x, sum));
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}

vectorized! {
    fn layer_norm_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
        let hidden = weight.len();
        for (x, y) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)) {
            let (mean, r) = mean_and_inverse_deviation::<FMA>(x, eps);
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = fma::<FMA>((x - mean) * r, *w, *b);
            }
        }
    }
}

vectorized! {
    /// `sums` is dweight, then dbias.
    fn layer_norm_backward_rows(x: &[f32], weight: &[f32], dy: &[f32], eps: f32, dx: &mut [f32], sums: &mut [f32]) {
        let hidden = weight.len();
        let (dweight, dbias) = sums.split_at_mut(hidden);
        let rows = x.chunks_exact(hidden).zip(dy.chunks_exact(hidden)).zip(dx.chunks_exact_mut(hidden));
        for ((x, dy), dx) in rows {
            let (x, dy) = (&x[..hidden], &dy[..hidden]);
            let (mean, r) = mean_and_inverse_deviation::<FMA>(x, eps);
            let g_sum = lane_sum([dy, weight], |[dy, w], sum| fma::<FMA>(dy, w, sum));
            let gn_sum = lane_sum([dy, weight, x], |[dy, w, x], sum| fma::<FMA>(dy * w, (x - mean) * r, sum));
            let (g_mean, gn_mean) = (g_sum / hidden as f32, gn_sum / hidden as f32);
            for i in 0..hidden {
                let n = (x[i] - mean) * r;
                dx[i] = r * (fma::<FMA>(dy[i], weight[i], -g_mean) - n * gn_mean);
                dweight[i] = fma::<FMA>(dy[i], n, dweight[i]);
                dbias[i] += dy[i];
            }
        }
    }
}

#[inline(always)]
fn mean_and_inverse_deviation<const FMA: bool>(x: &[f32], eps: f32) -> (f32, f32) {
    let mean = lane_sum([x], |[x], sum| sum + x) / x.len() as f32;
    let square = lane_sum([x], |[x], sum| fma::<FMA>(x - mean, x - mean, sum));
    (mean, 1.0 / (square / x.len() as f32 + eps).sqrt())
}
