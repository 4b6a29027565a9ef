//! Weights of which one side stores the value less one.
//!
//! Taking one away is exact for every weight from 0.5 on (until its steps are larger than one): `w - 1` needs no more
//! digits than `w`. Smaller weights have finer steps than their value less one can have; and a value less one that is
//! close to zero, as training makes them, has finer steps than the weight. Such a value would not come back, so it is
//! refused, unless rounding was asked for.

use half::{bf16, f16};

use super::transfer::SegmentReader;
use crate::checkpoint::{CheckpointError, RangeReader};
use crate::dtype::DType;

/// What is done to each element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shift {
    /// From the stored value less one to the weight.
    Add,
    /// From the weight to the value less one.
    Subtract,
}

impl Shift {
    fn by(self) -> f64 {
        match self {
            Shift::Add => 1.0,
            Shift::Subtract => -1.0,
        }
    }
}

/// The elements of a tensor, each one more or one less, in the type that they have.
pub(super) struct ShiftedReader<'a> {
    pub(super) inner: SegmentReader<'a>,
    /// Byte of `inner` at which element 0 lies.
    pub(super) base: u64,
    pub(super) dtype: DType,
    /// What to call the tensor in messages.
    pub(super) name: String,
    pub(super) shift: Shift,
    /// Whether a value that would not come back is rounded, and not refused.
    pub(super) rounds: bool,
}

impl ShiftedReader<'_> {
    /// Shifts the elements in `buf`, or says in words which cannot be.
    fn shift(&self, buf: &mut [u8]) -> Result<(), String> {
        let by = self.shift.by();
        let size = self.dtype.bytes().unwrap_or(1);
        for element in buf.chunks_exact_mut(size) {
            let stored = decode(self.dtype, element)
                .ok_or_else(|| format!("one cannot be added to weights of dtype {}", self.dtype))?;
            let mut back = [0; 8];
            let back = &mut back[..size];
            back.copy_from_slice(element);
            encode(self.dtype, stored + by, element);
            let shifted = decode(self.dtype, element).unwrap_or(f64::NAN);
            let before: [u8; 8] = padded(back);
            encode(self.dtype, shifted - by, back);
            if !self.rounds && padded(back) != before {
                let change = match self.shift {
                    Shift::Add => "plus one",
                    Shift::Subtract => "less one",
                };
                return Err(format!(
                    "one side stores it less one, and {stored} {change} has no exact {}: it would come back as {}; name \
                     the dtype to write (--dtype) to have such values rounded",
                    self.dtype,
                    decode(self.dtype, back).unwrap_or(f64::NAN),
                ));
            }
        }
        Ok(())
    }
}

fn padded(bytes: &[u8]) -> [u8; 8] {
    let mut all = [0; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    all
}

/// The value of an element; `None` for types that are none of a plain float's.
fn decode(dtype: DType, bytes: &[u8]) -> Option<f64> {
    Some(match (dtype, bytes) {
        (DType::F64, _) => f64::from_le_bytes(bytes.try_into().ok()?),
        (DType::F32, _) => f64::from(f32::from_le_bytes(bytes.try_into().ok()?)),
        (DType::BF16, &[low, high]) => bf16::from_le_bytes([low, high]).to_f64(),
        (DType::F16, &[low, high]) => f16::from_le_bytes([low, high]).to_f64(),
        _ => return None,
    })
}

/// The nearest element, ties to even. `out` is of the type's size.
fn encode(dtype: DType, value: f64, out: &mut [u8]) {
    match dtype {
        DType::F64 => out.copy_from_slice(&value.to_le_bytes()),
        DType::F32 => out.copy_from_slice(&(value as f32).to_le_bytes()),
        DType::BF16 => out.copy_from_slice(&bf16::from_f64(value).to_le_bytes()),
        DType::F16 => out.copy_from_slice(&f16::from_f64(value).to_le_bytes()),
        // What cannot be decoded is never encoded.
        _ => {}
    }
}

impl RangeReader for ShiftedReader<'_> {
    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
        let bad = |problem| CheckpointError::BadRange {
            name: self.name.clone(),
            problem,
        };
        let size = self.dtype.bytes().unwrap_or(1) as u64;
        let whole = offset >= self.base
            && (offset - self.base).is_multiple_of(size)
            && (buf.len() as u64).is_multiple_of(size);
        if !whole {
            return Err(bad(format!(
                "{} bytes from byte {offset} on are not whole elements",
                buf.len()
            )));
        }
        self.inner.read_exact_at(offset, buf)?;
        self.shift(buf).map_err(bad)
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bytes(Vec<u8>);

    impl RangeReader for Bytes {
        fn len(&self) -> u64 {
            self.0.len() as u64
        }

        fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), CheckpointError> {
            buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
            Ok(())
        }

        fn describe(&self) -> String {
            "memory".to_owned()
        }
    }

    /// What becomes of a bf16 value, or the message.
    fn shifted(value: f32, shift: Shift, rounds: bool) -> Result<f32, String> {
        // An element lies anywhere, at odd bytes too.
        let mut bytes = vec![0; 3];
        bytes.extend(bf16::from_f32(value).to_le_bytes());
        let source = Bytes(bytes);
        let reader = ShiftedReader {
            inner: SegmentReader::Stored(&source),
            base: 3,
            dtype: DType::BF16,
            name: "norm".to_owned(),
            shift,
            rounds,
        };
        let mut out = [0; 2];
        reader
            .read_exact_at(3, &mut out)
            .map_err(|error| error.to_string())?;
        Ok(bf16::from_le_bytes(out).to_f32())
    }

    #[test]
    fn every_weight_from_a_half_to_256_comes_back_and_no_other_is_changed_in_silence() {
        for bits in 0..=u16::MAX {
            let weight = bf16::from_bits(bits).to_f32();
            // As the reader is given it: of NaN there are several, and conversion keeps one kind of them.
            let bits = bf16::from_f32(weight).to_bits();
            match shifted(weight, Shift::Subtract, false) {
                Ok(less) => {
                    let back = shifted(less, Shift::Add, true).unwrap();
                    assert_eq!(bf16::from_f32(back).to_bits(), bits, "{weight}");
                }
                Err(message) => {
                    assert!(!(0.5..=256.0).contains(&weight), "{message}");
                    assert!(message.contains("norm"), "{message}");
                }
            }
        }
    }

    #[test]
    fn a_value_that_would_not_come_back_is_refused_or_rounded_when_asked_to() {
        // 1.001 is between two numbers of this precision, 1 and 1.0078125.
        let error = shifted(0.001, Shift::Add, false).unwrap_err();
        assert!(error.contains("plus one has no exact BF16"), "{error}");
        assert!(error.contains("come back as 0;"), "{error}");
        assert_eq!(shifted(0.001, Shift::Add, true), Ok(1.0));
        assert!(shifted(0.1, Shift::Subtract, false).is_err());
        assert_eq!(shifted(0.1, Shift::Subtract, true), Ok(-0.8984375));
        assert_eq!(shifted(-0.25, Shift::Add, false), Ok(0.75));
    }
}
