//! Loops compiled for the vector instructions that are found at run time.

use std::sync::OnceLock;

/// Which instructions a loop may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// What every processor of the target has.
    Baseline,
    /// AVX2: x86-64 processors since 2013 to 2015.
    Avx2,
    /// AVX-512 with the parts that servers have had since 2017.
    Avx512,
}

/// What this processor has.
#[inline]
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
                return Level::Avx512;
            }
            if has!("avx2") {
                return Level::Avx2;
            }
        }
        Level::Baseline
    })
}

/// Defines a function whose body is compiled for each [`Level`] and that picks one when called. The compiler makes the
/// vector code, so all of them compute the same bits: it neither reorders nor fuses floating-point operations.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn with_avx2($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                fn with_avx512($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }

                match crate::simd::level() {
                    // SAFETY: the processor has these instructions.
                    crate::simd::Level::Avx512 => return unsafe { with_avx512($($arg),*) },
                    // SAFETY: the processor has these instructions.
                    crate::simd::Level::Avx2 => return unsafe { with_avx2($($arg),*) },
                    crate::simd::Level::Baseline => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized;
