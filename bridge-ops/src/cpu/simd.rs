//! Instruction sets found at run time, and loading of storage formats as fp32.

use burn_backend::{bf16, f16};

/// Whether the processor has AVX2, FMA and F16C (every x86-64 processor since 2013 to 2015).
#[inline]
pub(crate) fn has_avx2() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // The macro caches its answers.
        std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("fma")
            && std::arch::is_x86_feature_detected!("f16c")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A storage format of weights. Arithmetic is fp32.
pub(crate) trait Element: burn_backend::Element + bytemuck::Pod + Send + Sync {
    /// The value as fp32, exactly.
    fn widen(self) -> f32;

    /// Eight consecutive values as fp32.
    ///
    /// # Safety
    /// `source` is valid for eight values; the processor has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load8(source: *const Self) -> std::arch::x86_64::__m256;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(source: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(source) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(source: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{
            _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_slli_epi32,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load8(source: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise.
        unsafe {
            std::arch::x86_64::_mm256_cvtph_ps(std::arch::x86_64::_mm_loadu_si128(source.cast()))
        }
    }
}

/// Defines a function that is compiled twice, for AVX2 with FMA and for the baseline of the target, and picks one when
/// called. The body may use the constant `FMA` with [`fma`] and the functions in [`math`](super::math).
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$($generic:ident: $bound:path),*])? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$($generic: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($($generic: $bound,)*)? const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn with_avx2<$($($generic: $bound),*)?>($($arg: $ty),*) $(-> $ret)? {
                body::<$($($generic,)*)? true>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            if crate::cpu::simd::has_avx2() {
                // SAFETY: the processor has these instructions.
                return unsafe { with_avx2::<$($($generic),*)?>($($arg),*) };
            }
            body::<$($($generic,)*)? false>($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// `a * b + c`, fused where the processor can: without the instruction the library's fused function would be slow.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Number of partial sums that [`vectorized`] reductions keep: enough for four registers of eight.
pub(crate) const LANES: usize = 32;

/// A sum over the elements of slices of equal length, in a fixed order: `add` adds the term of one element of each.
#[inline(always)]
pub(crate) fn lane_sum<const N: usize>(
    slices: [&[f32]; N],
    add: impl Fn([f32; N], f32) -> f32,
) -> f32 {
    let len = slices[0].len();
    let slices = slices.map(|slice| &slice[..len]);
    let mut lanes = [0.0_f32; LANES];
    let mut start = 0;
    while start + LANES <= len {
        // One check of bounds per block leaves the inner loop without any, so that it becomes vector code.
        let block = slices.map(|slice| &slice[start..start + LANES]);
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = add(block.map(|block| block[l]), *lane);
        }
        start += LANES;
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        let (low, high) = lanes.split_at_mut(width);
        low.iter_mut()
            .zip(high)
            .for_each(|(low, high)| *low += *high);
    }
    let mut sum = lanes[0];
    for i in start..len {
        sum = add(slices.map(|slice| slice[i]), sum);
    }
    sum
}
