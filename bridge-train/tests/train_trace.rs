//! Twenty AdamW steps against the same steps in PyTorch (`train_trace.json` of the fixture says how they were made).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use bridge_core::LayoutSpec;
use bridge_core::convert::HfModel;
use bridge_core::mapping::ForeignRole;
use bridge_data::{Batch, IGNORE_INDEX};
use bridge_models::verify::Reference;
use bridge_models::weights::load_hf;
use bridge_models::{Decoder, DtypePolicy, SegmentedModel};
use bridge_ops::{DType, to_f32_vec};
use bridge_train::config::RecomputeGranularity;
use bridge_train::engine::Executor;
use bridge_train::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};
use bridge_train::step::{StepOptions, evaluate, train_step};
use burn::backend::Flex;
use serde::Deserialize;

/// How far losses and gradient norms may be from PyTorch's: fp32 rounding that twenty updates amplify.
const TRACE: f64 = 1e-4;

/// The same where gradients and their running means are rounded to the 8 bits of bf16.
const NARROW_TRACE: f64 = 5e-3;

#[derive(Deserialize)]
struct Trace {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    clip: f64,
    loss: Vec<f64>,
    grad_norm_before_clip: Vec<f64>,
    final_loss: f64,
    /// Norm, sum and number of elements by name on disk.
    final_params: BTreeMap<String, (f64, f64, usize)>,
}

#[track_caller]
fn close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "{what} is {found}, expected {expected}"
    );
}

/// The elements of every weight as the checkpoint stores it, by its name there.
fn stored(folder: &HfModel, model: &Decoder<Flex>) -> BTreeMap<String, Vec<f32>> {
    let mapping = folder.plan().mapping();
    let values: HashMap<String, Vec<f32>> = SegmentedModel::params(model)
        .into_iter()
        .map(|param| (param.name().to_owned(), to_f32_vec::<Flex>(param.value())))
        .collect();
    let weights = mapping.foreign.iter().enumerate();
    weights
        .filter(|(_, tensor)| tensor.role == ForeignRole::Weight)
        .map(|(index, tensor)| {
            let mut stored = vec![0.0; tensor.shape.iter().product()];
            for piece in mapping.pieces_of_foreign(index) {
                let own = &values[&mapping.canonical[piece.canonical].name];
                let places = piece.foreign_view.offsets();
                for (from, to) in piece.canonical_view.offsets().zip(places) {
                    stored[to] = own[from];
                }
            }
            (tensor.name.clone(), stored)
        })
        .collect()
}

#[test]
fn twenty_steps_of_a_dense_model_match_pytorch() {
    twenty_steps_match_pytorch("llama3_2", DType::F32, TRACE);
}

#[test]
fn twenty_steps_of_a_mixture_of_experts_match_pytorch() {
    twenty_steps_match_pytorch("qwen3_moe", DType::F32, TRACE);
}

#[test]
fn twenty_steps_of_a_hybrid_model_match_pytorch() {
    twenty_steps_match_pytorch("nemotron_h", DType::F32, TRACE);
}

#[test]
fn twenty_steps_with_narrow_gradients_and_means_follow_pytorch() {
    twenty_steps_match_pytorch("llama3_2", DType::BF16, NARROW_TRACE);
}

#[track_caller]
fn twenty_steps_match_pytorch(name: &str, kept: DType, tolerance: f64) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures")
        .join(name);
    let json = std::fs::read(fixture.join("train_trace.json")).unwrap();
    let trace: Trace = serde_json::from_slice(&json).unwrap();
    let device = Default::default();
    let folder =
        HfModel::open(&fixture, &bridge_models::registry(), &LayoutSpec::default()).unwrap();
    let model = load_hf::<Flex>(&folder, DtypePolicy::Float32, &device).unwrap();
    let inputs = Reference::load(&fixture).unwrap().logits.unwrap();

    // Labels on disk stand at their token; here each stands at the token that is to predict it.
    let shifted = inputs
        .labels
        .chunks(inputs.seq)
        .flat_map(|row| row[1..].iter().copied().chain([IGNORE_INDEX]));
    let batch = Batch {
        batch: inputs.batch,
        seq: inputs.seq,
        tokens: inputs.input_ids.iter().map(|id| i64::from(*id)).collect(),
        labels: shifted.collect(),
        position_ids: (0..inputs.batch)
            .flat_map(|_| 0..inputs.seq as i64)
            .collect(),
        cu_seqlens: None,
    };
    let batches = [batch];
    let options = AdamWOptions {
        beta1: trace.betas.0,
        beta2: trace.betas.1,
        eps: trace.eps,
        // The reference decays every parameter.
        no_weight_decay: Vec::new(),
        main_grads_dtype: kept,
        exp_avg_dtype: kept,
    };
    let executor = Executor::single(&model, &device, RecomputeGranularity::None).unwrap();
    let mut optimizer = Optimizer::new(
        &model,
        executor.parallel(),
        &options,
        &DataParallelOptions::default(),
    )
    .unwrap();
    let step = StepOptions {
        lr: trace.lr,
        weight_decay: trace.weight_decay,
        clip_grad: trace.clip,
        auxiliary: Default::default(),
    };
    assert_eq!(trace.loss.len(), 20);
    for (index, (loss, grad_norm)) in trace
        .loss
        .iter()
        .zip(&trace.grad_norm_before_clip)
        .enumerate()
    {
        let outcome = train_step(
            &executor,
            &model,
            &mut optimizer,
            &batches,
            &step,
            [false; 2],
        )
        .unwrap();
        close(
            &format!("loss of step {index}"),
            outcome.loss.mean,
            *loss,
            tolerance,
        );
        close(
            &format!("gradient norm of step {index}"),
            outcome.grad_norm,
            *grad_norm,
            tolerance,
        );
    }
    close(
        "final loss",
        evaluate(&executor, &model, &batches).unwrap().mean,
        trace.final_loss,
        tolerance,
    );

    let stored = stored(&folder, &model);
    assert!(stored.keys().eq(trace.final_params.keys()));
    for (name, values) in stored {
        let (norm, sum, numel) = trace.final_params[&name];
        let found = |f: fn(f64) -> f64| values.iter().map(|v| f(f64::from(*v))).sum::<f64>();
        assert_eq!(values.len(), numel, "{name}");
        close(
            &format!("norm of {name}"),
            found(|v| v * v).sqrt(),
            norm,
            tolerance,
        );
        // A sum of elements of both signs: measured against the size of the terms.
        let error = (found(|v| v) - sum).abs();
        assert!(
            error <= tolerance * found(f64::abs).max(1.0),
            "sum of {name}: off by {error}"
        );
    }
}
