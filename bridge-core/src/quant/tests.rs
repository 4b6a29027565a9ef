//! Codes there and back, and what is refused.

use half::bf16;
use serde_json::{Value, json};

use super::*;
use crate::checkpoint::{Checkpoint, RangeReader, ShardedWriter, TensorSpec, WriterOptions};

fn bytes_of(values: &[bf16]) -> Vec<[u8; 2]> {
    values.iter().map(|value| value.to_le_bytes()).collect()
}

fn config(settings: Value) -> HfConfig {
    let Value::Object(keys) = json!({ "quantization_config": settings }) else {
        unreachable!("an object literal")
    };
    HfConfig::from_json(keys, "config.json")
}

const FP8: QuantScheme = QuantScheme::Fp8Block { rows: 4, cols: 6 };

#[test]
fn every_code_of_e4m3_has_its_value_and_comes_back() {
    for code in 0..=255u8 {
        let exact = crate::dtype::float8_value(DType::F8E4M3, code).unwrap();
        let found = fp8::value(code);
        assert_eq!(found.to_bits() & 0x8000_0000, exact.to_bits() & 0x8000_0000);
        assert!(
            found == exact || (found.is_nan() && exact.is_nan()),
            "{code:#x}"
        );
        assert_eq!(fp8::encode(found), code);
    }
    for (x, code) in [
        (1e9, 0x7e),
        (-449.0, 0xfe),
        (1.0 / 1024.0, 0), // halfway, to even
        (3.0 / 1024.0, 2),
        (1.0625, 0x38),
        (1.1875, 0x3a),
    ] {
        assert_eq!(fp8::encode(x), code, "{x}");
    }
}

#[test]
fn rounding_to_bf16_is_that_of_half() {
    for bits in (0..=u32::MAX).step_by(65_521) {
        let x = f32::from_bits(bits);
        assert_eq!(fp8::bf16_bits(x), bf16::from_f32(x).to_bits(), "{bits:#x}");
    }
}

/// A checkpoint of one quantized tensor.
fn stored(scheme: QuantScheme, shape: &[usize], codes: &[u8], scales: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (names, dtypes) = match scheme {
        QuantScheme::Fp8Block { .. } => (["w", "w_scale_inv"], [DType::F8E4M3, DType::F32]),
        QuantScheme::Mxfp4 => (["w_blocks", "w_scales"], [DType::U8, DType::U8]),
    };
    let (_, scale_shape) = shapes(scheme, shape).unwrap();
    let specs = vec![
        TensorSpec::new(names[0], dtypes[0], shape),
        TensorSpec::new(names[1], dtypes[1], scale_shape),
    ];
    let out = dir.path().join("out");
    let writer = ShardedWriter::create(&out, specs, WriterOptions::default()).unwrap();
    writer.write_at(0, 0, codes).unwrap();
    writer.write_at(1, 0, scales).unwrap();
    writer.finish().unwrap();
    dir
}

fn settings(scheme: QuantScheme) -> Value {
    match scheme {
        QuantScheme::Fp8Block { rows, cols } => {
            json!({"quant_method": "fp8", "weight_block_size": [rows, cols]})
        }
        QuantScheme::Mxfp4 => json!({"quant_method": "mxfp4"}),
    }
}

#[test]
fn what_is_read_at_any_offset_is_the_dequantized_tensor_and_quantizes_back_to_the_same_bytes() {
    let numbers = |count: usize, seed: u64| -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as u8
        };
        (0..count).map(|_| next()).collect()
    };
    // Blocks that are cut off at both edges, NaN codes included.
    let (rows, cols) = (10, 15);
    let factors: Vec<f32> = (0..9).map(|i| 0.37f32 * 1.7f32.powi(i - 4)).collect();
    let scales: Vec<u8> = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
    let codes = numbers(rows * cols, 1);
    let expected = |i: usize| {
        let (row, col) = (i / cols, i % cols);
        let factor = factors[row / 4 * 3 + col / 6];
        let value = crate::dtype::float8_value(DType::F8E4M3, codes[i]).unwrap();
        bf16::from_f32(value * factor).to_bits()
    };
    check(FP8, &[rows, cols], &codes, &scales, cols, expected);

    let (blocks, scales) = (numbers(6 * 2 * 16, 2), numbers(12, 3));
    let scales: Vec<u8> = scales.iter().map(|s| s % 120 + 70).collect();
    let table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let expected = |i: usize| {
        let code = blocks[i / 2] >> (i % 2 * 4) & 15;
        let value: f32 = table[usize::from(code & 7)] * if code & 8 == 0 { 1.0 } else { -1.0 };
        let factor = 2f32.powi(i32::from(scales[i / 32]) - 127);
        bf16::from_f32(value * factor).to_bits()
    };
    let shape = [3, 2, 2, 16];
    check(QuantScheme::Mxfp4, &shape, &blocks, &scales, 64, expected);
}

