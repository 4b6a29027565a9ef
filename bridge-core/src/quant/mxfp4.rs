//! Codes of E2M1 with a shared power of two (OCP Microscaling Formats 1.0, section 5).

use std::sync::OnceLock;

use half::bf16;

/// The values of the 16 codes.
const VALUES: [f32; 16] = [
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
];
/// Exponent of the largest value, 6 = 1.5 * 2^2.
const MAX_EXPONENT: i32 = 2;

/// For each scale the bf16 bits of each code's value.
fn tables() -> &'static [[u16; 16]; 256] {
    static TABLES: OnceLock<Box<[[u16; 16]; 256]>> = OnceLock::new();
    TABLES.get_or_init(|| {
        let mut tables = Box::new([[0; 16]; 256]);
        for (scale, table) in tables.iter_mut().enumerate() {
            for (bits, value) in table.iter_mut().zip(VALUES) {
                *bits = bf16::from_f64(f64::from(value) * factor(scale as u8)).to_bits();
            }
        }
        tables
    })
}

/// 2^(scale - 127); the last scale is NaN.
fn factor(scale: u8) -> f64 {
    match scale {
        0xff => f64::NAN,
        _ => 2f64.powi(i32::from(scale) - 127),
    }
}

/// Writes the 32 values of each block of 16 bytes as bf16.
pub(super) fn decode(blocks: &[u8], scales: &[u8], out: &mut [u8]) {
    let tables = tables();
    let blocks = blocks.as_chunks::<16>().0.iter().zip(scales);
    for (out, (block, scale)) in out.as_chunks_mut::<64>().0.iter_mut().zip(blocks) {
        let table = &tables[usize::from(*scale)];
        for (pair, byte) in out.as_chunks_mut::<4>().0.iter_mut().zip(block) {
            let low = table[usize::from(byte & 15)].to_le_bytes();
            let high = table[usize::from(byte >> 4)].to_le_bytes();
            *pair = [low[0], low[1], high[0], high[1]];
        }
    }
}

/// The codes of 32 values, and their scale: `stored` if it gives every value back exactly, else that of the largest
/// magnitude, values rounded to the nearest code. `None` if a value is not finite.
pub(super) fn encode(values: &[bf16; 32], stored: Option<u8>) -> Option<([u8; 16], u8)> {
    if let Some(scale) = stored
        && let Some(block) = encode_exactly(values, scale)
    {
        return Some((block, scale));
    }
    let largest = values
        .iter()
        .map(|x| x.to_f32().abs())
        .fold(
            0.0,
            |a: f32, b| if b.is_nan() { f32::NAN } else { a.max(b) },
        );
    if !largest.is_finite() {
        return None;
    }
    let scale = if largest == 0.0 {
        127
    } else {
        (largest.log2().floor() as i32 - MAX_EXPONENT + 127).clamp(0, 254) as u8
    };
    let factor = factor(scale);
    let code = |x: bf16| nearest((x.to_f64() / factor) as f32);
    let block = std::array::from_fn(|i| code(values[2 * i]) | (code(values[2 * i + 1]) << 4));
    Some((block, scale))
}

fn encode_exactly(values: &[bf16; 32], scale: u8) -> Option<[u8; 16]> {
    let table = &tables()[usize::from(scale)];
    let code = |x: bf16| table.iter().position(|bits| *bits == x.to_bits());
    let mut block = [0; 16];
    for (byte, pair) in block.iter_mut().zip(values.as_chunks::<2>().0) {
        *byte = code(pair[0])? as u8 | ((code(pair[1])? as u8) << 4);
    }
    Some(block)
}

/// The code of the nearest value, ties to the even code, values beyond the largest held to it.
fn nearest(x: f32) -> u8 {
    let magnitude = x.abs();
    let mut best = 0u8;
    for code in 1..8u8 {
        let apart = |code: u8| (VALUES[usize::from(code)] - magnitude).abs();
        if apart(code) < apart(best) || (apart(code) == apart(best) && code % 2 == 0) {
            best = code;
        }
    }
    best | if x.is_sign_negative() { 8 } else { 0 }
}
