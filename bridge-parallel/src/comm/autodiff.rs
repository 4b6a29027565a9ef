//! Collectives as operations of a tape: each has the collective of its backward pass written by hand.
//!
//! What the gradient is depends on how many ranks use a value, not only on how it was made. Two cases recur:
//!
//! - After the operation every rank goes its own way (its own columns, its own experts): then each rank's gradient of
//!   the shared value is a part, and the parts are summed ([`copy`], [`all_gather`]).
//! - After it every rank computes the same thing (replicated work): then each rank has the whole gradient already, and
//!   summing would count it several times ([`reduce`], [`gather`]).
//!
//! In a group of one all of them return their argument. On the way back, gradients of weights that need not be there yet are
//! computed while an exchange is under way ([`bridge_ops::Deferred`]).
//!
//! | operation | forward | backward | Megatron-Core's name |
//! | --- | --- | --- | --- |
//! | [`copy`] | identity | all-reduce | `copy_to_tensor_model_parallel_region` |
//! | [`reduce`] | all-reduce | identity | `reduce_from_tensor_model_parallel_region` |
//! | [`all_gather`] | all-gather | reduce-scatter | `gather_from_sequence_parallel_region` |
//! | [`reduce_scatter`] | reduce-scatter | all-gather | `reduce_scatter_to_sequence_parallel_region` |
//! | [`gather`] | all-gather | own part | `gather_from_tensor_model_parallel_region` |
//! | [`scatter`] | own part | all-gather | `scatter_to_sequence_parallel_region` |
//! | [`all_to_all`] | all-to-all | all-to-all back | `all_to_all` |

use bridge_ops::{Float, Ops, Tape, Var};
use burn_backend::{Slice, TensorMetadata};

use super::{Group, Pending, ReduceOp};

/// How much is computed in the time that a byte takes to come from another rank, beside the computation: a GPU of
/// 550 TFLOP/s whose links bring 80 GB/s while it computes, as measured on H100 and H200. Less would leave the exchange alone
/// at its end, more would keep the pass waiting for what could have been put off further; neither changes a result.
const FLOPS_PER_BYTE: f64 = 7000.0;

/// Identity; the gradient is summed over the group. For a replicated `x` of which each rank uses the whole in its own
/// way, as the input of a column-parallel layer.
pub fn copy<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let backward = on_the_way_back(tape, group, 2.0 * others(group), |group, dy| {
        group.start_all_reduce(dy, ReduceOp::Sum)
    });
    tape.cheap_as(tape.record(x.value(), &[x], backward), x)
}

/// The sum over the group, replicated; the gradient passes unchanged, since every rank computes the same from here on.
/// For the output of a row-parallel layer.
pub fn reduce<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let y = group.all_reduce(x.value(), ReduceOp::Sum);
    tape.record(y, &[x], |dy| vec![Some(dy)])
}

/// The ranks' parts joined along `dim`; each rank gets the sum of the ranks' gradients of its part. For parts of which
/// each rank uses the whole in its own way, as the sequence parts before a column-parallel layer.
pub fn all_gather<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>, dim: usize) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let y = group.all_gather(x.value(), dim);
    let backward = on_the_way_back(tape, group, others(group), move |group, dy| {
        group.start_reduce_scatter(dy, dim)
    });
    tape.record(y, &[x], backward)
}

/// This rank's part along `dim` of the sum over the group; the gradients of the parts are joined again. For the output
/// of a row-parallel layer under sequence parallelism.
pub fn reduce_scatter<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>, dim: usize) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let y = group.reduce_scatter(x.value(), dim);
    joined_on_the_way_back(tape, y, x, group, dim)
}

/// The ranks' parts joined along `dim`, replicated; each rank takes its part of the gradient, since every rank computes
/// the same from here on. For logits that are wanted whole.
pub fn gather<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>, dim: usize) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let y = group.all_gather(x.value(), dim);
    let (rank, size) = (group.rank(), group.size());
    tape.record(y, &[x], move |dy| {
        vec![Some(own_part::<B>(dy, dim, rank, size))]
    })
}