#[track_caller]
fn check(
    scheme: QuantScheme,
    shape: &[usize],
    codes: &[u8],
    scales: &[u8],
    cols: usize,
    expected: impl Fn(usize) -> u16,
) {
    let dir = stored(scheme, shape, codes, scales);
    let checkpoint = Checkpoint::open(dir.path().join("out")).unwrap();
    let headers: Vec<TensorHeader> = checkpoint.tensors().iter().map(Into::into).collect();
    let mut problems = Problems::new();
    let folded = fold(&config(settings(scheme)), &headers, &mut problems);
    assert!(problems.is_empty() && folded.len() == 1, "{problems}");
    let tensor = &folded[0];
    assert_eq!(
        (tensor.header.name.as_str(), tensor.header.dtype),
        ("w", DType::BF16)
    );
    let numel: usize = tensor.header.shape.iter().product();
    let reader = DequantizingReader::new(&checkpoint, tensor.quantized.as_ref().unwrap()).unwrap();
    assert_eq!(reader.len(), 2 * numel as u64);
    for (start, end) in [
        (0, numel),
        (1, numel),
        (7, 8),
        (31, 65),
        (numel - 1, numel),
        (5, 5),
    ] {
        let mut bytes = vec![0; 2 * (end - start)];
        reader.read_exact_at(2 * start as u64, &mut bytes).unwrap();
        for (i, pair) in bytes.as_chunks::<2>().0.iter().enumerate() {
            assert_eq!(
                u16::from_le_bytes(*pair),
                expected(start + i),
                "element {}",
                start + i
            );
        }
    }
    let mut byte = [0];
    reader.read_exact_at(3, &mut byte).unwrap();
    assert_eq!(byte[0], expected(1).to_le_bytes()[1]);
    assert!(
        reader
            .read_exact_at(2 * numel as u64 - 1, &mut [0; 2])
            .is_err()
    );

    let values: Vec<bf16> = (0..numel).map(|i| bf16::from_bits(expected(i))).collect();
    let (mut band, mut found_codes, mut found_scales) = (Band::default(), vec![], vec![]);
    let (height, scale_bytes) = match scheme {
        QuantScheme::Fp8Block { rows, cols: width } => (rows, cols.div_ceil(width) * 4),
        QuantScheme::Mxfp4 => (1, cols / 32),
    };
    for (index, rows) in values.chunks(height * cols).enumerate() {
        let known = &scales[index * scale_bytes..][..scale_bytes];
        quantize_band(scheme, &bytes_of(rows), cols, Some(known), &mut band).unwrap();
        found_codes.extend_from_slice(&band.codes);
        found_scales.extend_from_slice(&band.scales);
    }
    assert_eq!(found_codes, codes);
    assert_eq!(found_scales, scales);
}

#[test]
fn changed_blocks_get_a_scale_of_their_own_and_stay_close() {
    let values: Vec<bf16> = (0..24 * 64)
        .map(|i| bf16::from_f32(((i * 37 % 101) as f32 - 50.0) * 0.013))
        .collect();
    for (scheme, close) in [(FP8, 0.04), (QuantScheme::Mxfp4, 0.35)] {
        let mut band = Band::default();
        let height = if scheme == FP8 { 4 } else { 24 };
        for rows in values.chunks(height * 64) {
            let stale = vec![0; 4 * 64];
            quantize_band(scheme, &bytes_of(rows), 64, Some(&stale), &mut band).unwrap();
            let mut bytes = vec![0; 2 * rows.len()];
            match scheme {
                QuantScheme::Fp8Block { cols, .. } => {
                    let scales = band.scales.as_chunks::<4>().0.iter();
                    let scales: Vec<f32> = scales.map(|s| f32::from_le_bytes(*s)).collect();
                    for (codes, bytes) in band.codes.chunks(64).zip(bytes.chunks_mut(128)) {
                        fp8::decode_row(codes, 0, cols, &scales, bytes);
                    }
                }
                QuantScheme::Mxfp4 => mxfp4::decode(&band.codes, &band.scales, &mut bytes),
            }
            for (value, found) in rows.iter().zip(bytes.as_chunks::<2>().0) {
                let found = bf16::from_le_bytes(*found).to_f32();
                let (value, limit) = (value.to_f32(), 0.65 * close);
                assert!(
                    (value - found).abs() <= limit,
                    "{scheme:?}: {value} became {found}"
                );
            }
        }
    }
    let infinite = vec![bf16::INFINITY; 32];
    for scheme in [FP8, QuantScheme::Mxfp4] {
        let error = quantize_band(scheme, &bytes_of(&infinite), 32, None, &mut Band::default());
        assert!(error.unwrap_err().contains("not finite"));
    }
}

