//! The comparison at a parallel layout, every rank a thread of this process.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::convert::HfModel;
use bridge_core::layout::PipelineSplit;
use bridge_core::{LayoutSpec, Registry};
use bridge_ops::{Ops, Tape, to_f32_vec};
use bridge_parallel::{ParallelContext, SequenceShard, complete_gradients, run_threads};

use super::{
    LogitsReference, Reference, VerifyOptions, VerifyReport, check_ids, checked_targets, gradients,
    record_logits, record_loss,
};
use crate::context::{ForwardContext, IGNORED_TARGET};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::parallel::{ParallelOptions, check_layout};
use crate::run::StagedRun;
use crate::weights::{DtypePolicy, load_hf_parallel};

/// How a model is divided for a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct LayoutOptions {
    /// The layout.
    pub layout: LayoutSpec,
    /// What it leaves open.
    pub parallel: ParallelOptions,
    /// How long a rank waits for another.
    pub timeout: Duration,
}

impl LayoutOptions {
    /// `layout` with everything else as usual.
    pub fn new(layout: LayoutSpec) -> Self {
        Self {
            layout,
            parallel: ParallelOptions::default(),
            timeout: Duration::from_secs(120),
        }
    }
}

/// [`verify`](super::verify) at a layout: logits, loss and gradients. Every rank is a thread, on the backend's default
/// device, and holds its own part of the model. Greedy texts are left to one rank.
///
/// # Errors
/// As [`verify`](super::verify), or if the model cannot be divided that way, or a rank fails.
pub fn verify_layout<B: Ops>(
    registry: &Registry,
    hf: &Path,
    reference: &Path,
    options: &VerifyOptions,
    divided: &LayoutOptions,
    backend: &str,
) -> Result<VerifyReport> {
    let layout = divided.layout;
    let folder = Arc::new(HfModel::open(hf, registry, &layout)?);
    check_layout(folder.config(), &layout, &divided.parallel)?;
    let reference = Reference::load(reference)?;
    let Some(inputs) = &reference.logits else {
        let problem = "holds no logits to compare with";
        return Err(Error::reference(&reference.path, problem));
    };
    let vocab_size = folder.config().vocab_size;
    check_ids(vocab_size, &reference, inputs)?;
    let batch = Arc::new(Batch {
        targets: checked_targets(vocab_size, &reference, inputs)?,
        inputs: inputs.clone(),
    });

    let work = {
        let (folder, batch, options) = (Arc::clone(&folder), Arc::clone(&batch), divided.clone());
        move |ctx: Arc<ParallelContext<B>>| run_rank(&folder, &batch, &options, &ctx)
    };
    let ranks = run_threads::<B, RankResult, Error>(layout, divided.timeout, work)?;

    let mut report = VerifyReport::new(folder.bridge().name(), &layout.to_string(), backend, "f32");
    let (logits, loss) = batch.joined(&ranks, &layout, vocab_size);
    let tolerances = &options.tolerances;
    record_logits(
        &logits,
        vocab_size,
        &reference,
        inputs,
        tolerances,
        &mut report,
    )?;
    if let Some(expected) = reference.loss {
        record_loss(loss, expected, tolerances, &mut report);
        if options.gradients {
            let (whole, apart) = joined_gradients(&ranks, &layout);
            report.compare(
                "copies of a gradient on several ranks, largest relative distance",
                apart,
                tolerances.gradient,
            );
            gradients::compare(&whole, &folder, &reference, tolerances, &mut report)?;
        }
    }
    Ok(report)
}

/// The input of all ranks together.
struct Batch {
    inputs: LogitsReference,
    /// `[batch, seq]`
    targets: Vec<i64>,
}

/// What one rank found.
struct RankResult {
    /// `[rows, local seq, vocab]`, where the head is here.
    logits: Option<Vec<f32>>,
    /// `[rows, local seq]`, where the head is here.
    losses: Option<Vec<f32>>,
    gradients: Vec<GradientPart>,
}

