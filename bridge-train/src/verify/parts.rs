//! What ranks found, brought to the first one and put together.

use std::collections::HashMap;
use std::ops::Range;

use bridge_ops::{DType, Ops, float_from_f32, to_f32_vec};
use bridge_parallel::{Axis, ParallelContext};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What one rank found.
#[derive(Default)]
pub(super) struct Parts {
    /// Mean loss of all ranks' tokens.
    pub(super) loss: f64,
    /// Where this rank is the one to give them.
    pub(super) logits: Option<LogitsPart>,
    pub(super) gradients: Vec<GradientPart>,
}

/// The logits of a rank's tokens.
pub(super) struct LogitsPart {
    /// `[micro-batches, local seq, vocab]`.
    pub(super) values: Vec<f32>,
}

/// A rank's part of a summed gradient.
pub(super) struct GradientPart {
    /// Canonical name of the weight.
    pub(super) name: String,
    /// Shape of the whole weight.
    pub(super) global_shape: Vec<usize>,
    /// Where in it these elements are.
    pub(super) ranges: Vec<Range<usize>>,
    pub(super) values: Vec<f32>,
}

/// What all ranks found together.
pub(super) struct Gathered {
    pub(super) loss: f64,
    /// By rank.
    pub(super) logits: Vec<Option<LogitsPart>>,
    /// By canonical name, whole.
    pub(super) gradients: HashMap<String, Vec<f32>>,
    /// The largest relative distance between two ranks' copies of a gradient.
    pub(super) apart: f64,
}

/// What a rank is going to send, without the numbers.
#[derive(Serialize, Deserialize)]
struct Header {
    logits: Option<usize>,
    /// Name, shape of the whole, ranges here.
    gradients: Vec<(String, Vec<usize>, Vec<Range<usize>>)>,
}

impl Header {
    fn of(parts: &Parts) -> Self {
        let gradient = |part: &GradientPart| {
            (
                part.name.clone(),
                part.global_shape.clone(),
                part.ranges.clone(),
            )
        };
        Self {
            logits: parts.logits.as_ref().map(|part| part.values.len()),
            gradients: parts.gradients.iter().map(gradient).collect(),
        }
    }

    fn len(&self) -> usize {
        let gradients = self.gradients.iter().map(|(_, _, ranges)| numel(ranges));
        self.logits.unwrap_or(0) + gradients.sum::<usize>()
    }

    fn with_values(self, loss: f64, values: Vec<f32>) -> Parts {
        let mut values = values.into_iter();
        let mut next = |count: usize| values.by_ref().take(count).collect::<Vec<f32>>();
        Parts {
            loss,
            logits: self.logits.map(|count| LogitsPart {
                values: next(count),
            }),
            gradients: self
                .gradients
                .into_iter()
                .map(|(name, global_shape, ranges)| GradientPart {
                    values: next(numel(&ranges)),
                    name,
                    global_shape,
                    ranges,
                })
                .collect(),
        }
    }
}

fn numel(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(ExactSizeIterator::len).product()
}

/// Brings every rank's parts to rank 0 and puts them together there; `None` on the others. Every rank calls this.
///
/// # Errors
/// If a rank failed, or the ranks' parts do not make up a model.
pub(super) fn gather<B: Ops>(
    parallel: &ParallelContext<B>,
    own: Parts,
) -> Result<Option<Gathered>> {
    if parallel.world_size() == 1 {
        return joined(vec![own]).map(Some);
    }
    let (world, device) = (parallel.group(Axis::World), parallel.device());
    let header = Header::of(&own);
    let text = serde_json::to_vec(&header)
        .map_err(|error| Error::Parallel(format!("what this rank found: {error}")))?;
    let headers = world.all_gather_bytes(&text)?;
    if world.rank() > 0 {
        let values: Vec<f32> = own
            .logits
            .into_iter()
            .map(|part| part.values)
            .chain(own.gradients.into_iter().map(|part| part.values))
            .flatten()
            .collect();
        if !values.is_empty() {
            let count = values.len();
            world.send(float_from_f32::<B>(&values, &[count], device), 0);
        }
        parallel.health()?;
        return Ok(None);
    }
    let loss = own.loss;
    let mut ranks = vec![own];
    for (rank, text) in headers.iter().enumerate().skip(1) {
        let header: Header = serde_json::from_slice(text).map_err(|error| {
            Error::Parallel(format!(
                "rank {rank} sent what cannot be read ({error}); run the same program on every rank"
            ))
        })?;
        let values = match header.len() {
            0 => Vec::new(),
            count => to_f32_vec::<B>(world.recv(&[count], DType::F32, rank)),
        };
        ranks.push(header.with_values(loss, values));
    }
    parallel.health()?;
    joined(ranks).map(Some)
}

/// Puts the parts of all ranks together. What several ranks hold, they must hold alike.
fn joined(ranks: Vec<Parts>) -> Result<Gathered> {
    let mut gathered = Gathered {
        loss: ranks.first().map_or(f64::NAN, |first| first.loss),
        logits: Vec::with_capacity(ranks.len()),
        gradients: HashMap::new(),
        apart: 0.0,
    };
    let mut parts: HashMap<String, Vec<GradientPart>> = HashMap::new();
    for rank in ranks {
        gathered.logits.push(rank.logits);
        for part in rank.gradients {
            let known = parts.entry(part.name.clone()).or_default();
            match known.iter().find(|known| known.ranges == part.ranges) {
                Some(copy) => {
                    let apart = relative_distance(&copy.values, &part.values);
                    // NaN stays.
                    if apart.is_nan() || apart > gathered.apart {
                        gathered.apart = apart;
                    }
                }
                None => known.push(part),
            }
        }
    }
    for (name, parts) in parts {
        let shape = parts[0].global_shape.clone();
        let numel: usize = shape.iter().product();
        let (mut whole, mut covered) = (vec![0.0; numel], vec![false; numel]);
        for part in &parts {
            for (place, value) in region(&shape, &part.ranges).into_iter().zip(&part.values) {
                (whole[place], covered[place]) = (*value, true);
            }
        }
        if let Some(missing) = covered.iter().position(|covered| !covered) {
            return Err(Error::Parallel(format!(
                "no rank has element {missing} of the gradient of `{name}`"
            )));
        }
        gathered.gradients.insert(name, whole);
    }
    Ok(gathered)
}

fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&mut a.iter().map(|x| f64::from(*x)));
    let apart = a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(&mut apart.into_iter()) / size.max(1e-3)
}

/// The row-major indices of the elements of `ranges` in a tensor of `shape`.
pub(super) fn region(shape: &[usize], ranges: &[Range<usize>]) -> Vec<usize> {
    let mut indices = vec![0];
    for (extent, range) in shape.iter().zip(ranges) {
        indices = indices
            .into_iter()
            .flat_map(|index| range.clone().map(move |i| index * extent + i))
            .collect();
    }
    indices
}
