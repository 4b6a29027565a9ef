//! Queries, keys and values of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) from their
//! projections.
//!
//! ```text
//! q_h = [x_h up to channel start, rotate(the rest)]        rotary_tail
//! k_h = [kv_h up to channel nope, r]                       latent_heads: r is one for all heads
//! v_h = kv_h from channel nope on
//! ```

use std::sync::{Arc, Mutex, PoisonError};

use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::primitive::{Float, dims};
use crate::rotary::{RotaryDirection, RotaryStyle, RotaryTable};
use crate::shape::slices_along;
use crate::tape::{Tape, Var};

/// Rotates the channels of each head from `start` on by the angles of the table. x: [batch, seq, heads, d] -> same.
///
/// # Panics
/// When the table does not fit x.
#[track_caller]
pub fn rotary_tail<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    table: &RotaryTable<B>,
    start: usize,
) -> Var<B> {
    let (shape, table_shape) = (x.shape(), dims(&table.cos()));
    assert!(
        shape.len() == 4
            && shape[1] == table_shape[1]
            && (table_shape[0] == 1 || table_shape[0] == shape[0])
            && start + table.rotary_dim() == shape[3],
        "rotary_tail: a table of shape {table_shape:?} does not fit x of shape {shape:?} ([batch, seq, heads, d]) from \
         channel {start} on"
    );
    let rotate = move |x: Float<B>, table: &RotaryTable<B>, direction| {
        B::rotary_tail(x, table.cos(), table.sin(), table.style(), direction, start)
    };
    let output = rotate(x.value(), table, RotaryDirection::Forward);
    let table = table.clone();
    tape.record(output, &[x], move |dy| {
        vec![Some(rotate(dy, &table, RotaryDirection::Backward))]
    })
}

/// Keys and values of every head. kv: [batch, seq, heads, nope + value], rotated: [batch, seq, 1, r]
/// -> keys [batch, seq, heads, nope + r] and values [batch, seq, heads, value].
///
/// Whoever uses the values must use the keys as well, as an attention does: the values' gradient joins that of the keys.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn latent_heads<B: Ops>(
    tape: &Tape<B>,
    kv: &Var<B>,
    rotated: &Var<B>,
    nope: usize,
) -> (Var<B>, Var<B>) {
    let (shape, own) = (kv.shape(), rotated.shape());
    assert!(
        shape.len() == 4
            && own.len() == 4
            && shape[..2] == own[..2]
            && own[2] == 1
            && (1..shape[3]).contains(&nope),
        "latent_heads: kv {shape:?} ([batch, seq, heads, nope + value]) does not fit {own:?} ([batch, seq, 1, r]) with nope \
         = {nope}"
    );
    let keys = B::latent_keys(kv.value(), rotated.value(), nope);
    let values = B::float_slice(kv.value(), &slices_along(4, 3, nope..shape[3]));
    let (device, dtype) = (B::float_device(&values), values.dtype());
    // The values' node comes later, and so earlier on the way back.
    let kept: Arc<Mutex<Option<Float<B>>>> = Arc::default();
    let dvalues = Arc::clone(&kept);
    let value_shape = dims(&values);
    let keys = tape.record(keys, &[kv, rotated], move |dk| {
        let dv = dvalues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let dv = dv.unwrap_or_else(|| B::float_zeros(value_shape.into(), &device, dtype.into()));
        let (dkv, drotated) = B::latent_keys_backward(dk, dv, nope);
        vec![Some(dkv), Some(drotated)]
    });
    let values = tape.record(values, &[kv], move |dv| {
        *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(dv);
        vec![None]
    });
    (keys, values)
}

/// The rotation in plain tensor operations.
pub fn portable_rotary_tail<B: Ops>(
    x: Float<B>,
    cos: Float<B>,
    sin: Float<B>,
    style: RotaryStyle,
    direction: RotaryDirection,
    start: usize,
) -> Float<B> {
    let d = dims(&x)[3];
    if start == 0 {
        return B::rotary(x, cos, sin, style, direction);
    }
    let head = B::float_slice(x.clone(), &slices_along(4, 3, 0..start));
    let tail = B::float_slice(x, &slices_along(4, 3, start..d));
    let tail = B::rotary(tail, cos, sin, style, direction);
    B::float_cat(vec![head, tail], 3)
}