/// This rank's part along `dim` of a replicated `x`; the gradients of the parts are joined. For hidden states that go
/// on in sequence parts.
///
/// # Panics
/// When `dim` does not divide by the size of the group.
#[track_caller]
pub fn scatter<B: Ops>(tape: &Tape<B>, x: &Var<B>, group: &Group<B>, dim: usize) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let y = own_part::<B>(x.value(), dim, group.rank(), group.size());
    joined_on_the_way_back(tape, y, x, group, dim)
}

/// Rows of dimension 0 sent to each rank, as [`Communicator::all_to_all`](super::Communicator::all_to_all) does; their
/// gradients are sent back. For tokens on their way to experts.
///
/// # Panics
/// When the numbers of rows do not fit `x` or the group.
#[track_caller]
pub fn all_to_all<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    group: &Group<B>,
    send_rows: &[usize],
    recv_rows: &[usize],
) -> Var<B> {
    if group.size() == 1 {
        return x.clone();
    }
    let y = group.all_to_all(x.value(), send_rows, recv_rows);
    let (sent, received) = (send_rows.to_vec(), recv_rows.to_vec());
    let backward = on_the_way_back(tape, group, others(group), move |group, dy| {
        group.start_all_to_all(dy, &received, &sent)
    });
    tape.record(y, &[x], backward)
}

/// A backward pass that starts an exchange of the gradient, and computes gradients of weights until that should be over.
/// `received`: how often a rank receives as much as it gives in.
fn on_the_way_back<B: Ops>(
    tape: &Tape<B>,
    group: &Group<B>,
    received: f64,
    start: impl FnOnce(&Group<B>, Float<B>) -> Pending<B> + Send + 'static,
) -> impl FnOnce(Float<B>) -> Vec<Option<Float<B>>> + Send + 'static {
    let (group, deferred) = (group.clone(), tape.defer());
    move |dy| {
        let bytes = received * (dy.shape().num_elements() * dy.dtype().size()) as f64;
        let exchanged = start(&group, dy);
        B::beside_exchange(|| deferred.work_for(bytes * FLOPS_PER_BYTE));
        vec![Some(exchanged.wait())]
    }
}

/// `y`, this rank's part of something made of `x`; the gradients of the parts are joined along `dim` on the way back.
fn joined_on_the_way_back<B: Ops>(
    tape: &Tape<B>,
    y: Float<B>,
    x: &Var<B>,
    group: &Group<B>,
    dim: usize,
) -> Var<B> {
    let received = (group.size() - 1) as f64;
    let backward = on_the_way_back(tape, group, received, move |group, dy| {
        group.start_all_gather(dy, dim)
    });
    tape.record(y, &[x], backward)
}

/// The other ranks' share of a group.
fn others<B: Ops>(group: &Group<B>) -> f64 {
    let size = group.size() as f64;
    (size - 1.0) / size
}

/// Part `rank` of `size` equal ones along `dim`.
#[track_caller]
fn own_part<B: Ops>(x: Float<B>, dim: usize, rank: usize, size: usize) -> Float<B> {
    let shape = x.shape().to_vec();
    assert!(
        dim < shape.len() && shape[dim].is_multiple_of(size),
        "dim {dim} of shape {shape:?} does not divide among {size} ranks"
    );
    let part = shape[dim] / size;
    let mut slices = vec![Slice::full(); shape.len()];
    slices[dim] = (rank * part..(rank + 1) * part).into();
    B::float_slice(x, &slices)
}

#[cfg(test)]
mod tests {
    use bridge_ops::{float_from_f32, to_f32_vec};
    use burn_flex::Flex;

    use super::*;
    use crate::comm::testing::{number, run_on};
    use crate::groups::Axis;

    /// Shape of what the operations start from; dim 1 divides among 2 and 4 ranks.
    const SHAPE: [usize; 3] = [3, 4, 2];

    struct Case {
        name: &'static str,
        op: fn(&Tape<Flex>, &Var<Flex>, &Group<Flex>) -> Var<Flex>,
        /// Whether `x`, and whether the output, is one value held by all ranks, and so counts once.
        replicated: [bool; 2],
    }