#[track_caller]
fn check_refused(settings: Value, headers: &[(&str, DType, &[usize])], expected: &str) {
    let headers: Vec<TensorHeader> = headers
        .iter()
        .map(|(name, dtype, shape)| TensorHeader::new(*name, *dtype, *shape))
        .collect();
    let mut problems = Problems::new();
    fold(&config(settings), &headers, &mut problems);
    let text = problems.to_string();
    assert!(text.contains(expected), "{text}");
}

#[test]
fn misfits_are_named() {
    let fp8 = settings(FP8);
    check_refused(json!({"quant_method": "gptq"}), &[], "quantized (`gptq`)");
    check_refused(
        json!({"quant_method": "fp8"}),
        &[],
        "without weight_block_size",
    );
    check_refused(
        fp8.clone(),
        &[("w", DType::F8E4M3, &[8, 6])],
        "scales `w_scale_inv` are missing",
    );
    check_refused(
        fp8.clone(),
        &[
            ("w", DType::F8E4M3, &[8, 6]),
            ("w_scale_inv", DType::F32, &[2, 2]),
        ],
        "is F32 [2, 2], expected F32 [2, 1]",
    );
    check_refused(
        fp8,
        &[
            ("w", DType::F8E4M3, &[8]),
            ("w_scale_inv", DType::F32, &[2]),
        ],
        "has shape [8]",
    );
    check_refused(
        settings(QuantScheme::Mxfp4),
        &[
            ("w_blocks", DType::U8, &[8, 2, 15]),
            ("w_scales", DType::U8, &[8, 2]),
        ],
        "has shape [8, 2, 15]",
    );
}

/// The plainest form of each step, of which the vector code must give the same bits.
mod plain {
    use half::bf16;

    pub(super) fn fp8_code(x: f32) -> u8 {
        let sign = ((x.to_bits() >> 24) & 0x80) as u8;
        let magnitude = x.abs();
        if magnitude.is_nan() {
            return sign | 0x7f;
        }
        if magnitude < 1.0 / 64.0 {
            return sign | (magnitude * 512.0).round_ties_even() as u8;
        }
        let bits = magnitude.min(448.0).to_bits();
        let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
        sign | ((rounded >> 20) - (120 << 3)) as u8
    }

    pub(super) fn fp8_value(code: u8, scale: f32) -> bf16 {
        let value = crate::dtype::float8_value(crate::dtype::DType::F8E4M3, code).unwrap();
        bf16::from_f32(value * scale)
    }

    const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

    fn factor(scale: u8) -> f64 {
        2f64.powi(i32::from(scale) - 127)
    }

    pub(super) fn mxfp4_value(code: u8, scale: u8) -> bf16 {
        let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
        bf16::from_f64(sign * E2M1[usize::from(code & 7)] * factor(scale))
    }

    pub(super) fn mxfp4_nearest(x: bf16, scale: u8) -> u8 {
        let magnitude = ((x.to_f64() / factor(scale)) as f32).abs();
        let mut best = 0u8;
        for code in 1..8u8 {
            let apart = |code: u8| (E2M1[usize::from(code)] as f32 - magnitude).abs();
            if apart(code) < apart(best) || (apart(code) == apart(best) && code % 2 == 0) {
                best = code;
            }
        }
        best | if x.is_sign_negative() { 8 } else { 0 }
    }

    pub(super) fn mxfp4_scale(largest: bf16) -> u8 {
        match largest.to_f32() {
            0.0 => 127,
            largest => (largest.log2().floor() as i32 - 2 + 127).clamp(0, 254) as u8,
        }
    }
}