/// A rank's part of a gradient, over its own data.
struct GradientPart {
    name: String,
    global_shape: Vec<usize>,
    ranges: Vec<Range<usize>>,
    is_expert: bool,
    values: Vec<f32>,
}

impl Batch {
    /// The rows of one rank of data parallelism: an equal number for each, the last ones without any tokens to predict if
    /// there are not enough rows.
    fn rows(&self, layout: &LayoutSpec, dp_rank: usize) -> Vec<Option<usize>> {
        let share = self.inputs.batch.div_ceil(layout.dp);
        (dp_rank * share..(dp_rank + 1) * share)
            .map(|row| (row < self.inputs.batch).then_some(row))
            .collect()
    }

    fn of_rank(&self, layout: &LayoutSpec, dp_rank: usize) -> (Vec<u32>, Vec<i64>, usize) {
        let seq = self.inputs.seq;
        let rows = self.rows(layout, dp_rank);
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        for row in &rows {
            match row {
                Some(row) => {
                    ids.extend(&self.inputs.input_ids[row * seq..(row + 1) * seq]);
                    targets.extend(&self.targets[row * seq..(row + 1) * seq]);
                }
                None => {
                    ids.extend(std::iter::repeat_n(0, seq));
                    targets.extend(std::iter::repeat_n(IGNORED_TARGET, seq));
                }
            }
        }
        (ids, targets, rows.len())
    }

    /// One over the number of tokens that have a target.
    fn weight(&self) -> f64 {
        let counted = self
            .targets
            .iter()
            .filter(|t| **t != IGNORED_TARGET)
            .count();
        1.0 / counted.max(1) as f64
    }

    /// Logits `[batch, seq, vocab]` and the mean loss, from the ranks that have the head.
    fn joined(&self, ranks: &[RankResult], layout: &LayoutSpec, vocab: usize) -> (Vec<f32>, f64) {
        let (batch, seq) = (self.inputs.batch, self.inputs.seq);
        let mut logits = vec![f32::NAN; batch * seq * vocab];
        let mut loss = 0.0;
        for (rank, found) in ranks.iter().enumerate() {
            let coords = layout.coords(rank);
            let (0, Some(own), Some(losses)) = (coords.tp, &found.logits, &found.losses) else {
                continue;
            };
            let shard = SequenceShard::new(seq, layout, coords.cp);
            let width = shard.local_seq() * vocab;
            for (index, row) in self.rows(layout, coords.dp).into_iter().enumerate() {
                if let Some(row) = row {
                    let whole = &mut logits[row * seq * vocab..(row + 1) * seq * vocab];
                    shard.put(&own[index * width..(index + 1) * width], whole, vocab);
                }
            }
            loss += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
        }
        (logits, loss * self.weight())
    }
}

fn run_rank<B: Ops>(
    folder: &HfModel,
    batch: &Batch,
    options: &LayoutOptions,
    ctx: &Arc<ParallelContext<B>>,
) -> Result<RankResult> {
    let layout = ctx.layout();
    let model: Decoder<B> = load_hf_parallel(folder, DtypePolicy::Float32, ctx, &options.parallel)?;
    let (ids, targets, rows) = batch.of_rank(layout, ctx.coords().dp);
    let forward = ForwardContext::for_rank(&ids, [rows, batch.inputs.seq], ctx);
    let split = match &options.parallel.pipeline {
        Some(split) => split.clone(),
        None => PipelineSplit::even(layout, model.config().num_hidden_layers)?,
    };
    let run = StagedRun::new(&model, &forward, &split, ctx);
    let logits = run.hidden_states().map(|hidden| {
        let tape = Tape::inference();
        to_f32_vec::<B>(model.logits(&tape, &tape.constant(hidden)).into_value())
    });
    let losses = run.loss_and_gradients(&forward.own_targets(&targets), batch.weight() as f32);
    let params = model.params();
    complete_gradients(&params, ctx);
    ctx.health()?;
    let trained = params.into_iter().filter(bridge_ops::Param::requires_grad);
    let gradients = trained.map(|param| {
        let shape = param.shape();
        let whole = || shape.iter().map(|extent| 0..*extent).collect();
        let ranges: Vec<Range<usize>> = param.shard().map_or_else(whole, |s| s.ranges.clone());
        let values = match param.take_grad() {
            Some(grad) => to_f32_vec::<B>(grad),
            None => vec![0.0; shape.iter().product()],
        };
        let corner: Vec<Range<usize>> = ranges.iter().map(|range| 0..range.len()).collect();
        GradientPart {
            name: param.name().to_owned(),
            values: region(&shape, &corner)
                .into_iter()
                .map(|i| values[i])
                .collect(),
            global_shape: param
                .shard()
                .map_or(shape, |shard| shard.global_shape.clone()),
            is_expert: param
                .shard()
                .is_some_and(|shard| shard.reduction.is_expert()),
            ranges,
        }
    });
    Ok(RankResult {
        logits,
        losses,
        gradients: gradients.collect(),
    })
}

