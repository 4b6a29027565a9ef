use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

fn cast(src: &[u8], from: DType, to: DType) -> Vec<u8> {
    let mut out = vec![0; src.len() / from.bytes().unwrap() * to.bytes().unwrap()];
    cast_bytes(src, from, to, &mut out).unwrap();
    out
}

fn all_u16() -> Vec<u8> {
    (0..=u16::MAX).flat_map(u16::to_le_bytes).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

/// Equal bits, or both NaN of the same sign.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits()
        || (a.is_nan() && b.is_nan() && a.is_sign_negative() == b.is_sign_negative())
}

#[test]
fn every_half_and_bfloat_widens_exactly() {
    for (dtype, reference) in [
        (
            DType::F16,
            (|bits| f16::from_bits(bits).to_f32()) as fn(u16) -> f32,
        ),
        (DType::BF16, |bits| bf16::from_bits(bits).to_f32()),
    ] {
        let widened = f32s(&cast(&all_u16(), dtype, DType::F32));
        for (bits, value) in widened.iter().enumerate() {
            assert!(
                same(*value, reference(bits as u16)),
                "{dtype} {bits:#06x}: {value}"
            );
        }
        let as_f64 = cast(&all_u16(), dtype, DType::F64);
        for (bits, bytes) in as_f64.as_chunks::<8>().0.iter().enumerate() {
            assert!(
                same(f64::from_le_bytes(*bytes) as f32, reference(bits as u16)),
                "{dtype} {bits:#06x}"
            );
        }
    }
}

#[test]
fn every_16_bit_value_survives_f32_and_f64_and_back() {
    for dtype in [DType::F16, DType::BF16] {
        for wide in [DType::F32, DType::F64] {
            let back = cast(&cast(&all_u16(), dtype, wide), wide, dtype);
            for (bits, found) in back.as_chunks::<2>().0.iter().enumerate() {
                let (bits, found) = (bits as u16, u16::from_le_bytes(*found));
                let is_nan = match dtype {
                    DType::F16 => f16::from_bits(bits).is_nan(),
                    _ => bf16::from_bits(bits).is_nan(),
                };
                // A signalling NaN comes back quiet: everything else bit for bit.
                let quiet = if dtype == DType::F16 { 0x200 } else { 0x40 };
                let expected = if is_nan { bits | quiet } else { bits };
                assert_eq!(found, expected, "{dtype} through {wide}: {bits:#06x}");
            }
        }
    }
}

#[test]
fn every_half_to_bfloat_and_back_matches_the_reference() {
    let to_bf16 = cast(&all_u16(), DType::F16, DType::BF16);
    let to_f16 = cast(&all_u16(), DType::BF16, DType::F16);
    for bits in 0..=u16::MAX {
        let at = 2 * usize::from(bits);
        let found = bf16::from_le_bytes([to_bf16[at], to_bf16[at + 1]]);
        assert!(
            same(
                found.to_f32(),
                bf16::from_f32(f16::from_bits(bits).to_f32()).to_f32()
            ),
            "{bits:#06x}"
        );
        let found = f16::from_le_bytes([to_f16[at], to_f16[at + 1]]);
        assert!(
            same(
                found.to_f32(),
                f16::from_f32(bf16::from_bits(bits).to_f32()).to_f32()
            ),
            "{bits:#06x}"
        );
    }
}

/// Around every 16-bit value: the value, the tie above it, and the neighbours of that tie.
#[test]
fn rounding_is_to_nearest_even_around_every_16_bit_value() {
    for dtype in [DType::F16, DType::BF16] {
        let mut inputs = Vec::new();
        for value in f32s(&cast(&all_u16(), dtype, DType::F32)) {
            let tie = match dtype {
                DType::BF16 => f32::from_bits(value.to_bits().wrapping_add(0x8000)),
                _ => f32::from_bits(value.to_bits().wrapping_add(0x1000)),
            };
            inputs.extend([value, tie, f32::from_bits(tie.to_bits().wrapping_add(1))]);
            inputs.push(f32::from_bits(tie.to_bits().wrapping_sub(1)));
        }
        let bytes: Vec<u8> = inputs.iter().flat_map(|v| v.to_le_bytes()).collect();
        let found = cast(&bytes, DType::F32, dtype);
        for (value, found) in inputs.iter().zip(found.as_chunks::<2>().0) {
            let (found, expected) = match dtype {
                DType::F16 => (
                    f16::from_le_bytes(*found).to_f32(),
                    f16::from_f32_const(*value).to_f32(),
                ),
                _ => (
                    bf16::from_le_bytes(*found).to_f32(),
                    bf16::from_f32(*value).to_f32(),
                ),
            };
            assert!(
                same(found, expected),
                "{dtype} of {value:e}: {found:e}, expected {expected:e}"
            );
        }
    }
}