pub(crate) fn portable_keys<B: Ops>(kv: Float<B>, rotated: Float<B>, nope: usize) -> Float<B> {
    let mut shape = dims(&rotated);
    shape[2] = dims(&kv)[2];
    let head = B::float_slice(kv, &slices_along(4, 3, 0..nope));
    let tail = B::float_expand(rotated, shape.into());
    B::float_cat(vec![head, tail], 3)
}

pub(crate) fn portable_keys_backward<B: Ops>(
    dk: Float<B>,
    dv: Float<B>,
    nope: usize,
) -> (Float<B>, Float<B>) {
    let d = dims(&dk)[3];
    let head = B::float_slice(dk.clone(), &slices_along(4, 3, 0..nope));
    let tail = B::float_slice(dk, &slices_along(4, 3, nope..d));
    let dkv = B::float_cat(vec![head, dv], 3);
    (dkv, B::float_sum_dim(tail, 2))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use burn_flex::Flex;

    use super::*;
    use crate::rotary::rotary;
    use crate::shape::{concat, slice};
    use crate::testing::{DEVICE, ROUNDING, assert_close, check, random};

    #[test]
    fn a_rotated_tail_is_the_rotation_of_a_slice() {
        for style in [RotaryStyle::Halves, RotaryStyle::Pairs] {
            let table =
                RotaryTable::<Flex>::from_positions(&[1.0, 0.3, 0.1], 1.2, 0..5, style, &DEVICE);
            for start in [0, 4] {
                let run = |fused: bool| {
                    let tape = Tape::<Flex>::new();
                    let x = tape.leaf(random(&[2, 5, 3, start + 6], 1));
                    let y = if fused {
                        rotary_tail(&tape, &x, &table, start)
                    } else if start == 0 {
                        rotary(&tape, &x, &table)
                    } else {
                        let tail = slice(&tape, &x, 3, start..start + 6);
                        let head = slice(&tape, &x, 3, 0..start);
                        concat(&tape, &[head, rotary(&tape, &tail, &table)], 3)
                    };
                    let value = y.value();
                    let seed = random(&[2, 5, 3, start + 6], 2);
                    let dx = tape.backward(vec![(y, seed)], &[&x]).remove(0);
                    (value, dx.expect("x is used"))
                };
                let (fused, plain) = (run(true), run(false));
                assert_close("y", &fused.0, &plain.0, ROUNDING);
                assert_close("dx", &fused.1, &plain.1, ROUNDING);
            }
        }
    }

    #[test]
    fn keys_and_values_match_autodiff() {
        let inputs = [random(&[2, 5, 3, 11], 1), random(&[2, 5, 1, 4], 2)];
        check(
            "latent heads",
            &inputs,
            &[],
            |tape, x, _| {
                let (k, v) = latent_heads(tape, &x[0], &x[1], 6);
                concat(tape, &[v, k], 3)
            },
            |x, _| {
                let (kv, rotated) = (x[0].tensor::<4>(), x[1].tensor::<4>());
                let k = Tensor::cat(
                    vec![kv.clone().narrow(3, 0, 6), rotated.expand([2, 5, 3, 4])],
                    3,
                );
                Tensor::cat(vec![kv.narrow(3, 6, 5), k], 3)
            },
        );
    }

    #[test]
    #[should_panic(expected = "does not fit [2, 4, 1, 4]")]
    fn shapes_are_checked() {
        let tape = Tape::<Flex>::inference();
        let kv = tape.constant(random(&[2, 5, 3, 11], 1));
        latent_heads(&tape, &kv, &tape.constant(random(&[2, 4, 1, 4], 2)), 6);
    }
}
