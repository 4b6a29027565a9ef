//! The thread transport: what collectives compute, and how jobs end.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bridge_core::LayoutSpec;
use bridge_ops::{DType, Float, Ops, float_from_f32, linear, to_f32_vec};
use burn_backend::TensorMetadata;
use burn_flex::Flex;

use super::testing::{number, run_on};
use super::*;
use crate::context::ParallelContext;
use crate::error::Error;
use crate::groups::{Axis, group_ranks};

fn tensor(values: &[f32], shape: &[usize]) -> Float<Flex> {
    float_from_f32::<Flex>(values, shape, &Default::default())
}

fn values(x: Float<Flex>) -> (Vec<usize>, Vec<f32>) {
    (x.shape().to_vec(), to_f32_vec::<Flex>(x))
}

#[test]
fn collectives_do_what_their_definitions_say() {
    for size in [1, 2, 3, 5] {
        let results = run_on(size, move |ctx| {
            let (group, rank) = (ctx.group(Axis::Tp), ctx.rank());
            let mine = |i: usize| (10 * rank + i) as f32;
            let x = tensor(&[mine(1), mine(2)], &[2, 1]);
            let sum = group.all_reduce(x.clone(), ReduceOp::Sum);
            let max = group.all_reduce(x.clone(), ReduceOp::Max);
            let rows = group.all_gather(x.clone(), 0);
            let columns = group.all_gather(x.clone(), 1);
            let wide: Vec<f32> = (0..size).map(mine).collect();
            let part = group.reduce_scatter(tensor(&wide, &[1, size]), 1);
            let from_last = group.broadcast(x.clone(), size - 1);
            group.send(x.clone(), (rank + 1) % size);
            let from_left = group.recv(&[2, 1], DType::F32, (rank + size - 1) % size);
            let bytes = group.all_gather_bytes(&vec![7; rank])?;
            group.barrier()?;
            ctx.health()?;
            let lengths: Vec<usize> = bytes.iter().map(Vec::len).collect();
            Ok((
                [sum, max, rows, columns, part, from_last, from_left].map(values),
                lengths,
            ))
        });
        let of = |rank: usize, i: usize| (10 * rank + i) as f32;
        let sum = |i: usize| (0..size).map(|rank| of(rank, i)).sum::<f32>();
        for (rank, (found, lengths)) in results.into_iter().enumerate() {
            let left = (rank + size - 1) % size;
            let expected = [
                (vec![2, 1], vec![sum(1), sum(2)]),
                (vec![2, 1], vec![of(size - 1, 1), of(size - 1, 2)]),
                (
                    vec![2 * size, 1],
                    (0..size).flat_map(|r| [of(r, 1), of(r, 2)]).collect(),
                ),
                (
                    vec![2, size],
                    (1..3)
                        .flat_map(|i| (0..size).map(move |r| of(r, i)))
                        .collect(),
                ),
                (vec![1, 1], vec![sum(rank)]),
                (vec![2, 1], vec![of(size - 1, 1), of(size - 1, 2)]),
                (vec![2, 1], vec![of(left, 1), of(left, 2)]),
            ];
            assert_eq!(found, expected, "rank {rank} of {size}");
            assert_eq!(lengths, (0..size).collect::<Vec<_>>());
        }
    }
}

#[test]
fn all_to_all_moves_any_number_of_rows() {
    // Row t of rank r holds r.t; rank r sends r + s + 1 rows (mod 3) to rank s, nothing from or to rank 3.
    let rows = |from: usize, to: usize| {
        if from == 3 || to == 3 {
            0
        } else {
            (from + to + 1) % 3
        }
    };
    let results = run_on(4, move |ctx| {
        let me = ctx.rank();
        let send: Vec<usize> = (0..4).map(|to| rows(me, to)).collect();
        let recv: Vec<usize> = (0..4).map(|from| rows(from, me)).collect();
        let count = send.iter().sum::<usize>();
        let sent: Vec<f32> = (0..count).flat_map(|t| [me as f32, t as f32]).collect();
        let received = ctx
            .group(Axis::Tp)
            .all_to_all(tensor(&sent, &[count, 2]), &send, &recv);
        ctx.health()?;
        Ok(values(received))
    });
    for (me, (shape, found)) in results.into_iter().enumerate() {
        let expected: Vec<f32> = (0..4)
            .flat_map(|from| {
                let first: usize = (0..me).map(|to| rows(from, to)).sum();
                (first..first + rows(from, me)).flat_map(move |t| [from as f32, t as f32])
            })
            .collect();
        assert_eq!((shape, found), (vec![expected.len() / 2, 2], expected));
    }
}

