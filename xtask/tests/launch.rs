//! Jobs of real processes: they compute, and when one of them dies the others say which.

#![cfg(unix)]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use support::{command, xtask};

#[test]
fn ranks_compute_and_rank_zero_speaks() {
    let outcome = xtask("launch --nproc 3 -- bench comm --bytes 64KB --seconds 0.05").ok();
    let cases: Vec<serde_json::Value> = outcome
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON lines only"))
        .collect();
    let names: Vec<&str> = cases
        .iter()
        .filter_map(|case| case["collective"].as_str())
        .collect();
    assert_eq!(
        names,
        [
            "all_reduce",
            "all_gather",
            "reduce_scatter",
            "all_to_all",
            "send_recv"
        ]
    );
    assert!(cases.iter().all(|case| case["ranks"] == 3));
}

#[test]
fn threads_do_without_a_launcher() {
    let outcome = xtask("bench comm --ranks 2 --bytes 64KB --seconds 0.05").ok();
    assert_eq!(outcome.stdout.lines().count(), 5);
}

#[test]
fn mistakes_end_the_job_with_their_exit_code() {
    xtask("launch --nproc 2 -- pretrian").fails(
        2,
        &[
            "[rank 0] ",
            "[rank 1] ",
            "was the first to fail, with exit code 2",
        ],
    );
    xtask("launch --nproc 2 --nnodes 2 -- bench comm").fails(2, &["needs --rendezvous"]);
    xtask("launch --nproc 2 --nnodes 2 --rendezvous host:1 -- bench comm")
        .fails(2, &["shared secret in BRIDGE_SECRET"]);
    xtask("launch --nproc 2 --node-rank 1 -- bench comm")
        .fails(2, &["--node-rank 1 of 1 machines"]);
}

/// A running job of four ranks, in the middle of its collectives.
struct Job {
    launcher: Child,
    lines: Receiver<String>,
    stderr: Vec<String>,
    pids: [u32; 4],
}

impl Job {
    fn start(flags: &[&str]) -> Self {
        let mut launcher = command()
            .args(["launch", "--nproc", "4"])
            .args(flags)
            .args(["--", "bench", "comm", "--bytes", "4KB", "--seconds", "300"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the launcher starts");
        let from = BufReader::new(launcher.stderr.take().expect("piped"));
        let (to, lines) = channel();
        std::thread::spawn(move || {
            from.lines()
                .map_while(Result::ok)
                .try_for_each(|line| to.send(line))
        });
        let mut job = Self {
            launcher,
            lines,
            stderr: Vec::new(),
            pids: [0; 4],
        };
        for rank in 0..4 {
            let line = job
                .lines
                .recv_timeout(Duration::from_secs(20))
                .expect("a line per rank");
            let pid = line
                .strip_prefix(&format!("[launch] rank {rank} is process "))
                .expect("the process of a rank");
            job.pids[rank] = pid.parse().expect("a number");
        }
        // Long enough to have joined and be at work.
        std::thread::sleep(Duration::from_millis(1500));
        job
    }

    fn signal(pid: u32, signal: &str) {
        let status = Command::new("kill")
            .args([signal, &pid.to_string()])
            .status();
        assert!(status.expect("kill runs").success());
    }

    /// Waits for the end and returns the exit code and how long it took.
    fn finish(&mut self, limit: Duration) -> (Option<i32>, Duration) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.launcher.try_wait().expect("a status") {
                break status;
            }
            assert!(
                start.elapsed() < limit,
                "still running; stderr: {:#?}",
                self.lines.try_iter().collect::<Vec<_>>()
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(2)) {
            self.stderr.push(line);
        }
        (status.code(), start.elapsed())
    }

    /// Whether every rank but `lost` has said `words`.
    #[track_caller]
    fn all_but(&self, lost: usize, words: &str) {
        for rank in (0..4).filter(|rank| *rank != lost) {
            let prefix = format!("[rank {rank}] ");
            let said = self
                .stderr
                .iter()
                .any(|line| line.starts_with(&prefix) && line.contains(words));
            assert!(
                said,
                "rank {rank} does not say {words:?}: {:#?}",
                self.stderr
            );
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_killed_rank_is_named_by_all_others() {
    for rank in [2, 0] {
        let mut job = Job::start(&[]);
        Job::signal(job.pids[rank], "-KILL");
        let (code, _) = job.finish(LIMIT);
        assert_eq!(code, Some(3));
        job.all_but(rank, &format!("rank {rank} is gone"));
        let first = format!("rank {rank} was the first to fail, with signal 9");
        assert!(
            job.stderr.iter().any(|line| line.contains(&first)),
            "{:#?}",
            job.stderr
        );
    }
}

#[test]
fn a_stopped_rank_is_named_within_the_timeout() {
    let mut job = Job::start(&["--timeout", "3", "--grace", "2"]);
    Job::signal(job.pids[1], "-STOP");
    let (code, time) = job.finish(LIMIT);
    assert_eq!(code, Some(3));
    job.all_but(1, "rank 1 did not reach");
    assert!(time > Duration::from_secs(3), "{time:?}");
    assert!(
        job.stderr
            .iter()
            .any(|line| line.contains("still running after 2 s: ranks [1]")),
        "{:#?}",
        job.stderr
    );
}

#[test]
fn a_signal_to_the_launcher_ends_every_rank() {
    let mut job = Job::start(&[]);
    Job::signal(job.launcher.id(), "-TERM");
    assert_eq!(job.finish(LIMIT).0, Some(130));
    for pid in job.pids {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}
