//! Rotary position embedding (Su et al. 2021, "RoFormer"): each pair of channels is rotated by an angle that grows with
//! the position.
//!
//! ```text
//! a' = a cos - b sin          (a, b) = channels (i, i + r/2)    RotaryStyle::Halves, as Hugging Face stores weights
//! b' = b cos + a sin          (a, b) = channels (2i, 2i + 1)    RotaryStyle::Pairs, as in the paper and Meta's code
//! ```
//!
//! `r` is the rotary dimension; channels from `r` on pass through. The gradient is the rotation by the opposite angle.

use burn::tensor::Tensor;
use burn_backend::TensorMetadata;

use crate::data::float_from_f32;
use crate::ops::Ops;
use crate::primitive::{Float, dims, float, tensor, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// Which channels form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryStyle {
    /// Channel `i` goes with channel `i + rotary_dim / 2`.
    Halves,
    /// Channel `2 i` goes with channel `2 i + 1`.
    Pairs,
}

/// Which way to rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotaryDirection {
    /// By the angle: the embedding itself.
    Forward,
    /// By the opposite angle: its gradient, and its inverse when the table is not scaled.
    Backward,
}

/// Cosines and sines of the angle of each position and channel pair, fp32: [batch or 1, seq, rotary_dim / 2].
#[derive(Debug, Clone)]
pub struct RotaryTable<B: Ops> {
    cos: Float<B>,
    sin: Float<B>,
    style: RotaryStyle,
}

impl<B: Ops> RotaryTable<B> {
    /// A table from its cosines and sines: [batch or 1, seq, rotary_dim / 2].
    ///
    /// # Panics
    /// When the two differ in shape or are not of rank 3.
    #[track_caller]
    pub fn new(cos: Float<B>, sin: Float<B>, style: RotaryStyle) -> Self {
        let (c, s) = (dims(&cos), dims(&sin));
        assert!(
            c == s && c.len() == 3,
            "expected cos and sin of one shape [batch or 1, seq, r / 2], found {c:?}, {s:?}"
        );
        Self {
            cos: to_f32::<B>(cos),
            sin: to_f32::<B>(sin),
            style,
        }
    }

    /// The table of `positions`, the same for every sequence of a batch.
    ///
    /// `inv_freq` are the rotary_dim / 2 angular frequencies; `attention_factor` multiplies cosines and sines (1 except
    /// for YaRN and its kin). Angles are products of fp32 numbers, as in Hugging Face `LlamaRotaryEmbedding`.
    pub fn from_positions(
        inv_freq: &[f32],
        attention_factor: f32,
        positions: impl IntoIterator<Item = usize>,
        style: RotaryStyle,
        device: &B::Device,
    ) -> Self {
        let angles: Vec<f32> = positions
            .into_iter()
            .flat_map(|position| {
                inv_freq
                    .iter()
                    .map(move |frequency| frequency * position as f32)
            })
            .collect();
        let shape = [1, angles.len() / inv_freq.len().max(1), inv_freq.len()];
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles
                .iter()
                .map(|&angle| f(angle) * attention_factor)
                .collect();
            float_from_f32::<B>(&values, &shape, device)
        };
        Self {
            cos: table(f32::cos),
            sin: table(f32::sin),
            style,
        }
    }

    /// The cosines, [batch or 1, seq, rotary_dim / 2].
    pub fn cos(&self) -> Float<B> {
        self.cos.clone()
    }

    /// The sines, like the cosines.
    pub fn sin(&self) -> Float<B> {
        self.sin.clone()
    }

    /// Which channels form a pair.
    pub fn style(&self) -> RotaryStyle {
        self.style
    }

    /// The number of channels that are rotated.
    pub fn rotary_dim(&self) -> usize {
        2 * dims(&self.cos)[2]
    }

    fn apply(&self, x: Float<B>, direction: RotaryDirection) -> Float<B> {
        B::rotary(x, self.cos(), self.sin(), self.style, direction)
    }
}

/// Rotates the channels of each head by the angles of the table. x: [batch, seq, heads, d] -> same.
///
/// # Panics
/// When the table does not fit x.
#[track_caller]
pub fn rotary<B: Ops>(tape: &Tape<B>, x: &Var<B>, table: &RotaryTable<B>) -> Var<B> {
    let (shape, table_shape) = (x.shape(), dims(&table.cos));
    assert!(
        shape.len() == 4
            && shape[1] == table_shape[1]
            && (table_shape[0] == 1 || table_shape[0] == shape[0])
            && table.rotary_dim() <= shape[3],
        "rotary: a table of shape {table_shape:?} does not fit x of shape {shape:?} ([batch, seq, heads, d])"
    );
    let output = table.apply(x.value(), RotaryDirection::Forward);
    let table = table.clone();
    tape.record(output, &[x], move |dy| {
        vec![Some(table.apply(dy, RotaryDirection::Backward))]
    })
}

