//! Elementary functions without branches, which the compiler turns into vector code.
//!
//! Each is good to a few units in the last place of fp32. The polynomials are those of the Cephes library (Moshier
//! 1989).

#![expect(
    clippy::excessive_precision,
    reason = "polynomials keep the digits they were published with"
)]

use super::simd::fma;

/// The polynomial with the given coefficients, highest power first.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[0];
    for coefficient in &coefficients[1..] {
        value = fma::<FMA>(value, x, *coefficient);
    }
    value
}

/// `exp(x)`. 0 below the smallest normal number, at most `f32::MAX` above the largest.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const HIGHEST: f32 = 88.722_8;
    const LOWEST: f32 = -87.336_5;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > HIGHEST { HIGHEST } else { x };
    let clamped = if clamped < LOWEST { LOWEST } else { clamped };

    // x = n ln 2 + r, with ln 2 in two parts so that the subtraction is exact.
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -0.693_359_375, clamped);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let p = polynomial::<FMA, 6>(
        r,
        [
            1.987_569_15e-4,
            1.398_199_95e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_6e-1,
            5.000_000_1e-1,
        ],
    );
    let mantissa = fma::<FMA>(p * r, r, r) + 1.0;

    // 2^n in two factors, because n may be 128.
    let n_bits = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n_bits >> 1;
    let scale = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let value = mantissa * scale(half) * scale(n_bits - half);
    if x < LOWEST { 0.0 } else { value }
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(crate) fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// `tanh(x)`.
#[inline(always)]
pub(crate) fn tanh<const FMA: bool>(x: f32) -> f32 {
    let magnitude = x.abs();
    let square = x * x;
    let p = polynomial::<FMA, 5>(
        square,
        [
            -5.704_988_7e-3,
            2.063_908_9e-2,
            -5.373_971_6e-2,
            1.333_144_2e-1,
            -3.333_328e-1,
        ],
    );
    let small = fma::<FMA>(p * square, x, x);
    let large = (1.0 - 2.0 / (exp::<FMA>(2.0 * magnitude) + 1.0)).copysign(x);
    if magnitude < 0.625 { small } else { large }
}

/// The error function.
#[inline(always)]
pub(crate) fn erf<const FMA: bool>(x: f32) -> f32 {
    let magnitude = x.abs();
    let square = x * x;
    let small = x * polynomial::<FMA, 7>(
        square,
        [
            7.853_861_4e-5,
            -8.010_194e-4,
            5.188_328e-3,
            -2.685_381_2e-2,
            1.128_358_5e-1,
            -3.761_262_6e-1,
            std::f32::consts::FRAC_2_SQRT_PI,
        ],
    );
    // erfc(x) = exp(-x^2) / x * polynomial in 1 / x^2
    let inverse = 1.0 / if magnitude < 1.0 { 1.0 } else { magnitude };
    let y = inverse * inverse;
    let middle = polynomial::<FMA, 9>(
        y,
        [
            2.326_82e-2,
            -1.387_039_4e-1,
            3.687_424_7e-1,
            -5.824_733e-1,
            6.210_004_6e-1,
            -4.944_515_3e-1,
            3.404_88e-1,
            -2.741_127e-1,
            5.638_259_4e-1,
        ],
    );
    let far = polynomial::<FMA, 8>(
        y,
        [
            -1.047_766_4e1,
            1.297_72e1,
            -7.495_518_7,
            2.921_019,
            -1.015_265_3,
            4.218_463_4e-1,
            -2.820_767_4e-1,
            5.641_895e-1,
        ],
    );
    let tail = exp::<FMA>(-square) * inverse * if magnitude < 2.0 { middle } else { far };
    let large = (1.0 - tail).copysign(x);
    if magnitude < 1.0 { small } else { large }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        name: &str,
        f: fn(f32) -> f32,
        reference: impl Fn(f64) -> f64,
        range: f32,
        tolerance: f64,
    ) {
        for i in -20_000..=20_000 {
            let x = i as f32 / 20_000.0 * range;
            let (found, expected) = (f64::from(f(x)), reference(f64::from(x)));
            let error = (found - expected).abs() / expected.abs().max(1e-30);
            assert!(
                error < tolerance,
                "{name}({x}) = {found}, expected {expected}, relative error {error:e}"
            );
        }
    }

    /// erf by its Taylor series, which converges for all x and in f64 is exact enough up to 3.
    fn erf_reference(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn functions_are_good_to_a_few_units_in_the_last_place() {
        check("exp", exp::<false>, f64::exp, 87.0, 3e-7);
        check("exp", exp::<true>, f64::exp, 87.0, 3e-7);
        check("tanh", tanh::<false>, f64::tanh, 12.0, 3e-7);
        check("tanh", tanh::<true>, f64::tanh, 12.0, 3e-7);
        check(
            "sigmoid",
            sigmoid::<true>,
            |x| 1.0 / (1.0 + (-x).exp()),
            80.0,
            4e-7,
        );
        check("erf", erf::<false>, erf_reference, 3.0, 4e-7);
        check("erf", erf::<true>, erf_reference, 3.0, 4e-7);
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp::<true>(0.0), 1.0);
        assert_eq!(exp::<true>(-1e30), 0.0);
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert!(exp::<true>(88.72).is_finite() && exp::<true>(88.72) > 3.3e38);
        assert!(exp::<true>(f32::NAN).is_nan());
        assert_eq!((tanh::<true>(50.0), tanh::<true>(-50.0)), (1.0, -1.0));
        assert_eq!((erf::<true>(9.0), erf::<true>(-9.0)), (1.0, -1.0));
        assert!(sigmoid::<true>(-200.0) < 1e-38);
    }
}
