//! A process that saves in a loop is killed at random moments, many times; a complete checkpoint is there each time.

#![cfg(unix)]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bridge_core::checkpoint::native::{self, Group, NativeCheckpoint, NativeWriter, PieceSpec};
use bridge_core::checkpoint::{Durability, Region};
use bridge_core::dtype::DType;

/// Set for the child alone: the folder to save into.
const CHILD_FOLDER: &str = "BRIDGE_TEST_SAVE_LOOP";
const KILLS: usize = 60;
const TENSORS: usize = 5;
const SHAPE: [usize; 2] = [64, 96];

/// What tensor number `tensor` holds in the checkpoint of `iteration`.
fn values(iteration: u64, tensor: usize) -> Vec<u8> {
    let mut state = iteration.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ tensor as u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    (0..SHAPE[0] * SHAPE[1])
        .flat_map(|_| next().to_le_bytes())
        .collect()
}

/// Saves with two ranks, each on a thread and with half of the rows, in both groups.
fn save(root: &Path, iteration: u64) {
    let writer = NativeWriter::begin(root, iteration, Durability::Cached).unwrap();
    let half = SHAPE[0] / 2;
    std::thread::scope(|scope| {
        for rank in 0..2 {
            let writer = &writer;
            scope.spawn(move || {
                for group in Group::ALL {
                    let region = Region::new([rank * half, 0], [half, SHAPE[1]]);
                    let pieces = (0..TENSORS).map(|tensor| PieceSpec {
                        name: format!("tensor.{tensor}"),
                        dtype: DType::U32,
                        shape: SHAPE.to_vec(),
                        region: region.clone(),
                    });
                    let file = writer.piece_file(group, rank, pieces.collect()).unwrap();
                    for tensor in 0..TENSORS {
                        let bytes = values(iteration, tensor);
                        let middle = bytes.len() / 2;
                        let mine = if rank == 0 {
                            &bytes[..middle]
                        } else {
                            &bytes[middle..]
                        };
                        file.write_at(tensor, 0, mine).unwrap();
                    }
                    file.finish().unwrap();
                }
            });
        }
    });
    writer
        .add_file("train_state.json", iteration.to_string().as_bytes())
        .unwrap();
    writer.finish(2, 2).unwrap();
    native::retain(root, 3, iteration).unwrap();
}

/// Not a test of its own: what the child process does, until it is killed.
#[test]
fn save_loop_of_the_child() {
    let Some(root) = env::var_os(CHILD_FOLDER).map(PathBuf::from) else {
        return;
    };
    let mut iteration = NativeCheckpoint::open(&root).unwrap().iteration();
    for round in 0u64.. {
        // Every fifth save takes the place of the one before.
        iteration += u64::from(round % 5 != 4);
        save(&root, iteration);
    }
}

/// Every byte of the checkpoint is that of its iteration.
#[track_caller]
fn verify(dir: &Path) -> u64 {
    let checkpoint = NativeCheckpoint::open(dir).unwrap();
    assert!(checkpoint.notes().is_empty(), "{:?}", checkpoint.notes());
    checkpoint.check_files().unwrap();
    let iteration = checkpoint.iteration();
    for group in Group::ALL {
        assert_eq!(checkpoint.index().group(group).len(), TENSORS);
        for tensor in 0..TENSORS {
            let found = checkpoint.read(group, &format!("tensor.{tensor}")).unwrap();
            assert!(
                found == values(iteration, tensor),
                "{group} tensor {tensor} of iteration {iteration}"
            );
        }
    }
    assert_eq!(
        checkpoint.read_file("train_state.json").unwrap(),
        iteration.to_string().as_bytes()
    );
    iteration
}

fn start_child(root: &Path) -> Child {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "save_loop_of_the_child", "--test-threads", "1"])
        .env(CHILD_FOLDER, root);
    command.stdout(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_kill_at_any_moment_of_a_save_leaves_a_complete_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("checkpoints");
    save(&root, 1);
    let mut newest = verify(&root);
    let mut interrupted = 0;
    for kill in 0..KILLS {
        let mut child = start_child(&root);
        // The first save of the child shows as a change of `latest`; from then on it saves all the time.
        let begun = Instant::now();
        let latest = fs::metadata(root.join("latest"))
            .unwrap()
            .modified()
            .unwrap();
        while fs::metadata(root.join("latest"))
            .unwrap()
            .modified()
            .unwrap()
            == latest
        {
            assert!(
                child.try_wait().unwrap().is_none(),
                "the child ended by itself"
            );
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "the child does not save"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        // Spread over a few saves' time, in steps unrelated to it.
        std::thread::sleep(Duration::from_micros((kill as u64 * 1_618_034) % 60_000));
        child.kill().unwrap();
        child.wait().unwrap();

        let found = verify(&root);
        assert!(found >= newest, "iteration {found} after {newest}");
        newest = found;
        // Not only the one that `latest` names: whatever stands under an iteration's name is complete.
        for (iteration, dir) in native::list_iterations(&root).unwrap() {
            assert_eq!(verify(&dir), iteration);
        }
        interrupted += usize::from(hidden(&root) > 0);
    }
    assert!(newest >= KILLS as u64, "only {newest} saves");
    assert!(
        interrupted > KILLS / 4,
        "only {interrupted} of {KILLS} kills met a save half-way"
    );

    // The next save clears away what the killed ones left.
    save(&root, newest + 1);
    assert_eq!(hidden(&root), 0);
    assert_eq!(verify(&root), newest + 1);
}

fn hidden(root: &Path) -> usize {
    let names = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().starts_with('.'))
        .count()
}
