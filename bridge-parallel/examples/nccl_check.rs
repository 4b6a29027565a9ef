//! Checks the NCCL communicator on the GPUs of this machine, and measures it.
//!
//! ```sh
//! cargo run --release -p bridge-parallel --example nccl_check -- 2
//! ```
//!
//! starts two processes of itself, a GPU each. Every collective is compared with the thread transport on the CPU, on the
//! same numbers; then each is timed. With `--die` the last rank stops in the middle, and the others must say so.

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge_core::LayoutSpec;
use bridge_cuda::{Cuda, CudaDevice};
use bridge_ops::{DType, Float, Ops, float_from_f32, to_f32_vec};
use bridge_parallel::{
    Axis, Error, Group, JobOptions, NcclTransport, ParallelContext, ReduceOp, run_threads,
};
use burn_flex::Flex;

fn main() -> ExitCode {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let die = words.iter().any(|word| word == "--die");
    words.retain(|word| word != "--die");
    let result = match words.as_slice() {
        [ranks] => parent(ranks, die),
        [rank, ranks, address] => child(rank, ranks, address, die),
        _ => Err("usage: nccl_check RANKS [--die]".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nccl_check {words:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

fn parent(ranks: &str, die: bool) -> Outcome {
    let count: usize = ranks.parse()?;
    let address = std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .to_string();
    let program = std::env::current_exe()?;
    let start = Instant::now();
    let mut children = Vec::new();
    for rank in 0..count {
        let mut command = Command::new(&program);
        command.args([rank.to_string().as_str(), ranks, &address]);
        if die {
            command.arg("--die");
        }
        children.push(command.spawn()?);
    }
    let mut failed = Vec::new();
    for (rank, child) in children.iter_mut().enumerate() {
        if !child.wait()?.success() {
            failed.push(rank);
        }
    }
    println!(
        "{count} ranks, {:.1} s, failed: {failed:?}",
        start.elapsed().as_secs_f64()
    );
    let expected: Vec<usize> = if die {
        (0..count).collect()
    } else {
        Vec::new()
    };
    if failed == expected {
        Ok(())
    } else {
        Err(format!("ranks {failed:?} failed, expected {expected:?}").into())
    }
}

fn child(rank: &str, ranks: &str, address: &str, die: bool) -> Outcome {
    let (rank, ranks): (usize, usize) = (rank.parse()?, ranks.parse()?);
    let device = CudaDevice::open(rank % CudaDevice::count().max(1))?;
    let mut options = JobOptions::new(rank, ranks, address, b"nccl_check");
    options.timeout = Duration::from_secs(if die { 5 } else { 60 });
    let transport = Arc::new(NcclTransport::connect(options, device)?);
    let layout = LayoutSpec {
        dp: ranks,
        ..LayoutSpec::default()
    };
    let ctx = ParallelContext::<Cuda>::new(layout, device, transport)?;
    if rank == 0 {
        println!("NCCL {}, {ranks} ranks", NcclTransport::nccl_version()?);
    }
    for dtype in [DType::F32, DType::BF16] {
        let found = work::<Cuda>(ctx.group(Axis::Dp), ctx.device(), dtype)?;
        ctx.health()?;
        let threads = run_threads::<Flex, _, Error>(layout, Duration::from_secs(60), move |ctx| {
            work::<Flex>(ctx.group(Axis::Dp), ctx.device(), dtype)
        })?;
        for (at, (found, expected)) in found.iter().zip(&threads[rank]).enumerate() {
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 2e-2 };
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * b.abs().max(1.0);
            if found.len() != expected.len() || !found.iter().zip(expected).all(close) {
                return Err(format!(
                    "{dtype:?} result {at} differs: {found:?}, expected {expected:?}"
                )
                .into());
            }
        }
    }
    overlap(&ctx)?;
    if die {
        hang_or_die(&ctx)?;
    }
    measure(&ctx)?;
    Ok(())
}

/// The results of every collective, on numbers that depend on the rank.
fn work<B: Ops>(
    group: &Group<B>,
    device: &B::Device,
    dtype: DType,
) -> Result<Vec<Vec<f32>>, Error> {
    let (rank, size) = (group.rank(), group.size());
    let x = |seed: usize| {
        let values: Vec<f32> = (0..4 * size * 3)
            .map(|i| ((i * 7 + seed * 13 + rank * 5) % 17) as f32 - 8.0)
            .collect();
        B::cast(float_from_f32::<B>(&values, &[4, size, 3], device), dtype)
    };
    let shift = |tensor: Float<B>| {
        group.send(tensor, (rank + 1) % size);
        group.recv(&[4, size, 3], dtype, (rank + size - 1) % size)
    };
    // Rank r sends r + 1 rows to each rank but the last, which gets one less.
    let rows = |from: usize, to: usize| from + usize::from(to + 1 < size);
    let send: Vec<usize> = (0..size).map(|to| rows(rank, to)).collect();
    let recv: Vec<usize> = (0..size).map(|from| rows(from, rank)).collect();
    let count: usize = send.iter().sum();
    let tokens: Vec<f32> = (0..count * 2).map(|i| (i + 100 * rank) as f32).collect();
    let tokens = B::cast(float_from_f32::<B>(&tokens, &[count, 2], device), dtype);
    let started = [
        group.start_all_reduce(x(1), ReduceOp::Sum),
        group.start_all_gather(x(2), 1),
        group.start_reduce_scatter(x(3), 1),
    ];
    let mut results = vec![
        group.all_reduce(x(4), ReduceOp::Sum),
        group.all_reduce(x(5), ReduceOp::Max),
        group.all_gather(x(6), 0),
        group.all_gather(x(7), 2),
        group.reduce_scatter(x(8), 1),
        group.all_to_all(tokens, &send, &recv),
        group.broadcast(x(9), size - 1),
        shift(x(10)),
    ];
    results.extend(started.into_iter().map(|pending| pending.wait()));
    group.barrier()?;
    group.health()?;
    Ok(results.into_iter().map(to_f32_vec::<B>).collect())
}

/// A started all-reduce must not see what is done to its input's memory afterwards, nor give a result too early.
fn overlap(ctx: &ParallelContext<Cuda>) -> Outcome {
    let (group, device) = (ctx.group(Axis::Dp), ctx.device());
    let count = 1 << 22;
    let expected = (group.size() * (group.size() + 1) / 2) as f32;
    for _ in 0..20 {
        let mine =
            float_from_f32::<Cuda>(&vec![group.rank() as f32 + 1.0; count], &[count], device);
        let pending = group.start_all_reduce(mine, ReduceOp::Sum);
        // Freed and taken again at once: the pool would hand out the same memory if it could.
        let noise: Vec<_> = (0..4)
            .map(|i| float_from_f32::<Cuda>(&vec![i as f32; count], &[count], device))
            .collect();
        drop(noise);
        let sum = Cuda::scale(pending.wait(), 2.0);
        let found = to_f32_vec::<Cuda>(sum);
        ctx.health()?;
        if let Some(at) = found.iter().position(|value| *value != 2.0 * expected) {
            return Err(format!(
                "a started all-reduce gave {} at {at}, expected {}",
                found[at],
                2.0 * expected
            )
            .into());
        }
    }
    Ok(())
}

/// The last rank dies; the others wait in a collective for it, on the GPU.
fn hang_or_die(ctx: &ParallelContext<Cuda>) -> Outcome {
    if ctx.rank() + 1 == ctx.world_size() {
        std::thread::sleep(Duration::from_millis(500));
        std::process::abort();
    }
    let x = float_from_f32::<Cuda>(&[1.0; 1024], &[1024], ctx.device());
    for _ in 0..100 {
        let sum = ctx.group(Axis::Dp).all_reduce(x.clone(), ReduceOp::Sum);
        to_f32_vec::<Cuda>(sum);
        ctx.health()?;
    }
    Err("the others did not notice".into())
}

fn measure(ctx: &ParallelContext<Cuda>) -> Outcome {
    let (group, device) = (ctx.group(Axis::Dp), *ctx.device());
    let size = group.size();
    for count in [1 << 12, 1 << 20, 1 << 26] {
        let x = float_from_f32::<Cuda>(&vec![0.0; count], &[count], &device);
        type Op<'a> = Box<dyn Fn() -> Float<Cuda> + 'a>;
        let ops: [(&str, f64, Op<'_>); 4] = [
            (
                "all_reduce",
                2.0,
                Box::new(|| group.all_reduce(x.clone(), ReduceOp::Sum)),
            ),
            (
                "started all_reduce",
                2.0,
                Box::new(|| group.start_all_reduce(x.clone(), ReduceOp::Sum).wait()),
            ),
            (
                "all_gather",
                size as f64,
                Box::new(|| group.all_gather(x.clone(), 0)),
            ),
            (
                "reduce_scatter",
                1.0,
                Box::new(|| group.reduce_scatter(x.clone(), 0)),
            ),
        ];
        for (name, factor, op) in ops {
            (0..3).for_each(|_| drop(op()));
            device.synchronize()?;
            group.barrier()?;
            let (start, calls) = (Instant::now(), 20);
            (0..calls).for_each(|_| drop(op()));
            let queued = start.elapsed().as_secs_f64() / f64::from(calls);
            device.synchronize()?;
            let time = start.elapsed().as_secs_f64() / f64::from(calls);
            ctx.health()?;
            if group.rank() == 0 {
                let bus =
                    factor * (size - 1) as f64 / size as f64 * (4 * count) as f64 / time / 1e9;
                println!(
                    "{name:20} {:10} bytes: {:8.1} us a call, {:6.1} us of the host, bus {bus:.1} GB/s",
                    4 * count,
                    time * 1e6,
                    queued * 1e6
                );
            }
        }
    }
    Ok(())
}
