//! `launch`: starts the ranks of a job on this machine, and ends them together.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::failure::{Blame, Cause, Failure, Result};
use crate::job;
use crate::report::Report;

/// How often the launcher looks at its ranks.
const LOOK: Duration = Duration::from_millis(20);

/// Starts one process a rank on this machine, each running the given verb.
///
/// Rank 0's stdout is passed on as it is; everything else appears on stderr with the rank before each line. When a rank
/// fails, the others learn of it and end by themselves; what is left after --grace seconds is killed. The exit code is
/// that of the rank that failed first. One process is a job, too: it exchanges with itself what ranks exchange. Under Slurm, Open MPI or torchrun start the verb itself, not `launch`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask launch --nproc 4 -- bench comm\n  \
    cargo xtask launch --nproc 8 -- pretrain llama3_8b --backend cuda parallel.tensor_model_parallel_size=2\n  \
    BRIDGE_SECRET=... cargo xtask launch --nproc 8 --nnodes 2 --node-rank 0 --rendezvous node0:29400 -- pretrain ...")]
pub(crate) struct Args {
    /// Processes on this machine.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    nproc: u16,
    /// Machines; each runs this command.
    #[arg(long, default_value_t = 1, value_name = "M", value_parser = clap::value_parser!(u16).range(1..))]
    nnodes: u16,
    /// Which of the machines this is.
    #[arg(long, default_value_t = 0, value_name = "R")]
    node_rank: u16,
    /// Where rank 0 listens [default: a free port of this machine].
    #[arg(long, value_name = "HOST:PORT")]
    rendezvous: Option<String>,
    /// Seconds that a rank may wait for others in a collective [default: 600].
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    timeout: Option<u32>,
    /// Seconds that the other ranks have to end after one has failed.
    #[arg(long, default_value_t = 25, value_name = "S")]
    grace: u32,
    /// The verb to run, with its arguments.
    #[arg(last = true, required = true, value_name = "VERB ...")]
    command: Vec<String>,
}

pub(crate) fn run(args: Args, _: Report) -> Result {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // A second signal ends the launcher, and with it the ranks. Handlers run in this order.
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop))
            .running("cannot catch signals")?;
        signal_hook::flag::register(signal, Arc::clone(&stop)).running("cannot catch signals")?;
    }
    let mut ranks = start(&args)?;
    let end = watch(
        &mut ranks,
        &stop,
        Duration::from_secs(u64::from(args.grace)),
    );
    for output in ranks.iter_mut().flat_map(|rank| rank.output.drain(..)) {
        // A grandchild may hold a pipe open; what it still writes is lost, and nobody waits for it.
        let waited = Instant::now();
        while !output.is_finished() && waited.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(LOOK);
        }
    }
    let on_request = |status: &ExitStatus| status.code() == Some(130) || status.signal().is_some();
    match end {
        None if stop.load(Ordering::Relaxed) => Err(Failure::interrupted("stopped on request")),
        Some((_, status)) if stop.load(Ordering::Relaxed) && on_request(&status) => {
            Err(Failure::interrupted("stopped on request"))
        }
        None => Ok(()),
        Some((rank, status)) => Err(failure(rank, status)),
    }
}

/// A running rank.
struct Rank {
    rank: usize,
    child: Child,
    status: Option<ExitStatus>,
    output: Vec<JoinHandle<()>>,
}

impl Rank {
    fn signal(&self, signal: Signal) {
        if self.status.is_none()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            // It may just have ended.
            let _ = kill_process(pid, signal);
        }
    }
}

