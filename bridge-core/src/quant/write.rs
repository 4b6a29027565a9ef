//! Quantizing a band of rows.

use super::{MXFP4_BLOCK, QuantScheme, fp8, mxfp4};

/// A band of rows in codes and scales, as they are stored.
#[derive(Debug, Default)]
pub(crate) struct Band {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<u8>,
}

/// Quantizes whole rows of `cols` values, bf16 in little-endian order. A band of FP8 is one row of blocks, or what is left
/// of it at the end; a band of MXFP4 any number of rows. `stored` are the scales that the values came with, if they are
/// known; each is used again where it gives its block's values back exactly.
///
/// # Errors
/// What is wrong with the values, in words.
pub(crate) fn quantize_band(
    scheme: QuantScheme,
    values: &[[u8; 2]],
    cols: usize,
    stored: Option<&[u8]>,
    band: &mut Band,
) -> Result<(), String> {
    match scheme {
        QuantScheme::Fp8Block { cols: width, .. } => {
            // Every byte is written, so what was there before need not go.
            band.codes.resize(values.len(), 0);
            band.scales.clear();
            for (index, start) in (0..cols).step_by(width).enumerate() {
                let block = Block {
                    values,
                    cols,
                    run: [start, (start + width).min(cols)],
                };
                let known = stored
                    .and_then(|scales| scales.as_chunks::<4>().0.get(index))
                    .map(|bytes| f32::from_le_bytes(*bytes))
                    .filter(|scale| block.encode_exactly(*scale, &mut band.codes));
                let scale = match known {
                    Some(scale) => scale,
                    None => block.encode(&mut band.codes)?,
                };
                band.scales.extend_from_slice(&scale.to_le_bytes());
            }
        }
        QuantScheme::Mxfp4 => {
            let blocks = values.len() / MXFP4_BLOCK;
            band.codes.resize(blocks * (MXFP4_BLOCK / 2), 0);
            band.scales.resize(blocks, 0);
            if !mxfp4::encode(values, stored, &mut band.codes, &mut band.scales) {
                return Err(
                    "holds a value that is not finite, which MXFP4 does not have".to_owned(),
                );
            }
        }
    }
    Ok(())
}

/// A block of FP8: columns `run[0]..run[1]` of all rows of a band, encoded where it stands.
struct Block<'a> {
    values: &'a [[u8; 2]],
    cols: usize,
    run: [usize; 2],
}

impl Block<'_> {
    /// The places in the band at which the block's rows lie.
    fn rows(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
        let [start, end] = self.run;
        (0..self.values.len())
            .step_by(self.cols)
            .map(move |row| row + start..row + end)
    }

    /// Codes under a scale that gives every value back exactly; `false` if it does not.
    fn encode_exactly(&self, scale: f32, codes: &mut [u8]) -> bool {
        scale.is_finite()
            && self
                .rows()
                .all(|row| fp8::encode_exactly(&self.values[row.clone()], scale, &mut codes[row]))
    }

    /// Codes under the scale that takes the largest magnitude to the largest code.
    fn encode(&self, codes: &mut [u8]) -> Result<f32, String> {
        let largest = self.rows().map(|row| fp8::largest(&self.values[row]));
        let largest = f32::from_bits(u32::from(largest.fold(0, u16::max)) << 16);
        if !largest.is_finite() {
            return Err(
                "holds a value that is not finite, of which no scale can be made".to_owned(),
            );
        }
        let scale = fp8::scale_for(largest);
        for row in self.rows() {
            fp8::encode_nearest(&self.values[row.clone()], scale, &mut codes[row]);
        }
        Ok(scale)
    }
}
