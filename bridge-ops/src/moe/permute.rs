//! Bringing the rows of one expert side by side, and back.
//!
//! Row `i` of the sorted order is assignment `order[i] = token * k + slot`. Expert `e` has rows
//! `offsets[e]..offsets[e + 1]`. An assignment to no expert (a number of `E` or more: dropped, or held elsewhere) is
//! sorted to the end, after `offsets[E]`; its row is not used.
//!
//! ```text
//! permute:    rows[i] = x[order[i] / k]
//! unpermute:  y[t] = sum over slots s of weights[t, s] outputs[inverse[t, s]]     the used rows only
//! ```

use std::sync::{Arc, OnceLock};

use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::TensorMetadata;

use crate::data::{float_from_f32, int_from_i64, to_f32_vec, to_i64_vec};
use crate::ops::Ops;
use crate::primitive::{Float, Int, dims, float, matrix, to_dtype, to_f32};
use crate::tape::{Tape, Var};

/// Where each expert's rows begin: on the device, and on the host once somebody asks.
#[derive(Debug, Clone)]
pub struct ExpertOffsets<B: Ops> {
    device: Int<B>,
    host: Arc<OnceLock<Vec<usize>>>,
}

impl<B: Ops> ExpertOffsets<B> {
    /// Offsets `[E + 1]` that rise from 0.
    pub fn new(offsets: Int<B>) -> Self {
        Self {
            device: offsets,
            host: Arc::default(),
        }
    }

    /// Offsets of experts with `counts` rows each.
    pub fn from_counts(counts: &[usize], device: &B::Device) -> Self {
        let mut offsets = vec![0];
        offsets.extend(counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        }));
        let values: Vec<i64> = offsets.iter().map(|&offset| offset as i64).collect();
        Self {
            device: int_from_i64::<B>(&values, &[values.len()], device),
            host: Arc::new(OnceLock::from(offsets)),
        }
    }

    /// The offsets on the device, `[E + 1]`.
    pub fn device(&self) -> &Int<B> {
        &self.device
    }

    /// The offsets on the host. The first call waits for the device.
    pub fn host(&self) -> &[usize] {
        self.host.get_or_init(|| {
            let offsets = to_i64_vec::<B>(self.device.clone());
            offsets.into_iter().map(|offset| offset as usize).collect()
        })
    }

    /// Number of experts.
    pub fn num_experts(&self) -> usize {
        self.device.shape().num_elements() - 1
    }

    /// Rows of each expert, on the host.
    pub fn counts(&self) -> Vec<usize> {
        self.host()
            .windows(2)
            .map(|pair| pair[1] - pair[0])
            .collect()
    }
}

/// What the sorting kernel returns; see the module documentation.
#[derive(Debug, Clone)]
pub struct SortedExperts<B: Ops> {
    /// `[tokens * k]`.
    pub order: Int<B>,
    /// [tokens, k].
    pub inverse: Int<B>,
    /// `[E + 1]`.
    pub offsets: Int<B>,
}

/// An order of assignments by expert, stable within one.
#[derive(Debug, Clone)]
pub struct ExpertOrder<B: Ops> {
    order: Int<B>,
    inverse: Int<B>,
    offsets: ExpertOffsets<B>,
    tokens: usize,
    top_k: usize,
}

impl<B: Ops> ExpertOrder<B> {
    /// Sorts assignments. experts: [tokens, k].
    ///
    /// # Panics
    /// When `experts` is no matrix.
    #[track_caller]
    pub fn new(experts: Int<B>, num_experts: usize) -> Self {
        let shape = dims(&experts);
        let &[tokens, top_k] = shape.as_slice() else {
            panic!("experts have shape {shape:?}, expected [tokens, k]");
        };
        let SortedExperts {
            order,
            inverse,
            offsets,
        } = B::sort_by_expert(experts, num_experts);
        Self {
            order,
            inverse,
            offsets: ExpertOffsets::new(offsets),
            tokens,
            top_k,
        }
    }

    /// Where each expert's rows begin.
    pub fn offsets(&self) -> &ExpertOffsets<B> {
        &self.offsets
    }

