//! Twenty AdamW steps against the same steps in PyTorch (`train_trace.json` of the fixture says how they were made).

use std::collections::BTreeMap;
use std::path::Path;

use bridge_core::LayoutSpec;
use bridge_core::convert::HfModel;
use bridge_data::{Batch, IGNORE_INDEX};
use bridge_models::verify::Reference;
use bridge_models::weights::load_hf;
use bridge_models::{DtypePolicy, SegmentedModel};
use bridge_ops::to_f32_vec;
use bridge_train::config::RecomputeGranularity;
use bridge_train::optimizer::{AdamW, AdamWOptions};
use bridge_train::step::{StepOptions, evaluate, train_step};
use burn::backend::Flex;
use serde::Deserialize;

/// How far losses and gradient norms may be from PyTorch's: fp32 rounding that twenty updates amplify.
const TRACE: f64 = 1e-4;

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
fn close(what: &str, found: f64, expected: f64) {
    let tolerance = TRACE * expected.abs().max(1.0);
    assert!(
        (found - expected).abs() <= tolerance,
        "{what} is {found}, expected {expected}"
    );
}

/// Canonical names of Llama weights as Hugging Face has them.
fn disk_name(canonical: &str) -> String {
    let name = canonical
        .replace("embedding.", "embed_tokens.")
        .replace("final_norm.", "norm.")
        .replace("input_norm.", "input_layernorm.")
        .replace("mlp_norm.", "post_attention_layernorm.")
        .replace("attention.", "self_attn.");
    if name.starts_with("lm_head") {
        name
    } else {
        format!("model.{name}")
    }
}

#[test]
fn twenty_steps_match_pytorch() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/llama3_2");
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
    };
    let mut optimizer = AdamW::new(SegmentedModel::params(&model), &options).unwrap();
    let step = StepOptions {
        lr: trace.lr,
        weight_decay: trace.weight_decay,
        clip_grad: trace.clip,
        recompute: RecomputeGranularity::None,
    };
    assert_eq!(trace.loss.len(), 20);
    for (index, (loss, grad_norm)) in trace
        .loss
        .iter()
        .zip(&trace.grad_norm_before_clip)
        .enumerate()
    {
        let outcome = train_step(&model, &mut optimizer, &batches, &device, &step);
        close(&format!("loss of step {index}"), outcome.loss.mean, *loss);
        close(
            &format!("gradient norm of step {index}"),
            outcome.grad_norm,
            *grad_norm,
        );
    }
    close(
        "final loss",
        evaluate(&model, &batches, &device).mean,
        trace.final_loss,
    );

    let params = SegmentedModel::params(&model);
    assert_eq!(params.len(), trace.final_params.len());
    for param in params {
        let values = to_f32_vec::<Flex>(param.value());
        let (norm, sum, numel) = trace.final_params[&disk_name(param.name())];
        let found = |f: fn(f64) -> f64| values.iter().map(|v| f(f64::from(*v))).sum::<f64>();
        assert_eq!(values.len(), numel, "{}", param.name());
        close(
            &format!("norm of {}", param.name()),
            found(|v| v * v).sqrt(),
            norm,
        );
        // A sum of elements of both signs: measured against the size of the terms.
        let error = (found(|v| v) - sum).abs();
        assert!(
            error <= TRACE * found(f64::abs).max(1.0),
            "sum of {}: off by {error}",
            param.name()
        );
    }
}