fn start(args: &Args) -> Result<Vec<Rank>> {
    let (nproc, nnodes) = (usize::from(args.nproc), usize::from(args.nnodes));
    let node_rank = usize::from(args.node_rank);
    if node_rank >= nnodes {
        return Err(Failure::input(format!(
            "--node-rank {node_rank} of {nnodes} machines; they count from 0"
        )));
    }
    let secret = std::env::var(job::SECRET)
        .ok()
        .filter(|secret| !secret.is_empty());
    let (rendezvous, secret) = match (&args.rendezvous, secret) {
        (Some(address), Some(secret)) => (address.clone(), secret),
        (None, _) if nnodes > 1 => {
            return Err(Failure::input(
                "--nnodes above 1 needs --rendezvous HOST:PORT, a free port of the first machine",
            ));
        }
        (Some(_), None) if nnodes > 1 => {
            let what = format!(
                "--nnodes above 1 needs a shared secret in {}, the same on every machine",
                job::SECRET
            );
            return Err(Failure::input(what));
        }
        (address, secret) => (
            address.clone().map_or_else(free_address, Ok)?,
            secret.map_or_else(random_secret, Ok)?,
        ),
    };
    let program = std::env::current_exe().running("cannot find this program")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut ranks: Vec<Rank> = Vec::with_capacity(nproc);
    for local_rank in 0..nproc {
        let rank = node_rank * nproc + local_rank;
        let mut command = Command::new(&program);
        command
            .args(&args.command)
            .env(job::RANK, rank.to_string())
            .env(job::WORLD_SIZE, (nproc * nnodes).to_string())
            .env(job::LOCAL_RANK, local_rank.to_string())
            .env(job::RENDEZVOUS, &rendezvous)
            .env(job::SECRET, &secret)
            .env(job::LAUNCHER, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C reaches the launcher alone, which passes it on once.
            .process_group(0);
        if let Some(seconds) = args.timeout {
            command.env(job::TIMEOUT, seconds.to_string());
        }
        if std::env::var_os("RAYON_NUM_THREADS").is_none() {
            command.env("RAYON_NUM_THREADS", (cores / nproc).max(1).to_string());
        }
        match command.spawn() {
            Ok(child) => ranks.push(Rank {
                rank,
                child,
                status: None,
                output: Vec::new(),
            }),
            Err(error) => {
                ranks.iter_mut().for_each(end_now);
                return Err(error).running(format!("cannot start rank {rank}"));
            }
        }
        let rank = ranks.last_mut().expect("just pushed");
        eprintln!("[launch] rank {} is process {}", rank.rank, rank.child.id());
        let prefix = if nproc * nnodes > 1 {
            format!("[rank {}] ", rank.rank)
        } else {
            String::new()
        };
        if let Some(stdout) = rank.child.stdout.take() {
            let plain = rank.rank == 0;
            rank.output.push(pass_on(
                stdout,
                if plain { String::new() } else { prefix.clone() },
                plain,
            ));
        }
        if let Some(stderr) = rank.child.stderr.take() {
            rank.output.push(pass_on(stderr, prefix, false));
        }
    }
    Ok(ranks)
}

/// Waits for the ranks. Returns the first that failed.
fn watch(ranks: &mut [Rank], stop: &AtomicBool, grace: Duration) -> Option<(usize, ExitStatus)> {
    let mut first: Option<(usize, ExitStatus)> = None;
    let mut ending: Option<Instant> = None;
    let mut told = false;
    loop {
        let mut failed: Vec<(usize, ExitStatus)> = Vec::new();
        for rank in ranks.iter_mut().filter(|rank| rank.status.is_none()) {
            if let Ok(Some(status)) = rank.child.try_wait() {
                rank.status = Some(status);
                failed.extend((!status.success()).then_some((rank.rank, status)));
            }
        }
        // Of ranks that ended together, one killed by a signal is the cause; the others noticed.
        failed.sort_by_key(|(_, status)| status.signal().is_none());
        if let (None, Some((rank, status))) = (first, failed.first()) {
            eprintln!("[launch] {}", failure(*rank, *status).text());
            first = Some((*rank, *status));
            ending.get_or_insert_with(Instant::now);
        }
        if ranks.iter().all(|rank| rank.status.is_some()) {
            return first;
        }
        if stop.load(Ordering::Relaxed) && !told {
            told = true;
            ranks.iter().for_each(|rank| rank.signal(Signal::TERM));
        }
        if ending.is_some_and(|since| since.elapsed() > grace) {
            let left: Vec<usize> = ranks
                .iter()
                .filter(|rank| rank.status.is_none())
                .map(|rank| rank.rank)
                .collect();
            eprintln!(
                "[launch] still running after {} s: ranks {left:?}; killing them",
                grace.as_secs()
            );
            ranks.iter_mut().for_each(end_now);
            return first;
        }
        std::thread::sleep(LOOK);
    }
}

fn end_now(rank: &mut Rank) {
    if rank.status.is_none() {
        // Both fail only if it has ended by itself.
        let _ = rank.child.kill();
        rank.status = rank.child.wait().ok();
    }
}

/// Copies lines to stdout or stderr as they come.
fn pass_on(from: impl Read + Send + 'static, prefix: String, to_stdout: bool) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if !line.ends_with(b"\n") {
                line.push(b'\n');
            }
            let whole = [prefix.as_bytes(), &line].concat();
            // One write a line, so that ranks do not cut into each other. A reader that has gone ends nothing.
            let _ = if to_stdout {
                std::io::stdout().lock().write_all(&whole)
            } else {
                std::io::stderr().lock().write_all(&whole)
            };
            line.clear();
        }
    })
}

fn failure(rank: usize, status: ExitStatus) -> Failure {
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    };
    let cause = match status.code() {
        Some(1) => Cause::Check,
        Some(2) => Cause::Input,
        Some(130) => Cause::Interrupted,
        _ => Cause::Running,
    };
    let mut failure = Failure::running(format!("rank {rank} was the first to fail, with {how}"));
    failure.cause = cause;
    failure
}

fn free_address() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").running("cannot find a free port")?;
    Ok(listener
        .local_addr()
        .running("cannot find a free port")?
        .to_string())
}

fn random_secret() -> Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).running("cannot make a secret")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