    /// The assignment in each place of the sorted order, `[tokens * k]`.
    pub fn order(&self) -> &Int<B> {
        &self.order
    }

    /// The place of each assignment, [tokens, k].
    pub fn inverse(&self) -> &Int<B> {
        &self.inverse
    }

    /// Experts per token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// Number of sorted rows, the unused ones included: `tokens * k`.
    pub fn num_rows(&self) -> usize {
        self.tokens * self.top_k
    }
}

/// Rows by expert. x: [tokens, h] -> [tokens * k, h].
///
/// # Panics
/// When `x` has another number of tokens than the order.
#[track_caller]
pub fn permute<B: Ops>(tape: &Tape<B>, x: &Var<B>, order: &ExpertOrder<B>) -> Var<B> {
    let shape = x.shape();
    assert!(
        shape.len() == 2 && shape[0] == order.tokens,
        "permute: x has shape {shape:?}, the order is of {} tokens",
        order.tokens
    );
    let output = B::permute_rows(x.value(), order, None);
    let (input, own) = (x.value(), order.clone());
    let order = order.clone();
    let rows = tape.record(output, &[x], move |drows| {
        vec![Some(B::unpermute_rows(
            drows,
            order.inverse,
            None,
            order.offsets.device,
        ))]
    });
    tape.cheap(rows, move || B::permute_rows(input.clone(), &own, None))
}

/// The weighted sum of each token's rows. rows: [tokens * k, h], weights: [tokens, k] -> [tokens, h].
///
/// # Panics
/// When the shapes do not fit the order.
#[track_caller]
pub fn unpermute<B: Ops>(
    tape: &Tape<B>,
    rows: &Var<B>,
    weights: &Var<B>,
    order: &ExpertOrder<B>,
) -> Var<B> {
    let (shape, expected) = (rows.shape(), [order.tokens, order.top_k]);
    assert!(
        shape.len() == 2 && shape[0] == order.num_rows() && weights.shape() == expected,
        "unpermute: rows {shape:?} and weights {:?} do not fit {expected:?} assignments",
        weights.shape()
    );
    let output = B::unpermute_rows(
        rows.value(),
        order.inverse.clone(),
        Some(weights.value()),
        order.offsets.device.clone(),
    );
    let order = order.clone();
    let (rows_value, weights_value) = (weights.is_tracked().then(|| rows.value()), weights.value());
    let rows_tracked = rows.is_tracked();
    tape.record(output, &[rows, weights], move |dy| {
        let dweights = rows_value.map(|rows| {
            B::unpermute_weight_grad(
                rows,
                order.inverse.clone(),
                dy.clone(),
                order.offsets.device.clone(),
            )
        });
        let drows = rows_tracked.then(|| B::permute_rows(dy, &order, Some(weights_value)));
        vec![drows, dweights]
    })
}

/// The order, made on the host.
pub fn portable_sort<B: Ops>(experts: Int<B>, num_experts: usize) -> SortedExperts<B> {
    let device = B::int_device(&experts);
    let shape = dims(&experts);
    let sorted = sort_on_host(&to_i64_vec::<B>(experts), num_experts);
    SortedExperts {
        order: int_from_i64::<B>(&sorted.order, &[sorted.order.len()], &device),
        inverse: int_from_i64::<B>(&sorted.inverse, &shape, &device),
        offsets: int_from_i64::<B>(&sorted.offsets, &[num_experts + 1], &device),
    }
}

/// A sorted order on the host.
pub(crate) struct HostOrder {
    pub(crate) order: Vec<i64>,
    pub(crate) inverse: Vec<i64>,
    pub(crate) offsets: Vec<i64>,
}

