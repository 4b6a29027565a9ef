use proptest::prelude::*;

use super::*;

#[track_caller]
fn checked(schedule: Result<Schedule, ScheduleError>) -> Schedule {
    let schedule = schedule.unwrap();
    schedule.check().unwrap();
    schedule
}

/// (forward?, chunk of the stage, micro-batch) of the passes of a stage.
fn passes(schedule: &Schedule, stage: usize) -> Vec<(bool, usize, usize)> {
    let pass = |action: &Action| match *action {
        Action::Forward { chunk, micro_batch } => {
            Some((true, chunk / schedule.num_stages(), micro_batch))
        }
        Action::Backward { chunk, micro_batch } => {
            Some((false, chunk / schedule.num_stages(), micro_batch))
        }
        Action::Send(_) | Action::Recv(_) => None,
    };
    schedule.stage(stage).iter().filter_map(pass).collect()
}

proptest! {
    #[test]
    fn every_micro_batch_goes_once_forward_and_once_backward_and_nothing_deadlocks(
        pp in 1usize..9, vpp in 1usize..5, rounds in 1usize..5, extra in 0usize..8,
    ) {
        let micro_batches = if vpp == 1 { rounds + extra } else { rounds * pp };
        let schedule = Schedule::training(pp, vpp, micro_batches).unwrap();
        prop_assert_eq!(schedule.check(), Ok(()));
        // As Megatron-Core's `get_pp_rank_microbatches`: the warm-up, and one forward pass before the first backward one.
        for stage in 0..pp {
            let behind = pp - stage - 1;
            let warm_up = if vpp == 1 { behind } else { 2 * behind + (vpp - 1) * pp };
            prop_assert_eq!(schedule.peak_in_flight(stage), (warm_up + 1).min(micro_batches * vpp));
        }
    }

    #[test]
    fn forward_only_schedules_do_not_deadlock(pp in 1usize..7, vpp in 1usize..4, micro_batches in 1usize..12) {
        let schedule = Schedule::forward_only(pp, vpp, micro_batches).unwrap();
        prop_assert_eq!(schedule.check(), Ok(()));
    }
}

#[test]
fn one_stage_is_gradient_accumulation() {
    let schedule = checked(Schedule::training(1, 1, 3));
    let expected: Vec<_> = (0..3).flat_map(|m| [(true, 0, m), (false, 0, m)]).collect();
    assert_eq!(passes(&schedule, 0), expected);
    assert!(!schedule.stage(0).iter().any(Action::is_transfer));
    assert_eq!(Timeline::of(&schedule).unwrap().bubble(), 0.0);
}

#[test]
fn the_bubble_of_1f1b_is_that_of_the_paper_and_interleaving_shrinks_it() {
    let bubble = |pp, vpp, micro_batches| {
        let schedule = checked(Schedule::training(pp, vpp, micro_batches));
        Timeline::of(&schedule).unwrap().bubble()
    };
    for (pp, micro_batches) in [(4, 8), (2, 3), (8, 32)] {
        let expected = (pp - 1) as f64 / (micro_batches + pp - 1) as f64;
        assert!((bubble(pp, 1, micro_batches) - expected).abs() < 1e-9);
    }
    for (pp, vpp, micro_batches) in [(2, 2, 8), (4, 2, 8), (4, 3, 12), (8, 2, 32)] {
        let (found, whole) = (bubble(pp, vpp, micro_batches), bubble(pp, 1, micro_batches));
        assert!(
            found < 0.8 * whole,
            "pp={pp} vpp={vpp}: {found} against {whole}"
        );
    }
}

#[test]
fn a_broken_schedule_is_found() {
    let sound = Schedule::training(2, 1, 3).unwrap();
    let edit = |edit: &dyn Fn(&mut Vec<Vec<Action>>)| {
        let mut broken = sound.clone();
        edit(&mut broken.stages);
        broken.check().unwrap_err().to_string()
    };
    let missing =
        edit(&|stages| stages[0].retain(|a| !matches!(a, Action::Backward { micro_batch: 1, .. })));
    assert!(
        missing.contains("stage 0") && missing.contains("Backward"),
        "{missing}"
    );
    let twice = edit(&|stages| {
        let first = stages[1][0];
        stages[1].push(first);
    });
    assert!(twice.contains("twice"), "{twice}");
    let early = edit(&|stages| stages[1].swap(0, 1));
    assert!(early.contains("is received"), "{early}");
    // Stage 0 waits for the gradient of micro-batch 0 before it has sent its activations.
    let deadlock = edit(&|stages| {
        let send = stages[0]
            .iter()
            .position(|a| matches!(a, Action::Send(_)))
            .unwrap();
        let send = stages[0].remove(send);
        let backward = stages[0]
            .iter()
            .position(|a| matches!(a, Action::Backward { .. }))
            .unwrap();
        stages[0].insert(backward + 1, send);
    });
    assert!(
        deadlock.contains("deadlocks: stage 0 waits at"),
        "{deadlock}"
    );
}

#[test]
fn sizes_that_make_no_schedule_are_refused() {
    assert_eq!(
        Schedule::training(2, 1, 0),
        Err(ScheduleError::Empty("micro-batch"))
    );
    let error = Schedule::training(4, 2, 6).unwrap_err().to_string();
    assert!(
        error.contains("found 6; the nearest that fit are 4 and 8"),
        "{error}"
    );
}

#[test]
fn the_interleaved_picture() {
    let schedule = checked(Schedule::training(2, 2, 2));
    let picture = schedule.to_string();
    assert_eq!(
        picture.lines().collect::<Vec<_>>(),
        [
            "interleaved: 2 stages, 2 chunks each, 2 micro-batches, bubble 20%",
            "stage 0 |F0a|F1a|F0b|F1b|   |   |B0b----|   |B1b----|B0a----|B1a----| at most 4 in flight",
            "stage 1 |   |F0a|F1a|F0b|B0b----|F1b|B1b----|B0a----|B1a----|   |   | at most 3 in flight",
        ],
    );
}
