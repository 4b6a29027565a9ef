//! What each collective computes, given what every rank passed. Shared by the transports that work on the host, so that
//! they cannot differ; additions are in the order of ranks.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bridge_ops::{DType, Float, Ops, float_zeros};
use burn_backend::{BoolDType, BoolStore, Slice, TensorMetadata};

use serde::{Deserialize, Serialize};

use super::ReduceOp;
use crate::error::name_ranks;

/// A collective, with the arguments that must be equal on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    AllReduce(ReduceOp),
    AllGather { dim: usize },
    ReduceScatter { dim: usize },
    AllToAll,
    Broadcast { root: usize },
    GatherBytes,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Call::AllReduce(ReduceOp::Sum) => f.write_str("all_reduce (sum)"),
            Call::AllReduce(ReduceOp::Max) => f.write_str("all_reduce (max)"),
            Call::AllGather { dim } => write!(f, "all_gather (dim {dim})"),
            Call::ReduceScatter { dim } => write!(f, "reduce_scatter (dim {dim})"),
            Call::AllToAll => f.write_str("all_to_all"),
            Call::Broadcast { root } => write!(f, "broadcast (root {root})"),
            Call::GatherBytes => f.write_str("all_gather_bytes"),
        }
    }
}

/// What one rank passes to a collective.
pub(crate) struct Contribution<B: Ops> {
    pub(crate) call: Call,
    pub(crate) data: Data<B>,
    /// Rows sent to and expected from each rank, for all-to-all.
    pub(crate) send_rows: Vec<usize>,
    pub(crate) recv_rows: Vec<usize>,
}

/// What travels.
#[derive(Clone)]
pub(crate) enum Data<B: Ops> {
    Tensor(Float<B>),
    Bytes(Arc<Vec<Vec<u8>>>),
}

impl<B: Ops> Data<B> {
    fn tensor(&self) -> Option<&Float<B>> {
        match self {
            Data::Tensor(x) => Some(x),
            Data::Bytes(_) => None,
        }
    }
}

/// The result of each rank, or what does not fit. `ranks` are the members' global ranks, for messages.
pub(crate) fn combine<B: Ops>(
    contributions: Vec<Contribution<B>>,
    ranks: &[usize],
) -> Result<Vec<Data<B>>, String> {
    check(&contributions, ranks)?;
    let call = contributions[0].call;
    let size = ranks.len();
    if call == Call::GatherBytes {
        let all: Vec<Vec<u8>> = contributions
            .into_iter()
            .flat_map(|c| match c.data {
                Data::Bytes(bytes) => Arc::unwrap_or_clone(bytes),
                Data::Tensor(_) => Vec::new(),
            })
            .collect();
        return Ok(vec![Data::Bytes(Arc::new(all)); size]);
    }
    let (mut tensors, mut send_rows) = (Vec::with_capacity(size), Vec::with_capacity(size));
    for contribution in contributions {
        if let Data::Tensor(x) = contribution.data {
            tensors.push(x);
            send_rows.push(contribution.send_rows);
        }
    }
    let shared = |x: Float<B>| (0..size).map(|_| Data::Tensor(x.clone())).collect();
    Ok(match call {
        Call::AllReduce(op) => shared(reduce::<B>(tensors, op)),
        Call::AllGather { dim } => shared(B::float_cat(tensors, dim)),
        Call::ReduceScatter { dim } => {
            let sum = reduce::<B>(tensors, ReduceOp::Sum);
            let part = sum.shape()[dim] / size;
            let parts = (0..size).map(|r| along::<B>(sum.clone(), dim, r * part..(r + 1) * part));
            parts.map(Data::Tensor).collect()
        }
        Call::Broadcast { root } => shared(tensors.swap_remove(root)),
        Call::AllToAll => exchange::<B>(&tensors, &send_rows),
        Call::GatherBytes => unreachable!("handled above"),
    })
}

