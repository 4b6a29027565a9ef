//! Training on many ranks is training on one: the same losses at every layout, checkpoints that continue at any other,
//! and nothing that depends on how a batch is cut.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bridge_core::checkpoint::native::list_iterations;
use bridge_core::layout::PipelineSplit;
use bridge_core::{DecoderConfig, LayoutSpec};
use bridge_data::{Batch, Dataset, Fingerprint, GlobalBatchSampler, IGNORE_INDEX, Sample};
use bridge_models::families::llama::presets;
use bridge_models::{Decoder, Init, ParallelOptions, RandomInit};
use bridge_ops::to_f32_vec;
use bridge_parallel::{Axis, ParallelContext, run_threads};
use bridge_train::callback::{Callback, StepReport};
use bridge_train::checkpoint::CheckpointStore;
use bridge_train::config::RecomputeGranularity;
use bridge_train::engine::Executor;
use bridge_train::lr_schedule::LrSchedule;
use bridge_train::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};
use bridge_train::signals::StopFlag;
use bridge_train::step::accumulate_gradients;
use bridge_train::{Trainer, TrainerOptions};
use burn_flex::Flex;
use proptest::prelude::*;

/// How far losses may drift from those of one rank over twenty steps: rounding of sums in another order, amplified by
/// AdamW, which divides small gradients by small roots.
const TRACE: f64 = 1e-3;
/// Sums of fp32 in another order.
const REORDERED_SUM: f64 = 1e-5;
/// Far longer than any of these tests.
const TIMEOUT: Duration = Duration::from_secs(120);

const STEPS: u64 = 20;

/// Samples with a different number of places without loss in each, some of them of packed documents.
struct Patchy {
    vocab: u64,
}

const SEQ: usize = 12;

impl Dataset for Patchy {
    fn seq_length(&self) -> usize {
        SEQ
    }

    fn samples_per_epoch(&self) -> u64 {
        1000
    }

    fn sample(&self, index: u64) -> bridge_data::Result<Sample> {
        let token = |i: usize| ((index * 7919 + i as u64 * i as u64 * 31 + 11) % self.vocab) as i64;
        let labels = (1..=SEQ).map(|i| match i as u64 % (index % 5 + 2) {
            0 => IGNORE_INDEX,
            _ => token(i),
        });
        let cut = (index % 3) as usize * 4;
        let boundaries = if cut == 0 {
            vec![0, SEQ]
        } else {
            vec![0, cut, SEQ]
        };
        Ok(Sample {
            tokens: (0..SEQ).map(token).collect(),
            labels: labels.collect(),
            position_ids: (0..SEQ)
                .map(|i| (if i < cut { i } else { i - cut }) as i64)
                .collect(),
            boundaries,
        })
    }

    fn describe(&self) -> String {
        "patchy samples".into()
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("patchy").number(self.vocab)
    }
}

/// A Llama of 5 layers, with a tied head or not.
fn model_config(tied: bool) -> DecoderConfig {
    let mut config = presets::tiny();
    let layer = config.layers[0].clone();
    config.num_hidden_layers = 5;
    config.layers = vec![layer; 5];
    config.tie_word_embeddings = tied;
    config
}

fn data(config: &DecoderConfig) -> Arc<Patchy> {
    Arc::new(Patchy {
        vocab: config.vocab_size as u64,
    })
}

/// This rank's part of a fresh model.
fn build(
    config: &DecoderConfig,
    seed: u64,
    parallel: &Arc<ParallelContext<Flex>>,
    split: Option<&PipelineSplit>,
) -> Decoder<Flex> {
    let init = Init {
        seed,
        ..Init::default()
    };
    let mut source = RandomInit::new(&init, config);
    let options = ParallelOptions {
        pipeline: split.cloned(),
        ..ParallelOptions::default()
    };
    Decoder::build_parallel(config.clone(), &mut source, parallel, &options).expect("a model")
}

fn layout(text: &str) -> LayoutSpec {
    let mut layout = LayoutSpec::default();
    for word in text.split_whitespace() {
        let split = word.find(|c: char| c.is_ascii_digit());
        let (axis, degree) = word.split_at(split.unwrap_or(word.len()));
        let degree = || degree.parse().expect("a degree");
        match axis {
            "tp" => layout.tp = degree(),
            "pp" => layout.pp = degree(),
            "vpp" => layout.vpp = degree(),
            "cp" => layout.cp = degree(),
            "ep" => layout.ep = degree(),
            "etp" => layout.etp = degree(),
            "dp" => layout.dp = degree(),
            "sp" => layout.sp = true,
            _ => panic!("no axis {axis}"),
        }
    }
    layout
}

/// How a test run goes.
#[derive(Clone)]
struct Run {
    config: DecoderConfig,
    layout: LayoutSpec,
    split: Option<Vec<usize>>,
    options: TrainerOptions,
    /// Where it saves itself and continues from.
    dir: Option<std::path::PathBuf>,
    /// Stop after so many steps.
    stop_after: u64,
}

