//! The token embedding with its vocabulary divided among ranks.

use bridge_ops::{Float, Int, Ops, Param, Tape, Var, embedding};
use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::TensorMetadata;

use super::TensorRegion;
use crate::tensors::{float, matrix, reshaped};

/// Rows of `weight`, of which each rank holds a range: the others contribute zeros to the sum over ranks.
/// ids: [batch, seq], weight: local [vocab / tp, h] -> [batch, seq or seq / tp, h], as it is outside of the region.
pub fn vocab_parallel_embedding<B: Ops>(
    tape: &Tape<B>,
    ids: &Int<B>,
    weight: &Param<B>,
    region: &TensorRegion<B>,
) -> Var<B> {
    if region.group().is_none() {
        return embedding(tape, ids, weight);
    }
    let (rows, held) = (weight.shape()[0], super::cross_entropy::held_rows(weight));
    let shape: Vec<usize> = ids.shape().to_vec();
    let count = shape.iter().product::<usize>();
    let flat = B::int_reshape(ids.clone(), vec![count].into());
    let local = Tensor::<B, 1, IntKind>::from_primitive(flat).sub_scalar(held.start as i64);
    let outside = local
        .clone()
        .lower_elem(0)
        .bool_or(local.clone().greater_equal_elem(held.len() as i64));
    // Those of other ranks' rows stand for zeros, which may go anywhere. Each goes to a row of its own: all in one place
    // would have to be added up one after the other.
    let anywhere = Tensor::arange(0..count as i64, &local.device()).remainder_scalar(rows as i64);
    let local = local.mask_where(outside.clone(), anywhere).into_primitive();
    let hidden_rows = outside.unsqueeze_dim::<2>(1); // [tokens, 1]

    let dtype = B::activation_dtype(weight.dtype());
    let zeroed = move |x: Float<B>| {
        let x = matrix::<B>(x);
        let mask = hidden_rows.clone().expand(x.dims());
        float(x.mask_fill(mask, 0.0))
    };
    let found = zeroed(B::embedding_forward(local.clone(), weight.value(), dtype));
    let shape = [shape, vec![weight.shape()[1]]].concat();
    let output = reshaped::<B>(found, &shape);

    let param = weight.clone();
    let own = tape.record_with_params(output, &[], &[weight], move |dy| {
        let dy = zeroed(dy);
        param.accumulate_with(|slot| B::embedding_accumulate_grad(local, dy, rows, slot));
        Vec::new()
    });
    region.leave(tape, &own)
}