#[test]
fn codes_of_any_number_are_those_of_the_plain_form() {
    for bits in (0..=u32::MAX).step_by(9973) {
        let x = f32::from_bits(bits);
        assert_eq!(fp8::encode(x), plain::fp8_code(x), "{bits:#x}");
    }
    // Around every boundary between two codes.
    for code in 0..0x7eu8 {
        let [below, above] = [code, code + 1].map(fp8::value);
        let middle = (below + above) / 2.0;
        for bits in middle.to_bits() - 3..middle.to_bits() + 4 {
            let x = f32::from_bits(bits);
            assert_eq!(fp8::encode(x), plain::fp8_code(x), "{x}");
            assert_eq!(fp8::encode(-x), plain::fp8_code(-x), "{x}");
        }
    }
    for scale in 0..0xffu8 {
        let codes: Vec<u8> = (0..16).map(|byte| byte << 4 | (15 - byte)).collect();
        let mut bytes = [0; 64];
        mxfp4::decode(&codes, &[scale], &mut bytes);
        for (i, found) in bytes.as_chunks::<2>().0.iter().enumerate() {
            let code = codes[i / 2] >> (i % 2 * 4) & 15;
            let expected = plain::mxfp4_value(code, scale);
            assert_eq!(
                u16::from_le_bytes(*found),
                expected.to_bits(),
                "{code} {scale}"
            );
        }
    }
}

proptest::proptest! {
    /// Bands of values near what a scale makes, and of any bits at all; stored scales that fit, and that do not.
    #[test]
    fn bands_are_quantized_as_in_the_plain_form(
        bits in proptest::collection::vec(proptest::prelude::any::<u16>(), 4 * 64),
        scale in 1e-4f32..1e4,
        spread in 0u32..3,
        fits in proptest::prelude::any::<bool>(),
    ) {
        let (cols, width): (usize, usize) = (64, 24);
        let scheme = QuantScheme::Fp8Block { rows: 4, cols: width };
        let values: Vec<bf16> = bits.iter().map(|&bits| match spread {
            0 => plain::fp8_value(if bits as u8 & 0x7f == 0x7f { 0 } else { bits as u8 }, scale),
            1 => bf16::from_f32(f32::from(bits as i16) * scale),
            _ => bf16::from_bits(if bits & 0x7f80 == 0x7f80 { 0 } else { bits }),
        }).collect();
        let stored = if fits { scale } else { scale * 0.77 }.to_le_bytes().repeat(cols.div_ceil(width));
        let mut band = Band::default();
        quantize_band(scheme, &bytes_of(&values), cols, Some(&stored), &mut band).unwrap();
        let stored = f32::from_le_bytes(stored[..4].try_into().unwrap());
        for (block, start) in (0..cols).step_by(width).enumerate() {
            let places: Vec<usize> = (0..4)
                .flat_map(|row| (start..(start + width).min(cols)).map(move |col| row * cols + col))
                .collect();
            let exact = places.iter().all(|at| {
                let code = plain::fp8_code(values[*at].to_f32() / stored);
                plain::fp8_value(code, stored).to_bits() == values[*at].to_bits()
            });
            let largest = places.iter().map(|at| values[*at].to_f32().abs()).fold(0.0, f32::max);
            let fresh = if largest == 0.0 { 1.0 } else { largest / 448.0 }.max(f32::MIN_POSITIVE);
            let expected = if exact { stored } else { fresh };
            let found = f32::from_le_bytes(band.scales.as_chunks::<4>().0[block]);
            proptest::prop_assert_eq!(found.to_bits(), expected.to_bits());
            for at in places {
                let code = plain::fp8_code(values[at].to_f32() / expected);
                proptest::prop_assert_eq!(band.codes[at], code, "{}", values[at]);
            }
        }

        let known = 60 + (bits[0] % 120) as u8;
        let values: Vec<bf16> = match spread {
            0 => bits.iter().map(|&bits| plain::mxfp4_value(bits as u8 & 15, known)).collect(),
            _ => values,
        };
        let stored = vec![if fits { known } else { known + 1 }; values.len() / 32];
        quantize_band(QuantScheme::Mxfp4, &bytes_of(&values), cols, Some(&stored), &mut band).unwrap();
        for (block, values) in values.chunks(32).enumerate() {
            let code = |i: usize| band.codes[block * 16 + i / 2] >> (i % 2 * 4) & 15;
            let exactly = |x: bf16| (0..16u8).find(|code| {
                plain::mxfp4_value(*code, stored[block]).to_bits() == x.to_bits()
            });
            let exact: Option<Vec<u8>> = values.iter().map(|x| exactly(*x)).collect();
            let largest = values.iter().map(|x| bf16::from_bits(x.to_bits() & 0x7fff));
            let largest = largest.fold(bf16::ZERO, |a, b| if b > a { b } else { a });
            let fresh = plain::mxfp4_scale(largest);
            proptest::prop_assert_eq!(band.scales[block], if exact.is_some() { stored[block] } else { fresh });
            for (i, x) in values.iter().enumerate() {
                let expected = exact.as_ref().map_or_else(|| plain::mxfp4_nearest(*x, fresh), |codes| codes[i]);
                proptest::prop_assert_eq!(code(i), expected, "{}", x);
            }
        }
    }
}
