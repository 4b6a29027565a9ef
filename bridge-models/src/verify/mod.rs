//! Comparison of a model with reference numbers: logits, loss, every gradient, greedy text.
//!
//! [`verify`] runs a whole model in the plainest way. Whoever runs one differently (the training engine at a layout, in
//! `bridge-train`) reads the same [`Reference`] and compares its [`Outputs`] by the same bounds.

mod gradients;
mod narrow;
mod reference;
mod report;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;

use bridge_core::convert::HfModel;
use bridge_core::{LayoutSpec, Registry};
use bridge_ops::{Ops, to_f32_vec};

pub use narrow::verify_bf16;
pub use reference::{GradientStats, GreedyReference, LogitsReference, Reference};
pub use report::{Comparison, VerifyReport};

use crate::context::ForwardContext;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::generate::{GenerateOptions, generate};
use crate::run::loss_and_gradients;
use crate::weights::{DtypePolicy, load_hf};

/// How close is close enough.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerances {
    /// Largest absolute difference of any logit.
    pub logits: f64,
    /// Largest absolute difference of the mean loss.
    pub loss: f64,
    /// Largest relative difference of any gradient's norm, and of any gradient that the reference has in full.
    pub gradient: f64,
    /// Differences of a gradient's norm up to this pass whatever their size: some gradients are zero but for rounding.
    pub gradient_floor: f64,
}

impl Default for Tolerances {
    fn default() -> Self {
        Self {
            logits: 1e-4,
            loss: 1e-5,
            gradient: 1e-3,
            gradient_floor: 1e-6,
        }
    }
}

/// What to compare.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VerifyOptions {
    /// Whether gradients are compared. Needs memory for all of them.
    pub gradients: bool,
    /// How close is close enough.
    pub tolerances: Tolerances,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self {
            gradients: true,
            tolerances: Tolerances::default(),
        }
    }
}

/// Loads the model in the Hugging Face folder `hf` in f32, runs it on the inputs of the reference folder `reference`
/// and compares. `backend` names the backend in the report.
///
/// # Errors
/// If either folder cannot be read or they do not fit each other. A comparison that does not hold is no error: see
/// [`VerifyReport::passed`].
pub fn verify<B: Ops>(
    registry: &Registry,
    hf: &Path,
    reference: &Path,
    options: &VerifyOptions,
    device: &B::Device,
    backend: &str,
) -> Result<VerifyReport> {
    let layout = LayoutSpec::default();
    let folder = HfModel::open(hf, registry, &layout)?;
    let reference = Reference::load(reference)?;
    let model = load_hf::<B>(&folder, DtypePolicy::Float32, device)?;

    let mut report = VerifyReport::new(folder.bridge().name(), &layout.to_string(), backend, "f32");
    if reference.logits.is_some() {
        let (inputs, targets) = reference.inputs(model.config().vocab_size)?;
        let ctx = ForwardContext::new(&inputs.input_ids, [inputs.batch, inputs.seq], device);
        let logits = to_f32_vec::<B>(model.forward(&ctx));
        // One run gives loss and gradients; without gradients wanted they are dropped with the model.
        let loss = loss_and_gradients(&model, &ctx, &targets).mean_loss();
        let outputs = Outputs {
            logits,
            loss,
            gradients: options.gradients.then(|| gradients::gradients(&model)),
        };
        outputs.compare(&folder, &reference, &options.tolerances, &mut report)?;
        compare_mtp_logits(&model, &reference, &options.tolerances, &mut report)?;
    }
    if let Some(greedy) = &reference.greedy {
        let texts = greedy_texts(&model, greedy)?;
        record_greedy(&texts, greedy, &mut report);
    }
    if report.comparisons.is_empty() {
        return Err(reference.lacks("neither logits nor a greedy text"));
    }
    Ok(report)
}

/// What a model gave for the inputs of a reference.
#[derive(Debug, Clone, PartialEq)]
pub struct Outputs {
    /// `[batch, seq, vocab]`.
    pub logits: Vec<f32>,
    /// Mean over the tokens that have a target.
    pub loss: f64,
    /// The gradient of that loss by every trained weight, whole and by canonical name, where it is compared.
    pub gradients: Option<HashMap<String, Vec<f32>>>,
}

