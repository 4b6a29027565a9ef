//! Comparison of a model with reference numbers: logits, loss, every gradient, greedy text.

mod gradients;
mod layout;
mod narrow;
mod reference;
mod report;

#[cfg(test)]
mod tests;

use std::path::Path;

use bridge_core::convert::HfModel;
use bridge_core::{LayoutSpec, Registry};
use bridge_ops::{Ops, to_f32_vec};

pub use layout::{LayoutOptions, verify_layout};
pub use narrow::verify_bf16;
pub use reference::{GradientStats, GreedyReference, LogitsReference, Reference};
pub use report::{Comparison, VerifyReport};

use crate::context::{ForwardContext, IGNORED_TARGET};
use crate::decoder::{Decoder, check_token_ids};
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
    if let Some(logits) = &reference.logits {
        compare_logits(&model, &reference, logits, &options.tolerances, &mut report)?;
        if let Some(loss) = reference.loss {
            // One run gives loss and gradients; without gradients wanted they are dropped with the model.
            compare_loss(
                &model,
                &reference,
                logits,
                loss,
                &options.tolerances,
                &mut report,
            )?;
            if options.gradients {
                gradients::compare(
                    &gradients::gradients(&model),
                    &folder,
                    &reference,
                    &options.tolerances,
                    &mut report,
                )?;
            }
        }
    }
    if let Some(greedy) = &reference.greedy {
        compare_greedy(&model, greedy, &mut report)?;
    }
    if report.comparisons.is_empty() {
        return Err(Error::reference(
            &reference.path,
            "holds neither logits nor a greedy text to compare with",
        ));
    }
    Ok(report)
}

fn compare_logits<B: Ops>(
    model: &Decoder<B>,
    reference: &Reference,
    expected: &LogitsReference,
    tolerances: &Tolerances,
    report: &mut VerifyReport,
) -> Result<()> {
    let vocab_size = model.config().vocab_size;
    check_ids(vocab_size, reference, expected)?;
    let ctx = ForwardContext::new(
        &expected.input_ids,
        [expected.batch, expected.seq],
        model.device(),
    );
    let found = to_f32_vec::<B>(model.forward(&ctx));
    record_logits(&found, vocab_size, reference, expected, tolerances, report)?;
    compare_mtp_logits(model, &ctx, reference, expected, tolerances, report)
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

/// Compares the logits of multi-token prediction, where the reference has them.
fn compare_mtp_logits<B: Ops>(
    model: &Decoder<B>,
    ctx: &ForwardContext<'_, B>,
    reference: &Reference,
    expected: &LogitsReference,
    tolerances: &Tolerances,
    report: &mut VerifyReport,
) -> Result<()> {
    let Some(expected_mtp) = &expected.mtp_logits else {
        return Ok(());
    };
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

fn compare_loss<B: Ops>(
    model: &Decoder<B>,
    reference: &Reference,
    inputs: &LogitsReference,
    expected: f64,
    tolerances: &Tolerances,
    report: &mut VerifyReport,
) -> Result<()> {
    let targets = checked_targets(model.config().vocab_size, reference, inputs)?;
    let ctx = ForwardContext::new(
        &inputs.input_ids,
        [inputs.batch, inputs.seq],
        model.device(),
    );
    let found = loss_and_gradients(model, &ctx, &targets).mean_loss();
    record_loss(found, expected, tolerances, report);
    Ok(())
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

/// What each token is to predict, all of it in the vocabulary.
fn checked_targets(
    vocab_size: usize,
    reference: &Reference,
    inputs: &LogitsReference,
) -> Result<Vec<i64>> {
    let targets = shifted(inputs);
    let known = |id: i64| usize::try_from(id).is_ok_and(|id| id < vocab_size);
    match targets
        .iter()
        .find(|t| **t != IGNORED_TARGET && !known(**t))
    {
        None => Ok(targets),
        Some(bad) => Err(Error::reference(
            &reference.path,
            format!("label {bad} lies outside the vocabulary"),
        )),
    }
}

/// Each token's label is the one after it; the last of a row has none.
fn shifted(inputs: &LogitsReference) -> Vec<i64> {
    let labels = inputs.labels.chunks(inputs.seq);
    labels
        .flat_map(|row| row[1..].iter().copied().chain([IGNORED_TARGET]))
        .collect()
}

fn check_ids(vocab_size: usize, reference: &Reference, inputs: &LogitsReference) -> Result<()> {
    check_token_ids(&inputs.input_ids, vocab_size).map_err(|error| {
        Error::reference(
            &reference.path,
            format!("input_ids: {error}; is this the model's own?"),
        )
    })
}

fn compare_greedy<B: Ops>(
    model: &Decoder<B>,
    expected: &GreedyReference,
    report: &mut VerifyReport,
) -> Result<()> {
    let mut matches = true;
    for (use_cache, what) in [
        (true, "greedy text with a cache"),
        (false, "greedy text without a cache"),
    ] {
        let options = GenerateOptions {
            max_new_tokens: expected.token_ids.len(),
            use_cache,
            ..GenerateOptions::default()
        };
        let found = generate(model, &expected.prompt, &options)?.token_ids;
        let wrong = found
            .iter()
            .zip(&expected.token_ids)
            .position(|(a, b)| a != b);
        matches &= wrong.is_none() && found.len() == expected.token_ids.len();
        report.compare_exact(what, &found, &expected.token_ids);
    }
    report.greedy_match = Some(matches);
    Ok(())
}