pub(crate) fn portable<B: Ops>(
    x: Float<B>,
    cos: Float<B>,
    sin: Float<B>,
    style: RotaryStyle,
    direction: RotaryDirection,
) -> Float<B> {
    let dtype = x.dtype();
    let x = tensor::<B, 4>(to_f32::<B>(x));
    let [batch, seq, heads, d] = x.dims();
    let cos = tensor::<B, 3>(to_f32::<B>(cos)).unsqueeze_dim::<4>(2); // [batch or 1, seq, 1, r / 2]
    let sin = tensor::<B, 3>(to_f32::<B>(sin)).unsqueeze_dim::<4>(2);
    let sin = match direction {
        RotaryDirection::Forward => sin,
        RotaryDirection::Backward => sin.neg(),
    };
    let half = cos.dims()[3];

    let rotated = x.clone().narrow(3, 0, 2 * half);
    let (a, b): (Tensor<B, 4>, Tensor<B, 4>) = match style {
        RotaryStyle::Halves => (
            rotated.clone().narrow(3, 0, half),
            rotated.narrow(3, half, half),
        ),
        RotaryStyle::Pairs => {
            let pairs = rotated.reshape([batch, seq, heads, half, 2]);
            (
                pairs.clone().narrow(4, 0, 1).squeeze_dim(4),
                pairs.narrow(4, 1, 1).squeeze_dim(4),
            )
        }
    };
    let a_out = a.clone() * cos.clone() - b.clone() * sin.clone();
    let b_out = b * cos + a * sin;
    let y = match style {
        RotaryStyle::Halves => Tensor::cat(vec![a_out, b_out], 3),
        RotaryStyle::Pairs => {
            Tensor::stack::<5>(vec![a_out, b_out], 4).reshape([batch, seq, heads, 2 * half])
        }
    };
    let y = if 2 * half < d {
        Tensor::cat(vec![y, x.narrow(3, 2 * half, d - 2 * half)], 3)
    } else {
        y
    };
    to_dtype::<B>(float(y), dtype)
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{DEVICE, ROUNDING, assert_close, assert_fast, random, run};
    use crate::to_f32_vec;

    /// Angles for `batch` sequences of `seq` positions.
    fn table(batch: usize, seq: usize, half: usize, style: RotaryStyle) -> RotaryTable<Flex> {
        let angles = to_f32_vec::<Flex>(random(&[batch, seq, half], 7));
        let of = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&x| f(3.0 * x)).collect();
            float_from_f32::<Flex>(&values, &[batch, seq, half], &DEVICE)
        };
        RotaryTable::new(of(f32::cos), of(f32::sin), style)
    }

    /// The definition: each pair, read as a complex number, is multiplied by that of its angle.
    fn reference(x: &Float<Flex>, table: &RotaryTable<Flex>, sign: f32) -> Float<Flex> {
        let &[batch, seq, heads, d] = dims(x).as_slice() else {
            panic!("rank")
        };
        let &[table_batch, _, half] = dims(&table.cos).as_slice() else {
            panic!("rank")
        };
        let (cos, sin) = (
            to_f32_vec::<Flex>(table.cos()),
            to_f32_vec::<Flex>(table.sin()),
        );
        let mut y = to_f32_vec::<Flex>(x.clone());
        for b in 0..batch {
            for s in 0..seq {
                for h in 0..heads {
                    let head = &mut y[((b * seq + s) * heads + h) * d..][..d];
                    for i in 0..half {
                        let (first, second) = match table.style {
                            RotaryStyle::Halves => (i, i + half),
                            RotaryStyle::Pairs => (2 * i, 2 * i + 1),
                        };
                        let angle = ((b % table_batch) * seq + s) * half + i;
                        let (re, im) = (head[first], head[second]);
                        head[first] = re * cos[angle] - sign * im * sin[angle];
                        head[second] = im * cos[angle] + sign * re * sin[angle];
                    }
                }
            }
        }
        float_from_f32::<Flex>(&y, &[batch, seq, heads, d], &DEVICE)
    }

    #[test]
    fn rotates_forward_and_the_gradient_backward() {
        for style in [RotaryStyle::Halves, RotaryStyle::Pairs] {
            // A table for all sequences or one each; all channels or some.
            for (table_batch, half, d) in [(1, 8, 16), (2, 5, 10), (2, 3, 16)] {
                let table = table(table_batch, 5, half, style);
                let x = random(&[2, 5, 3, d], 1);
                let found = run(std::slice::from_ref(&x), &[], |tape, x, _| {
                    rotary(tape, &x[0], &table)
                });
                assert_close("y", &found.output, &reference(&x, &table, 1.0), ROUNDING);
                let seed = random(&[2, 5, 3, d], 999);
                assert_close(
                    "dx",
                    &found.input_grads[0],
                    &reference(&seed, &table, -1.0),
                    ROUNDING,
                );
                assert_fast(&["rotary"]);

                let portable =
                    portable::<Flex>(x, table.cos(), table.sin(), style, RotaryDirection::Forward);
                assert_close("portable", &found.output, &portable, ROUNDING);
            }
        }
    }

    #[test]
    fn works_in_place_only_when_nobody_else_has_the_buffer() {
        let table = table(1, 5, 8, RotaryStyle::Halves);
        let x = random(&[2, 5, 3, 16], 1);
        let before = to_f32_vec::<Flex>(x.clone());
        let y = table.apply(x.clone(), RotaryDirection::Forward);
        assert_eq!(to_f32_vec::<Flex>(x.clone()), before);
        let address = x.bytes().as_ptr();
        let in_place = table.apply(x, RotaryDirection::Forward);
        assert_eq!(in_place.bytes().as_ptr(), address);
        assert_eq!(to_f32_vec::<Flex>(in_place), to_f32_vec::<Flex>(y));
    }

    #[test]
    fn table_of_positions() {
        let table = RotaryTable::<Flex>::from_positions(
            &[1.0, 0.25],
            0.5,
            3..5,
            RotaryStyle::Halves,
            &DEVICE,
        );
        assert_eq!((dims(&table.cos()), table.rotary_dim()), (vec![1, 2, 2], 4));
        let expected = [3.0_f32, 0.75, 4.0, 1.0].map(|angle| 0.5 * angle.sin());
        assert_eq!(to_f32_vec::<Flex>(table.sin()), expected);
    }
}
