//! A model against reference numbers, run as training runs it: through the schedule of its layout, the exchanges between
//! its ranks and the sums of their gradients.
//!
//! Only the weights' update is left out. Each row of the reference is a micro-batch of its own, and rows without any token
//! to predict are added until a pipeline is full, so that 1F1B and the interleaved schedule run as they do in a step.
//! Ranks are threads ([`Verification::on_threads`]) or processes ([`Verification::on_rank`]).

mod parts;
mod step;

#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::convert::HfModel;
use bridge_core::{LayoutSpec, Registry};
use bridge_models::generate::check_generation_layout;
use bridge_models::verify::{
    Outputs, Reference, VerifyOptions, VerifyReport, compare_mtp_logits, greedy_texts,
    record_greedy,
};
use bridge_models::weights::load_hf_parallel;
use bridge_models::{Decoder, DtypePolicy, ParallelOptions, check_layout};
use bridge_ops::Ops;
use bridge_parallel::{ParallelContext, run_threads};

use self::parts::{Gathered, Parts, gather};
use self::step::Rows;
use crate::agree;
use crate::error::{Error, Result};

/// A comparison whose folders are read and checked, for any number of ranks to take part in.
pub struct Verification {
    folder: HfModel,
    reference: Reference,
    options: VerifyOptions,
    layout: LayoutSpec,
    parallel: ParallelOptions,
}

/// How a comparison ended on one rank.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Whether everything that was compared is within its tolerance: the same on every rank.
    pub passed: bool,
    /// What was compared, on rank 0.
    pub report: Option<VerifyReport>,
}

impl Verification {
    /// Reads the headers of the Hugging Face folder `hf` and the reference folder `reference`, and checks that the model
    /// can be divided as `layout` says, with what it leaves open in `parallel`.
    ///
    /// # Errors
    /// If a folder cannot be read, they do not fit each other, or the model cannot be divided that way.
    pub fn open(
        registry: &Registry,
        hf: &Path,
        reference: &Path,
        options: &VerifyOptions,
        layout: &LayoutSpec,
        parallel: &ParallelOptions,
    ) -> Result<Self> {
        let folder = HfModel::open(hf, registry, layout)?;
        check_layout(folder.config(), layout, parallel)?;
        let found = Self {
            reference: Reference::load(reference)?,
            folder,
            options: *options,
            layout: *layout,
            parallel: parallel.clone(),
        };
        if found.reference.logits.is_some() || !found.continues_texts() {
            found.reference.inputs(found.folder.config().vocab_size)?;
        }
        Ok(found)
    }

    /// Whether greedy texts are compared: generation divides a model by heads and experts alone.
    fn continues_texts(&self) -> bool {
        self.reference.greedy.is_some() && check_generation_layout(&self.layout).is_ok()
    }

    /// Runs every rank as a thread of this process, on the backend's default device. `timeout` is how long a rank waits
    /// for another; `backend` is what the report calls the backend.
    ///
    /// # Errors
    /// If weights cannot be read, or a rank fails. A comparison that does not hold is no error.
    pub fn on_threads<B: Ops>(self, timeout: Duration, backend: &str) -> Result<VerifyReport> {
        let (layout, backend) = (self.layout, backend.to_owned());
        let work = move |ctx: Arc<ParallelContext<B>>| self.on_rank(&ctx, &backend);
        let verdicts = run_threads::<B, Verdict, Error>(layout, timeout, work)?;
        let first = verdicts.into_iter().next();
        first
            .and_then(|verdict| verdict.report)
            .ok_or_else(|| Error::Parallel("no rank gave a report".to_owned()))
    }

    /// Takes part as one rank. Every rank calls this.
    ///
    /// # Errors
    /// If weights cannot be read, or a rank fails. A comparison that does not hold is no error.
    pub fn on_rank<B: Ops>(
        &self,
        parallel: &Arc<ParallelContext<B>>,
        backend: &str,
    ) -> Result<Verdict> {
        let loaded = load_hf_parallel(&self.folder, DtypePolicy::Float32, parallel, &self.parallel);
        let model: Decoder<B> = agree::all_well(parallel, loaded.map_err(Error::from))?;
        let rows = match &self.reference.logits {
            Some(_) => Some(Rows::new(&self.reference, self.folder.config())?),
            None => None,
        };
        let parts = match &rows {
            Some(rows) => rows.step(&model, parallel, &self.parallel, &self.options)?,
            None => Parts::default(),
        };
        let gathered = gather(parallel, parts)?;
        let texts = match &self.reference.greedy {
            // Ranks choose the same tokens from the same logits.
            Some(greedy) if self.continues_texts() => Some(greedy_texts(&model, greedy)?),
            _ => None,
        };
        parallel.health()?;
        let report = gathered
            .map(|gathered| self.report(&model, rows.as_ref(), gathered, texts, backend))
            .transpose();
        let report = agree::all_well(parallel, report)?;
        let passed = report.as_ref().is_some_and(|report| report.passed);
        let passed = agree::from_first(parallel, vec![u8::from(passed)])? == [1];
        Ok(Verdict { passed, report })
    }

    fn report<B: Ops>(
        &self,
        model: &Decoder<B>,
        rows: Option<&Rows>,
        gathered: Gathered,
        texts: Option<[Vec<u32>; 2]>,
        backend: &str,
    ) -> Result<VerifyReport> {
        let tolerances = &self.options.tolerances;
        let layout = self.layout.to_string();
        let mut report = VerifyReport::new(self.folder.bridge().name(), &layout, backend, "f32");
        if let Some(rows) = rows {
            let outputs = Outputs {
                logits: rows.whole_logits(&gathered.logits, &self.layout),
                loss: gathered.loss,
                gradients: self.options.gradients.then_some(gathered.gradients),
            };
            outputs.compare(&self.folder, &self.reference, tolerances, &mut report)?;
            if self.options.gradients && self.layout.world_size() > 1 {
                report.compare(
                    "copies of a gradient on several ranks, largest relative distance",
                    gathered.apart,
                    tolerances.gradient,
                );
            }
            if self.layout.world_size() == 1 {
                compare_mtp_logits(model, &self.reference, tolerances, &mut report)?;
            }
        }
        if let (Some(texts), Some(expected)) = (texts, &self.reference.greedy) {
            record_greedy(&texts, expected, &mut report);
        }
        if report.comparisons.is_empty() {
            return Err(self
                .reference
                .lacks("neither logits nor a greedy text")
                .into());
        }
        Ok(report)
    }
}
