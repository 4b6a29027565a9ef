//! A run that is stopped and continued ends exactly where one that is not does.

mod support;

use std::path::Path;
use std::sync::Arc;

use bridge_core::checkpoint::native::list_iterations;
use bridge_ops::DType;
use bridge_train::callback::{Callback, StepReport, StopReason, Summary};
use bridge_train::checkpoint::CheckpointStore;
use bridge_train::signals::StopFlag;
use bridge_train::{Error, Trainer, TrainerOptions};
use support::{Model, Recorder, cosine, fresh_model, patchy, tiny, weights};

const STEPS: u64 = 20;

fn options() -> TrainerOptions {
    TrainerOptions {
        micro_batch_size: 2,
        ..TrainerOptions::new(4, STEPS, cosine(4 * STEPS))
    }
}

fn store(dir: &Path) -> CheckpointStore {
    CheckpointStore::new(dir, serde_json::to_value(tiny()).unwrap())
}

/// Runs on `model` with the checkpoints of `dir`, raising the stop flag after `stop_after` steps.
fn run(
    model: &Model,
    dir: &Path,
    options: TrainerOptions,
    stop_after: u64,
) -> (Summary, Vec<StepReport>) {
    struct StopAfter<'a>(u64, StopFlag, &'a mut Recorder);
    impl Callback for StopAfter<'_> {
        fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
            if step.iteration >= self.0 {
                self.1.raise();
            }
            self.2.on_step_end(step)
        }
    }
    let (stop, mut recorder) = (StopFlag::new(), Recorder::default());
    let mut callback = StopAfter(stop_after, stop.clone(), &mut recorder);
    let summary = Trainer::new(model, patchy(), &Default::default(), options)
        .unwrap()
        .with_stop(stop)
        .with_callback(&mut callback)
        .with_checkpoints(store(dir))
        .unwrap()
        .run()
        .unwrap();
    (summary, recorder.steps)
}

fn losses(steps: &[StepReport]) -> Vec<(u64, u64, u64, u64)> {
    steps
        .iter()
        .map(|s| {
            (
                s.iteration,
                s.loss.to_bits(),
                s.grad_norm.to_bits(),
                s.lr.to_bits(),
            )
        })
        .collect()
}

#[test]
fn ten_steps_and_ten_more_are_twenty_bit_for_bit() {
    ten_and_ten_are_twenty(&options());
}

#[test]
fn so_they_are_with_narrow_gradients_and_means() {
    let mut options = options();
    options.adamw.main_grads_dtype = DType::BF16;
    options.adamw.exp_avg_dtype = DType::BF16;
    ten_and_ten_are_twenty(&options);
}

