//! Element types as safetensors files spell them, and casts between the floating-point ones.

mod cast;
mod convert;
mod float8;

pub use cast::{CastError, cast_bytes, decode_f32, encode_f32};

#[cfg(test)]
pub(crate) fn float8_value(dtype: DType, code: u8) -> Option<f32> {
    float8::table(dtype).map(|table| table[usize::from(code)])
}

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The type of a tensor's elements. All multi-byte elements are stored little-endian.
///
/// The order of the variants is the one by which the usual safetensors writers place tensors in a file (largest
/// last here, first there), so it must not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// One byte, 0 or 1.
    Bool,
    /// 4-bit float of the OCP microscaling formats, E2M1, packed without padding.
    F4,
    /// 6-bit float of the OCP microscaling formats, 2 exponent bits.
    F6E2M3,
    /// 6-bit float of the OCP microscaling formats, 3 exponent bits.
    F6E3M2,
    /// Unsigned 8-bit integer. Packed 4-bit weights travel under this type too.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// 8-bit float, 5 exponent bits, with infinities (Micikevicius et al. 2022, arXiv:2209.05433).
    F8E5M2,
    /// 8-bit float, 4 exponent bits, no infinities, largest value 448 (arXiv:2209.05433).
    F8E4M3,
    /// 8-bit power of two, the scale type of the OCP microscaling formats.
    F8E8M0,
    /// 8-bit float, 4 exponent bits, bias 8, one unsigned zero and one NaN (Noune et al. 2022, arXiv:2206.02915).
    F8E4M3Fnuz,
    /// 8-bit float, 5 exponent bits, bias 16, one unsigned zero and one NaN (arXiv:2206.02915).
    F8E5M2Fnuz,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an IEEE 754 single.
    BF16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// IEEE 754 single precision.
    F32,
    /// Complex number of two singles.
    C64,
    /// IEEE 754 double precision.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
}

/// Every type with its spelling in a safetensors header.
const SPELLINGS: [(DType, &str); 22] = [
    (DType::Bool, "BOOL"),
    (DType::F4, "F4"),
    (DType::F6E2M3, "F6_E2M3"),
    (DType::F6E3M2, "F6_E3M2"),
    (DType::U8, "U8"),
    (DType::I8, "I8"),
    (DType::F8E5M2, "F8_E5M2"),
    (DType::F8E4M3, "F8_E4M3"),
    (DType::F8E8M0, "F8_E8M0"),
    (DType::F8E4M3Fnuz, "F8_E4M3FNUZ"),
    (DType::F8E5M2Fnuz, "F8_E5M2FNUZ"),
    (DType::I16, "I16"),
    (DType::U16, "U16"),
    (DType::F16, "F16"),
    (DType::BF16, "BF16"),
    (DType::I32, "I32"),
    (DType::U32, "U32"),
    (DType::F32, "F32"),
    (DType::C64, "C64"),
    (DType::F64, "F64"),
    (DType::I64, "I64"),
    (DType::U64, "U64"),
];

impl DType {
    /// Every type, in the order of the enum.
    pub fn all() -> impl Iterator<Item = DType> {
        SPELLINGS.iter().map(|&(dtype, _)| dtype)
    }

    /// The spelling in a safetensors header: `BF16`, `F8_E4M3`.
    pub fn as_str(self) -> &'static str {
        SPELLINGS[self as usize].1
    }

    /// Size of one element, in bits.
    pub const fn bits(self) -> usize {
        match self {
            DType::F4 => 4,
            DType::F6E2M3 | DType::F6E3M2 => 6,
            DType::Bool | DType::U8 | DType::I8 => 8,
            DType::F8E5M2
            | DType::F8E4M3
            | DType::F8E8M0
            | DType::F8E4M3Fnuz
            | DType::F8E5M2Fnuz => 8,
            DType::I16 | DType::U16 | DType::F16 | DType::BF16 => 16,
            DType::I32 | DType::U32 | DType::F32 => 32,
            DType::C64 | DType::F64 | DType::I64 | DType::U64 => 64,
        }
    }

    /// Size of one element, in bytes; `None` for the packed types smaller than a byte.
    pub const fn bytes(self) -> Option<usize> {
        match self.bits() {
            bits if bits % 8 == 0 => Some(bits / 8),
            _ => None,
        }
    }

    /// Bytes that a tensor of this type and shape takes; `None` when the number does not fit in 64 bits or is not
    /// whole (packed types).
    pub fn byte_len(self, shape: &[usize]) -> Option<u64> {
        // A zero anywhere makes the tensor empty, however large the other dims are.
        if shape.contains(&0) {
            return Some(0);
        }
        let bits = shape.iter().try_fold(self.bits() as u64, |product, &dim| {
            product.checked_mul(dim as u64)
        })?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Whether the elements are real floating-point numbers.
    pub const fn is_float(self) -> bool {
        match self {
            DType::F4 | DType::F6E2M3 | DType::F6E3M2 => true,
            DType::F8E5M2
            | DType::F8E4M3
            | DType::F8E8M0
            | DType::F8E4M3Fnuz
            | DType::F8E5M2Fnuz => true,
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 => true,
            DType::Bool | DType::C64 => false,
            DType::U8
            | DType::I8
            | DType::I16
            | DType::U16
            | DType::I32
            | DType::U32
            | DType::I64
            | DType::U64 => false,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A spelling that names no element type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown dtype {found:?}, expected one of BOOL, U8..U64, I8..I64, F16, BF16, F32, F64, C64, F8_*, F6_*, F4"
)]
pub struct UnknownDType {
    /// The spelling found, cut short when it is long.
    pub found: String,
}

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(text: &str) -> Result<Self, UnknownDType> {
        let known = SPELLINGS.iter().find(|(_, spelling)| *spelling == text);
        known.map(|&(dtype, _)| dtype).ok_or_else(|| UnknownDType {
            found: text.chars().take(40).collect(),
        })
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_stand_in_enum_order_and_parse_back() {
        for (position, dtype) in DType::all().enumerate() {
            assert_eq!(dtype as usize, position);
            assert_eq!(dtype.as_str().parse(), Ok(dtype));
        }
        assert!("bf16".parse::<DType>().is_err());
        assert_eq!(
            "x".repeat(500).parse::<DType>().unwrap_err().found.len(),
            40
        );
    }

    #[test]
    fn byte_len_handles_scalars_empty_tensors_packed_types_and_overflow() {
        #[track_caller]
        fn check(dtype: DType, shape: &[usize], expected: Option<u64>) {
            assert_eq!(dtype.byte_len(shape), expected, "{dtype} {shape:?}");
        }
        check(DType::F32, &[], Some(4));
        check(DType::BF16, &[3, 5], Some(30));
        check(DType::F64, &[usize::MAX, 0, usize::MAX], Some(0));
        check(DType::F64, &[1 << 40, 1 << 40], None);
        check(DType::F4, &[3, 2], Some(3));
        check(DType::F4, &[3], None);
        check(DType::F6E2M3, &[4], Some(3));
    }

    #[test]
    fn serde_uses_the_safetensors_spelling() {
        assert_eq!(
            serde_json::to_string(&DType::F8E4M3).unwrap(),
            "\"F8_E4M3\""
        );
        assert_eq!(
            serde_json::from_str::<DType>("\"F8\\u005fE4M3\"").unwrap(),
            DType::F8E4M3
        );
        assert!(serde_json::from_str::<DType>("\"float\"").is_err());
    }
}
