//! The token embedding: a row of the weight per id.
//!
//! ```text
//! y[i] = W[ids[i]]           ids: [..] in 0..vocab, W: [vocab, h] -> y: [.., h]
//! dW[ids[i]] += dy[i]        in fp32, in the order of i
//! ```

use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::{DType, Shape, TensorMetadata};

use crate::grad_slot::GradSlot;
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{
    Float, Int, dims, float, matrix, reshaped, rows_and_last, tensor, to_dtype, to_f32,
};
use crate::tape::{Tape, Var};

/// Rows of `weight`, in the dtype that the backend computes in for such weights ([`Ops::activation_dtype`]). ids: [batch, seq] (any rank) with values in `0..vocab`, weight: [vocab, h]
/// -> [batch, seq, h].
///
/// On a recording tape the result is tracked when the weight requires a gradient, although there is no tracked input.
///
/// # Panics
/// When the weight is not a matrix, or (on backends that check) an id is out of range.
#[track_caller]
pub fn embedding<B: Ops>(tape: &Tape<B>, ids: &Int<B>, weight: &Param<B>) -> Var<B> {
    let dtype = B::activation_dtype(weight.dtype());
    embedding_as(tape, ids, weight, dtype)
}

/// [`embedding`] with the result in a chosen dtype.
///
/// # Panics
/// As [`embedding`].
#[track_caller]
pub fn embedding_as<B: Ops>(
    tape: &Tape<B>,
    ids: &Int<B>,
    weight: &Param<B>,
    dtype: DType,
) -> Var<B> {
    let shape = weight.shape();
    assert_eq!(
        shape.len(),
        2,
        "embedding: `{}` has shape {shape:?}, expected [vocab, hidden]",
        weight.name()
    );
    let output = B::embedding_forward(ids.clone(), weight.value(), dtype);

    let ids = ids.clone();
    let param = weight.clone();
    tape.record_with_params(output, &[], &[weight], move |dy| {
        param
            .accumulate_in_dtype_with(|slot| B::embedding_accumulate_grad(ids, dy, shape[0], slot));
        Vec::new()
    })
}

pub(crate) fn portable<B: Ops>(ids: Int<B>, weight: Float<B>, dtype: DType) -> Float<B> {
    let mut shape = dims(&ids);
    let weight = tensor::<B, 2>(weight);
    shape.push(weight.dims()[1]);
    let rows = weight.select(0, flat_ids::<B>(ids));
    reshaped::<B>(to_dtype::<B>(float(rows), dtype), &shape)
}

pub(crate) fn portable_accumulate_grad<B: Ops>(
    ids: Int<B>,
    dy: Float<B>,
    vocab_size: usize,
    slot: GradSlot<B>,
) -> Float<B> {
    let (_, hidden) = rows_and_last(&dims(&dy));
    let device = B::float_device(&dy);
    slot.rounded_once(|slot| {
        let sum = match slot {
            GradSlot::Sum(sum) => tensor(sum),
            GradSlot::Empty | GradSlot::Stale(_) => {
                Tensor::<B, 2>::zeros([vocab_size, hidden], (&device, DType::F32))
            }
        };
        let dy = matrix::<B>(to_f32::<B>(dy));
        float(sum.select_assign(
            0,
            flat_ids::<B>(ids),
            dy,
            burn::tensor::IndexingUpdateOp::Add,
        ))
    })
}

fn flat_ids<B: Ops>(ids: Int<B>) -> Tensor<B, 1, IntKind> {
    let count = ids.shape().num_elements();
    Tensor::from_primitive(B::int_reshape(ids, Shape::from(vec![count])))
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{DEVICE, ROUNDING, assert_close, assert_fast, random, random_bf16};
    use crate::{int_from_i64, to_f32_vec};

    fn ids() -> Int<Flex> {
        int_from_i64::<Flex>(&[4, 0, 12, 4, 4, 7], &[2, 3], &DEVICE)
    }

    #[test]
    fn looks_rows_up_and_adds_gradients_to_them() {
        for weight in [random(&[13, 21], 1), random_bf16(&[13, 21], 1)] {
            let param = Param::<Flex>::new("w", weight.clone());
            param.set_grad(Some(random(&[13, 21], 2)));
            let tape = Tape::new();
            let y = embedding(&tape, &ids(), &param);
            assert_eq!((y.shape(), y.value().dtype()), (vec![2, 3, 21], DType::F32));
            assert_close(
                "y",
                &y.value(),
                &portable::<Flex>(ids(), weight, DType::F32),
                0.0,
            );
            let dy = random(&[2, 3, 21], 3);
            tape.backward(vec![(y, dy.clone())], &[]);
            let slot = GradSlot::Sum(random(&[13, 21], 2));
            let expected = portable_accumulate_grad::<Flex>(ids(), dy, 13, slot);
            assert_close("dW", &param.grad().unwrap(), &expected, ROUNDING);
            assert_fast(&["embedding_forward", "embedding_accumulate_grad"]);
        }
    }

    #[test]
    fn a_stale_slot_is_overwritten() {
        let dy = random(&[2, 3, 21], 3);
        let slot = || GradSlot::Stale(random(&[13, 21], 2));
        let found = Flex::embedding_accumulate_grad(ids(), dy.clone(), 13, slot());
        assert_close(
            "dW",
            &found,
            &portable_accumulate_grad::<Flex>(ids(), dy.clone(), 13, slot()),
            ROUNDING,
        );
        let row = &to_f32_vec::<Flex>(found)[12 * 21..];
        assert_eq!(row, &to_f32_vec::<Flex>(dy)[2 * 21..3 * 21]);
    }

    #[test]
    fn a_frozen_weight_records_nothing() {
        let param = Param::<Flex>::new("w", random(&[13, 21], 1));
        param.set_requires_grad(false);
        let tape = Tape::new();
        assert!(!embedding(&tape, &ids(), &param).is_tracked());
    }

    #[test]
    #[should_panic(expected = "id 12 at 2 is not in a vocabulary of 12")]
    fn an_id_out_of_range_is_named() {
        Flex::embedding_forward(ids(), random(&[12, 4], 1), DType::F32);
    }
}
