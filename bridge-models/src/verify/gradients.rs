//! Comparing gradients, under the names and in the form that a checkpoint stores their weights.

use std::collections::HashMap;

use bridge_core::convert::HfModel;
use bridge_core::mapping::Mapping;
use bridge_ops::{Ops, to_f32_vec};

use super::{Reference, Tolerances, VerifyReport};
use crate::decoder::Decoder;
use crate::error::{Error, Result};

/// Compares gradients, whole and by canonical name, with the reference.
pub(super) fn compare(
    canonical: &HashMap<String, Vec<f32>>,
    folder: &HfModel,
    reference: &Reference,
    tolerances: &Tolerances,
    report: &mut VerifyReport,
) -> Result<()> {
    if reference.gradients.is_empty() && reference.full_gradients.is_empty() {
        return Ok(());
    }
    let mapping = mapping(folder, reference)?;
    check_names(&mapping, folder, canonical, reference)?;
    let mut worst: Option<(f64, &str)> = None;
    for (name, expected) in &reference.gradients {
        let found = foreign_gradient(&mapping, canonical, name);
        if found.len() != expected.numel {
            let problem = format!(
                "gradient `{name}` has {} elements, the weight {}",
                expected.numel,
                found.len()
            );
            return Err(Error::reference(&reference.path, problem));
        }
        let difference = relative(
            (norm(&found) - expected.norm).abs(),
            expected.norm,
            tolerances,
        );
        // NaN counts as worst.
        if worst
            .is_none_or(|(known, _)| !known.is_nan() && (difference.is_nan() || difference > known))
        {
            worst = Some((difference, name));
        }
    }
    if let Some((difference, name)) = worst {
        report.grad_norm_max_rel_diff = Some(difference);
        report.worst_grad = Some(name.to_owned());
        let what = format!(
            "norms of {} gradients, largest relative difference ({name})",
            reference.gradients.len()
        );
        report.compare(what, difference, tolerances.gradient);
    }
    for (name, expected) in &reference.full_gradients {
        let found = foreign_gradient(&mapping, canonical, name);
        if found.len() != expected.len() {
            let problem = format!(
                "gradient `{name}` has {} elements, the weight {}",
                expected.len(),
                found.len()
            );
            return Err(Error::reference(&reference.path, problem));
        }
        let apart: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
        let difference = relative(norm(&apart), norm(expected), tolerances);
        report.compare(
            format!("gradient {name}, relative distance"),
            difference,
            tolerances.gradient,
        );
    }
    Ok(())
}

/// `apart` relative to `size`, or to the size at which the absolute floor equals the relative tolerance.
fn relative(apart: f64, size: f64, tolerances: &Tolerances) -> f64 {
    apart / size.max(tolerances.gradient_floor / tolerances.gradient)
}

fn norm(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|value| f64::from(*value).powi(2))
        .sum::<f64>()
        .sqrt()
}

/// The gradient of every trained weight, by canonical name. A weight that the loss does not depend on has none: zeros.
pub(super) fn gradients<B: Ops>(model: &Decoder<B>) -> HashMap<String, Vec<f32>> {
    let gradient = |param: bridge_ops::Param<B>| {
        let values = param
            .take_grad()
            .map_or_else(|| vec![0.0; param.numel()], to_f32_vec::<B>);
        (param.name().to_owned(), values)
    };
    let trained = model
        .params()
        .into_iter()
        .filter(bridge_ops::Param::requires_grad);
    trained.map(gradient).collect()
}

/// How gradients are stored: as the checkpoint's own tensors, or, where these are quantized, as those of the model's
/// usual form, since a quantized weight has no gradient.
fn mapping(folder: &HfModel, reference: &Reference) -> Result<Mapping> {
    let plan = folder.plan();
    if !plan.is_quantized() {
        return Ok(plan.mapping().clone());
    }
    let bridge = folder.bridge();
    let resolved = bridge
        .weights(&plan.config)
        .resolve(&bridge.tensors(&plan.config));
    resolved.map_err(|problems| Error::reference(&reference.path, problems.to_string()))
}

/// The reference must speak of exactly the weights that the checkpoint holds and the loss depends on: neither numbers that
/// the optimizer does not train nor multi-token prediction, which has a loss of its own, have a gradient.
fn check_names(
    mapping: &Mapping,
    folder: &HfModel,
    canonical: &HashMap<String, Vec<f32>>,
    reference: &Reference,
) -> Result<()> {
    let names = reference
        .gradients
        .keys()
        .chain(reference.full_gradients.keys());
    if let Some(name) = names
        .into_iter()
        .find(|name| mapping.foreign_index(name).is_none())
    {
        return Err(Error::reference(
            &reference.path,
            format!("has a gradient of `{name}`, which the model lacks"),
        ));
    }
    if reference.gradients.is_empty() {
        return Ok(());
    }
    let is_trained = |name: &String| canonical.contains_key(name) && !name.starts_with("mtp.");
    let trained = folder
        .plan()
        .tensors
        .iter()
        .filter(|tensor| is_trained(&tensor.canonical));
    let stored = trained.flat_map(|tensor| &tensor.foreign);
    match stored
        .into_iter()
        .find(|name| !reference.gradients.contains_key(*name))
    {
        Some(name) => Err(Error::reference(
            &reference.path,
            format!("has no gradient of `{name}`"),
        )),
        None => Ok(()),
    }
}

/// The gradient of a stored tensor: the elements of its canonical tensors' gradients, arranged as they are stored.
fn foreign_gradient(
    mapping: &Mapping,
    canonical: &HashMap<String, Vec<f32>>,
    name: &str,
) -> Vec<f32> {
    let index = mapping.foreign_index(name).expect("names were checked");
    let mut gradient = vec![0.0; mapping.foreign[index].shape.iter().product()];
    for piece in mapping.pieces_of_foreign(index) {
        let own = &canonical[&mapping.canonical[piece.canonical].name];
        for (from, to) in piece
            .canonical_view
            .offsets()
            .zip(piece.foreign_view.offsets())
        {
            gradient[to] = own[from];
        }
    }
    gradient
}
