//! The innermost product: a tile of [`MR`] rows and [`NR`] columns held in registers.

/// Rows of a tile. 6 x 16 fp32 accumulators fill twelve of the sixteen 256-bit registers of AVX2, leaving two for a row
/// of the right operand and two for broadcast elements of the left one.
pub(crate) const MR: usize = 6;
/// Columns of a tile: two 256-bit registers.
pub(crate) const NR: usize = 16;

/// What a product does with the values already in its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// `c = a b`
    Overwrite,
    /// `c = c + a b`
    Add,
}

/// Which instructions to use; found out once per product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if crate::cpu::simd::has_avx2() {
            return Self::Avx2;
        }
        Self::Portable
    }
}

/// Multiplies a packed panel of the left operand with one of the right operand into the tile of `rows x cols` at `c`.
///
/// # Safety
/// `a` holds `depth * MR` values, `b` holds `depth * NR`; `c` is a tile of `rows <= MR` by `cols <= NR` values with rows
/// `ldc` apart, not accessed by anyone else. The processor has the instructions of `isa`.
#[inline]
pub(crate) unsafe fn tile(
    isa: Isa,
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    (rows, cols): (usize, usize),
    output: Output,
) {
    if rows == MR && cols == NR {
        // SAFETY: passed on; the tile is whole.
        return unsafe { whole_tile(isa, depth, a, b, c, ldc, output) };
    }
    // The same arithmetic into a whole tile on the stack, so that an element's value does not depend on where the edge
    // of the matrix is.
    let mut whole = [0.0_f32; MR * NR];
    // SAFETY: `whole` is a whole tile.
    unsafe { whole_tile(isa, depth, a, b, whole.as_mut_ptr(), NR, Output::Overwrite) };
    for row in 0..rows {
        // SAFETY: row and columns are within the tile the caller gave.
        let c = unsafe { std::slice::from_raw_parts_mut(c.add(row * ldc), cols) };
        for (c, value) in c.iter_mut().zip(&whole[row * NR..]) {
            *c = if output == Output::Add {
                *c + value
            } else {
                *value
            };
        }
    }
}

/// # Safety
/// As [`tile`], with `rows == MR` and `cols == NR`.
#[inline]
unsafe fn whole_tile(
    isa: Isa,
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    output: Output,
) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: passed on.
        Isa::Avx2 => unsafe { avx2::whole_tile(depth, a, b, c, ldc, output) },
        // SAFETY: passed on.
        Isa::Portable => unsafe { portable_whole_tile(depth, a, b, c, ldc, output) },
    }
}

/// # Safety
/// As [`whole_tile`].
unsafe fn portable_whole_tile(
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    output: Output,
) {
    // SAFETY: the panels are of this size.
    let (a, b) = unsafe {
        (
            std::slice::from_raw_parts(a, depth * MR),
            std::slice::from_raw_parts(b, depth * NR),
        )
    };
    let mut sums = [[0.0_f32; NR]; MR];
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(NR)) {
        for (sums, a) in sums.iter_mut().zip(a) {
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        // SAFETY: a row of the tile.
        let c = unsafe { std::slice::from_raw_parts_mut(c.add(row * ldc), NR) };
        for (c, sum) in c.iter_mut().zip(sums) {
            *c = if output == Output::Add {
                *c + sum
            } else {
                *sum
            };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        _MM_HINT_T0, _mm_prefetch, _mm256_add_ps, _mm256_broadcast_ss, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    use super::{MR, Output};

    /// # Safety
    /// As [`super::whole_tile`]; the processor has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn whole_tile(
        depth: usize,
        mut a: *const f32,
        mut b: *const f32,
        c: *mut f32,
        ldc: usize,
        output: Output,
    ) {
        let mut sums = [[_mm256_setzero_ps(); 2]; MR];
        // SAFETY: panels and tile are of the sizes the caller promised; prefetching has no requirements.
        unsafe {
            for row in 0..MR {
                _mm_prefetch::<_MM_HINT_T0>(c.add(row * ldc).cast());
                _mm_prefetch::<_MM_HINT_T0>(c.add(row * ldc + 15).cast());
            }
            for _ in 0..depth {
                let b0 = _mm256_loadu_ps(b);
                let b1 = _mm256_loadu_ps(b.add(8));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_broadcast_ss(&*a.add(row));
                    sums[0] = _mm256_fmadd_ps(a, b0, sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, b1, sums[1]);
                }
                a = a.add(MR);
                b = b.add(16);
            }
            for (row, sums) in sums.into_iter().enumerate() {
                let c = c.add(row * ldc);
                let [mut low, mut high] = sums;
                if output == Output::Add {
                    low = _mm256_add_ps(_mm256_loadu_ps(c), low);
                    high = _mm256_add_ps(_mm256_loadu_ps(c.add(8)), high);
                }
                _mm256_storeu_ps(c, low);
                _mm256_storeu_ps(c.add(8), high);
            }
        }
    }
}
