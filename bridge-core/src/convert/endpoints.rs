//! Conversions between any two of the three forms, streaming straight through.

use std::path::{Path, PathBuf};

use super::companions::SkippedFile;
use super::export::{ExportOptions, ExportReport, export_opened};
use super::import::import_opened;
use super::load::HfModel;
use super::megatron::write_megatron;
use super::run_config::config_of_run;
use super::{HF_DIR, Progress};
use crate::checkpoint::megatron::{RUN_CONFIG_FILE, iteration_dir};
use crate::checkpoint::native::NativeCheckpoint;
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::layout::LayoutSpec;
use crate::registry::Registry;

/// A place that holds a model, or will.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelPlace {
    /// A Hugging Face folder.
    Hf(PathBuf),
    /// A native checkpoint: its folder, or that of one iteration.
    Native(PathBuf),
    /// A Megatron-Core checkpoint (`torch_dist`).
    Megatron {
        /// Its folder, or that of one iteration.
        dir: PathBuf,
        /// Folder (or file) of the Hugging Face config of the model and, in a folder, of the files beside its weights.
        /// Not needed where the checkpoint has an `hf` folder of its own, as those written here have, or a
        /// `run_config.yaml`, as those of Megatron-Bridge have.
        hf_config: Option<PathBuf>,
    },
}

/// What a conversion did.
#[derive(Debug)]
pub struct ConvertReport {
    /// Name of the model's family.
    pub family: &'static str,
    /// The new folder.
    pub dir: PathBuf,
    /// Number of tensors written.
    pub tensors: usize,
    /// Bytes of tensors written.
    pub bytes: u64,
    /// Files beside the weights that were left behind.
    pub skipped_files: Vec<SkippedFile>,
}

impl From<ExportReport> for ConvertReport {
    fn from(done: ExportReport) -> Self {
        Self {
            family: done.family,
            dir: done.dir,
            tensors: done.tensors,
            bytes: done.bytes,
            skipped_files: done.skipped_files,
        }
    }
}

/// Converts the model at `from` to a new folder `to`.
///
/// # Errors
/// Before anything is written: if the source cannot be read or does not fit the model, if the target cannot hold it, or
/// exists. While writing: if the disk fails or `progress` stops it; nothing is left behind then.
pub fn convert(
    from: &ModelPlace,
    to: &ModelPlace,
    registry: &Registry,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    if let ModelPlace::Native(dir) = from {
        let weights = NativeCheckpoint::open(dir)?;
        let hf = weights.dir().join(HF_DIR);
        let config = HfConfig::load(&hf)?;
        return match to {
            ModelPlace::Hf(out) => {
                Ok(export_opened(&weights, config, &hf, out, registry, options, progress)?.into())
            }
            ModelPlace::Megatron { dir: out, .. } => {
                write_megatron(&weights, &config, &hf, out, registry, options, progress)
            }
            ModelPlace::Native(_) => Err(Error::InvalidArgument(
                "a native checkpoint loads at any layout as it is; there is nothing to convert"
                    .to_owned(),
            )),
        };
    }
    let (mut model, hf) = open(from, registry, &LayoutSpec::default())?;
    if options.dtype.is_some() {
        model.round();
    }
    model.check_values()?;
    match to {
        ModelPlace::Native(out) => {
            if options.dtype.is_some() || options.quantize.is_some() {
                return Err(Error::InvalidArgument(
                    "a native checkpoint keeps the dtypes of its source; choose one when it is exported"
                        .to_owned(),
                ));
            }
            let family = model.bridge().name();
            let done = import_opened(model, Some(&hf), out, &options.convert, progress)?;
            Ok(ConvertReport {
                family,
                dir: done.dir,
                tensors: done.plan.tensors.len(),
                bytes: done.bytes,
                skipped_files: done.skipped_files,
            })
        }
        ModelPlace::Hf(out) => Ok(export_opened(
            &model,
            model.hf_config().clone(),
            &hf,
            out,
            registry,
            options,
            progress,
        )?
        .into()),
        ModelPlace::Megatron { dir: out, .. } => write_megatron(
            &model,
            model.hf_config(),
            &hf,
            out,
            registry,
            options,
            progress,
        ),
    }
}

/// Opens the model at a foreign place, to be held at `layout`. Returns also the folder of its config and of the files
/// beside its weights.
///
/// # Errors
/// As [`HfModel::open`] and [`HfModel::open_megatron`]; for a native checkpoint, which is not opened this way.
pub fn open(
    place: &ModelPlace,
    registry: &Registry,
    layout: &LayoutSpec,
) -> Result<(HfModel, PathBuf)> {
    match place {
        ModelPlace::Hf(dir) => Ok((HfModel::open(dir, registry, layout)?, dir.clone())),
        ModelPlace::Megatron { dir, hf_config } => {
            let (config, folder) = match hf_config {
                Some(path) => given_config(path)?,
                None => own_config(dir, registry)?,
            };
            let model = HfModel::open_megatron(dir, config, registry, layout)?;
            Ok((model, folder))
        }
        ModelPlace::Native(dir) => Err(Error::InvalidArgument(format!(
            "{} is a native checkpoint, not a foreign one",
            dir.display()
        ))),
    }
}

/// A config that was named, and the folder of the files beside it.
fn given_config(path: &Path) -> Result<(HfConfig, PathBuf)> {
    let config = HfConfig::load(path)?;
    let folder = if path.is_file() {
        path.parent().map(Path::to_path_buf).unwrap_or_default()
    } else {
        path.to_path_buf()
    };
    Ok((config, folder))
}

/// The config that a Megatron-Core checkpoint has of its own, and the folder of the tokenizer beside it: what was written
/// here has both in one folder, what Megatron-Bridge wrote a `run_config.yaml` and a folder `tokenizer`.
fn own_config(dir: &Path, registry: &Registry) -> Result<(HfConfig, PathBuf)> {
    let iteration = iteration_dir(dir)?;
    let own = iteration.join(HF_DIR);
    if own.join("config.json").is_file() {
        return given_config(&own);
    }
    let run_config = iteration.join(RUN_CONFIG_FILE);
    if run_config.is_file() {
        let config = config_of_run(&run_config, registry)?;
        let tokenizer = iteration.join("tokenizer");
        let folder = if tokenizer.is_dir() {
            tokenizer
        } else {
            iteration
        };
        return Ok((config, folder));
    }
    Err(Error::InvalidArgument(format!(
        "{} does not say which model it holds: give the folder of its Hugging Face config.json (and tokenizer) with \
         --hf-config",
        iteration.display()
    )))
}
