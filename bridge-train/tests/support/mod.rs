//! What the tests of training share: a small model, a dataset, and ways to look at the outcome.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::Arc;

use bridge_core::DecoderConfig;
use bridge_data::{Batch, Dataset, Fingerprint, IGNORE_INDEX, Sample};
use bridge_models::families::llama::presets;
use bridge_models::{Decoder, Init, RandomInit, SegmentedModel};
use bridge_ops::to_f32_vec;
use bridge_train::callback::{Callback, EvalReport, SaveReport, StepReport};
use bridge_train::lr_schedule::{LrDecayStyle, LrSchedule, WsdDecayStyle};
use burn::backend::Flex;

pub(crate) type Model = Decoder<Flex>;

pub(crate) fn fresh_model(config: &DecoderConfig, seed: u64) -> Model {
    let mut source = RandomInit::new(
        &Init {
            seed,
            ..Init::default()
        },
        config,
    );
    Decoder::build(config.clone(), &mut source, &Default::default()).unwrap()
}

pub(crate) fn tiny() -> DecoderConfig {
    presets::tiny()
}

/// Pseudo-random samples with a different number of places without loss in each.
pub(crate) struct Patchy {
    pub(crate) seq: usize,
    pub(crate) vocab: u64,
}

impl Dataset for Patchy {
    fn seq_length(&self) -> usize {
        self.seq
    }

    fn samples_per_epoch(&self) -> u64 {
        1000
    }

    fn sample(&self, index: u64) -> bridge_data::Result<Sample> {
        let token = |i: usize| ((index * 7919 + i as u64 * i as u64 * 31 + 11) % self.vocab) as i64;
        let tokens = (0..self.seq).map(token).collect();
        let labels = (1..=self.seq).map(|i| match i as u64 % (index % 5 + 2) {
            0 => IGNORE_INDEX,
            _ => token(i),
        });
        Ok(Sample {
            tokens,
            labels: labels.collect(),
            position_ids: (0..self.seq as i64).collect(),
            boundaries: vec![0, self.seq],
        })
    }

    fn describe(&self) -> String {
        "patchy samples".into()
    }

    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new("patchy")
            .number(self.seq as u64)
            .number(self.vocab)
    }
}

pub(crate) fn patchy() -> Arc<Patchy> {
    Arc::new(Patchy {
        seq: 13,
        vocab: tiny().vocab_size as u64,
    })
}

pub(crate) fn batches(data: &dyn Dataset, samples: u64, micro_batch_size: usize) -> Vec<Batch> {
    let indices: Vec<u64> = (0..samples).collect();
    indices
        .chunks(micro_batch_size)
        .map(|indices| Batch::load(data, indices).unwrap())
        .collect()
}

/// Every weight's bits, by name.
pub(crate) fn weights(model: &Model) -> Vec<(String, Vec<u32>)> {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    let params = SegmentedModel::params(model);
    params
        .iter()
        .map(|p| (p.name().to_owned(), bits(to_f32_vec::<Flex>(p.value()))))
        .collect()
}

/// Every gradient, by name.
pub(crate) fn gradients(model: &Model) -> Vec<(String, Vec<f32>)> {
    let params = SegmentedModel::params(model);
    params
        .iter()
        .map(|p| {
            (
                p.name().to_owned(),
                to_f32_vec::<Flex>(p.grad().expect("a gradient")),
            )
        })
        .collect()
}

/// A schedule that differs at every step.
pub(crate) fn cosine(decay_samples: u64) -> LrSchedule {
    LrSchedule {
        max_lr: 3e-3,
        min_lr: 1e-4,
        warmup_init: 0.0,
        warmup_samples: decay_samples as f64 / 10.0,
        decay_samples,
        style: LrDecayStyle::Cosine,
        wsd_decay_samples: 0,
        wsd_style: WsdDecayStyle::Exponential,
    }
}

/// Remembers what a run reports.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) steps: Vec<StepReport>,
    pub(crate) evals: Vec<EvalReport>,
    pub(crate) saves: Vec<u64>,
}

impl Callback for Recorder {
    fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
        self.steps.push(step.clone());
        Ok(())
    }

    fn on_eval(&mut self, eval: &EvalReport) -> bridge_train::Result<()> {
        self.evals.push(eval.clone());
        Ok(())
    }

    fn on_checkpoint_save(&mut self, save: &SaveReport<'_>) -> bridge_train::Result<()> {
        self.saves.push(save.iteration);
        Ok(())
    }
}
