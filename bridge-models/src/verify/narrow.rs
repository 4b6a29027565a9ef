//! A model in bf16 against reference numbers that were computed in f32: not the same digits, but the same model.

use std::path::Path;
use std::sync::Arc;

use bridge_core::convert::HfModel;
use bridge_core::{LayoutSpec, Registry};
use bridge_ops::{DType, Ops, to_f32_vec};
use bridge_parallel::ParallelContext;

use super::{Reference, VerifyReport};
use crate::context::ForwardContext;
use crate::decoder::Decoder;
use crate::error::Result;
use crate::expert_choices::ExpertChoices;
use crate::parallel::ParallelOptions;
use crate::run::loss_and_gradients;
use crate::weights::{DtypePolicy, HfWeights, load_hf, load_param};

/// Largest relative difference of the mean loss. A bf16 number has 8 bits, so each is off by up to 0.4 %.
const LOSS: f64 = 1e-2;
/// How far the cosine between found and expected logits may be from 1.
const COSINE: f64 = 1e-3;
/// How many of a mixture's choices of experts rounding may turn over. In models of random weights, whose scores lie close
/// together, it is a few in a hundred.
const OTHER_EXPERTS: f64 = 0.05;

/// Like [`verify`](super::verify) with weights and activations in bf16, as it is trained: direction of the logits and loss. The
/// logits of a mixture of experts are those of the experts that it would choose in f32; its loss is that of its own choice.
///
/// # Errors
/// As [`verify`](super::verify), and if the backend does not compute in bf16 or the reference has no logits.
pub fn verify_bf16<B: Ops>(
    registry: &Registry,
    hf: &Path,
    reference: &Path,
    device: &B::Device,
    backend: &str,
) -> Result<VerifyReport> {
    let layout = LayoutSpec::default();
    let folder = HfModel::open(hf, registry, &layout)?;
    let reference = Reference::load(reference)?;
    let (expected, targets) = reference.inputs(folder.config().vocab_size)?;
    // Exactly as a run in bf16 holds it.
    let alone = Arc::new(ParallelContext::single(device.clone()));
    let options = ParallelOptions::default();
    let model =
        Decoder::<B>::without_weights(folder.config().clone(), DType::BF16, &alone, &options)?;
    let mut weights = HfWeights::new(&folder, DtypePolicy::Float32);
    for param in model.params() {
        load_param(&param, &mut weights)?;
    }
    let name = folder.bridge().name();
    let mut report = VerifyReport::new(name, &layout.to_string(), backend, "bf16");

    let size = [expected.batch, expected.seq];
    let ctx = ForwardContext::new(&expected.input_ids, size, device);
    // Rounding turns close choices of experts over, and then says nothing of the arithmetic: compare with the same ones.
    let choices = ExpertChoices::new();
    if folder.config().moe.is_some() {
        let exact = load_hf::<B>(&folder, DtypePolicy::Float32, device)?;
        let ctx = ForwardContext::new(&expected.input_ids, size, device);
        exact.forward(&ctx.with_expert_choices(&choices));
    }
    let choices = choices.replay();
    let same = ForwardContext::new(&expected.input_ids, size, device).with_expert_choices(&choices);
    let found = to_f32_vec::<B>(model.forward(&same));
    let cosine = cosine(&found, &expected.logits);
    if choices.is_empty() {
        report.compare("logits, one minus their cosine", 1.0 - cosine, COSINE);
    } else {
        let what = "logits with the experts of f32, one minus their cosine";
        report.compare(what, 1.0 - cosine, COSINE);
        let (different, all) = choices.different();
        let share = different as f64 / all as f64;
        report.compare(
            "experts that f32 would not choose, share",
            share,
            OTHER_EXPERTS,
        );
    }
    if let Some(loss) = reference.loss {
        let found = loss_and_gradients(&model, &ctx, &targets).mean_loss();
        report.loss = Some(found);
        report.loss_reference = Some(loss);
        let difference = (found - loss).abs() / loss.abs().max(f64::MIN_POSITIVE);
        report.compare("loss, relative difference", difference, LOSS);
    }
    Ok(report)
}

/// Cosine of the angle between two vectors; NaN where they differ in length or one is zero.
fn cosine(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::NAN;
    }
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_of_vectors() {
        assert!((cosine(&[1.0, 2.0], &[2.0, 4.0]) - 1.0).abs() < 1e-12);
        assert!((cosine(&[1.0, 0.0], &[0.0, 1.0])).abs() < 1e-12);
        assert!(cosine(&[1.0], &[1.0, 2.0]).is_nan() && cosine(&[0.0], &[1.0]).is_nan());
    }
}
