//! Quantizing a band of rows.

use half::bf16;

use super::{MXFP4_BLOCK, QuantScheme, fp8, mxfp4};

/// A band of rows in codes and scales, as they are stored.
#[derive(Debug, Default)]
pub(crate) struct Band {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<u8>,
}

/// Quantizes whole rows of `cols` values. A band of FP8 is one row of blocks, or what is left of it at the end; a band of
/// MXFP4 any number of rows. `stored` are the scales that the values came with, if they are known; each is used again
/// where it gives its block's values back exactly.
///
/// # Errors
/// What is wrong with the values, in words.
pub(crate) fn quantize_band(
    scheme: QuantScheme,
    values: &[bf16],
    cols: usize,
    stored: Option<&[u8]>,
    band: &mut Band,
) -> Result<(), String> {
    band.codes.clear();
    band.scales.clear();
    match scheme {
        QuantScheme::Fp8Block { cols: width, .. } => {
            band.codes.resize(values.len(), 0);
            let rows = values.len() / cols.max(1);
            let (mut block, mut codes) = (Vec::new(), Vec::new());
            for (index, start) in (0..cols).step_by(width).enumerate() {
                let run = start..(start + width).min(cols);
                block.clear();
                for row in 0..rows {
                    block.extend_from_slice(&values[row * cols..][run.clone()]);
                }
                codes.resize(block.len(), 0);
                let known = stored
                    .and_then(|scales| scales.as_chunks::<4>().0.get(index))
                    .map(|bytes| f32::from_le_bytes(*bytes))
                    .filter(|scale| fp8::encode_exactly(&block, *scale, &mut codes));
                let scale = match known {
                    Some(scale) => scale,
                    None => fresh_fp8(&block, &mut codes)?,
                };
                for row in 0..rows {
                    band.codes[row * cols..][run.clone()]
                        .copy_from_slice(&codes[row * run.len()..][..run.len()]);
                }
                band.scales.extend_from_slice(&scale.to_le_bytes());
            }
        }
        QuantScheme::Mxfp4 => {
            for (index, block) in values.as_chunks::<MXFP4_BLOCK>().0.iter().enumerate() {
                let known = stored.and_then(|scales| scales.get(index).copied());
                let (codes, scale) = mxfp4::encode(block, known)
                    .ok_or("holds a value that is not finite, which MXFP4 does not have")?;
                band.codes.extend_from_slice(&codes);
                band.scales.push(scale);
            }
        }
    }
    Ok(())
}

/// Codes under the scale that takes the largest magnitude to the largest code.
fn fresh_fp8(block: &[bf16], codes: &mut [u8]) -> Result<f32, String> {
    let mut largest = 0f32;
    for value in block {
        let magnitude = value.to_f32().abs();
        if !magnitude.is_finite() {
            return Err(
                "holds a value that is not finite, of which no scale can be made".to_owned(),
            );
        }
        largest = largest.max(magnitude);
    }
    let scale = if largest == 0.0 {
        1.0
    } else {
        largest / fp8::MAX
    };
    // The smallest magnitudes have a scale that is no normal number, or none at all.
    let scale = scale.max(f32::MIN_POSITIVE);
    for (code, value) in codes.iter_mut().zip(block) {
        *code = fp8::encode(value.to_f32() / scale);
    }
    Ok(scale)
}
