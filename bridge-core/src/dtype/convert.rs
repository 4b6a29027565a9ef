//! Element loops between raw little-endian bytes and f32, each over slices of the same number of elements.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Elements converted at a time, so that the intermediate f32 values stay in the first-level cache.
pub(super) const BLOCK: usize = 1024;

pub(super) fn f32_from_bytes(src: &[u8], out: &mut [f32]) {
    for (out, src) in out.iter_mut().zip(src.as_chunks::<4>().0) {
        *out = f32::from_le_bytes(*src);
    }
}

pub(super) fn f32_to_bytes(src: &[f32], out: &mut [u8]) {
    for (out, src) in out.as_chunks_mut::<4>().0.iter_mut().zip(src) {
        *out = src.to_le_bytes();
    }
}

pub(super) fn f32_to_f64(src: &[f32], out: &mut [u8]) {
    for (out, src) in out.as_chunks_mut::<8>().0.iter_mut().zip(src) {
        *out = f64::from(*src).to_le_bytes();
    }
}

pub(super) fn f64_to_f32(src: &[u8], out: &mut [f32]) {
    for (out, src) in out.iter_mut().zip(src.as_chunks::<8>().0) {
        *out = f64::from_le_bytes(*src) as f32;
    }
}

/// Cuts f64 to f32 so that a further rounding to a type at least two bits narrower gives what rounding the f64 once
/// would have given: the result is truncated, and its last bit is set when anything was lost.
///
/// Source: Boldo and Melquiond, "When double rounding is odd" (2004).
pub(super) fn f64_to_f32_round_to_odd(src: &[u8], out: &mut [f32]) {
    for (out, src) in out.iter_mut().zip(src.as_chunks::<8>().0) {
        let value = f64::from_le_bytes(*src);
        let nearest = value as f32;
        let back = f64::from(nearest);
        // An infinite `nearest` for a finite value compares as not equal and is stepped back to the largest finite
        // f32, whose last bit is set.
        *out = if back == value || value.is_nan() {
            nearest
        } else {
            let truncated = nearest.to_bits() - u32::from(back.abs() > value.abs());
            f32::from_bits(truncated | 1)
        };
    }
}

pub(super) fn bf16_to_f32(src: &[u8], out: &mut [f32]) {
    for (out, src) in out.iter_mut().zip(src.as_chunks::<2>().0) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*src)) << 16);
    }
}

pub(super) fn f32_to_bf16(src: &[f32], out: &mut [u8]) {
    for (out, src) in out.as_chunks_mut::<2>().0.iter_mut().zip(src) {
        let bits = src.to_bits();
        // Adding just under half of the last kept bit, plus one when that bit is set, rounds ties to even; a carry
        // runs into the exponent and ends at infinity, as it should.
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        // A NaN keeps its sign and upper bits, and the quiet bit keeps it from turning into an infinity.
        let nan = (bits >> 16) as u16 | 0x40;
        *out = if src.is_nan() { nan } else { rounded }.to_le_bytes();
    }
}

pub(super) fn f16_to_f32(src: &[u8], out: &mut [f32]) {
    let mut halves = [f16::ZERO; BLOCK];
    for (src, out) in src.chunks(2 * BLOCK).zip(out.chunks_mut(BLOCK)) {
        let halves = &mut halves[..out.len()];
        for (half, src) in halves.iter_mut().zip(src.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(*src);
        }
        halves.convert_to_f32_slice(out);
    }
}

pub(super) fn f32_to_f16(src: &[f32], out: &mut [u8]) {
    let mut halves = [f16::ZERO; BLOCK];
    for (src, out) in src.chunks(BLOCK).zip(out.chunks_mut(2 * BLOCK)) {
        let halves = &mut halves[..src.len()];
        halves.convert_from_f32_slice(src);
        for (out, half) in out.as_chunks_mut::<2>().0.iter_mut().zip(&*halves) {
            *out = half.to_le_bytes();
        }
    }
}