/// The doubles that show rounding twice: just above a tie of the narrow type, by less than half an f32 step.
#[test]
fn doubles_are_rounded_once() {
    #[track_caller]
    fn check(value: f64, to: DType, expected: f32) {
        let found = f32s(&cast(
            &cast(&value.to_le_bytes(), DType::F64, to),
            to,
            DType::F32,
        ))[0];
        assert!(
            same(found, expected),
            "{value:e} to {to}: {found:e}, expected {expected:e}"
        );
    }
    let tiny = 2f64.powi(-40);
    check(1.0 + 2f64.powi(-11), DType::F16, 1.0);
    check(
        1.0 + 2f64.powi(-11) + tiny,
        DType::F16,
        1.0 + 2f32.powi(-10),
    );
    check(1.0 + 2f64.powi(-8), DType::BF16, 1.0);
    check(1.0 + 2f64.powi(-8) + tiny, DType::BF16, 1.0 + 2f32.powi(-7));
    check(
        -(1.0 + 2f64.powi(-8) + tiny),
        DType::BF16,
        -(1.0 + 2f32.powi(-7)),
    );
    check(
        f64::from(f32::MAX) * (1.0 + 2f64.powi(-30)),
        DType::BF16,
        f32::INFINITY,
    );
    check(f64::MAX, DType::F16, f32::INFINITY);
    check(65519.999, DType::F16, 65504.0);
    check(65520.0, DType::F16, f32::INFINITY);
    check(-f64::MIN_POSITIVE, DType::BF16, -0.0);
    check(f64::NEG_INFINITY, DType::F16, f32::NEG_INFINITY);
    check(f64::NAN, DType::F16, f32::NAN);
    // Half of the smallest subnormal is a tie with zero; anything above it rounds up.
    check(2f64.powi(-25), DType::F16, 0.0);
    check(2f64.powi(-25) + 2f64.powi(-70), DType::F16, 2f32.powi(-24));
    check(2f64.powi(-134), DType::BF16, 0.0);
    check(
        2f64.powi(-134) + 2f64.powi(-170),
        DType::BF16,
        2f32.powi(-133),
    );
}

#[test]
fn eight_bit_floats_are_read_and_never_written() {
    let codes: Vec<u8> = (0..=255).collect();
    for dtype in [
        DType::F8E4M3,
        DType::F8E5M2,
        DType::F8E8M0,
        DType::F8E4M3Fnuz,
        DType::F8E5M2Fnuz,
    ] {
        let table = float8::table(dtype).unwrap();
        for (code, value) in f32s(&cast(&codes, dtype, DType::F32))
            .into_iter()
            .enumerate()
        {
            assert!(same(value, table[code]));
        }
        let refused = cast_bytes(&[0; 4], DType::F32, dtype, &mut [0]);
        assert_eq!(
            refused,
            Err(CastError::Unsupported {
                from: DType::F32,
                to: dtype
            })
        );
    }
}

#[test]
fn other_types_are_copied_only_and_lengths_are_checked() {
    for dtype in DType::all() {
        let mut out = [0; 6];
        cast_bytes(b"abcdef", dtype, dtype, &mut out).unwrap();
        assert_eq!(&out, b"abcdef");
        assert!(matches!(
            cast_bytes(b"abc", dtype, dtype, &mut out),
            Err(CastError::Length { .. })
        ));
    }
    let i64_to_f32 = cast_bytes(&[0; 8], DType::I64, DType::F32, &mut [0; 4]);
    assert_eq!(
        i64_to_f32,
        Err(CastError::Unsupported {
            from: DType::I64,
            to: DType::F32
        })
    );
    let ragged = cast_bytes(&[0; 7], DType::F32, DType::BF16, &mut [0; 2]);
    assert_eq!(
        ragged,
        Err(CastError::Ragged {
            dtype: DType::F32,
            bytes: 7
        })
    );
    let short = cast_bytes(&[0; 8], DType::F32, DType::BF16, &mut [0; 2]);
    assert!(matches!(
        short,
        Err(CastError::Length {
            expected: 4,
            to_bytes: 2,
            ..
        })
    ));
    assert!(matches!(
        decode_f32(&[0; 8], DType::F32, &mut [0.0]),
        Err(CastError::Length { .. })
    ));
    assert!(matches!(
        encode_f32(&[0.0], DType::F32, &mut [0; 3]),
        Err(CastError::Length { .. })
    ));
}

#[test]
fn large_inputs_give_the_same_on_many_threads() {
    let src: Vec<u8> = (0..PARALLEL_THRESHOLD as u32 + 77)
        .flat_map(|i| (i as f32).sin().to_le_bytes())
        .collect();
    for to in [DType::BF16, DType::F16, DType::F64] {
        let whole = cast(&src, DType::F32, to);
        let pieces: Vec<u8> = src
            .chunks(4 * 1000)
            .flat_map(|piece| cast(piece, DType::F32, to))
            .collect();
        assert_eq!(whole, pieces, "{to}");
    }
}

proptest! {
    #[test]
    fn random_bits_agree_with_the_reference(bits in proptest::collection::vec(any::<u32>(), 1..3000)) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let mut halves = vec![0; values.len() * 2];
        let mut bfloats = halves.clone();
        encode_f32(&values, DType::F16, &mut halves).unwrap();
        encode_f32(&values, DType::BF16, &mut bfloats).unwrap();
        for (i, value) in values.iter().enumerate() {
            let half = f16::from_le_bytes([halves[2 * i], halves[2 * i + 1]]).to_f32();
            let bfloat = bf16::from_le_bytes([bfloats[2 * i], bfloats[2 * i + 1]]).to_f32();
            prop_assert!(same(half, f16::from_f32_const(*value).to_f32()));
            prop_assert!(same(bfloat, bf16::from_f32(*value).to_f32()));
        }
    }
}
