//! Runs of the trainer on ranks that are threads, and comparisons of what they report. Shared by the tests of training.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::layout::PipelineSplit;
use bridge_core::{DecoderConfig, LayoutSpec};
use bridge_data::{Dataset, Fingerprint, IGNORE_INDEX, Sample};
use bridge_models::{
    Decoder, Init, ParallelOptions, RandomInit, SegmentedModel, is_correction_bias,
};
use bridge_ops::{DType, Ops};
use bridge_parallel::{ParallelContext, run_threads};
use bridge_train::callback::{Callback, EvalReport, StepReport};
use bridge_train::checkpoint::CheckpointStore;
use bridge_train::lr_schedule::LrSchedule;
use bridge_train::optimizer::DataParallelOptions;
use bridge_train::signals::StopFlag;
use bridge_train::{Trainer, TrainerOptions};
use burn_flex::Flex;

/// How far losses may drift from those of one rank over twenty steps: rounding of sums in another order, amplified by
/// AdamW, which divides small gradients by small roots.
pub(crate) const TRACE: f64 = 1e-3;
/// Far longer than any of these tests.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(120);

pub(crate) const STEPS: u64 = 20;

/// Samples with a different number of places without loss in each, some of them of packed documents.
pub(crate) struct Patchy {
    pub(crate) seq: usize,
    pub(crate) vocab: u64,
}

pub(crate) const SEQ: usize = 12;

impl Dataset for Patchy {
    fn seq_length(&self) -> usize {
        self.seq
    }

    fn samples_per_epoch(&self) -> u64 {
        1000
    }

    fn sample(&self, index: u64) -> bridge_data::Result<Sample> {
        let token = |i: usize| ((index * 7919 + i as u64 * i as u64 * 31 + 11) % self.vocab) as i64;
        let labels = (1..=self.seq).map(|i| match i as u64 % (index % 5 + 2) {
            0 => IGNORE_INDEX,
            _ => token(i),
        });
        let cut = (index % 3) as usize * 4;
        let boundaries = if cut == 0 {
            vec![0, self.seq]
        } else {
            vec![0, cut, self.seq]
        };
        Ok(Sample {
            tokens: (0..self.seq).map(token).collect(),
            labels: labels.collect(),
            position_ids: (0..self.seq)
                .map(|i| (if i < cut { i } else { i - cut }) as i64)
                .collect(),
            boundaries,
        })
    }

    fn describe(&self) -> String {
        "patchy samples".into()
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("patchy")
            .number(self.vocab)
            .number(self.seq as u64)
    }
}

pub(crate) fn data(config: &DecoderConfig) -> Arc<Patchy> {
    data_of(config, SEQ)
}

/// Samples of `seq` tokens.
pub(crate) fn data_of(config: &DecoderConfig, seq: usize) -> Arc<Patchy> {
    Arc::new(Patchy {
        seq,
        vocab: config.vocab_size as u64,
    })
}

/// This rank's part of a fresh model.
pub(crate) fn build(
    config: &DecoderConfig,
    seed: u64,
    parallel: &Arc<ParallelContext<Flex>>,
    split: Option<&PipelineSplit>,
) -> Decoder<Flex> {
    let init = Init {
        seed,
        ..Init::default()
    };
    build_with(config, &init, parallel, split)
}

/// This rank's part of a fresh model.
pub(crate) fn build_with(
    config: &DecoderConfig,
    init: &Init,
    parallel: &Arc<ParallelContext<Flex>>,
    split: Option<&PipelineSplit>,
) -> Decoder<Flex> {
    let mut source = RandomInit::new(init, config);
    let options = ParallelOptions {
        pipeline: split.cloned(),
        ..ParallelOptions::default()
    };
    Decoder::build_parallel(config.clone(), &mut source, parallel, &options).expect("a model")
}

pub(crate) fn layout(text: &str) -> LayoutSpec {
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

/// What a step reports.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Step {
    pub(crate) iteration: u64,
    pub(crate) loss: f64,
    pub(crate) grad_norm: f64,
    /// Losses besides that of the next token.
    pub(crate) others: Vec<f64>,
}

