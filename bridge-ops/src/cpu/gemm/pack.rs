//! Copying parts of the operands into panels, the order in which the innermost loop reads them.
//!
//! A panel of the left operand holds [`MR`] rows: for each step of the depth the values of these rows. One of the right
//! operand holds [`NR`] columns likewise. Rows and columns past the edge are zero.

use std::ops::Range;

use super::super::threads::{SharedMut, part, run_jobs_on};
use super::kernel::{Isa, MR, NR};
use super::{Element, Matrix};

/// Packs `rows` (whole panels of them) and `depth` of `a` into `panels`: [panel][depth][MR].
pub(super) fn pack_left(
    isa: Isa,
    a: &Matrix<'_, f32>,
    rows: Range<usize>,
    depth: Range<usize>,
    panels: &mut [f32],
) {
    let panel_len = depth.len() * MR;
    let whole = rows.len() / MR;
    if a.row_stride == 1 && a.col_stride != 1 {
        // Columns are contiguous: for each step of the depth, a run of them is dealt out to the panels.
        for (step, k) in depth.clone().enumerate() {
            let start = a.index(rows.start, k);
            let column = &a.data[start..start + whole * MR];
            for (source, panel) in column
                .chunks_exact(MR)
                .zip(panels.chunks_exact_mut(panel_len))
            {
                panel[step * MR..][..MR].copy_from_slice(source);
            }
        }
    } else {
        for (panel, row) in panels
            .chunks_exact_mut(panel_len)
            .zip(rows.clone().step_by(MR))
            .take(whole)
        {
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has AVX2, and the block is within the matrix.
                Isa::Avx2 if a.col_stride == 1 => unsafe {
                    avx2::left_from_rows(a, row, depth.clone(), panel)
                },
                _ => strided(panel, MR, MR, |k, r| a.get(row + r, depth.start + k)),
            }
        }
    }
    if let Some(panel) = panels.chunks_exact_mut(panel_len).nth(whole) {
        let row = rows.start + whole * MR;
        strided(panel, MR, rows.end - row, |k, r| {
            a.get(row + r, depth.start + k)
        });
    }
}

/// Packs columns `cols` of rows `depth` of `b` (a whole block of the right operand) into `panels`: [panel][depth][NR].
pub(super) fn pack_right<T: Element>(
    threads: usize,
    isa: Isa,
    b: &Matrix<'_, T>,
    depth: Range<usize>,
    cols: Range<usize>,
    panels: &mut [f32],
) {
    // A job packs at least 32 KiB.
    let jobs = if threads == 1 {
        1
    } else {
        (panels.len() >> 13).clamp(1, 4 * threads)
    };
    let shared = SharedMut::new(panels);
    run_jobs_on(threads, jobs, |job| {
        // Jobs read parts of the operand that are contiguous, as far as possible.
        let (depth_part, cols_part) = if b.col_stride == 1 {
            (part(depth.len(), jobs, 1, job), 0..cols.len())
        } else {
            (0..depth.len(), part(cols.len(), jobs, NR, job))
        };
        // SAFETY: jobs write different steps, or different panels.
        unsafe { pack_right_part(isa, b, (&depth, depth_part), (&cols, cols_part), shared) };
    });
}

