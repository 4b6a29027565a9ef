//! Codes of E4M3 (Micikevicius et al. 2022, arXiv 2209.05433) in both directions.

use half::bf16;

/// Largest value of E4M3.
pub(super) const MAX: f32 = 448.0;

/// What each code stands for under one scale, as bf16. A scale serves thousands of codes, and looking them up takes half
/// the time of computing each, even in vector instructions.
pub(super) struct Decoder([u16; 256]);

impl Decoder {
    /// `code * scale`, rounded to bf16, for each code.
    pub(super) fn new(scale: f32) -> Self {
        Self(std::array::from_fn(|code| {
            bf16_bits(value(code as u8) * scale)
        }))
    }

    /// Writes the values of `codes`, 2 bytes each.
    pub(super) fn decode(&self, codes: &[u8], out: &mut [u8]) {
        for (out, code) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            *out = self.0[usize::from(*code)].to_le_bytes();
        }
    }
}

/// The value of a code.
#[inline(always)]
pub(super) fn value(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    // Exponent and mantissa moved to their places in an f32, the bias changed from 7 to 127.
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let subnormal = magnitude as f32 * (1.0 / 512.0);
    let positive = if magnitude < 8 { subnormal } else { normal };
    let positive = if magnitude == 0x7f {
        f32::NAN
    } else {
        positive
    };
    f32::from_bits(positive.to_bits() | (u32::from(code & 0x80) << 24))
}

/// The upper half of an f32, rounded to nearest even; NaN stays NaN.
#[inline(always)]
pub(super) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
    (if is_nan { nan } else { rounded }) as u16
}

/// The code nearest to `x`, ties to even, values beyond the largest held to it.
pub(super) fn encode(x: f32) -> u8 {
    let sign = ((x.to_bits() >> 24) & 0x80) as u8;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return sign | 0x7f;
    }
    if magnitude < 1.0 / 64.0 {
        // Below the smallest normal value codes are 1/512 apart; 8 is the code of the smallest normal value.
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.min(MAX).to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - (120 << 3)) as u8
}

/// The codes of one block under a scale that gives every value back exactly; `None` if it does not.
pub(super) fn encode_exactly(values: &[bf16], scale: f32, codes: &mut [u8]) -> bool {
    if !scale.is_finite() {
        return false;
    }
    for (code, value) in codes.iter_mut().zip(values) {
        let quotient = if scale == 0.0 {
            0f32.copysign(value.to_f32())
        } else {
            value.to_f32() / scale
        };
        *code = encode(quotient);
        if bf16_bits(self::value(*code) * scale) != value.to_bits() {
            return false;
        }
    }
    true
}