#[track_caller]
fn ten_and_ten_are_twenty(options: &TrainerOptions) {
    let options = || options.clone();
    let (whole_dir, cut_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let whole = fresh_model(&tiny(), 1);
    let (summary, expected) = run(&whole, whole_dir.path(), options(), u64::MAX);
    assert_eq!(
        (summary.reason, summary.iteration),
        (StopReason::Finished, STEPS)
    );

    let first = fresh_model(&tiny(), 1);
    let (summary, mut found) = run(&first, cut_dir.path(), options(), 10);
    assert_eq!(
        (summary.reason, summary.iteration),
        (StopReason::Interrupted, 10)
    );
    // Another seed: nothing of the fresh weights may be left.
    let second = fresh_model(&tiny(), 2);
    let (summary, rest) = run(&second, cut_dir.path(), options(), u64::MAX);
    assert_eq!(
        (summary.reason, summary.iteration, rest.len()),
        (StopReason::Finished, STEPS, 10)
    );
    found.extend(rest);

    assert_eq!(losses(&found), losses(&expected));
    assert_eq!(weights(&second), weights(&whole));
    assert_ne!(weights(&first), weights(&whole), "ten steps are not twenty");
    // What is on disk is the same too, but for the time.
    for file in [
        "model/rank_00000.safetensors",
        "optimizer/rank_00000.safetensors",
        "train_state.json",
    ] {
        let read = |dir: &Path| std::fs::read(dir.join("iter_0000020").join(file)).unwrap();
        assert!(
            read(whole_dir.path()) == read(cut_dir.path()),
            "{file} differs"
        );
    }
}

#[test]
fn a_finished_run_has_nothing_left_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let model = fresh_model(&tiny(), 1);
    run(&model, dir.path(), options(), u64::MAX);
    let (summary, steps) = run(&model, dir.path(), options(), u64::MAX);
    assert_eq!(
        (summary.reason, steps.len()),
        (StopReason::AlreadyFinished, 0)
    );
    let longer = TrainerOptions {
        train_iters: STEPS + 2,
        ..options()
    };
    assert_eq!(run(&model, dir.path(), longer, u64::MAX).1.len(), 2);
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let model = fresh_model(&tiny(), 1);
    let mut recorder = Recorder::default();
    Trainer::new(
        &model,
        patchy(),
        &Default::default(),
        TrainerOptions {
            save_interval: 3,
            ..options()
        },
    )
    .unwrap()
    .with_callback(&mut recorder)
    .with_checkpoints(store(dir.path()).keep(2))
    .unwrap()
    .run()
    .unwrap();
    assert_eq!(recorder.saves, [3, 6, 9, 12, 15, 18, 20]);
    let left: Vec<u64> = list_iterations(dir.path())
        .unwrap()
        .into_iter()
        .map(|(iteration, _)| iteration)
        .collect();
    assert_eq!(left, [18, 20]);
}

#[test]
fn a_checkpoint_of_another_model_is_refused_with_the_difference() {
    let dir = tempfile::tempdir().unwrap();
    run(&fresh_model(&tiny(), 1), dir.path(), options(), 1);
    let mut other = tiny();
    other.hidden_size += 16;
    let model = fresh_model(&other, 1);
    let store = CheckpointStore::new(dir.path(), serde_json::to_value(&other).unwrap());
    let trainer = Trainer::new(&model, patchy(), &Default::default(), options()).unwrap();
    let error = trainer
        .with_checkpoints(store)
        .err()
        .expect("another model");
    assert!(matches!(error, Error::ModelDiffers { .. }) && error.is_input());
    assert!(
        error
            .to_string()
            .contains("hidden_size is 48 there and 64 here"),
        "{error}"
    );
}

#[test]
fn weights_without_optimizer_state_are_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let model = fresh_model(&tiny(), 1);
    let trainer = || Trainer::new(&model, patchy(), &Default::default(), options()).unwrap();
    trainer()
        .with_checkpoints(store(dir.path()).save_optim(false))
        .unwrap()
        .run()
        .unwrap();
    let error = trainer()
        .with_checkpoints(store(dir.path()))
        .err()
        .expect("no optimizer state");
    assert!(error.to_string().contains("optimizer state"), "{error}");
    assert!(
        error.to_string().contains("checkpoint.pretrained"),
        "{error}"
    );
}

#[test]
fn other_data_is_noticed() {
    #[derive(Default)]
    struct Notes(Vec<String>);
    impl Callback for Notes {
        fn on_train_start(
            &mut self,
            run: &bridge_train::callback::RunInfo,
        ) -> bridge_train::Result<()> {
            self.0.extend(run.notes.iter().cloned());
            Ok(())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let model = fresh_model(&tiny(), 1);
    run(&model, dir.path(), options(), 3);
    let mut notes = Notes::default();
    let other = Arc::new(support::Patchy {
        seq: 11,
        vocab: tiny().vocab_size as u64,
    });
    Trainer::new(&model, other, &Default::default(), options())
        .unwrap()
        .with_callback(&mut notes)
        .with_checkpoints(store(dir.path()))
        .unwrap()
        .run()
        .unwrap();
    assert!(
        notes
            .0
            .iter()
            .any(|note| note.contains("not that of the checkpoint")),
        "{:?}",
        notes.0
    );
}
