//! Jobs over TCP, their ranks on threads of this process, which only here share it.

use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use bridge_core::LayoutSpec;
use bridge_ops::{float_from_f32, to_f32_vec};
use burn_flex::Flex;

use super::*;
use crate::comm::{ReduceOp, Transport};
use crate::context::ParallelContext;
use crate::groups::Axis;

/// An address of this host that is free.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn options(rank: usize, world_size: usize, address: &str) -> JobOptions {
    JobOptions {
        join_timeout: Duration::from_secs(10),
        timeout: Duration::from_secs(20),
        ..JobOptions::new(rank, world_size, address, b"a secret")
    }
}

/// Runs `work` for every rank and returns what each gives.
fn run<T: Send>(
    world_size: usize,
    adapt: impl Fn(&mut JobOptions) + Sync,
    work: impl Fn(TcpTransport<Flex>) -> T + Sync,
) -> Vec<Result<T>> {
    let address = free_address();
    std::thread::scope(|scope| {
        let start = |rank| {
            let mut options = options(rank, world_size, &address);
            adapt(&mut options);
            let work = &work;
            scope.spawn(move || TcpTransport::connect(options, Default::default()).map(work))
        };
        let ranks: Vec<_> = (0..world_size).map(start).collect();
        ranks
            .into_iter()
            .map(|rank| rank.join().expect("no panic"))
            .collect()
    })
}

/// What a fixed piece of work gives on each rank of a layout.
fn mixed_work(ctx: &ParallelContext<Flex>) -> Result<Vec<f32>> {
    let rank = ctx.rank() as f32;
    let tensor = |values: &[f32]| float_from_f32::<Flex>(values, &[values.len(), 1], ctx.device());
    let (tp, dp, world) = (
        ctx.group(Axis::Tp),
        ctx.group(Axis::Dp),
        ctx.group(Axis::World),
    );
    let mut x = tp.all_reduce(tensor(&[rank, 0.1 * rank, 1e7 + rank, 3.0]), ReduceOp::Sum);
    x = dp.reduce_scatter(x, 0);
    x = world.all_gather(x, 1);
    let pending = world.start_all_reduce(x, ReduceOp::Max);
    let (next, previous) = (
        (world.rank() + 1) % world.size(),
        (world.rank() + world.size() - 1) % world.size(),
    );
    world.send(tensor(&[rank]), next);
    let from_left = world.recv(&[1, 1], bridge_ops::DType::F32, previous);
    let sizes = world.all_gather_bytes(&vec![0; ctx.rank()])?;
    let swapped = tp.all_to_all(
        tensor(&[rank, rank + 0.5, 9.0]),
        &[1, 2],
        &[1 + tp.rank(), 1 + tp.rank()],
    );
    let root = dp.broadcast(tensor(&[rank]), 1);
    ctx.health()?;
    let mut all = to_f32_vec::<Flex>(pending.wait());
    for more in [from_left, swapped, root] {
        all.extend(to_f32_vec::<Flex>(more));
    }
    all.extend(sizes.iter().map(|bytes| bytes.len() as f32));
    Ok(all)
}

#[test]
fn processes_compute_what_threads_do() {
    let layout = LayoutSpec {
        tp: 2,
        dp: 2,
        ..LayoutSpec::default()
    };
    let over_tcp = run(
        4,
        |_| (),
        |transport| {
            let ctx = ParallelContext::new(layout, Default::default(), Arc::new(transport))?;
            mixed_work(&ctx)
        },
    );
    let over_tcp: Vec<Vec<f32>> = over_tcp
        .into_iter()
        .map(|result| result.unwrap().unwrap())
        .collect();
    let limit = Duration::from_secs(20);
    let on_threads =
        crate::run_threads::<Flex, _, Error>(layout, limit, |ctx| mixed_work(&ctx)).unwrap();
    assert_eq!(over_tcp, on_threads);
}