impl Run {
    fn new(tied: bool, at: &str) -> Self {
        let options = TrainerOptions {
            micro_batch_size: 1,
            ..TrainerOptions::new(8, STEPS, LrSchedule::constant(2e-3))
        };
        Self {
            config: model_config(tied),
            layout: layout(at),
            split: None,
            options,
            dir: None,
            stop_after: u64::MAX,
        }
    }

    fn distributed(mut self, distributed_optimizer: bool) -> Self {
        self.options.data_parallel = DataParallelOptions {
            distributed_optimizer,
            // Small, so that there are several and weights lie across ranks.
            bucket_size: 4000,
            ..DataParallelOptions::default()
        };
        self
    }

    /// Loss and gradient norm of every step, which must be the same on every rank.
    #[track_caller]
    fn trace(self) -> Vec<(u64, f64, f64)> {
        let at = self.layout.to_string();
        let ranks = run_threads::<Flex, _, _>(self.layout, TIMEOUT, move |parallel| {
            self.on_rank(&parallel)
        });
        let ranks = ranks.unwrap_or_else(|error| panic!("{at}: {error}"));
        assert!(
            ranks.iter().all(|rank| *rank == ranks[0]),
            "{at}: ranks differ"
        );
        ranks.into_iter().next().expect("a rank")
    }

    fn on_rank(
        &self,
        parallel: &Arc<ParallelContext<Flex>>,
    ) -> bridge_train::Result<Vec<(u64, f64, f64)>> {
        struct Recorder(Vec<(u64, f64, f64)>, StopFlag, u64);
        impl Callback for Recorder {
            fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
                self.0.push((step.iteration, step.loss, step.grad_norm));
                if step.iteration >= self.2 {
                    self.1.raise();
                }
                Ok(())
            }
        }
        let split = self.split.as_ref().map(|sizes| {
            PipelineSplit::uneven(&self.layout, sizes.iter().sum(), sizes).expect("a split")
        });
        let options = TrainerOptions {
            pipeline_split: split.clone(),
            ..self.options.clone()
        };
        let model = build(&self.config, 3, parallel, split.as_ref());
        let stop = StopFlag::new();
        // The flag is heard in the step after the one that raised it, except on one rank.
        let after = if parallel.world_size() > 1 {
            self.stop_after.saturating_sub(1)
        } else {
            self.stop_after
        };
        let mut recorder = Recorder(Vec::new(), stop.clone(), after);
        let mut trainer = Trainer::on_rank(&model, data(&self.config), parallel, options)?
            .with_stop(stop)
            .with_callback(&mut recorder);
        if let Some(dir) = &self.dir {
            trainer = trainer.with_checkpoints(store(dir, &self.config))?;
        }
        trainer.run()?;
        Ok(recorder.0)
    }
}

fn store(dir: &Path, config: &DecoderConfig) -> CheckpointStore {
    CheckpointStore::new(dir, serde_json::to_value(config).expect("a config"))
}

#[track_caller]
fn close(what: &str, found: &[(u64, f64, f64)], expected: &[(u64, f64, f64)]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for ((step, loss, norm), (expected_step, expected_loss, expected_norm)) in
        found.iter().zip(expected)
    {
        assert_eq!(step, expected_step, "{what}");
        assert!(
            (loss - expected_loss).abs() <= TRACE,
            "{what}, step {step}: loss {loss}, on one rank {expected_loss}"
        );
        assert!(
            (norm - expected_norm).abs() <= TRACE * expected_norm.max(1.0),
            "{what}, step {step}: gradient norm {norm}, on one rank {expected_norm}"
        );
    }
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
        let expected = Run::new(tied, "").trace();
        // The steps move the weights, far beyond what layouts may differ by.
        let moved = (expected[0].2 - expected[19].2).abs();
        assert!(moved > 100.0 * TRACE, "{expected:?}");
        for at in LAYOUTS {
            for distributed in [false, true] {
                // Half of the combinations of each kind keep the time short.
                if tied && distributed == (at.len() % 2 == 0) {
                    continue;
                }
                let found = Run::new(tied, at).distributed(distributed).trace();
                let what = format!("{at}, tied {tied}, distributed optimizer {distributed}");
                close(&what, &found, &expected);
            }
        }
    }
}

#[test]
fn uneven_stages_recomputation_and_late_sums_change_nothing() {
    let expected = Run::new(true, "").trace();
    let mut run = Run::new(true, "pp2 vpp2 dp2").distributed(true);
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
    let expected = Run::new(true, "").trace();
    for (index, (before, after)) in pairs.into_iter().enumerate() {
        let dir = tempfile::tempdir().expect("a folder");
        let run = |at: &str, distributed| Run {
            dir: Some(dir.path().to_owned()),
            ..Run::new(true, at).distributed(distributed)
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
    let whole = Run::new(true, "pp2 dp2").distributed(true).trace();
    let dir = tempfile::tempdir().expect("a folder");
    let run = || Run {
        dir: Some(dir.path().to_owned()),
        ..Run::new(true, "pp2 dp2").distributed(true)
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
    let (path, run) = (dir.path().to_owned(), Run::new(false, "pp2 dp2"));
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