#[test]
fn half_precision_keeps_its_dtype_and_sums_in_single() {
    let results = run_on(3, |ctx| {
        // In bf16, 256 + 1 is 256 again; in f32 the two ones arrive.
        let x = tensor(&[if ctx.rank() == 0 { 256.0 } else { 1.0 }], &[1]);
        let x = Flex::cast(x, DType::BF16);
        let sum = ctx.group(Axis::Tp).all_reduce(x, ReduceOp::Sum);
        ctx.health()?;
        Ok((sum.dtype(), to_f32_vec::<Flex>(sum)))
    });
    assert!(
        results
            .iter()
            .all(|found| *found == (DType::BF16, vec![258.0]))
    );
}

#[test]
fn a_maximum_does_not_hide_nan() {
    let results = run_on(2, |ctx| {
        let x = if ctx.rank() == 0 {
            [f32::NAN, 2.0, 1.0]
        } else {
            [1.0, f32::NAN, 3.0]
        };
        let max = ctx
            .group(Axis::Tp)
            .all_reduce(tensor(&x, &[3]), ReduceOp::Max);
        ctx.health()?;
        Ok(to_f32_vec::<Flex>(max))
    });
    for found in results {
        assert!(found[0].is_nan() && found[1].is_nan() && found[2] == 3.0);
    }
}

#[test]
fn sums_repeat_bit_for_bit() {
    let run = || {
        run_on(5, |ctx| {
            // Later ranks come first at some calls and last at others.
            let mut total = 0u64;
            for round in 0..20 {
                if (ctx.rank() + round) % 3 == 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
                let x: Vec<f32> = (0..64)
                    .map(|i| number(ctx.rank() + round, i) * 10f32.powi(i as i32 % 9))
                    .collect();
                let sum = ctx
                    .group(Axis::Tp)
                    .all_reduce(tensor(&x, &[64]), ReduceOp::Sum);
                ctx.health()?;
                let bits = to_f32_vec::<Flex>(sum)
                    .into_iter()
                    .map(|x| u64::from(x.to_bits()));
                total = bits.fold(total, |hash, bits| hash.rotate_left(7) ^ bits);
            }
            Ok(total)
        })
    };
    let first = run();
    assert!(first.iter().all(|total| *total == first[0]));
    assert!((0..3).all(|_| run() == first));
}

#[test]
fn started_collectives_may_be_awaited_in_any_order() {
    let results = run_on(3, |ctx| {
        let group = ctx.group(Axis::Tp);
        let started: Vec<Pending<Flex>> = (0..6)
            .map(|i| group.start_all_reduce(tensor(&[i as f32], &[1]), ReduceOp::Sum))
            .collect();
        let incoming = group.start_recv(&[1], DType::F32, (ctx.rank() + 1) % 3);
        group.send(tensor(&[ctx.rank() as f32], &[1]), (ctx.rank() + 2) % 3);
        let mut found: Vec<f32> = started
            .into_iter()
            .rev()
            .flat_map(|p| to_f32_vec::<Flex>(p.wait()))
            .collect();
        found.extend(to_f32_vec::<Flex>(incoming.wait()));
        ctx.health()?;
        Ok(found)
    });
    for (rank, found) in results.into_iter().enumerate() {
        assert_eq!(
            found,
            [15.0, 12.0, 9.0, 6.0, 3.0, 0.0, ((rank + 1) % 3) as f32]
        );
    }
}

