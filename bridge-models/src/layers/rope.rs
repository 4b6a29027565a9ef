//! From positions to the cosines and sines of a rotary embedding.

use bridge_core::config::{Frequencies, RopeConfig, RopeStyle};
use bridge_ops::{Ops, RotaryStyle, RotaryTable, float_from_f32};

use rayon::prelude::*;

use crate::context::ForwardContext;

/// The rotary table of `ctx`'s positions for heads of which `rotary_dim` elements are rotated:
/// cosines and sines of `[batch or 1, seq, rotary_dim / 2]`.
///
/// Frequencies that depend on the length of the sequence are those of the highest position, as in transformers.
/// Layers should ask [`ForwardContext::rotary_table`], which remembers what it has made.
pub fn rotary_table<B: Ops>(
    ctx: &ForwardContext<'_, B>,
    rope: &RopeConfig,
    rotary_dim: usize,
    style: RopeStyle,
) -> RotaryTable<B> {
    let frequencies = rope.frequencies(rotary_dim, ctx.last_position() + 1);
    let half = rotary_dim / 2;
    let (rows, positions) = ctx.rows_of_positions();
    let (cos, sin) = cos_sin(positions.into_iter(), &frequencies);
    let shape = [rows, ctx.seq(), half];
    let style = match style {
        RopeStyle::Halves => RotaryStyle::Halves,
        RopeStyle::Pairs => RotaryStyle::Pairs,
    };
    RotaryTable::new(
        float_from_f32::<B>(&cos, &shape, ctx.device()),
        float_from_f32::<B>(&sin, &shape, ctx.device()),
        style,
    )
}

fn cos_sin(
    positions: impl Iterator<Item = usize>,
    frequencies: &Frequencies,
) -> (Vec<f32>, Vec<f32>) {
    let Frequencies {
        inv_freq,
        attention_factor,
    } = frequencies;
    let positions: Vec<usize> = positions.collect();
    // On all cores: a GPU waits for this in each step.
    positions
        .par_iter()
        .with_min_len(64)
        .flat_map_iter(|position| {
            inv_freq.iter().map(move |frequency| {
                // The angle is rounded to f32, as in the reference implementation; its cosine is then exact.
                let (sin, cos) = f64::from(*position as f32 * frequency).sin_cos();
                (
                    (cos * attention_factor) as f32,
                    (sin * attention_factor) as f32,
                )
            })
        })
        .unzip()
}
