//! Runs a layout with every rank a thread.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use bridge_core::LayoutSpec;
use bridge_ops::Ops;

use super::threads::{ThreadTransport, Threads};
use crate::context::ParallelContext;
use crate::error::{Error, Result};

/// How often the caller looks whether the job has failed.
const LOOK: Duration = Duration::from_millis(20);
/// Stack of a rank's thread. Only what is touched takes memory.
const STACK: usize = 8 << 20;

/// Runs `work` once for each rank of `layout`, each on a thread of its own, and returns the results in the order of
/// ranks.
///
/// With more than one rank, the CPU kernels called by a rank run on that rank's thread alone. A rank that waits for
/// another longer than `timeout` ends the job.
///
/// # Errors
/// The first failure of the job, with the rank at fault: its error or panic, its end while others wait for it, or that
/// it hangs. A rank that hangs cannot be stopped; its thread is left behind.
pub fn run_threads<B, T, E>(
    layout: LayoutSpec,
    timeout: Duration,
    work: impl Fn(Arc<ParallelContext<B>>) -> Result<T, E> + Send + Sync + 'static,
) -> Result<Vec<T>>
where
    B: Ops,
    T: Send + 'static,
    E: Display,
{
    let world_size = layout.world_size();
    if world_size == 0 {
        return Err(Error::Invalid(format!("layout {layout} has no ranks")));
    }
    let device = B::Device::default();
    let job = Threads::<B>::new(world_size, device.clone(), timeout);
    let work = Arc::new(work);
    let (results, inbox) = channel();
    for rank in 0..world_size {
        let (shared, device, work) = (Arc::clone(&job), device.clone(), Arc::clone(&work));
        let results = results.clone();
        let body = move || {
            let job = Arc::clone(&shared);
            let transport = Arc::new(ThreadTransport { job, rank });
            run_rank(&shared, rank, &results, || {
                let ctx = ParallelContext::new(layout, device, transport)
                    .map_err(|error| error.to_string())?;
                work(Arc::new(ctx)).map_err(|error| error.to_string())
            });
        };
        if let Err(reason) = spawn(rank, world_size, body) {
            job.fail(Error::RankFailed { rank, reason });
            job.end(rank);
        }
    }
    drop(results);
    collect(&job, world_size, timeout, &inbox)
}

/// Runs one rank, and tells the others how it ended.
fn run_rank<B: Ops, T>(
    job: &Threads<B>,
    rank: usize,
    results: &Sender<(usize, T)>,
    work: impl FnOnce() -> Result<T, String>,
) {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(result)) => {
            // The receiver is gone only when the job has failed.
            let _ = results.send((rank, result));
            None
        }
        Ok(Err(reason)) => Some(reason),
        Err(panic) => Some(panic_message(panic.as_ref())),
    };
    if let Some(reason) = reason {
        job.fail(Error::RankFailed { rank, reason });
    }
    job.end(rank);
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("no message"))
}

/// Starts a rank's thread.
fn spawn(
    rank: usize,
    world_size: usize,
    body: impl FnOnce() + Send + 'static,
) -> Result<(), String> {
    let name = format!("rank {rank}");
    if world_size == 1 {
        let thread = std::thread::Builder::new().name(name).stack_size(STACK);
        return thread
            .spawn(body)
            .map(|_| ())
            .map_err(|error| error.to_string());
    }
    // Kernels ask the pool they are called in how many threads to use. A rank is the one thread of a pool of its own,
    // so that many ranks neither crowd the cores nor wait for each other inside a shared pool.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .thread_name(move |_| name.clone())
        .stack_size(STACK)
        .build()
        .map_err(|error| error.to_string())?;
    pool.spawn(body);
    Ok(())
}

/// Waits for every rank's result, or for the failure of the job.
fn collect<B: Ops, T>(
    job: &Threads<B>,
    world_size: usize,
    grace: Duration,
    inbox: &std::sync::mpsc::Receiver<(usize, T)>,
) -> Result<Vec<T>> {
    let mut found: Vec<Option<T>> = (0..world_size).map(|_| None).collect();
    let mut failed_at = None;
    loop {
        match inbox.recv_timeout(LOOK) {
            Ok((rank, result)) => found[rank] = Some(result),
            // Every thread has ended.
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if job.failure().is_some() => {
                // The others notice at their next collective; one that hangs never does.
                let since = *failed_at.get_or_insert_with(Instant::now);
                if since.elapsed() > grace {
                    break;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    match job.failure() {
        Some(error) => Err(error.clone()),
        None => Ok(found.into_iter().flatten().collect()),
    }
}