#[test]
fn groups_of_every_axis_hold_the_right_ranks() {
    let layouts = [
        LayoutSpec {
            tp: 2,
            cp: 2,
            dp: 2,
            pp: 2,
            ep: 4,
            etp: 2,
            ..LayoutSpec::default()
        },
        LayoutSpec {
            tp: 3,
            dp: 2,
            pp: 3,
            ep: 6,
            ..LayoutSpec::default()
        },
        LayoutSpec {
            cp: 4,
            dp: 4,
            pp: 4,
            ep: 2,
            etp: 1,
            ..LayoutSpec::default()
        },
    ];
    for layout in layouts {
        let found = run_threads::<Flex, _, Error>(layout, Duration::from_secs(30), |ctx| {
            let mut members = Vec::new();
            for axis in Axis::ALL {
                let group = ctx.group(axis);
                let mine = tensor(&[ctx.rank() as f32], &[1]);
                let all = to_f32_vec::<Flex>(group.all_gather(mine, 0));
                assert_eq!(group.ranks()[group.rank()], ctx.rank());
                members.push(
                    all.into_iter()
                        .map(|rank| rank as usize)
                        .collect::<Vec<_>>(),
                );
            }
            ctx.health()?;
            Ok(members)
        })
        .unwrap();
        for (rank, members) in found.into_iter().enumerate() {
            for (axis, found) in Axis::ALL.into_iter().zip(members) {
                assert_eq!(
                    found,
                    group_ranks(&layout, axis, rank),
                    "{axis:?} of rank {rank} at {layout}"
                );
            }
        }
    }
}

#[test]
fn kernels_of_sixty_four_ranks_keep_to_their_own_threads() {
    let layout = LayoutSpec {
        tp: 4,
        cp: 2,
        dp: 4,
        pp: 2,
        ..LayoutSpec::default()
    };
    let sums = run_threads::<Flex, _, Error>(layout, Duration::from_secs(60), |ctx| {
        assert_eq!(rayon::current_num_threads(), 1);
        let weights: Vec<f32> = (0..128 * 128).map(|i| number(1, i) / 8.0).collect();
        let weight = bridge_ops::Param::<Flex>::new("weight", tensor(&weights, &[128, 128]));
        let start: Vec<f32> = (0..32 * 128).map(|i| number(ctx.rank(), i)).collect();
        let mut x = tensor(&start, &[32, 128]);
        for _ in 0..8 {
            let tape = bridge_ops::Tape::inference();
            x = linear(&tape, &tape.constant(x), &weight, None).into_value();
            for axis in [Axis::Tp, Axis::DpCp, Axis::World] {
                let group = ctx.group(axis);
                x = Flex::scale(
                    group.all_reduce(x, ReduceOp::Sum),
                    1.0 / group.size() as f64,
                );
            }
        }
        ctx.health()?;
        Ok(to_f32_vec::<Flex>(x)[0].to_bits())
    })
    .unwrap();
    assert!(sums.len() == 64 && sums.iter().all(|sum| *sum == sums[0]));
    // One rank alone may use every core.
    let single =
        |ctx: Arc<ParallelContext<Flex>>| Ok((ctx.world_size(), rayon::current_num_threads()));
    let found =
        run_threads::<Flex, _, Error>(LayoutSpec::default(), Duration::from_secs(5), single);
    assert_eq!(found.unwrap(), [(1, rayon::current_num_threads())]);
}

/// What one rank does wrong.
type Fault = fn(&ParallelContext<Flex>) -> Result<(), Error>;

