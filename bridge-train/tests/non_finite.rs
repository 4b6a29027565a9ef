//! NaN and infinity in loss or gradients: the weights survive, and the run stops or passes over the step.

mod support;

use bridge_models::SegmentedModel;
use bridge_ops::{float_from_f32, to_f32_vec};
use bridge_train::callback::{Callback, StepReport};
use bridge_train::config::NonFinitePolicy;
use bridge_train::lr_schedule::LrSchedule;
use bridge_train::{Error, Trainer, TrainerOptions};
use burn::backend::Flex;
use support::{Model, Recorder, fresh_model, patchy, tiny, weights};

fn options(on_non_finite: NonFinitePolicy) -> TrainerOptions {
    TrainerOptions {
        on_non_finite,
        max_skipped_in_a_row: 2,
        ..TrainerOptions::new(2, 6, LrSchedule::constant(1e-3))
    }
}

fn set_first(model: &Model, name: &str, value: f32) {
    let param = SegmentedModel::params(model)
        .into_iter()
        .find(|p| p.name() == name)
        .unwrap();
    let mut values = to_f32_vec::<Flex>(param.value());
    values[0] = value;
    param.set_value(float_from_f32::<Flex>(
        &values,
        &param.shape(),
        &Default::default(),
    ));
}

#[test]
fn by_default_the_run_stops_and_says_where() {
    let model = fresh_model(&tiny(), 1);
    set_first(&model, "final_norm.weight", f32::NAN);
    let before = weights(&model);
    let error = Trainer::new(
        &model,
        patchy(),
        &Default::default(),
        options(NonFinitePolicy::Stop),
    )
    .unwrap()
    .run()
    .unwrap_err();
    assert!(matches!(&error, Error::NonFinite { iteration: 1, .. }) && !error.is_input());
    assert!(
        error.to_string().contains("step 1: the loss is NaN"),
        "{error}"
    );
    assert_eq!(weights(&model), before);
}

#[test]
fn skipping_passes_over_bad_steps_and_counts_them() {
    /// Breaks a weight after step 2 and mends it after step 4.
    struct Breaker<'a>(&'a Model, f32, Recorder);
    impl Callback for Breaker<'_> {
        fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
            match step.iteration {
                2 => set_first(self.0, "final_norm.weight", f32::INFINITY),
                4 => set_first(self.0, "final_norm.weight", self.1),
                _ => {}
            }
            self.2.on_step_end(step)
        }
    }
    let model = fresh_model(&tiny(), 1);
    let mut callback = Breaker(&model, 1.0, Recorder::default());
    let summary = Trainer::new(
        &model,
        patchy(),
        &Default::default(),
        options(NonFinitePolicy::Skip),
    )
    .unwrap()
    .with_callback(&mut callback)
    .run()
    .unwrap();
    let skipped: Vec<u64> = callback
        .2
        .steps
        .iter()
        .filter(|s| s.skipped)
        .map(|s| s.iteration)
        .collect();
    assert_eq!(
        (summary.iteration, summary.skipped_steps, skipped),
        (6, 2, vec![3, 4])
    );
}

#[test]
fn too_many_bad_steps_in_a_row_stop_the_run() {
    let model = fresh_model(&tiny(), 1);
    set_first(&model, "embedding.weight", f32::NAN);
    set_first(&model, "final_norm.weight", f32::NAN);
    let error = Trainer::new(
        &model,
        patchy(),
        &Default::default(),
        options(NonFinitePolicy::Skip),
    )
    .unwrap()
    .run()
    .unwrap_err();
    assert!(
        matches!(error, Error::NonFinite { iteration: 3, .. }),
        "{error}"
    );
}
