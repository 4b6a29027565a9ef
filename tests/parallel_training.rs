//! Training on many ranks is training on one: the same losses at every layout, checkpoints that continue at any other,
//! and nothing that depends on how a batch is cut.

mod training;

use std::sync::{Arc, Mutex};

use bridge_core::checkpoint::native::list_iterations;
use bridge_core::{DecoderConfig, LayoutSpec};
use bridge_data::{Batch, Dataset, Fingerprint, GlobalBatchSampler, Sample};
use bridge_models::families::llama::presets;
use bridge_ops::to_f32_vec;
use bridge_parallel::{Axis, run_threads};
use bridge_train::config::RecomputeGranularity;
use bridge_train::engine::Executor;
use bridge_train::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};
use bridge_train::step::accumulate_gradients;
use bridge_train::{Trainer, TrainerOptions};
use burn_flex::Flex;
use proptest::prelude::*;

use training::{Patchy, Run, STEPS, TIMEOUT, TRACE, build, close, data, store};

/// Sums of fp32 in another order.
const REORDERED_SUM: f64 = 1e-5;
/// A Llama of 5 layers, with a tied head or not.
fn model_config(tied: bool) -> DecoderConfig {
    let mut config = presets::tiny();
    let layer = config.layers[0].clone();
    config.num_hidden_layers = 5;
    config.layers = vec![layer; 5];
    config.tie_word_embeddings = tied;
    config
}

const LAYOUTS: [&str; 8] = [
    "dp4",
    "pp4",
    "pp2 vpp2 dp2",
    "pp5 dp2",
    "tp2 sp",
    "cp2 dp2",
    "tp2 pp2 dp2",
    "tp2 sp cp2 pp2",
];

#[test]
fn twenty_steps_are_those_of_one_rank_at_eight_layouts() {
    for tied in [false, true] {
        let expected = Run::of(model_config(tied), "").trace();
        // The steps move the weights, far beyond what layouts may differ by.
        let moved = (expected[0].grad_norm - expected[19].grad_norm).abs();
        assert!(moved > 100.0 * TRACE, "{expected:?}");
        for at in LAYOUTS {
            for distributed in [false, true] {
                // Half of the combinations of each kind keep the time short.
                if tied && distributed == (at.len() % 2 == 0) {
                    continue;
                }
                let found = Run::of(model_config(tied), at)
                    .distributed(distributed)
                    .trace();
                let what = format!("{at}, tied {tied}, distributed optimizer {distributed}");
                close(&what, &found, &expected);
            }
        }
    }
}

#[test]
fn uneven_stages_recomputation_and_late_sums_change_nothing() {
    let expected = Run::of(model_config(true), "").trace();
    let mut run = Run::of(model_config(true), "pp2 vpp2 dp2").distributed(true);
    run.split = Some(vec![0, 3, 2, 0]);
    run.options.recompute = RecomputeGranularity::Full;
    run.options.data_parallel.overlap_grad_reduce = false;
    close("uneven", &run.trace(), &expected);
}

#[test]
fn a_run_saved_at_one_layout_continues_at_any_other() {
    let pairs = [
        ("", "dp2"),
        ("dp2", ""),
        ("dp4", "tp2"),
        ("tp2", "dp2"),
        ("tp2 sp", "pp2"),
        ("pp2", "tp2 pp2"),
        ("pp4", "pp2 vpp2"),
        ("pp2 vpp2", "cp2"),
        ("cp2", "pp2 dp2"),
        ("tp2 dp2", "pp2 vpp2 dp2"),
        ("pp2 vpp2 dp2", "tp2 pp2"),
        ("tp2 pp2 dp2", ""),
    ];
    let expected = Run::of(model_config(true), "").trace();
    for (index, (before, after)) in pairs.into_iter().enumerate() {
        let dir = tempfile::tempdir().expect("a folder");
        let run = |at: &str, distributed| Run {
            dir: Some(dir.path().to_owned()),
            ..Run::of(model_config(true), at).distributed(distributed)
        };
        // Whole and divided state in all combinations.
        let mut first = run(before, index % 2 == 0);
        first.stop_after = 8;
        let mut found = first.trace();
        assert_eq!(found.len(), 8, "{before}");
        found.extend(run(after, index % 4 < 2).trace());
        close(&format!("{before} to {after}"), &found, &expected);
        assert!(
            list_iterations(dir.path())
                .expect("checkpoints")
                .iter()
                .map(|(iteration, _)| *iteration)
                .eq([8, STEPS])
        );
    }
}

#[test]
fn a_run_continued_at_the_same_layout_is_the_same_bit_for_bit() {
    let whole = Run::of(model_config(true), "pp2 dp2")
        .distributed(true)
        .trace();
    let dir = tempfile::tempdir().expect("a folder");
    let run = || Run {
        dir: Some(dir.path().to_owned()),
        ..Run::of(model_config(true), "pp2 dp2").distributed(true)
    };
    let mut first = run();
    first.stop_after = 7;
    let mut found = first.trace();
    found.extend(run().trace());
    assert_eq!(found, whole);
}