#[test]
fn missing_ranks_are_named() {
    let address = free_address();
    let start = Instant::now();
    let short = JobOptions {
        join_timeout: Duration::from_millis(300),
        ..options(0, 3, &address)
    };
    let error = TcpTransport::<Flex>::connect(short, Default::default())
        .err()
        .unwrap();
    assert!(
        error
            .to_string()
            .contains("ranks 1, 2 did not join within 0 s"),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn strangers_and_wrong_ranks_stay_outside() {
    let address = free_address();
    let hub = address.clone();
    let rank_0 = std::thread::spawn(move || {
        TcpTransport::<Flex>::connect(options(0, 2, &hub), Default::default())
    });
    let refused = |change: fn(&mut JobOptions)| {
        let mut options = options(1, 2, &address);
        change(&mut options);
        TcpTransport::<Flex>::connect(options, Default::default())
            .err()
            .unwrap()
            .to_string()
    };
    // Noise, and a promise of much to come.
    let mut stranger = TcpStream::connect(loop_until_open(&address)).unwrap();
    std::io::Write::write_all(&mut stranger, &[0xff; 64]).unwrap();
    let text = refused(|options| options.secret = b"another".to_vec());
    assert!(text.contains("the secret differs"), "{text}");
    let text = refused(|options| options.world_size = 3);
    assert!(
        text.contains("rank 1 of 3 ranks wants to join a job of 2"),
        "{text}"
    );
    assert!(refused(|options| options.secret.clear()).contains("needs a shared secret"));
    // The job starts all the same.
    let rank_1 =
        TcpTransport::<Flex>::connect(options(1, 2, &address), Default::default()).unwrap();
    rank_1.health().unwrap();
    drop(rank_1);
    rank_0.join().unwrap().unwrap();
}

fn loop_until_open(address: &str) -> &str {
    while TcpStream::connect(address).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    address
}

/// Every rank joins a barrier over and over; rank 1 of 3 does `fault` in the middle. Returns what the others learn.
fn learn(timeout: Duration, fault: impl Fn(TcpTransport<Flex>) + Sync) -> Vec<Error> {
    let results = run(
        3,
        |options| options.timeout = timeout,
        |transport| {
            let world = Transport::<Flex>::group(&transport, "world", &[0, 1, 2]).unwrap();
            for step in 0.. {
                if step == 5 && transport.rank() == 1 {
                    drop(world);
                    fault(transport);
                    return None;
                }
                if let Err(error) = world.barrier() {
                    return Some(error);
                }
            }
            unreachable!("the loop ends by a failure")
        },
    );
    results
        .into_iter()
        .filter_map(|result| result.unwrap())
        .collect()
}

#[test]
fn the_end_of_a_rank_reaches_all_others() {
    let long = Duration::from_secs(20);
    let start = Instant::now();
    // In good order, too early.
    let errors = learn(long, drop);
    assert!(
        errors.len() == 2
            && errors
                .iter()
                .all(|e| matches!(e, Error::Ended { rank: 1, .. })),
        "{errors:?}"
    );
    // With a reason.
    let errors = learn(long, |transport| transport.abort("the disk is full"));
    let expected = "rank 1 ended the job: the disk is full";
    assert!(
        errors.len() == 2 && errors.iter().all(|e| e.to_string() == expected),
        "{errors:?}"
    );
    // Without a word.
    let errors = learn(long, |transport| {
        transport.link.sever();
        std::mem::forget(transport);
    });
    assert!(
        errors.len() == 2
            && errors
                .iter()
                .all(|e| matches!(e, Error::RankLost { rank: 1, .. })),
        "{errors:?}"
    );
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn a_rank_that_hangs_is_named() {
    let errors = learn(Duration::from_millis(700), |_transport| {
        std::thread::sleep(Duration::from_secs(4))
    });
    assert!(errors.len() == 2 && errors[0] == errors[1], "{errors:?}");
    assert!(
        matches!(&errors[0], Error::Timeout { ranks, .. } if *ranks == [1]),
        "{errors:?}"
    );
}