impl Outputs {
    /// Compares with what `reference` has, and records it in `report`. `folder` says how weights are stored.
    ///
    /// # Errors
    /// If the reference is not one of this model.
    pub fn compare(
        &self,
        folder: &HfModel,
        reference: &Reference,
        tolerances: &Tolerances,
        report: &mut VerifyReport,
    ) -> Result<()> {
        let vocab_size = folder.config().vocab_size;
        let (inputs, _) = reference.inputs(vocab_size)?;
        record_logits(
            &self.logits,
            vocab_size,
            reference,
            inputs,
            tolerances,
            report,
        )?;
        let Some(expected) = reference.loss else {
            return Ok(());
        };
        record_loss(self.loss, expected, tolerances, report);
        match &self.gradients {
            Some(gradients) => gradients::compare(gradients, folder, reference, tolerances, report),
            None => Ok(()),
        }
    }
}

fn record_logits(
    found: &[f32],
    vocab_size: usize,
    reference: &Reference,
    expected: &LogitsReference,
    tolerances: &Tolerances,
    report: &mut VerifyReport,
) -> Result<()> {
    if found.len() != expected.logits.len() {
        let problem = format!(
            "logits have {} elements, expected {} x {} x {vocab_size}",
            expected.logits.len(),
            expected.batch,
            expected.seq
        );
        return Err(Error::reference(&reference.path, problem));
    }
    let worst = largest_difference(found, &expected.logits);
    report.logits_max_abs_diff = Some(worst);
    report.compare(
        "logits, largest absolute difference",
        worst,
        tolerances.logits,
    );
    Ok(())
}

/// Compares the logits of multi-token prediction of a whole model, where the reference has them.
///
/// # Errors
/// If the model makes no such prediction, or another number of logits.
pub fn compare_mtp_logits<B: Ops>(
    model: &Decoder<B>,
    reference: &Reference,
    tolerances: &Tolerances,
    report: &mut VerifyReport,
) -> Result<()> {
    let Some(expected) = &reference.logits else {
        return Ok(());
    };
    let Some(expected_mtp) = &expected.mtp_logits else {
        return Ok(());
    };
    let size = [expected.batch, expected.seq];
    let ctx = &ForwardContext::new(&expected.input_ids, size, model.device());
    let found = model.mtp_logits(ctx).into_iter().next();
    let Some(found) = found.map(to_f32_vec::<B>) else {
        let problem = "has logits of multi-token prediction, for which the model has no module";
        return Err(Error::reference(&reference.path, problem));
    };
    // The last row of each sequence is not told the token after it.
    let (seq, vocab) = (expected.seq, model.config().vocab_size);
    let told = found
        .chunks(seq * vocab)
        .flat_map(|row| &row[..(seq - 1) * vocab]);
    let told: Vec<f32> = told.copied().collect();
    if told.len() != expected_mtp.len() {
        let problem = format!(
            "mtp_logits have {} elements, expected {}",
            expected_mtp.len(),
            told.len()
        );
        return Err(Error::reference(&reference.path, problem));
    }
    report.compare(
        "logits of multi-token prediction, largest absolute difference",
        largest_difference(&told, expected_mtp),
        tolerances.logits,
    );
    Ok(())
}

/// The largest absolute difference of two lists; NaN if any is.
fn largest_difference(found: &[f32], expected: &[f32]) -> f64 {
    let differences = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
    differences.fold(0.0, |worst: f64, d| {
        if d.is_nan() || worst.is_nan() {
            f64::NAN
        } else {
            worst.max(d)
        }
    })
}

fn record_loss(found: f64, expected: f64, tolerances: &Tolerances, report: &mut VerifyReport) {
    report.loss = Some(found);
    report.loss_reference = Some(expected);
    report.compare(
        "loss, absolute difference",
        (found - expected).abs(),
        tolerances.loss,
    );
}

/// The model's own continuations of a reference's prompt: with a cache, and without.
///
/// # Errors
/// As [`generate`].
pub fn greedy_texts<B: Ops>(
    model: &Decoder<B>,
    expected: &GreedyReference,
) -> Result<[Vec<u32>; 2]> {
    let text = |use_cache| -> Result<Vec<u32>> {
        let options = GenerateOptions {
            max_new_tokens: expected.token_ids.len(),
            use_cache,
            ..GenerateOptions::default()
        };
        Ok(generate(model, &expected.prompt, &options)?.token_ids)
    };
    Ok([text(true)?, text(false)?])
}

/// Compares [`greedy_texts`] with the reference's.
pub fn record_greedy(texts: &[Vec<u32>; 2], expected: &GreedyReference, report: &mut VerifyReport) {
    let what = ["greedy text with a cache", "greedy text without a cache"];
    for (what, found) in what.into_iter().zip(texts) {
        report.compare_exact(what, found, &expected.token_ids);
    }
    report.greedy_match = Some(texts.iter().all(|text| *text == expected.token_ids));
}