/// A counting sort.
pub(crate) fn sort_on_host(experts: &[i64], num_experts: usize) -> HostOrder {
    let bucket = |expert: i64| {
        usize::try_from(expert)
            .unwrap_or(num_experts)
            .min(num_experts)
    };
    let mut starts = vec![0usize; num_experts + 2];
    for &expert in experts {
        starts[bucket(expert) + 1] += 1;
    }
    for e in 0..=num_experts {
        starts[e + 1] += starts[e];
    }
    let offsets = starts[..=num_experts].iter().map(|&at| at as i64).collect();
    let mut order = vec![0; experts.len()];
    let mut inverse = vec![0; experts.len()];
    for (assignment, &expert) in experts.iter().enumerate() {
        let at = &mut starts[bucket(expert)];
        order[*at] = assignment as i64;
        inverse[assignment] = *at as i64;
        *at += 1;
    }
    HostOrder {
        order,
        inverse,
        offsets,
    }
}

pub(crate) fn portable_permute<B: Ops>(
    x: Float<B>,
    order: &ExpertOrder<B>,
    weights: Option<Float<B>>,
) -> Float<B> {
    let (dtype, top_k) = (x.dtype(), order.top_k as i64);
    let order = Tensor::<B, 1, IntKind>::from_primitive(order.order.clone());
    let rows = matrix::<B>(x).select(0, order.clone().div_scalar(top_k));
    let Some(weights) = weights else {
        return float(rows);
    };
    let count = weights.shape().num_elements();
    let weights = matrix::<B>(to_f32::<B>(weights))
        .reshape([count, 1])
        .select(0, order);
    let rows = matrix::<B>(to_f32::<B>(float(rows))) * weights;
    to_dtype::<B>(float(rows), dtype)
}

pub(crate) fn portable_unpermute<B: Ops>(
    rows: Float<B>,
    inverse: Int<B>,
    weights: Option<Float<B>>,
    offsets: Int<B>,
) -> Float<B> {
    let dtype = rows.dtype();
    let (tokens, top_k) = (dims(&inverse)[0], dims(&inverse)[1]);
    let (picked, used) = picked::<B>(rows, inverse, offsets);
    let weights = match weights {
        Some(weights) => matrix::<B>(to_f32::<B>(weights)) * used,
        None => used,
    };
    let hidden = picked.dims()[2];
    let sum = (picked * weights.reshape([tokens, top_k, 1])).sum_dim(1);
    to_dtype::<B>(float(sum.reshape([tokens, hidden])), dtype)
}

pub(crate) fn portable_weight_grad<B: Ops>(
    rows: Float<B>,
    inverse: Int<B>,
    dy: Float<B>,
    offsets: Int<B>,
) -> Float<B> {
    let (tokens, top_k) = (dims(&inverse)[0], dims(&inverse)[1]);
    let (picked, used) = picked::<B>(rows, inverse, offsets);
    let hidden = picked.dims()[2];
    let dy = matrix::<B>(to_f32::<B>(dy)).reshape([tokens, 1, hidden]);
    let dots = (picked * dy).sum_dim(2).reshape([tokens, top_k]);
    float(dots * used)
}

/// The rows of each assignment in fp32, [tokens, k, h], zeros where the row is not used; and 1 where it is, [tokens, k].
fn picked<B: Ops>(
    rows: Float<B>,
    inverse: Int<B>,
    offsets: Int<B>,
) -> (Tensor<B, 3>, Tensor<B, 2>) {
    let device = B::float_device(&rows);
    let shape = dims(&inverse);
    let inverse = to_i64_vec::<B>(inverse);
    let end = to_i64_vec::<B>(offsets).last().copied().unwrap_or(0);
    let used: Vec<f32> = inverse
        .iter()
        .map(|&row| f32::from(u8::from(row < end)))
        .collect();
    // What lies in a row that is not used may be anything, NaN included.
    let values = to_f32_vec::<B>(rows.clone());
    let hidden = dims(&rows)[1];
    let mut picked = vec![0.0; inverse.len() * hidden];
    for (out, &row) in picked.chunks_mut(hidden.max(1)).zip(&inverse) {
        if row < end {
            out.copy_from_slice(&values[row as usize * hidden..][..hidden]);
        }
    }
    let picked = float_from_f32::<B>(&picked, &[shape[0], shape[1], hidden], &device);
    let used = float_from_f32::<B>(&used, &shape, &device);
    (
        crate::primitive::tensor(picked),
        crate::primitive::tensor(used),
    )
}
