//! What the 256 codes of each 8-bit float mean, as f32 (exact: every value of these types is an f32).

use super::DType;

/// The value of each code of `dtype`; `None` unless it is one of the 8-bit floats.
pub(super) fn table(dtype: DType) -> Option<[f32; 256]> {
    let value: fn(u8) -> f32 = match dtype {
        DType::F8E4M3 => e4m3,
        DType::F8E5M2 => e5m2,
        DType::F8E8M0 => e8m0,
        DType::F8E4M3Fnuz => |code| fnuz(code, 3, 8),
        DType::F8E5M2Fnuz => |code| fnuz(code, 2, 16),
        _ => return None,
    };
    Some(std::array::from_fn(|code| value(code as u8)))
}

/// Sign, exponent and mantissa of a code, read as a number without special values.
fn plain(code: u8, mantissa_bits: u32, bias: i32) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((code & 0x7f) >> mantissa_bits);
    let mantissa = f32::from(code & ((1 << mantissa_bits) - 1));
    let fraction = mantissa / (1 << mantissa_bits) as f32;
    match exponent {
        0 => sign * fraction * 2f32.powi(1 - bias),
        _ => sign * (1.0 + fraction) * 2f32.powi(exponent - bias),
    }
}

/// No infinities; only the two codes with all lower bits set are NaN.
fn e4m3(code: u8) -> f32 {
    match code & 0x7f {
        0x7f => f32::NAN.copysign(if code & 0x80 == 0 { 1.0 } else { -1.0 }),
        _ => plain(code, 3, 7),
    }
}

/// A half cut to its upper byte, so infinities and NaNs are those of the half.
fn e5m2(code: u8) -> f32 {
    half::f16::from_bits(u16::from(code) << 8).to_f32()
}

/// 2^(code - 127); the last code is NaN.
fn e8m0(code: u8) -> f32 {
    match code {
        0xff => f32::NAN,
        // 2^-127 is a subnormal f32.
        0 => f32::from_bits(1 << 22),
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

/// Finite values, one zero and, where negative zero would be, the one NaN.
fn fnuz(code: u8, mantissa_bits: u32, bias: i32) -> f32 {
    match code {
        0x80 => f32::NAN,
        _ => plain(code, mantissa_bits, bias),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Landmarks of each format, from the tables of the papers that define them.
    #[test]
    fn landmark_codes_have_their_published_values() {
        #[track_caller]
        fn check(dtype: DType, code: u8, expected: f32) {
            assert_eq!(
                table(dtype).unwrap()[code as usize],
                expected,
                "{dtype} {code:#04x}"
            );
        }
        check(DType::F8E4M3, 0x00, 0.0);
        check(DType::F8E4M3, 0x01, 2f32.powi(-9));
        check(DType::F8E4M3, 0x08, 2f32.powi(-6));
        check(DType::F8E4M3, 0x38, 1.0);
        check(DType::F8E4M3, 0xb8, -1.0);
        check(DType::F8E4M3, 0x7e, 448.0);
        check(DType::F8E5M2, 0x01, 2f32.powi(-16));
        check(DType::F8E5M2, 0x3c, 1.0);
        check(DType::F8E5M2, 0x7b, 57344.0);
        check(DType::F8E5M2, 0x7c, f32::INFINITY);
        check(DType::F8E8M0, 0, 2f32.powi(-127));
        check(DType::F8E8M0, 127, 1.0);
        check(DType::F8E8M0, 254, 2f32.powi(127));
        check(DType::F8E4M3Fnuz, 0x01, 2f32.powi(-10));
        check(DType::F8E4M3Fnuz, 0x40, 1.0);
        check(DType::F8E4M3Fnuz, 0x7f, 240.0);
        check(DType::F8E5M2Fnuz, 0x01, 2f32.powi(-17));
        check(DType::F8E5M2Fnuz, 0x40, 1.0);
        check(DType::F8E5M2Fnuz, 0x7f, 57344.0);
    }

    #[test]
    fn nan_codes_are_nan_and_no_others() {
        #[track_caller]
        fn check(dtype: DType, nans: &[u8]) {
            let table = table(dtype).unwrap();
            let found: Vec<u8> = (0..=255)
                .filter(|&code: &u8| table[code as usize].is_nan())
                .collect();
            assert_eq!(found, nans, "{dtype}");
        }
        check(DType::F8E4M3, &[0x7f, 0xff]);
        check(DType::F8E5M2, &[0x7d, 0x7e, 0x7f, 0xfd, 0xfe, 0xff]);
        check(DType::F8E8M0, &[0xff]);
        check(DType::F8E4M3Fnuz, &[0x80]);
        check(DType::F8E5M2Fnuz, &[0x80]);
        assert!(table(DType::BF16).is_none());
    }
}
