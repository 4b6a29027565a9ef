//! Copying parts of the operands into panels, the order in which the innermost loop reads them.
//!
//! A panel of the left operand holds [`MR`] rows: for each step of the depth the values of these rows. One of the right
//! operand holds [`NR`] columns likewise. Rows and columns past the edge are zero.

use super::kernel::{Isa, MR, NR};
use super::{Element, Matrix};

/// Packs `rows` (whole panels of them) and `depth` of `a` into `panels`: [panel][depth][MR].
pub(super) fn pack_left(
    isa: Isa,
    a: &Matrix<'_, f32>,
    rows: std::ops::Range<usize>,
    depth: std::ops::Range<usize>,
    panels: &mut [f32],
) {
    for (panel, row) in panels.chunks_exact_mut(depth.len() * MR).zip(rows.clone().step_by(MR)) {
        let height = MR.min(rows.end - row);
        if height == MR && a.col_stride == 1 {
            // Rows are contiguous: transpose blocks of them.
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has AVX2, and the block is within the matrix.
                Isa::Avx2 => unsafe { avx2::left_from_rows(a, row, depth.clone(), panel) },
                Isa::Portable => strided(panel, MR, height, |k, r| a.get(row + r, depth.start + k)),
            }
        } else if height == MR && a.row_stride == 1 {
            // Columns are contiguous: each step of the depth is a copy.
            for (step, k) in panel.chunks_exact_mut(MR).zip(depth.clone()) {
                let start = a.index(row, k);
                step.copy_from_slice(&a.data[start..start + MR]);
            }
        } else {
            strided(panel, MR, height, |k, r| a.get(row + r, depth.start + k));
        }
    }
}

/// Packs `depth` and `cols` (whole panels of them) of `b` into `panels`: [panel][depth][NR].
pub(super) fn pack_right<T: Element>(
    isa: Isa,
    b: &Matrix<'_, T>,
    depth: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    panels: &mut [f32],
) {
    for (panel, col) in panels.chunks_exact_mut(depth.len() * NR).zip(cols.clone().step_by(NR)) {
        let width = NR.min(cols.end - col);
        if width == NR && (b.col_stride == 1 || b.row_stride == 1) {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 if b.col_stride == 1 => {
                    // SAFETY: the processor has AVX2, and the block is within the matrix.
                    unsafe { avx2::right_from_rows(b, depth.clone(), col, panel) };
                }
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the processor has AVX2, and the block is within the matrix.
                Isa::Avx2 => unsafe { avx2::right_from_cols(b, depth.clone(), col, panel) },
                Isa::Portable => strided(panel, NR, width, |k, c| b.get(depth.start + k, col + c).widen()),
            }
        } else {
            strided(panel, NR, width, |k, c| b.get(depth.start + k, col + c).widen());
        }
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
        __m256, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps,
    };
    use std::ops::Range;

    use super::super::{Element, Matrix};
    use super::{MR, NR};

    /// # Safety
    /// AVX2; rows `row..row + MR` and `depth` are within `a`, whose rows are contiguous.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn left_from_rows(a: &Matrix<'_, f32>, row: usize, depth: Range<usize>, panel: &mut [f32]) {
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
    /// AVX2; columns `col..col + NR` and `depth` are within `b`, whose rows are contiguous.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn right_from_rows<T: Element>(
        b: &Matrix<'_, T>,
        depth: Range<usize>,
        col: usize,
        panel: &mut [f32],
    ) {
        assert!(b.index(depth.end - 1, col + NR - 1) < b.data.len() && panel.len() == depth.len() * NR);
        for (step, k) in depth.enumerate() {
            // SAFETY: 16 values of row `k` from `col`, and a step of the panel.
            unsafe {
                let source = b.data.as_ptr().add(b.index(k, col));
                let target = panel.as_mut_ptr().add(step * NR);
                _mm256_storeu_ps(target, T::load8(source));
                _mm256_storeu_ps(target.add(8), T::load8(source.add(8)));
            }
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
        assert!(b.index(depth.end - 1, col + NR - 1) < b.data.len() && panel.len() == depth.len() * NR);
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
                    unsafe { _mm256_storeu_ps(panel.as_mut_ptr().add((block * 8 + step) * NR + half), lane) };
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