/// Combines tensors of one shape in the order given; bf16 and f16 in f32.
fn reduce<B: Ops>(tensors: Vec<Float<B>>, op: ReduceOp) -> Float<B> {
    let dtype = tensors[0].dtype();
    let wide = match dtype {
        DType::BF16 | DType::F16 => DType::F32,
        other => other,
    };
    let total = tensors
        .into_iter()
        .map(|x| B::cast(x, wide))
        .reduce(|a, b| match op {
            ReduceOp::Sum => B::add(a, b),
            ReduceOp::Max => larger::<B>(a, b),
        })
        .expect("a group has members");
    B::cast(total, dtype)
}

/// Elementwise maximum; NaN where either is.
fn larger<B: Ops>(a: Float<B>, b: Float<B>) -> Float<B> {
    let bool = BoolDType::from(DType::Bool(BoolStore::Native));
    let above = B::float_lower(a.clone(), b.clone(), bool);
    let nan = B::float_not_equal(b.clone(), b.clone(), bool);
    B::float_mask_where(a, B::bool_or(above, nan), b)
}

fn exchange<B: Ops>(tensors: &[Float<B>], send_rows: &[Vec<usize>]) -> Vec<Data<B>> {
    let to = |receiver: usize| {
        let mut parts = Vec::new();
        for (x, rows) in tensors.iter().zip(send_rows) {
            let start: usize = rows[..receiver].iter().sum();
            if rows[receiver] > 0 {
                parts.push(along::<B>(x.clone(), 0, start..start + rows[receiver]));
            }
        }
        match parts.len() {
            0 => {
                let mut shape = tensors[receiver].shape().to_vec();
                shape[0] = 0;
                let x = &tensors[receiver];
                float_zeros::<B>(&shape, x.dtype(), &B::float_device(x))
            }
            _ => B::float_cat(parts, 0),
        }
    };
    (0..tensors.len()).map(|r| Data::Tensor(to(r))).collect()
}

fn along<B: Ops>(x: Float<B>, dim: usize, range: Range<usize>) -> Float<B> {
    let mut slices = vec![Slice::full(); x.rank()];
    slices[dim] = range.into();
    B::float_slice(x, &slices)
}

/// Whether the ranks' arguments fit together.
fn check<B: Ops>(contributions: &[Contribution<B>], ranks: &[usize]) -> Result<(), String> {
    let first = &contributions[0];
    for (contribution, rank) in contributions.iter().zip(ranks) {
        if contribution.call != first.call {
            return Err(format!(
                "rank {} calls {}, rank {rank} calls {}",
                ranks[0], first.call, contribution.call
            ));
        }
    }
    if first.call == Call::GatherBytes {
        return Ok(());
    }
    let describe = |c: &Contribution<B>| {
        let x = c.data.tensor()?;
        let mut shape = x.shape().to_vec();
        if c.call == Call::AllToAll && !shape.is_empty() {
            shape[0] = 0;
        }
        Some((shape, x.dtype()))
    };
    let expected = describe(first);
    for (contribution, rank) in contributions.iter().zip(ranks) {
        let found = describe(contribution);
        if found != expected {
            let show = |what: Option<(Vec<usize>, DType)>| {
                what.map_or("bytes".to_owned(), |(shape, dtype)| {
                    format!("{dtype:?} {shape:?}")
                })
            };
            return Err(format!(
                "rank {} passes {}, rank {rank} passes {}",
                ranks[0],
                show(expected),
                show(found)
            ));
        }
    }
    if first.call == Call::AllToAll {
        for (to, receiver) in contributions.iter().enumerate() {
            for (from, sender) in contributions.iter().enumerate() {
                let (sent, expected) = (sender.send_rows[to], receiver.recv_rows[from]);
                if sent != expected {
                    return Err(format!(
                        "{} sends {sent} rows to {}, which expects {expected}",
                        name_ranks(&ranks[from..=from]),
                        name_ranks(&ranks[to..=to])
                    ));
                }
            }
        }
    }
    Ok(())
}