/// Runs 4 ranks, of which rank 2 commits `fault` in the middle of their work. Checks that the job ends in time, that
/// every other rank learns the same error, and returns that.
#[track_caller]
fn check_fault(timeout: Duration, fault: Fault) -> Error {
    let learnt: Arc<Mutex<Vec<(usize, Error)>>> = Arc::default();
    let shared = Arc::clone(&learnt);
    let start = Instant::now();
    let layout = LayoutSpec {
        tp: 2,
        dp: 2,
        ..LayoutSpec::default()
    };
    let result = run_threads::<Flex, _, Error>(layout, timeout, move |ctx| {
        for step in 0..50 {
            if step == 3 && ctx.rank() == 2 {
                fault(&ctx)?;
                return Ok(());
            }
            let x = tensor(&[1.0, 2.0], &[2]);
            let x = ctx.group(Axis::Tp).all_reduce(x, ReduceOp::Sum);
            let x = ctx.group(Axis::Dp).all_gather(x, 0);
            assert_eq!(
                x.shape().to_vec(),
                [4],
                "the right shape even after a failure"
            );
            if let Err(error) = ctx.health() {
                shared.lock().unwrap().push((ctx.rank(), error.clone()));
                // Nothing waits any more.
                let again = Instant::now();
                let zeros = ctx
                    .group(Axis::World)
                    .reduce_scatter(tensor(&[1.0; 4], &[4]), 0);
                assert_eq!(to_f32_vec::<Flex>(zeros), [0.0]);
                assert!(ctx.group(Axis::World).barrier().is_err());
                assert!(again.elapsed() < Duration::from_millis(500));
                return Err(error);
            }
        }
        Ok(())
    });
    assert!(
        start.elapsed() < timeout * 3 + Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    let error = result.unwrap_err();
    let mut learnt = learnt.lock().unwrap().clone();
    learnt.sort_by_key(|(rank, _)| *rank);
    let ranks: Vec<usize> = learnt.iter().map(|(rank, _)| *rank).collect();
    assert_eq!(ranks, [0, 1, 3], "{learnt:?}");
    assert!(
        learnt.iter().all(|(_, other)| *other == error),
        "{learnt:?}"
    );
    error
}

const SHORT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_rank_that_panics_is_named() {
    let error = check_fault(LONG, |_| panic!("index out of range"));
    assert_eq!(
        error.to_string(),
        "rank 2 failed: panicked: index out of range"
    );
}

#[test]
fn a_rank_that_gives_up_is_named() {
    let error = check_fault(LONG, |_| Err(Error::Invalid("loss is NaN".into())));
    assert_eq!(error.to_string(), "rank 2 failed: loss is NaN");
}

#[test]
fn a_rank_that_ends_early_is_named() {
    let error = check_fault(LONG, |_| Ok(()));
    assert!(matches!(error, Error::Ended { rank: 2, .. }), "{error}");
    assert_eq!(error.rank(), Some(2));
}

#[test]
fn a_rank_that_hangs_is_named_within_the_timeout() {
    let error = check_fault(SHORT, |_| {
        std::thread::sleep(Duration::from_secs(10));
        Ok(())
    });
    assert!(
        matches!(&error, Error::Timeout { ranks, .. } if *ranks == [2]),
        "{error}"
    );
    assert!(error.to_string().starts_with("rank 2 did not reach "));
}

#[test]
fn a_rank_that_aborts_is_named() {
    let error = check_fault(LONG, |ctx| {
        ctx.abort("the disk is full");
        ctx.health()
    });
    assert_eq!(error.to_string(), "rank 2 ended the job: the disk is full");
}

#[test]
fn a_rank_that_calls_something_else_is_named() {
    let error = check_fault(LONG, |ctx| {
        ctx.group(Axis::Tp).all_gather(tensor(&[1.0, 2.0], &[2]), 0);
        ctx.health()
    });
    let text = error.to_string();
    assert!(
        text.contains("rank 2 calls all_gather (dim 0), rank 3 calls all_reduce (sum)"),
        "{text}"
    );
}

#[test]
fn a_rank_with_another_shape_is_named() {
    let error = check_fault(LONG, |ctx| {
        ctx.group(Axis::Tp)
            .all_reduce(tensor(&[1.0], &[1]), ReduceOp::Sum);
        ctx.health()
    });
    let text = error.to_string();
    assert!(
        text.contains("rank 2 passes F32 [1], rank 3 passes F32 [2]"),
        "{text}"
    );
}

#[test]
fn ranks_that_wait_for_each_other_are_told_so() {
    let result = run_threads::<Flex, (), Error>(LayoutSpec::tp_pp(2, 1), SHORT, |ctx| {
        let axis = if ctx.rank() == 0 {
            Axis::Tp
        } else {
            Axis::World
        };
        ctx.group(axis).barrier()
    });
    let error = result.unwrap_err();
    let Error::Deadlock { waits } = &error else {
        panic!("{error}")
    };
    assert_eq!(waits.len(), 2);
    assert!(
        error.to_string().contains("of group world [0, 1]")
            && error.to_string().contains("of group tp [0, 1]")
    );
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let run = |layout| {
        run_threads::<Flex, (), Error>(layout, LONG, |_| Ok(()))
            .unwrap_err()
            .to_string()
    };
    assert!(run(LayoutSpec::tp_pp(0, 1)).contains("no ranks"));
    let text = run(LayoutSpec {
        ep: 4,
        dp: 2,
        ..LayoutSpec::default()
    });
    assert!(
        text.contains("etp=1 times ep=4 does not divide the 2 ranks") && text.contains("dp=4"),
        "{text}"
    );
}
