//! `bench comm`: how fast, and whether right, ranks exchange data.

use std::time::{Duration, Instant};

use bridge_core::LayoutSpec;
use bridge_ops::{Ops, float_from_f32, to_f32_vec};
use bridge_parallel::{Axis, ParallelContext, ReduceOp, run_threads};
use serde_json::{Value, json};

use super::rounded;
use crate::backend::{OnBackend, dispatch};
use crate::failure::{Failure, Result};
use crate::flags::{BackendFlags, byte_size};
use crate::job;
use crate::report::Report;
use crate::transport::{ProcessBackend, as_rank};

/// Measures collectives among ranks, and checks what they return.
///
/// Under a launcher every process is a rank; otherwise --ranks threads of this process are. The bus bandwidth is that of
/// NCCL's own tests: the data rate times 2(n-1)/n for all-reduce and (n-1)/n for the others, which does not depend on the
/// number of ranks n where the links are the limit.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench comm --ranks 4\n  \
    cargo xtask launch --nproc 8 -- bench comm --backend cuda --bytes 256MB")]
pub(crate) struct Args {
    /// Ranks that are threads, where no launcher has started processes.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    ranks: u16,
    /// Bytes that each rank passes, fp32.
    #[arg(long, default_value = "1MB", value_name = "SIZE", value_parser = byte_size)]
    bytes: u64,
    /// Go on for this many seconds per collective.
    #[arg(long, default_value_t = 1.0, value_name = "S")]
    seconds: f64,
    #[command(flatten)]
    backend: BackendFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let cases = dispatch(args.backend, Work { args })?;
    for case in cases {
        report.line(&case)?;
    }
    Ok(())
}

struct Work {
    args: Args,
}

impl OnBackend for Work {
    type Output = Vec<Value>;

    fn run<B: ProcessBackend>(self, _: B::Device) -> Result<Vec<Value>> {
        let (bytes, seconds) = (
            self.args.bytes,
            Duration::from_secs_f64(self.args.seconds.clamp(0.0, 3600.0)),
        );
        if let Some(job) = job::from_environment()? {
            let layout = LayoutSpec {
                dp: job.options.world_size,
                ..LayoutSpec::default()
            };
            let cases = as_rank::<B, _, _>(&job, layout, |ctx| measure(ctx, bytes, seconds))?;
            return Ok(if job.options.rank == 0 {
                cases
            } else {
                Vec::new()
            });
        }
        let layout = LayoutSpec {
            dp: usize::from(self.args.ranks),
            ..LayoutSpec::default()
        };
        let timeout = Duration::from_secs(60);
        let all = run_threads::<B, _, bridge_parallel::Error>(layout, timeout, move |ctx| {
            measure(&ctx, bytes, seconds)
        })?;
        all.into_iter()
            .next()
            .ok_or_else(|| Failure::running("no rank gave a result"))
    }
}

/// One JSON value per collective.
fn measure<B: Ops>(
    ctx: &ParallelContext<B>,
    bytes: u64,
    seconds: Duration,
) -> bridge_parallel::Result<Vec<Value>> {
    let group = ctx.group(Axis::World);
    let (size, rank) = (group.size(), group.rank());
    // A multiple of the ranks squared, so that every collective divides it evenly.
    let count = (bytes as usize / 4 / (size * size)).max(1) * size * size;
    let mine = float_from_f32::<B>(&vec![rank as f32 + 1.0; count], &[count], ctx.device());
    let total = (size * (size + 1) / 2) as f32;
    let rows = vec![count / size; size];
    let mut cases = Vec::new();
    for name in [
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "send_recv",
    ] {
        let run = || match name {
            "all_reduce" => group.all_reduce(mine.clone(), ReduceOp::Sum),
            "all_gather" => group.all_gather(mine.clone(), 0),
            "reduce_scatter" => group.reduce_scatter(mine.clone(), 0),
            "all_to_all" => group.all_to_all(mine.clone(), &rows, &rows),
            _ => {
                group.send(mine.clone(), (rank + 1) % size);
                group.recv(&[count], bridge_ops::DType::F32, (rank + size - 1) % size)
            }
        };
        let parts: Vec<f32> = (0..size).map(|from| from as f32 + 1.0).collect();
        let expected = match name {
            "all_reduce" | "reduce_scatter" => vec![total],
            "send_recv" => vec![((rank + size - 1) % size) as f32 + 1.0],
            _ => parts,
        };
        // The first call makes connections and loads kernels.
        let found = to_f32_vec::<B>(run());
        ctx.health()?;
        let part = found.len() / expected.len();
        if let Some(at) = (0..found.len()).find(|i| found[*i] != expected[i / part]) {
            let problem = format!(
                "{name} gave {} at element {at}, expected {}",
                found[at],
                expected[at / part]
            );
            return Err(bridge_parallel::Error::RankFailed {
                rank,
                reason: problem,
            });
        }
        let (start, mut calls) = (Instant::now(), 0u32);
        loop {
            for _ in 0..5 {
                std::hint::black_box(run());
            }
            B::sync(ctx.device()).map_err(|error| bridge_parallel::Error::RankFailed {
                rank,
                reason: format!("{error:?}"),
            })?;
            calls += 5;
            // Rank 0 decides, so that all make the same number of calls.
            let enough = group.all_gather_bytes(&[u8::from(start.elapsed() >= seconds)])?[0] == [1];
            ctx.health()?;
            if enough {
                break;
            }
        }
        let time = start.elapsed().as_secs_f64() / f64::from(calls);
        let share = (size - 1) as f64 / size as f64;
        let moved = match name {
            "all_reduce" => 2.0 * share,
            "all_gather" => share * size as f64,
            "send_recv" => 1.0,
            _ => share,
        };
        cases.push(json!({
            "collective": name,
            "ranks": size,
            "bytes": count * 4,
            "us": rounded(time * 1e6, 1),
            "bus_gb_per_s": rounded(moved * (count * 4) as f64 / time / 1e9, 3),
        }));
    }
    Ok(cases)
}
