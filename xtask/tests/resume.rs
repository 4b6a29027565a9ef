//! A run that is stopped and continued ends where an uninterrupted one does, bit for bit.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{Workbench, arg, finish, latest, losses, native_tensors, pretrain};

/// The schedule spans 20 steps however many a process runs.
const SCHEDULE: &str = "scheduler.lr_decay_iters=20";

#[track_caller]
fn same_weights_and_state(a: &Path, b: &Path) {
    let (a, b) = (native_tensors(&latest(a)), native_tensors(&latest(b)));
    assert!(
        a.keys().any(|n| n.starts_with("model/")) && a.keys().any(|n| n.starts_with("optimizer/"))
    );
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let differ: Vec<_> = a
        .iter()
        .filter(|(name, value)| b[*name] != **value)
        .map(|(name, _)| name)
        .collect();
    assert!(differ.is_empty(), "these differ: {differ:?}");
}

#[test]
fn twenty_steps_equal_ten_and_ten_bit_for_bit() {
    let bench = Workbench::empty();
    let (whole, parts) = (bench.path("whole"), bench.path("parts"));
    finish(pretrain(&whole, &["train.train_iters=20", SCHEDULE])).ok();
    finish(pretrain(&parts, &["train.train_iters=10", SCHEDULE])).ok();
    assert!(latest(&parts).ends_with("iter_0000010"));
    finish(pretrain(&parts, &["train.train_iters=20", SCHEDULE])).ok();
    assert!(latest(&parts).ends_with("iter_0000020"));
    same_weights_and_state(&whole, &parts);
    assert_eq!(losses(&whole), losses(&parts));
    assert_eq!(losses(&whole).len(), 20);
}

#[test]
fn micro_batches_do_not_change_the_loss() {
    let bench = Workbench::empty();
    let run = |name: &str, micro: usize| {
        let dir = bench.path(name);
        let micro = format!("train.micro_batch_size={micro}");
        finish(pretrain(&dir, &["train.train_iters=5", &micro])).ok();
        losses(&dir)
    };
    let reference = run("one", 1);
    for micro in [2, 4] {
        for (step, loss) in run(&format!("micro{micro}"), micro) {
            // Sums in another order differ in the last bits of fp32, and five steps of AdamW carry that on.
            assert!(
                (loss - reference[&step]).abs() < 1e-5,
                "step {step}: {loss} and {}",
                reference[&step]
            );
        }
    }
}

/// Stops a run with `signal`, and continues it to its end.
#[track_caller]
fn stops_gracefully(signal: &str) {
    let bench = Workbench::empty();
    let (whole, stopped) = (bench.path("whole"), bench.path("stopped"));
    let steps = ["train.train_iters=200", "scheduler.lr_decay_iters=200"];
    finish(pretrain(&whole, &steps)).ok();

    let mut child = pretrain(&stopped, &steps)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it starts");
    let metrics = stopped.join("metrics.jsonl");
    let deadline = Instant::now() + Duration::from_secs(60);
    let lines = || {
        std::fs::read_to_string(&metrics)
            .map(|t| t.lines().count())
            .unwrap_or(0)
    };
    while lines() < 5 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(5));
    }
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args([signal, &pid])
            .status()
            .expect("kill runs")
            .success()
    );
    let status = child.wait().expect("it ends");
    assert_eq!(
        status.code(),
        Some(130),
        "a graceful stop has its own exit code"
    );
    let at = latest(&stopped);
    assert!(
        !at.ends_with("iter_0000200"),
        "it was stopped before the end, at {}",
        at.display()
    );

    finish(pretrain(&stopped, &steps)).ok();
    same_weights_and_state(&whole, &stopped);
}

#[test]
fn an_interrupted_run_saves_exits_130_and_continues_exactly() {
    stops_gracefully("-INT");
}

#[test]
fn a_terminated_run_saves_exits_130_and_continues_exactly() {
    stops_gracefully("-TERM");
}

#[test]
fn a_finished_run_has_nothing_to_do() {
    let bench = Workbench::empty();
    let run = bench.path("run");
    finish(pretrain(&run, &["train.train_iters=3"])).ok();
    let before = native_tensors(&latest(&run));
    finish(pretrain(&run, &["train.train_iters=3"])).ok();
    assert!(before == native_tensors(&latest(&run)));
    // A run that would need another model is refused before anything is touched.
    finish(pretrain(
        &run,
        &["train.train_iters=5", "model.hidden_size=64"],
    ))
    .fails(2, &["hidden_size"]);
    assert!(before == native_tensors(&latest(&run)));
    assert!(arg(&latest(&run)).ends_with("iter_0000003"));
}
