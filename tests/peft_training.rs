//! Adapters train alike at every layout, and alone: the model's own weights stay as they are.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_data::MockGptDataset;
use bridge_models::families::{deepseek_v3, llama, nemotron_h};
use bridge_models::{Decoder, Init, ParallelOptions, RandomInit, SegmentedModel};
use bridge_parallel::run_threads;
use bridge_peft::{AdapterConfig, AdapterKind, AdapterWeights, attach};
use bridge_train::callback::{Callback, StepReport};
use bridge_train::checkpoint::CheckpointStore;
use bridge_train::config::RecomputeGranularity;
use bridge_train::lr_schedule::LrSchedule;
use bridge_train::{Trainer, TrainerOptions};
use burn_flex::Flex;

/// As for whole models: sums in another order, amplified by AdamW.
const TRACE: f64 = 1e-3;
const SEQ: usize = 12;

struct Losses(Vec<f64>);

impl Callback for Losses {
    fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
        self.0.push(step.loss);
        Ok(())
    }
}

#[derive(Clone)]
struct Run {
    model: bridge_core::DecoderConfig,
    adapters: AdapterConfig,
    layout: LayoutSpec,
    steps: u64,
    stop_at: Option<u64>,
    recompute: RecomputeGranularity,
}

impl Run {
    fn new(model: bridge_core::DecoderConfig, adapters: AdapterConfig) -> Self {
        Self {
            model,
            adapters,
            layout: LayoutSpec::default(),
            steps: 8,
            stop_at: None,
            recompute: RecomputeGranularity::None,
        }
    }

    fn at(&self, layout: LayoutSpec) -> Self {
        Self {
            layout,
            ..self.clone()
        }
    }

    /// The losses of its steps, and how many base weights changed.
    fn run(&self, dir: Option<&Path>) -> (Vec<f64>, usize) {
        let (run, dir) = (self.clone(), dir.map(Path::to_owned));
        let results = run_threads::<Flex, _, String>(
            self.layout,
            Duration::from_secs(120),
            move |parallel| {
                let text = |error: &dyn std::fmt::Display| error.to_string();
                let mut fresh = RandomInit::new(&Init::default(), &run.model);
                let options = ParallelOptions::default();
                let model = Decoder::<Flex>::build_parallel(
                    run.model.clone(),
                    &mut fresh,
                    &parallel,
                    &options,
                );
                let mut model = model.map_err(|e| text(&e))?;
                attach(&mut model, &run.adapters).map_err(|e| text(&e))?;
                let before = base_weights(&model);
                let data = Arc::new(
                    MockGptDataset::new(SEQ, run.model.vocab_size, 7).map_err(|e| text(&e))?,
                );
                let mut options = TrainerOptions::new(
                    4,
                    run.stop_at.unwrap_or(run.steps),
                    LrSchedule::constant(1e-2),
                );
                options.micro_batch_size = 1;
                options.recompute = run.recompute;
                let mut losses = Losses(Vec::new());
                let mut trainer =
                    Trainer::on_rank(&model, data, &parallel, options).map_err(|e| text(&e))?;
                if let Some(dir) = dir.as_ref() {
                    let store = CheckpointStore::new(dir, serde_json::json!("tiny"))
                        .trained_weights_alone()
                        .with_file(
                            bridge_peft::ADAPTER_FILE,
                            serde_json::json!({"config": run.adapters})
                                .to_string()
                                .into_bytes(),
                        );
                    trainer = trainer.with_checkpoints(store).map_err(|e| text(&e))?;
                }
                trainer
                    .with_callback(&mut losses)
                    .run()
                    .map_err(|e| text(&e))?;
                let changed = before
                    .iter()
                    .zip(base_weights(&model))
                    .filter(|(a, b)| *a != b)
                    .count();
                Ok((losses.0, changed))
            },
        );
        results.expect("the run").remove(0)
    }
}

fn base_weights(model: &Decoder<Flex>) -> Vec<Vec<f32>> {
    let params = SegmentedModel::params(model).into_iter();
    let base = params.filter(|param| !param.name().contains(".lora_"));
    base.map(|param| bridge_ops::to_f32_vec::<Flex>(param.value()))
        .collect()
}