    /// The operations are linear, so their gradient is the adjoint: for every x and w, <A x, w> = <x, A' w>, with the
    /// products summed over the ranks, what is replicated counted once.
    #[test]
    fn gradients_are_the_adjoint_of_the_operation() {
        let cases = [
            // Each rank uses a replicated value in its own way: the output counts per rank.
            Case {
                name: "copy",
                op: |t, x, g| copy(t, x, g),
                replicated: [true, false],
            },
            Case {
                name: "reduce",
                op: |t, x, g| reduce(t, x, g),
                replicated: [false, true],
            },
            Case {
                name: "all_gather",
                op: |t, x, g| all_gather(t, x, g, 1),
                replicated: [false, false],
            },
            Case {
                name: "reduce_scatter",
                op: |t, x, g| reduce_scatter(t, x, g, 1),
                replicated: [false, false],
            },
            Case {
                name: "gather",
                op: |t, x, g| gather(t, x, g, 1),
                replicated: [false, true],
            },
            Case {
                name: "scatter",
                op: |t, x, g| scatter(t, x, g, 1),
                replicated: [true, false],
            },
            Case {
                name: "all_to_all",
                op: uneven_exchange,
                replicated: [false, false],
            },
        ];
        for case in cases {
            for size in [1, 2, 4] {
                let [x_replicated, y_replicated] = case.replicated;
                let op = case.op;
                let products = run_on(size, move |ctx| {
                    let (rank, device) = (ctx.rank(), ctx.device());
                    let values = |shape: &[usize], seed: usize, replicated: bool| {
                        let seed = if replicated {
                            seed
                        } else {
                            seed + 100 * (rank + 1)
                        };
                        let count = shape.iter().product::<usize>();
                        let values: Vec<f32> = (0..count).map(|i| number(seed, i)).collect();
                        float_from_f32::<Flex>(&values, shape, device)
                    };
                    let tape = Tape::<Flex>::new();
                    let x = tape.leaf(values(&SHAPE, 1, x_replicated));
                    let y = op(&tape, &x, ctx.group(Axis::Tp));
                    let w = values(&y.shape(), 2, y_replicated);
                    let forward = dot(y.value(), w.clone());
                    let dx = tape.backward(vec![(y, w)], &[&x])[0]
                        .clone()
                        .expect("a gradient");
                    ctx.health()?;
                    Ok([forward, dot(x.value(), dx)])
                });
                let total = |side: usize, once: bool| -> f64 {
                    let all = products.iter().map(|product| product[side]);
                    all.take(if once { 1 } else { size }).sum()
                };
                // A replicated gradient is the same on all ranks.
                if x_replicated {
                    assert!(
                        products.iter().all(|p| p[1] == products[0][1]),
                        "{}",
                        case.name
                    );
                }
                let [left, right] = [total(0, y_replicated), total(1, x_replicated)];
                assert!(
                    (left - right).abs() < 1e-4 * left.abs().max(1.0),
                    "{} on {size} ranks: {left} forward, {right} backward",
                    case.name
                );
            }
        }
    }

    /// Rank r sends to rank s as many of its 3 rows as fit a pattern in which some pairs exchange nothing.
    fn uneven_exchange(tape: &Tape<Flex>, x: &Var<Flex>, group: &Group<Flex>) -> Var<Flex> {
        let (me, size) = (group.rank(), group.size());
        let rows = |from: usize, to: usize| match (to + size - from) % size {
            0 if size > 1 => 1,
            0 => 3,
            1 => 2,
            _ => 0,
        };
        let send: Vec<usize> = (0..size).map(|to| rows(me, to)).collect();
        let recv: Vec<usize> = (0..size).map(|from| rows(from, me)).collect();
        all_to_all(tape, x, group, &send, &recv)
    }

    fn dot(a: Float<Flex>, b: Float<Flex>) -> f64 {
        let (a, b) = (to_f32_vec::<Flex>(a), to_f32_vec::<Flex>(b));
        assert_eq!(a.len(), b.len());
        a.iter()
            .zip(&b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    }

    #[test]
    fn inference_tapes_record_nothing() {
        let nodes = run_on(2, |ctx| {
            let tape = Tape::<Flex>::inference();
            let x = tape.leaf(float_from_f32::<Flex>(
                &[1.0, 2.0],
                &[1, 2, 1],
                ctx.device(),
            ));
            let y = reduce_scatter(&tape, &x, ctx.group(Axis::Tp), 1);
            ctx.health()?;
            Ok((tape.num_nodes(), to_f32_vec::<Flex>(y.value())))
        });
        assert_eq!(nodes, [(0, vec![2.0]), (0, vec![4.0])]);
    }
}
