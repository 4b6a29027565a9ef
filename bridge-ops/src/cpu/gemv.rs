//! Products of a few rows with a weight: what generation spends its time on.
//!
//! ```text
//! y: [rows, out] = x: [rows, in] W^T           W: [out, in], fp32, bf16 or f16
//! ```
//!
//! The time goes into reading the weight, so it is read once, in the format it is stored in, and widened in registers.
//! Threads share the rows of the weight. The sum over `in` is kept in eight lanes by four, whoever computes it.

use super::simd::{Element, has_avx2};
use super::threads::{SharedMut, part, run_jobs};

/// Up to this many rows of x, reading the weight row by row beats packing it for the general product.
pub(crate) const MAX_ROWS: usize = 8;
/// Rows of x that share one pass over a row of the weight.
const GROUP: usize = 4;
/// A job reads at least this many elements of the weight.
const MIN_PART: usize = 32 << 10;

/// Writes `x W^T (+ bias)` to `y`.
pub(crate) fn gemv<T: Element>(
    x: &[f32],
    weight: &[T],
    bias: Option<&[f32]>,
    y: &mut [f32],
    inner: usize,
) {
    let out = weight.len() / inner.max(1);
    let rows = x.len() / inner.max(1);
    assert!(
        x.len() == rows * inner && weight.len() == out * inner && y.len() == rows * out,
        "gemv: sizes do not fit"
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == out),
        "gemv: the bias does not fit"
    );
    let jobs = super::threads::num_parts(weight.len(), MIN_PART).min(out.max(1));
    let y = SharedMut::new(y);
    run_jobs(jobs, |job| {
        let part = part(out, jobs, 1, job);
        for (group, x) in x.chunks(GROUP * inner).enumerate() {
            for o in part.clone() {
                let sums = dots(x, &weight[o * inner..][..inner]);
                let bias = bias.map_or(0.0, |bias| bias[o]);
                for (r, sum) in sums.into_iter().enumerate().take(x.len() / inner) {
                    let at = (group * GROUP + r) * out + o;
                    // SAFETY: jobs write different columns.
                    unsafe { y.slice(at..at + 1)[0] = sum + bias };
                }
            }
        }
    });
}

/// Dot products of up to [`GROUP`] rows of x with one row of the weight.
#[inline]
fn dots<T: Element>(x: &[f32], weight: &[T]) -> [f32; GROUP] {
    let inner = weight.len();
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the processor has AVX2; x holds whole rows.
        unsafe {
            return match x.len() / inner {
                1 => avx2::dots::<T, 1>(x, weight),
                2 => avx2::dots::<T, 2>(x, weight),
                3 => avx2::dots::<T, 3>(x, weight),
                _ => avx2::dots::<T, 4>(x, weight),
            };
        }
    }
    let mut sums = [0.0; GROUP];
    for (sum, x) in sums.iter_mut().zip(x.chunks_exact(inner)) {
        *sum = portable_dot(x, weight);
    }
    sums
}

fn portable_dot<T: Element>(x: &[f32], weight: &[T]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    let (xs, ws) = (x.chunks_exact(16), weight.chunks_exact(16));
    let rest: f32 = xs
        .remainder()
        .iter()
        .zip(ws.remainder())
        .map(|(x, w)| x * w.widen())
        .sum();
    for (x, w) in xs.zip(ws) {
        for ((lane, x), w) in lanes.iter_mut().zip(x).zip(w) {
            *lane += x * w.widen();
        }
    }
    lanes.iter().sum::<f32>() + rest
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_movehl_ps, _mm_shuffle_ps,
        _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_setzero_ps,
    };

    use super::super::simd::Element;
    use super::GROUP;

    /// # Safety
    /// AVX2, FMA and F16C; x holds `ROWS` rows as long as the weight.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn dots<T: Element, const ROWS: usize>(
        x: &[f32],
        weight: &[T],
    ) -> [f32; GROUP] {
        let inner = weight.len();
        debug_assert!(x.len() >= ROWS * inner);
        // One row of x needs several sums to keep two multiply-add units busy; more rows bring theirs.
        const UNROLL: usize = 4;
        let mut sums = [[_mm256_setzero_ps(); UNROLL]; ROWS];
        let mut i = 0;
        // SAFETY: all reads are below `inner` of a row.
        unsafe {
            while i + 8 * UNROLL <= inner {
                for u in 0..UNROLL {
                    let w = T::load8(weight.as_ptr().add(i + 8 * u));
                    for (row, sums) in sums.iter_mut().enumerate() {
                        sums[u] = _mm256_fmadd_ps(
                            _mm256_loadu_ps(x.as_ptr().add(row * inner + i + 8 * u)),
                            w,
                            sums[u],
                        );
                    }
                }
                i += 8 * UNROLL;
            }
            while i + 8 <= inner {
                let w = T::load8(weight.as_ptr().add(i));
                for (row, sums) in sums.iter_mut().enumerate() {
                    sums[0] = _mm256_fmadd_ps(
                        _mm256_loadu_ps(x.as_ptr().add(row * inner + i)),
                        w,
                        sums[0],
                    );
                }
                i += 8;
            }
        }
        let mut result = [0.0; GROUP];
        for (row, (result, sums)) in result.iter_mut().zip(sums).enumerate() {
            let lanes = _mm256_add_ps(
                _mm256_add_ps(sums[0], sums[1]),
                _mm256_add_ps(sums[2], sums[3]),
            );
            *result = horizontal_sum(lanes);
            for j in i..inner {
                *result = x[row * inner + j].mul_add(weight[j].widen(), *result);
            }
        }
        result
    }

    #[target_feature(enable = "avx2")]
    fn horizontal_sum(lanes: __m256) -> f32 {
        let four = _mm_add_ps(
            _mm256_castps256_ps128(lanes),
            _mm256_extractf128_ps::<1>(lanes),
        );
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}
