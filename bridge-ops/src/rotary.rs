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
