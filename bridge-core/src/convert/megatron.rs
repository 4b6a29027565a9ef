//! Canonical weights to a Megatron-Core checkpoint.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::canonical::CanonicalSource;
use super::companions::{Companions, SkippedFile, write_new};
use super::endpoints::ConvertReport;
use super::export::{ExportOptions, transfers};
use super::transfer::{self, Sink, Transfer};
use super::{HF_DIR, Progress};
use crate::checkpoint::megatron::{
    MegatronBridge, MegatronForm, MegatronTensor, MegatronWriter, MegatronWriterOptions,
    RUN_CONFIG_FILE, RunConfig, extra_states, stacked_dims,
};
use crate::checkpoint::{RangeReader, TensorSpec};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::plan::plan_export;
use crate::registry::Registry;

/// Writes a Megatron-Core checkpoint, iteration 0, of the model that `config` describes. `hf` is the folder of the files
/// beside the weights, which go along into a folder of that name in the iteration's, so that the way back needs nothing
/// else.
pub(super) fn write_megatron(
    weights: &dyn CanonicalSource,
    config: &HfConfig,
    hf: &Path,
    out: &Path,
    registry: &Registry,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let family = registry.detect(config)?;
    let typed = family.config(config)?;
    let form = MegatronForm::to_write(&typed);
    let bridge = MegatronBridge::new(family, form);
    bridge.check(&typed)?;
    if options.quantize.is_some() {
        return Err(Error::InvalidArgument(
            "a Megatron-Core checkpoint is written in plain types; choose bf16, f16 or f32"
                .to_owned(),
        ));
    }
    let stored = weights.headers();
    let plan = plan_export(
        &bridge,
        &typed,
        &stored,
        options.dtype,
        None,
        &HashMap::new(),
    )?;
    let mut companions = Companions::find(hf, options.convert.copy_code)?;
    let tensors: Vec<MegatronTensor> = plan
        .headers()
        .map(|header| MegatronTensor {
            stacked: stacked_dims(&header.name, form.layer_names),
            spec: TensorSpec::new(header.name, header.dtype, header.shape),
        })
        .collect();
    let (transfers, _) = transfers(weights, &plan, None)?;
    // Few and small, and it is better to know before anything is written that one cannot be.
    let written = plan.written.iter().zip(&transfers);
    for (_, transfer) in written.filter(|(tensor, _)| plan.mapping.is_less_one(tensor.foreign)) {
        transfer.read(options.convert.resources())?;
    }
    let objects = extra_states(&typed, form);
    let writer = MegatronWriter::create(
        out,
        tensors,
        &objects,
        MegatronWriterOptions {
            iteration: 0,
            layer_names: form.layer_names,
            durability: options.convert.durability,
            existing: options.convert.existing,
        },
    )?;
    let beside = writer.iteration_dir().join(HF_DIR);
    fs::create_dir(&beside).map_err(|source| Error::io("create folder", &beside, source))?;
    write_new(beside.join("config.json"), config.raw())?;
    companions.copy(hf, &beside)?;
    let dtype = plan.headers().next().map(|header| header.dtype);
    let run_config = RunConfig {
        model: typed,
        dtype,
    };
    match run_config.to_yaml() {
        Ok(yaml) => writer.add_file(RUN_CONFIG_FILE, yaml.as_bytes())?,
        Err(_) => companions.skipped.push(SkippedFile {
            name: RUN_CONFIG_FILE.to_owned(),
            reason: "Megatron-Bridge has no keywords that say all of this model's config",
        }),
    }
    let bytes = transfers.iter().map(Transfer::bytes).sum();
    progress.begin("write", bytes);
    transfer::run(&transfers, &writer, options.convert.resources(), progress)?;
    let count = transfers.len();
    drop(transfers);
    Ok(ConvertReport {
        family: family.name(),
        dir: writer.finish()?,
        tensors: count,
        bytes,
        skipped_files: companions.skipped,
    })
}

impl Sink for MegatronWriter {
    fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.write_at(tensor, offset, bytes)?)
    }

    fn copy(
        &self,
        tensor: usize,
        offset: u64,
        reader: &dyn RangeReader,
        start: u64,
        len: u64,
    ) -> Result<()> {
        Ok(self.copy_from(tensor, offset, reader, start, len)?)
    }
}