/// Packs a part of a block of the right operand.
///
/// # Safety
/// Nobody else may access this part of the panels.
unsafe fn pack_right_part<T: Element>(
    isa: Isa,
    b: &Matrix<'_, T>,
    (depth, depth_part): (&Range<usize>, Range<usize>),
    (cols, cols_part): (&Range<usize>, Range<usize>),
    panels: SharedMut<'_, f32>,
) {
    let panel_len = depth.len() * NR;
    let k = depth.start + depth_part.start..depth.start + depth_part.end;
    // The steps of `depth_part` in the panel that holds column `col`.
    let part_of_panel = |col: usize| {
        let start = col / NR * panel_len + depth_part.start * NR;
        start..start + depth_part.len() * NR
    };
    let whole_end = cols_part.end / NR * NR;
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx2 && b.col_stride == 1 {
        for (step, k) in k.clone().enumerate() {
            for col in (cols_part.start..whole_end).step_by(NR) {
                let start = part_of_panel(col).start + step * NR;
                // SAFETY: the caller's promise; the processor has AVX2.
                unsafe { avx2::copy_step(b, k, cols.start + col, panels.slice(start..start + NR)) };
            }
        }
    } else {
        for col in (cols_part.start..whole_end).step_by(NR) {
            // SAFETY: the caller's promise.
            let panel = unsafe { panels.slice(part_of_panel(col)) };
            if isa == Isa::Avx2 && b.row_stride == 1 {
                // SAFETY: the processor has AVX2, and the block is within the matrix.
                unsafe { avx2::right_from_cols(b, k.clone(), cols.start + col, panel) };
            } else {
                strided(panel, NR, NR, |step, c| {
                    b.get(k.start + step, cols.start + col + c).widen()
                });
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for col in (cols_part.start..whole_end).step_by(NR) {
        // SAFETY: the caller's promise.
        let panel = unsafe { panels.slice(part_of_panel(col)) };
        strided(panel, NR, NR, |step, c| {
            b.get(k.start + step, cols.start + col + c).widen()
        });
    }
    if whole_end.max(cols_part.start) < cols_part.end {
        // SAFETY: the caller's promise.
        let panel = unsafe { panels.slice(part_of_panel(whole_end)) };
        let width = cols_part.end - whole_end;
        strided(panel, NR, width, |step, c| {
            b.get(k.start + step, cols.start + whole_end + c).widen()
        });
    }
}

/// Element by element: for any strides, and for panels cut off by the edge.
fn strided(panel: &mut [f32], unit: usize, filled: usize, value: impl Fn(usize, usize) -> f32) {
    for (k, step) in panel.chunks_exact_mut(unit).enumerate() {
        for (i, slot) in step.iter_mut().enumerate() {
            *slot = if i < filled { value(k, i) } else { 0.0 };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    use std::ops::Range;

    use super::super::{Element, Matrix};
    use super::{MR, NR};

    /// # Safety
    /// AVX2; rows `row..row + MR` and `depth` are within `a`, whose rows are contiguous.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn left_from_rows(
        a: &Matrix<'_, f32>,
        row: usize,
        depth: Range<usize>,
        panel: &mut [f32],
    ) {
        let last = a.index(row + MR - 1, depth.end - 1);
        assert!(last < a.data.len() && panel.len() == depth.len() * MR);
        let blocks = depth.len() / 8;
        for block in 0..blocks {
            let k = depth.start + block * 8;
            let mut lanes = [_mm256_setzero_ps(); 8];
            for (r, lane) in lanes.iter_mut().enumerate().take(MR) {
                // SAFETY: 8 values of row `row + r` from `k`, within the matrix.
                *lane = unsafe { f32::load8(a.data.as_ptr().add(a.index(row + r, k))) };
            }
            let lanes = transposed(lanes);
            let start = block * 8 * MR;
            for (step, lane) in lanes.into_iter().enumerate() {
                // Each store writes MR values and two zeros, which the next store overwrites; the very last one of a
                // panel must not write past it.
                let at = start + step * MR;
                if at + 8 <= panel.len() {
                    // SAFETY: within the panel by the condition.
                    unsafe { _mm256_storeu_ps(panel.as_mut_ptr().add(at), lane) };
                } else {
                    let mut whole = [0.0; 8];
                    // SAFETY: 8 values.
                    unsafe { _mm256_storeu_ps(whole.as_mut_ptr(), lane) };
                    panel[at..at + MR].copy_from_slice(&whole[..MR]);
                }
            }
        }
        for k in blocks * 8..depth.len() {
            for r in 0..MR {
                panel[k * MR + r] = a.get(row + r, depth.start + k);
            }
        }
    }

    /// # Safety
    /// AVX2; `step` holds [`NR`] values.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    pub(super) unsafe fn copy_step<T: Element>(
        b: &Matrix<'_, T>,
        k: usize,
        col: usize,
        step: &mut [f32],
    ) {
        let source = &b.data[b.index(k, col)..][..NR];
        // SAFETY: both slices hold 16 values.
        unsafe {
            _mm256_storeu_ps(step.as_mut_ptr(), T::load8(source.as_ptr()));
            _mm256_storeu_ps(step.as_mut_ptr().add(8), T::load8(source.as_ptr().add(8)));
        }
    }

    /// # Safety
    /// AVX2; columns `col..col + NR` and `depth` are within `b`, whose columns are contiguous.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn right_from_cols<T: Element>(
        b: &Matrix<'_, T>,
        depth: Range<usize>,
        col: usize,
        panel: &mut [f32],
    ) {
        assert!(
            b.index(depth.end - 1, col + NR - 1) < b.data.len() && panel.len() == depth.len() * NR
        );
        let blocks = depth.len() / 8;
        for block in 0..blocks {
            let k = depth.start + block * 8;
            for half in [0, 8] {
                let mut lanes = [_mm256_setzero_ps(); 8];
                for (c, lane) in lanes.iter_mut().enumerate() {
                    // SAFETY: 8 values of a column from `k`, within the matrix.
                    *lane = unsafe { T::load8(b.data.as_ptr().add(b.index(k, col + half + c))) };
                }
                for (step, lane) in transposed(lanes).into_iter().enumerate() {
                    // SAFETY: half a step of the panel.
                    unsafe {
                        _mm256_storeu_ps(
                            panel.as_mut_ptr().add((block * 8 + step) * NR + half),
                            lane,
                        )
                    };
                }
            }
        }
        for k in blocks * 8..depth.len() {
            for c in 0..NR {
                panel[k * NR + c] = b.get(depth.start + k, col + c).widen();
            }
        }
    }

    /// Transposes 8 x 8 values.
    #[target_feature(enable = "avx2")]
    fn transposed(r: [__m256; 8]) -> [__m256; 8] {
        let t = [
            _mm256_unpacklo_ps(r[0], r[1]),
            _mm256_unpackhi_ps(r[0], r[1]),
            _mm256_unpacklo_ps(r[2], r[3]),
            _mm256_unpackhi_ps(r[2], r[3]),
            _mm256_unpacklo_ps(r[4], r[5]),
            _mm256_unpackhi_ps(r[4], r[5]),
            _mm256_unpacklo_ps(r[6], r[7]),
            _mm256_unpackhi_ps(r[6], r[7]),
        ];
        let s = [
            _mm256_shuffle_ps::<0x44>(t[0], t[2]),
            _mm256_shuffle_ps::<0xEE>(t[0], t[2]),
            _mm256_shuffle_ps::<0x44>(t[1], t[3]),
            _mm256_shuffle_ps::<0xEE>(t[1], t[3]),
            _mm256_shuffle_ps::<0x44>(t[4], t[6]),
            _mm256_shuffle_ps::<0xEE>(t[4], t[6]),
            _mm256_shuffle_ps::<0x44>(t[5], t[7]),
            _mm256_shuffle_ps::<0xEE>(t[5], t[7]),
        ];
        [
            _mm256_permute2f128_ps::<0x20>(s[0], s[4]),
            _mm256_permute2f128_ps::<0x20>(s[1], s[5]),
            _mm256_permute2f128_ps::<0x20>(s[2], s[6]),
            _mm256_permute2f128_ps::<0x20>(s[3], s[7]),
            _mm256_permute2f128_ps::<0x31>(s[0], s[4]),
            _mm256_permute2f128_ps::<0x31>(s[1], s[5]),
            _mm256_permute2f128_ps::<0x31>(s[2], s[6]),
            _mm256_permute2f128_ps::<0x31>(s[3], s[7]),
        ]
    }
}
