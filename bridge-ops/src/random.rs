//! Random sequences whose elements are functions of a key and their index alone, so that any part of one can be drawn
//! anywhere: by one rank of many, in any order, on any device.

use std::ops::Range;

use rayon::prelude::*;

use crate::data::float_from_vec;
use crate::ops::Ops;
use crate::primitive::Float;

/// Increment of SplitMix64: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea and Flood 2014).
pub fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(GOLDEN);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Number `index` of the uniform sequence with `key`: 53 random bits in 0..1.
pub fn uniform(key: u64, index: u64) -> f64 {
    (mix(key.wrapping_add(index.wrapping_mul(GOLDEN))) >> 11) as f64 / (1u64 << 53) as f64
}

/// Numbers `range` of the normal sequence with `key` and standard deviation `std`: number `i` comes from the pair
/// `i / 2` of uniform numbers by the method of Box and Muller, the cosine for even `i` and the sine for odd.
pub fn normal(key: u64, std: f64, range: Range<usize>) -> Vec<f32> {
    // Whole pairs are computed in parallel; a range that cuts a pair takes its half.
    const CHUNK: usize = 1 << 14;
    let first = range.start & !1;
    let mut values = vec![0.0f32; range.end - first];
    values
        .par_chunks_mut(CHUNK)
        .enumerate()
        .for_each(|(chunk, values)| {
            let pair = (first + chunk * CHUNK) / 2;
            for (index, out) in values.chunks_mut(2).enumerate() {
                let (cos, sin) = normal_pair(key, (pair + index) as u64);
                out[0] = (cos * std) as f32;
                if let Some(odd) = out.get_mut(1) {
                    *odd = (sin * std) as f32;
                }
            }
        });
    values.drain(..range.start - first);
    values
}

fn normal_pair(key: u64, pair: u64) -> (f64, f64) {
    // The first is kept off zero for the logarithm.
    let radius = (-2.0 * (1.0 - uniform(key, 2 * pair)).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * uniform(key, 2 * pair + 1)).sin_cos();
    (radius * cos, radius * sin)
}

/// The part of a row-major tensor of `shape` within `ranges`, one per dimension, as runs of neighbouring elements, in
/// order.
pub fn runs(shape: &[usize], ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    // Dimensions from `split` on are whole, so what lies in one index of the dimensions before is one run.
    let whole = |dim: &usize| ranges[*dim] == (0..shape[*dim]);
    let split = shape.len() - (0..shape.len()).rev().take_while(whole).count();
    let Some(cut) = split.checked_sub(1) else {
        return std::iter::once(0..shape.iter().product()).collect();
    };
    let inner: usize = shape[split..].iter().product();
    let outer = ranges[..cut].iter().map(Range::len).product::<usize>();
    let run = |index: usize| {
        // The index of this run in the dimensions before `cut`, from the last one up.
        let (mut rest, mut row, mut stride) = (index, 0, 1);
        for dim in (0..cut).rev() {
            row += (ranges[dim].start + rest % ranges[dim].len()) * stride;
            rest /= ranges[dim].len();
            stride *= shape[dim];
        }
        let start = (row * shape[cut] + ranges[cut].start) * inner;
        start..start + ranges[cut].len() * inner
    };
    (0..outer).map(run).collect()
}

pub(crate) fn portable_normal_region<B: Ops>(
    key: u64,
    std: f64,
    shape: &[usize],
    ranges: &[Range<usize>],
    device: &B::Device,
) -> Float<B> {
    let held: Vec<usize> = ranges.iter().map(Range::len).collect();
    let mut runs = runs(shape, ranges);
    let values = match runs.len() {
        1 => normal(key, std, runs.remove(0)),
        _ => runs
            .into_iter()
            .flat_map(|run| normal(key, std, run))
            .collect(),
    };
    float_from_vec::<B>(values, &held, device)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::to_f32_vec;

    #[test]
    fn any_range_is_that_range_of_the_whole() {
        let whole = normal(7, 0.5, 0..4000);
        for range in [0..1, 1..2, 3..1000, 17..18, 1000..3840, 3999..4000, 5..5] {
            assert_eq!(normal(7, 0.5, range.clone()), whole[range]);
        }
    }

    #[test]
    fn any_region_is_that_region_of_the_whole() {
        let shape = [3, 5, 7];
        let whole = normal(9, 1.0, 0..105);
        for ranges in [
            [0..3, 0..5, 0..7],
            [1..3, 0..5, 0..7],
            [0..3, 2..4, 0..7],
            [0..2, 1..5, 3..6],
            [1..1, 0..5, 0..7],
        ] {
            let mut expected = Vec::new();
            for i in ranges[0].clone() {
                for j in ranges[1].clone() {
                    for k in ranges[2].clone() {
                        expected.push(whole[(i * 5 + j) * 7 + k]);
                    }
                }
            }
            let found = Flex::normal_region(9, 1.0, &shape, &ranges, &Default::default());
            assert_eq!(to_f32_vec::<Flex>(found), expected, "{ranges:?}");
        }
    }
}
