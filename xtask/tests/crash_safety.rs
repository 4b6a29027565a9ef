//! A run killed at any moment of a save leaves the previous checkpoint loadable, and no half-written one in its place.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use support::{Workbench, arg, finish, latest, pretrain, xtask};

/// How often the process is killed.
const KILLS: u64 = 24;

/// A save after every step, so that most of the time goes into saving. All are kept, to look at each.
fn run(dir: &Path, steps: u64) -> std::process::Command {
    let steps = format!("train.train_iters={steps}");
    let wide = [
        "model.vocab_size=8192",
        "checkpoint.save_interval=1",
        "checkpoint.most_recent_k=4",
        &steps,
    ];
    pretrain(
        dir,
        &[
            &wide[..],
            &[
                "data.seq_length=8",
                "train.global_batch_size=2",
                "scheduler.lr_decay_iters=1000000",
            ],
        ]
        .concat(),
    )
}

/// Checkpoints that stand under their final name.
fn checkpoints(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with("iter_"))
        .map(|e| e.path())
        .collect();
    found.sort();
    found
}

#[track_caller]
fn loads(checkpoint: &Path, scratch: &Path) {
    xtask(&format!(
        "export --checkpoint {} --out {}",
        arg(checkpoint),
        arg(scratch)
    ))
    .ok();
    fs::remove_dir_all(scratch).expect("the exported folder");
}

#[test]
fn a_killed_run_leaves_only_whole_checkpoints() {
    let bench = Workbench::empty();
    let dir = bench.path("run");
    let scratch = bench.path("exported");
    finish(run(&dir, 2)).ok();
    let mut last = latest(&dir);
    let mut advanced = 0;
    for round in 0..KILLS {
        let mut child = run(&dir, 1_000_000)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        // Wait until it saves, then a time that differs in every round.
        let deadline = Instant::now() + Duration::from_secs(60);
        while latest(&dir) == last && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            assert!(
                child.try_wait().expect("its state").is_none(),
                "the run ended by itself in round {round}"
            );
        }
        thread::sleep(Duration::from_micros(round * 7919 % 60_000));
        child.kill().expect("SIGKILL");
        child.wait().expect("it is gone");

        let now = latest(&dir);
        assert!(
            now.is_dir(),
            "`latest` names {}, which is not there",
            now.display()
        );
        advanced += u64::from(now != last);
        last = now;
        for checkpoint in checkpoints(&dir) {
            loads(&checkpoint, &scratch);
        }
    }
    assert!(
        advanced >= KILLS / 2,
        "only {advanced} of {KILLS} rounds got as far as saving"
    );

    // A run that ends by itself tidies up what the killed ones left.
    let step: u64 = last
        .file_name()
        .and_then(|n| n.to_str())
        .and_then(|n| n.strip_prefix("iter_"))
        .expect("a step")
        .parse()
        .expect("a number");
    finish(run(&dir, step + 2)).ok();
    loads(&latest(&dir), &scratch);
    let odd: Vec<String> = fs::read_dir(&dir)
        .expect("the run's folder")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| {
            name.starts_with('.') || name.contains("partial") || name.contains("removed")
        })
        .collect();
    assert!(odd.is_empty(), "left by killed runs: {odd:?}");
}