#[test]
fn a_rank_that_fails_ends_the_run_on_all_and_leaves_no_checkpoint() {
    struct FailsLate {
        inner: Arc<Patchy>,
        fails: bool,
    }
    impl Dataset for FailsLate {
        fn seq_length(&self) -> usize {
            self.inner.seq_length()
        }
        fn samples_per_epoch(&self) -> u64 {
            self.inner.samples_per_epoch()
        }
        fn sample(&self, index: u64) -> bridge_data::Result<Sample> {
            if self.fails && index >= 24 {
                return Err(bridge_data::DataError::Loader {
                    reason: "the disk is gone".into(),
                });
            }
            self.inner.sample(index)
        }
        fn describe(&self) -> String {
            self.inner.describe()
        }
        fn fingerprint(&self) -> Fingerprint {
            self.inner.fingerprint()
        }
    }
    let dir = tempfile::tempdir().expect("a folder");
    let (path, run) = (
        dir.path().to_owned(),
        Run::of(model_config(false), "pp2 dp2"),
    );
    let failures = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&failures);
    let error = run_threads::<Flex, (), _>(run.layout, TIMEOUT, move |parallel| {
        let model = build(&run.config, 3, &parallel, None);
        let data = Arc::new(FailsLate {
            inner: data(&run.config),
            fails: parallel.rank() == 2,
        });
        let options = TrainerOptions {
            save_interval: 100,
            ..run.options.clone()
        };
        let outcome = Trainer::on_rank(&model, data, &parallel, options)?
            .with_checkpoints(store(&path, &run.config))?
            .run();
        if outcome.is_err() {
            *counted.lock().expect("no panic") += 1;
        }
        outcome.map(drop)
    })
    .expect_err("a rank fails");
    let text = error.to_string();
    assert!(
        text.contains("rank 2") && text.contains("the disk is gone"),
        "{text}"
    );
    assert_eq!(*failures.lock().expect("no panic"), 4, "every rank ends");
    let left = std::fs::read_dir(dir.path()).expect("the folder").count();
    assert_eq!(left, 0, "nothing is written");
}

/// Loss and gradients of one step over `samples` samples, cut like that.
fn gradients(
    at: LayoutSpec,
    samples: usize,
    micro_batch_size: usize,
) -> (f64, Vec<(String, Vec<f32>)>) {
    let ranks = run_threads::<Flex, _, _>(at, TIMEOUT, move |parallel| {
        let config = model_config(true);
        let model = build(&config, 5, &parallel, None);
        let executor = Executor::new(
            &model,
            Arc::clone(&parallel),
            None,
            RecomputeGranularity::None,
        )?;
        let (replicas, replica) = (parallel.layout().dp, parallel.coords().dp);
        let sampler = GlobalBatchSampler::new(micro_batch_size, replicas, replica)?;
        let data = data(&config);
        let batches = sampler
            .micro_batches(0, samples)?
            .iter()
            .map(|indices| Batch::load(data.as_ref(), indices))
            .collect::<bridge_data::Result<Vec<_>>>()?;
        let batches = if executor.reads_samples() {
            batches
        } else {
            Vec::new()
        };
        let optimizer = Optimizer::new(
            &model,
            &parallel,
            &AdamWOptions::default(),
            &DataParallelOptions::default(),
        )?;
        let loss = accumulate_gradients(&executor, &model, &batches)?;
        optimizer.finish_reduction(optimizer.start_reduction())?;
        let gradients: Vec<(String, Vec<f32>)> = model
            .params()
            .iter()
            .map(|p| {
                (
                    p.name().to_owned(),
                    to_f32_vec::<Flex>(p.grad().expect("a gradient")),
                )
            })
            .collect();
        // Reported once each: by the first replica of the lowest stage that holds the weight.
        let counted = optimizer
            .placements()
            .iter()
            .map(|placement| placement.writes());
        let gradients = gradients
            .into_iter()
            .zip(counted)
            .filter_map(|(gradient, counted)| counted.then_some(gradient));
        parallel.group(Axis::World).barrier()?;
        Ok::<_, bridge_train::Error>((loss.mean, gradients.collect::<Vec<_>>()))
    })
    .unwrap_or_else(|error| panic!("{at}: {error}"));
    let loss = ranks[0].0;
    let mut all: Vec<_> = ranks
        .into_iter()
        .flat_map(|(_, gradients)| gradients)
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    (loss, all)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn loss_and_gradients_do_not_depend_on_how_a_batch_is_cut(
        micro in 1usize..4, dp in 1usize..4, rounds in 1usize..4, cp in 1usize..3, pp in 1usize..3,
    ) {
        let at = LayoutSpec { pp, cp, dp, ..LayoutSpec::default() };
        let samples = micro * dp * rounds;
        let (loss, found) = gradients(at, samples, micro);
        let (whole, expected) = gradients(LayoutSpec::default(), samples, samples);
        prop_assert!((loss - whole).abs() < REORDERED_SUM, "{at}: loss {loss} and {whole}");
        prop_assert_eq!(found.len(), expected.len());
        for ((name, found), (expected_name, expected)) in found.iter().zip(&expected) {
            prop_assert_eq!(name, expected_name);
            let largest = expected.iter().fold(0.0f32, |m, g| m.max(g.abs()));
            for (a, b) in found.iter().zip(expected) {
                prop_assert!(
                    f64::from((a - b).abs()) <= REORDERED_SUM * f64::from(largest.max(1e-2)),
                    "{at}, {samples} samples by {micro}, {name}: {a} and {b}, of at most {largest}"
                );
            }
        }
    }
}