/// How a test run goes.
#[derive(Clone)]
pub(crate) struct Run {
    pub(crate) config: DecoderConfig,
    pub(crate) layout: LayoutSpec,
    pub(crate) split: Option<Vec<usize>>,
    pub(crate) options: TrainerOptions,
    /// Where it saves itself and continues from.
    pub(crate) dir: Option<std::path::PathBuf>,
    /// Stop after so many steps.
    pub(crate) stop_after: u64,
    /// Tokens of a sample.
    pub(crate) seq: usize,
    /// Dtype of the weights.
    pub(crate) dtype: DType,
    /// Standard deviation of fresh matrices, where it is not the family's.
    pub(crate) std: Option<f64>,
}

impl Run {
    /// A run of a model at a layout, a sample at a time.
    pub(crate) fn of(config: DecoderConfig, at: &str) -> Self {
        let options = TrainerOptions {
            micro_batch_size: 1,
            ..TrainerOptions::new(8, STEPS, LrSchedule::constant(2e-3))
        };
        Self {
            config,
            layout: layout(at),
            split: None,
            options,
            dir: None,
            stop_after: u64::MAX,
            seq: SEQ,
            dtype: DType::F32,
            std: None,
        }
    }

    pub(crate) fn distributed(mut self, distributed_optimizer: bool) -> Self {
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
    pub(crate) fn trace(self) -> Vec<Step> {
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

    fn on_rank(&self, parallel: &Arc<ParallelContext<Flex>>) -> bridge_train::Result<Vec<Step>> {
        struct Recorder(Vec<Step>, StopFlag, u64);
        impl Callback for Recorder {
            fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
                self.0.push(Step {
                    iteration: step.iteration,
                    loss: step.loss,
                    grad_norm: step.grad_norm,
                    others: step
                        .auxiliary_losses
                        .iter()
                        .map(|(_, loss)| *loss)
                        .collect(),
                });
                if step.iteration >= self.2 {
                    self.1.raise();
                }
                Ok(())
            }

            /// The loss of an evaluation joins those of the step before it.
            fn on_eval(&mut self, eval: &EvalReport) -> bridge_train::Result<()> {
                if let Some(step) = self.0.last_mut() {
                    step.others.push(eval.loss);
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
        let init = Init {
            seed: 3,
            std: self.std,
            ..Init::default()
        };
        let model = build_with(&self.config, &init, parallel, split.as_ref());
        if self.dtype != DType::F32 {
            for param in SegmentedModel::params(&model) {
                if !is_correction_bias(param.name()) {
                    param.set_value(<Flex as Ops>::cast(param.value(), self.dtype));
                }
            }
        }
        let stop = StopFlag::new();
        // The flag is heard in the step after the one that raised it, except on one rank.
        let after = if parallel.world_size() > 1 {
            self.stop_after.saturating_sub(1)
        } else {
            self.stop_after
        };
        let mut recorder = Recorder(Vec::new(), stop.clone(), after);
        let mut trainer =
            Trainer::on_rank(&model, data_of(&self.config, self.seq), parallel, options)?
                .with_stop(stop)
                .with_callback(&mut recorder);
        if self.options.eval_interval > 0 {
            trainer = trainer.with_validation(data_of(&self.config, self.seq));
        }
        if let Some(dir) = &self.dir {
            trainer = trainer.with_checkpoints(store(dir, &self.config))?;
        }
        trainer.run()?;
        Ok(recorder.0)
    }
}

pub(crate) fn store(dir: &Path, config: &DecoderConfig) -> CheckpointStore {
    CheckpointStore::new(dir, serde_json::to_value(config).expect("a config"))
}

#[track_caller]
pub(crate) fn close(what: &str, found: &[Step], expected: &[Step]) {
    close_within(TRACE, what, found, expected);
}

#[track_caller]
pub(crate) fn close_within(tolerance: f64, what: &str, found: &[Step], expected: &[Step]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.iteration, expected.iteration, "{what}");
        let step = found.iteration;
        let near = |a: f64, b: f64| (a - b).abs() <= tolerance * b.abs().max(1.0);
        assert!(
            (found.loss - expected.loss).abs() <= tolerance
                && near(found.grad_norm, expected.grad_norm)
                && found.others.len() == expected.others.len()
                && (found.others.iter())
                    .zip(&expected.others)
                    .all(|(a, b)| near(*a, *b)),
            "{what}, step {step}: {found:?}, on one rank {expected:?}"
        );
    }
}