fn adapters(kind: AdapterKind, targets: &[&str]) -> AdapterConfig {
    AdapterConfig {
        kind,
        dim: 4,
        alpha: 8.0,
        target_modules: targets.iter().map(|&text| text.to_owned()).collect(),
        ..AdapterConfig::default()
    }
}

#[track_caller]
fn same(a: &[f64], b: &[f64], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(
            (a - b).abs() < TRACE * a.abs(),
            "{what}: step {step}: {a} and {b}"
        );
    }
}

fn layouts() -> Vec<LayoutSpec> {
    let one = LayoutSpec::default;
    vec![
        LayoutSpec { dp: 2, ..one() },
        LayoutSpec { tp: 2, ..one() },
        LayoutSpec {
            tp: 2,
            sp: true,
            ..one()
        },
        LayoutSpec { cp: 2, ..one() },
        LayoutSpec {
            tp: 2,
            dp: 2,
            sp: true,
            ..one()
        },
    ]
}

#[test]
fn adapters_train_alike_at_every_layout() {
    for kind in [AdapterKind::Lora, AdapterKind::Dora] {
        let mut model = llama::presets::tiny();
        model.num_hidden_layers = 2;
        model.layers.truncate(2);
        let run = Run::new(model, adapters(kind, &["all-linear"]));
        let (losses, changed) = run.run(None);
        assert_eq!(changed, 0, "base weights are frozen");
        assert!(losses[7] < losses[0], "{losses:?}");
        for layout in layouts().into_iter().chain([LayoutSpec {
            pp: 2,
            ..LayoutSpec::default()
        }]) {
            let (other, changed) = run.at(layout).run(None);
            assert_eq!(changed, 0, "{layout}");
            same(&losses, &other, &format!("{kind:?} at {layout}"));
        }
    }
}

#[test]
fn latent_attention_and_mamba_take_adapters_at_layouts() {
    let one = LayoutSpec::default;
    for (model, targets, layout) in [
        (
            deepseek_v3::presets::tiny(),
            &["q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"][..],
            LayoutSpec {
                tp: 2,
                sp: true,
                ..one()
            },
        ),
        (
            nemotron_h::presets::tiny(),
            &["mamba.x_proj", "mamba.dt_proj", "mamba.out_proj"],
            LayoutSpec { cp: 2, ..one() },
        ),
    ] {
        let mut run = Run::new(model, adapters(AdapterKind::Dora, targets));
        run.steps = 4;
        let (losses, changed) = run.run(None);
        assert_eq!(changed, 0, "base weights are frozen");
        same(
            &losses,
            &run.at(layout).run(None).0,
            &format!("{targets:?} at {layout}"),
        );
    }
}

#[test]
fn a_run_with_dropout_resumes_bit_for_bit_from_adapters_alone() {
    let mut config = adapters(AdapterKind::Dora, &["all-linear"]);
    config.dropout = 0.1;
    let mut run = Run::new(llama::presets::tiny(), config);
    run.steps = 6;
    let (whole, part) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (losses, _) = run.run(Some(whole.path()));
    let first = Run {
        stop_at: Some(3),
        ..run.clone()
    }
    .run(Some(part.path()))
    .0;
    let (rest, _) = run.run(Some(part.path()));
    assert_eq!([first, rest].concat(), losses);
    let open = |dir: &Path| {
        let checkpoint = bridge_core::checkpoint::native::NativeCheckpoint::open(dir).unwrap();
        AdapterWeights::from_native(&checkpoint).unwrap()
    };
    let weights = open(whole.path());
    assert_eq!(weights, open(part.path()));
    assert_eq!(weights.layers.len(), 3 * 7);
    weights.check(&run.model).unwrap();
    // A layer that runs again draws the same.
    let again = Run {
        recompute: RecomputeGranularity::Full,
        ..run.clone()
    };
    assert_eq!(again.run(None).0, losses);
    let none = Run {
        adapters: AdapterConfig {
            dropout: 0.0,
            ..run.adapters.clone()
        },
        ..run.clone()
    };
    assert_ne!(none.run(None).0, losses);
}