/// The row-major indices of the elements of `ranges` in a tensor of `shape`.
fn region(shape: &[usize], ranges: &[Range<usize>]) -> Vec<usize> {
    let mut indices = vec![0];
    for (extent, range) in shape.iter().zip(ranges) {
        indices = indices
            .into_iter()
            .flat_map(|index| range.clone().map(move |i| index * extent + i))
            .collect();
    }
    indices
}

/// Who holds a part: pipeline stage, then tensor-parallel rank, or expert and expert-tensor rank.
type Holder = (usize, usize, usize);

/// The gradient of every weight, by canonical name, summed over data and put together from its parts; and how far apart
/// the copies of a part are, which all ranks that hold one must agree on.
fn joined_gradients(ranks: &[RankResult], layout: &LayoutSpec) -> (HashMap<String, Vec<f32>>, f64) {
    // Over data: the ranks with the same part of the model.
    let mut summed: HashMap<(&str, Holder), (&GradientPart, Vec<f64>)> = HashMap::new();
    for (rank, found) in ranks.iter().enumerate() {
        let coords = layout.coords(rank);
        for part in &found.gradients {
            let holder = if part.is_expert {
                (coords.pp, coords.ep, coords.etp)
            } else {
                (coords.pp, coords.tp, 0)
            };
            let zeros = || (part, vec![0.0; part.values.len()]);
            let (_, sum) = summed.entry((&part.name, holder)).or_insert_with(zeros);
            sum.iter_mut()
                .zip(&part.values)
                .for_each(|(sum, value)| *sum += f64::from(*value));
        }
    }
    // Copies of a part within a stage; a weight in two stages (a tied embedding) is the sum of both.
    let mut holders: Vec<_> = summed.into_iter().collect();
    holders.sort_by_key(|((_, holder), _)| *holder);
    let mut first: HashMap<(&str, usize, &[Range<usize>]), Vec<f64>> = HashMap::new();
    let mut whole: HashMap<String, Vec<f32>> = HashMap::new();
    let mut apart: f64 = 0.0;
    for ((name, (stage, ..)), (part, sum)) in holders {
        let key = (name, stage, part.ranges.as_slice());
        if let Some(known) = first.get(&key) {
            let norm = |values: &mut dyn Iterator<Item = f64>| {
                values.map(|value| value * value).sum::<f64>().sqrt()
            };
            let size = norm(&mut known.iter().copied());
            let distance = norm(&mut known.iter().zip(&sum).map(|(a, b)| a - b));
            let relative = distance / size.max(1e-3);
            apart = if relative.is_nan() {
                f64::NAN
            } else {
                apart.max(relative)
            };
            continue;
        }
        let numel = part.global_shape.iter().product();
        let values = whole
            .entry(name.to_owned())
            .or_insert_with(|| vec![0.0; numel]);
        let places = region(&part.global_shape, &part.ranges);
        for (place, value) in places.into_iter().zip(&sum) {
            values[place] += *value as f32;
        }
        first.insert(key, sum);
    }
    (whole, apart)
}
