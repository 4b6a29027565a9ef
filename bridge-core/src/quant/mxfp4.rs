//! Codes of E2M1 with a shared power of two (OCP Microscaling Formats 1.0, section 5).
//!
//! Values are bf16 in little-endian order, two bytes each, as they lie in files. Loops have no branches, so that they
//! become vector code.

use super::MXFP4_BLOCK;
use crate::simd::vectorized;

/// Exponent of the largest value, 6 = 1.5 * 2^2.
const MAX_EXPONENT: u16 = 2;
/// The last scale, NaN.
const NAN_SCALE: u8 = 0xff;
/// The first scale under which more than one code is infinite in bf16: 4 * 2^126 and 6 * 2^126 both are.
const AMBIGUOUS_SCALE: u8 = 253;

/// Half of 2^(scale - 127), for all scales but NaN. A subnormal number for the smallest two.
#[inline(always)]
fn half_factor(scale: u8) -> f32 {
    let scale = u32::from(scale);
    f32::from_bits(if scale > 1 {
        (scale - 1) << 23
    } else {
        1 << (21 + scale)
    })
}

/// bf16 bits of the value of a code (0 to 15). All values and products are exact, or infinite.
#[inline(always)]
fn bits_of(code: u32, half_factor: f32) -> u32 {
    // Twice the magnitudes of the eight codes, a digit each.
    let doubled = (0xc864_3210_u32 >> ((code & 7) * 4)) & 15;
    ((doubled as i32 as f32 * half_factor).to_bits() >> 16) | ((code & 8) << 12)
}

vectorized! {
    /// Writes the 32 values of each block of 16 bytes as bf16.
    pub(super) fn decode(blocks: &[u8], scales: &[u8], out: &mut [u8]) {
        let blocks = blocks.as_chunks::<16>().0.iter().zip(scales);
        for (out, (block, scale)) in out.as_chunks_mut::<64>().0.iter_mut().zip(blocks) {
            let pairs = out.as_chunks_mut::<4>().0.iter_mut();
            if *scale == NAN_SCALE {
                pairs.for_each(|pair| *pair = [0xc0, 0x7f, 0xc0, 0x7f]);
                continue;
            }
            let half = half_factor(*scale);
            for (pair, byte) in pairs.zip(block) {
                let byte = u32::from(*byte);
                *pair = (bits_of(byte & 15, half) | (bits_of(byte >> 4, half) << 16)).to_le_bytes();
            }
        }
    }
}

vectorized! {
    /// The codes of each 32 values, and their scale: the stored one if it gives every value back exactly, else that of
    /// the largest magnitude, values rounded to the nearest code. `false` if a value without a stored scale of that
    /// kind is not finite.
    pub(super) fn encode(values: &[[u8; 2]], stored: Option<&[u8]>, codes: &mut [u8], scales: &mut [u8]) -> bool {
        let blocks = values.as_chunks::<MXFP4_BLOCK>().0.iter().enumerate();
        let places = codes.as_chunks_mut::<16>().0.iter_mut().zip(scales);
        for ((index, values), (codes, scale)) in blocks.zip(places) {
            if let Some(known) = stored.and_then(|scales| scales.get(index).copied())
                && encode_exactly(values, known, codes)
            {
                *scale = known;
                continue;
            }
            let magnitudes = values.iter().map(|bytes| u16::from_le_bytes(*bytes) & 0x7fff);
            let largest = magnitudes.fold(0, u16::max);
            if largest >= 0x7f80 {
                return false;
            }
            *scale = match largest {
                0 => 127,
                _ => (largest >> 7).saturating_sub(MAX_EXPONENT) as u8,
            };
            let (found, _) = nearest(values, *scale);
            pack(&found, codes);
        }
        true
    }
}

/// Codes that give every value back under `scale`, the first one where several do.
#[inline(always)]
fn encode_exactly(
    values: &[[u8; 2]; MXFP4_BLOCK],
    scale: u8,
    codes: &mut [u8; MXFP4_BLOCK / 2],
) -> bool {
    if scale >= AMBIGUOUS_SCALE {
        return encode_by_search(values, scale, codes);
    }
    let (found, apart) = nearest(values, scale);
    pack(&found, codes);
    apart == 0
}

/// The code nearest to each value, ties to the even code, values beyond the largest held to it; and 0 if all of them are
/// exact. For scales below [`AMBIGUOUS_SCALE`].
#[inline(always)]
fn nearest(values: &[[u8; 2]; MXFP4_BLOCK], scale: u8) -> ([u8; MXFP4_BLOCK], u32) {
    // Below the smallest normal value codes are 1/2 apart, as f32 numbers are from this one on.
    const STEPS_OF_SUBNORMALS: f32 = 4_194_304.0;
    let half = half_factor(scale);
    // 2^(127 - scale); under these scales a normal number, so no product is rounded unless it is next to nothing.
    let inverse = f32::from_bits((254 - u32::from(scale)) << 23);
    let mut codes = [0; MXFP4_BLOCK];
    let mut apart = 0;
    for (code, bytes) in codes.iter_mut().zip(values) {
        let bits = u32::from(u16::from_le_bytes(*bytes));
        let magnitude = f32::from_bits((bits & 0x7fff) << 16) * inverse;
        let subnormal = (magnitude + STEPS_OF_SUBNORMALS).to_bits() - STEPS_OF_SUBNORMALS.to_bits();
        let held = if magnitude < 6.0 { magnitude } else { 6.0 }.to_bits();
        let normal = ((held + 0x1f_ffff + ((held >> 22) & 1)) >> 22).wrapping_sub(126 << 1);
        let found = if magnitude < 1.0 { subnormal } else { normal };
        let found = found | ((bits >> 12) & 8);
        *code = found as u8;
        apart |= bits_of(found, half) ^ bits;
    }
    (codes, apart)
}

#[inline(always)]
fn pack(codes: &[u8; MXFP4_BLOCK], out: &mut [u8; MXFP4_BLOCK / 2]) {
    for (out, [low, high]) in out.iter_mut().zip(codes.as_chunks::<2>().0) {
        *out = low | (high << 4);
    }
}

/// [`encode_exactly`] for scales so large that no weight has them.
#[cold]
fn encode_by_search(
    values: &[[u8; 2]; MXFP4_BLOCK],
    scale: u8,
    codes: &mut [u8; MXFP4_BLOCK / 2],
) -> bool {
    let bits_of = |code| match scale {
        NAN_SCALE => 0x7fc0,
        _ => bits_of(code, half_factor(scale)),
    };
    let mut found = [0; MXFP4_BLOCK];
    for (found, bytes) in found.iter_mut().zip(values) {
        let bits = u32::from(u16::from_le_bytes(*bytes));
        match (0..16).find(|code| bits_of(*code) == bits) {
            Some(code) => *found = code as u8,
            None => return false,
        }
    }
    pack(&found, codes);
    true
}
