//! Codes of E4M3 (Micikevicius et al. 2022, arXiv 2209.05433) in both directions.
//!
//! Values are bf16 in little-endian order, two bytes each, as they lie in files. Loops have no branches, so that they
//! become vector code; computing each value that way beats looking it up in a table per scale.

use crate::simd::vectorized;

/// Largest value of E4M3.
const MAX: f32 = 448.0;

vectorized! {
    /// Writes `code * scale`, rounded to bf16, for `codes` of one row from column `col` on. Each `width` columns have a
    /// scale.
    pub(super) fn decode_row(codes: &[u8], col: usize, width: usize, scales: &[f32], out: &mut [u8]) {
        let (mut codes, mut out, mut col) = (codes, out.as_chunks_mut::<2>().0, col);
        while !codes.is_empty() {
            let run = (width - col % width).min(codes.len());
            let scale = scales[col / width];
            let (now, later) = codes.split_at(run);
            let (target, rest) = out.split_at_mut(run);
            for (out, code) in target.iter_mut().zip(now) {
                *out = bf16_bits(value(*code) * scale).to_le_bytes();
            }
            (codes, out, col) = (later, rest, col + run);
        }
    }
}

vectorized! {
    /// The codes of `values` under a scale; `false` if they do not give every value back exactly.
    pub(super) fn encode_exactly(values: &[[u8; 2]], scale: f32, codes: &mut [u8]) -> bool {
        // Under a scale of zero every value is zero, and so is its code.
        let divisor = if scale == 0.0 { f32::INFINITY } else { scale };
        let mut apart = 0;
        for (code, bytes) in codes.iter_mut().zip(values) {
            *code = encode(widen(*bytes) / divisor);
            apart |= bf16_bits(value(*code) * scale) ^ u16::from_le_bytes(*bytes);
        }
        apart == 0
    }
}

vectorized! {
    /// The codes nearest to `values` under a scale.
    pub(super) fn encode_nearest(values: &[[u8; 2]], scale: f32, codes: &mut [u8]) {
        for (code, bytes) in codes.iter_mut().zip(values) {
            *code = encode(widen(*bytes) / scale);
        }
    }
}

vectorized! {
    /// Bits of the largest magnitude: those of NaN are above infinity's, which are above all others.
    pub(super) fn largest(values: &[[u8; 2]]) -> u16 {
        let magnitudes = values.iter().map(|bytes| u16::from_le_bytes(*bytes) & 0x7fff);
        magnitudes.fold(0, u16::max)
    }
}

/// The scale that takes a magnitude to the largest code; it is a normal number for the smallest magnitudes too.
pub(super) fn scale_for(largest: f32) -> f32 {
    let scale = if largest == 0.0 { 1.0 } else { largest / MAX };
    scale.max(f32::MIN_POSITIVE)
}

#[inline(always)]
fn widen(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
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
#[inline(always)]
pub(super) fn encode(x: f32) -> u8 {
    // Below the smallest normal value codes are 1/512 apart, as f32 numbers are from this one on: the sum is rounded to
    // a code, and 8 is that of the smallest normal value.
    const STEPS_OF_SUBNORMALS: f32 = 16384.0;
    let sign = (x.to_bits() >> 24) & 0x80;
    let magnitude = x.abs();
    let subnormal = (magnitude + STEPS_OF_SUBNORMALS).to_bits() - STEPS_OF_SUBNORMALS.to_bits();
    let held = if magnitude < MAX { magnitude } else { MAX }.to_bits();
    let rounded = held + 0x7_ffff + ((held >> 20) & 1);
    let normal = (rounded >> 20).wrapping_sub(120 << 3);
    let code = if magnitude < 1.0 / 64.0 {
        subnormal
    } else {
        normal
    };
    let code = if magnitude.is_nan() { 0x7f } else { code };
    (sign | code) as u8
}
