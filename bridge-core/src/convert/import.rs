//! Hugging Face folder to native checkpoint.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::companions::{Companions, SkippedFile, write_new};
use super::load::HfModel;
use super::piece_files::PieceFiles;
use super::source_record::{CARRIED_DIR, SourceRecord};
use super::transfer::{self, Transfer};
use super::{ConvertOptions, HF_DIR, Progress};
use crate::checkpoint::native::{NativeWriter, PieceSpec, list_iterations};
use crate::checkpoint::{
    Checkpoint, CheckpointError, Existing, ShardedWriter, TensorSpec, WriterOptions,
};
use crate::error::{Error, Result};
use crate::layout::LayoutSpec;
use crate::mapping::ForeignRole;
use crate::plan::Plan;
use crate::registry::Registry;

/// What an import did.
#[derive(Debug)]
pub struct ImportReport {
    /// The folder of the new checkpoint's only iteration.
    pub dir: PathBuf,
    /// The plan that was carried out.
    pub plan: Plan,
    /// Bytes of tensors written.
    pub bytes: u64,
    /// Files beside the weights that were left behind.
    pub skipped_files: Vec<SkippedFile>,
}

/// Imports the model in the Hugging Face folder `hf_dir` as the native checkpoint `out`, iteration 0.
///
/// `hf/` in the checkpoint keeps the source's `config.json` and the files beside its weights verbatim, a record of its
/// safetensors files, and the tensors that the model does not use, so that an export can give everything back.
///
/// # Errors
/// Before anything is written: if the source cannot be read, does not fit together, or `out` exists. While writing: if
/// the disk fails, two stored copies of a tied weight differ, or `progress` stops it; nothing is left behind then.
pub fn import(
    hf_dir: &Path,
    out: &Path,
    registry: &Registry,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<ImportReport> {
    let model = HfModel::open(hf_dir, registry, &LayoutSpec::default())?;
    import_opened(model, Some(hf_dir), out, options, progress)
}

/// Imports an open model. `companions_dir` is the folder of the files to take along beside its weights.
pub(super) fn import_opened(
    model: HfModel,
    companions_dir: Option<&Path>,
    out: &Path,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<ImportReport> {
    check_target(out, options.existing)?;
    let companions = match companions_dir {
        Some(dir) => Companions::find(dir, options.copy_code)?,
        None => Companions::default(),
    };
    // Only safetensors files can come back byte for byte.
    let files = model.source().safetensors();
    let record = files.map(SourceRecord::of).transpose()?;

    let writer = NativeWriter::begin(out, 0, options.durability)?;
    let hf = writer.staging_dir().join(HF_DIR);
    fs::create_dir_all(&hf).map_err(|source| Error::io("create folder", &hf, source))?;
    write_new(hf.join("config.json"), model.hf_config().raw())?;
    if let Some(dir) = companions_dir {
        companions.copy(dir, &hf)?;
    }
    if let (Some(record), Some(files)) = (record, files) {
        record.save(&hf)?;
        carry_ignored(&model, files, &hf.join(CARRIED_DIR), options)?;
    }

    let bytes = model.plan().total_bytes;
    progress.begin("import", bytes);
    let order = by_place(&model);
    let tensors = &model.plan().tensors;
    let pieces = order.iter().map(|index| {
        let tensor = &tensors[*index];
        let (name, shape) = (tensor.canonical.as_str(), tensor.shape.as_slice());
        (
            PieceSpec::whole(name, tensor.dtype, shape),
            tensor.dtype.byte_len(shape).unwrap_or(0),
        )
    });
    let files = PieceFiles::create(&writer, parts(pieces.collect()))?;
    let transfers: Vec<Transfer<'_>> = order
        .iter()
        .enumerate()
        .map(|(piece, index)| model.transfer(*index, &whole(&tensors[*index].shape), piece))
        .collect();
    transfer::run(&transfers, &files, options.resources(), progress)?;
    drop(transfers);
    check_tied(&model, options, progress)?;
    let dir = files.finish(writer)?;
    Ok(ImportReport {
        dir,
        bytes,
        skipped_files: companions.skipped,
        plan: model.into_plan(),
    })
}

/// Cuts the pieces, each with its bytes, into files of about equal size. Several, because a file is locked while it is
/// written, so that two threads are faster in two; and few, whatever the size of the model. The same for any number of
/// threads.
fn parts(pieces: Vec<(PieceSpec, u64)>) -> Vec<Vec<PieceSpec>> {
    const WORTH_A_FILE: u64 = 256 << 20;
    const MOST_FILES: u64 = 8;
    let total: u64 = pieces.iter().map(|(_, bytes)| bytes).sum();
    let count = (total / WORTH_A_FILE).clamp(1, MOST_FILES);
    let mut parts: Vec<Vec<PieceSpec>> = Vec::new();
    let (mut before, mut current) = (0u64, None);
    for (piece, bytes) in pieces {
        // By its middle, so that no part is empty but for those that a single large piece spans.
        let middle = u128::from(before) + u128::from(bytes / 2);
        let part = middle * u128::from(count) / u128::from(total.max(1));
        if current != Some(part) {
            current = Some(part);
            parts.push(Vec::new());
        }
        if let Some(part) = parts.last_mut() {
            part.push(piece);
        }
        before += bytes;
    }
    parts
}

pub(super) fn whole(shape: &[usize]) -> Vec<Range<usize>> {
    shape.iter().map(|extent| 0..*extent).collect()
}

/// A new checkpoint, or one that holds nothing but an earlier import: a training run is never overwritten by one.
fn check_target(out: &Path, existing: Existing) -> Result<()> {
    let occupied = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(Error::io("open folder", out, error)),
    };
    if !occupied {
        return Ok(());
    }
    let only_import = || {
        Ok::<bool, Error>(
            list_iterations(out)?
                .iter()
                .map(|(number, _)| *number)
                .eq([0]),
        )
    };
    match existing {
        Existing::Replace if only_import()? => Ok(()),
        Existing::Replace => Err(CheckpointError::NotReplaceable {
            path: out.to_path_buf(),
        }
        .into()),
        Existing::Refuse => Err(CheckpointError::OutputExists {
            path: out.to_path_buf(),
        }
        .into()),
    }
}

/// The canonical tensors in the order in which their bytes lie in the source, so that both files are walked forwards.
fn by_place(model: &HfModel) -> Vec<usize> {
    let mut order: Vec<usize> = (0..model.plan().tensors.len()).collect();
    order.sort_by_key(|index| {
        let name = model.plan().tensors[*index].foreign.first();
        name.and_then(|name| model.place_of(name))
    });
    order
}

/// Keeps the tensors that the model does not use, for the export, and the scales of quantized ones.
fn carry_ignored(
    model: &HfModel,
    files: &Checkpoint,
    dir: &Path,
    options: &ConvertOptions,
) -> Result<()> {
    let names: Vec<&str> = model
        .plan()
        .ignored
        .iter()
        .map(|tensor| tensor.name.as_str())
        .chain(
            model
                .plan()
                .quantized_parts()
                .map(|stored| stored.scales.name.as_str()),
        )
        .collect();
    let infos: Vec<_> = names.iter().filter_map(|name| files.get(name)).collect();
    if infos.is_empty() {
        return Ok(());
    }
    let specs = infos
        .iter()
        .map(|info| TensorSpec::new(info.name.as_str(), info.dtype, info.shape.as_slice()));
    let writer_options = WriterOptions {
        durability: options.durability,
        ..WriterOptions::default()
    };
    let writer = ShardedWriter::create(dir, specs.collect(), writer_options)?;
    for (position, info) in infos.iter().enumerate() {
        writer.copy_from(position, 0, files.reader(info), info.offset, info.len)?;
    }
    writer.finish()?;
    Ok(())
}

/// Where a tied weight is stored twice, one copy is imported; the other must be equal, or it would be lost.
fn check_tied(model: &HfModel, options: &ConvertOptions, progress: &dyn Progress) -> Result<()> {
    let (mapping, plan) = (model.plan().mapping(), model.plan());
    let mut pairs = Vec::new();
    for (foreign, tensor) in mapping.foreign.iter().enumerate() {
        let ForeignRole::TiedCopy { of } = tensor.role else {
            continue;
        };
        let imported = plan
            .sources(of)
            .iter()
            .any(|piece| piece.foreign == foreign);
        if !imported && model.source().has(&tensor.name) {
            let mut copy = model.tied_transfer(of, foreign);
            copy.name = tensor.name.clone();
            pairs.push((copy, model.transfer(of, &whole(&plan.tensors[of].shape), 0)));
        }
    }
    if pairs.is_empty() {
        return Ok(());
    }
    progress.begin(
        "compare tied weights",
        pairs.iter().map(|(copy, _)| copy.bytes()).sum(),
    );
    let differing = Mutex::new(None);
    transfer::compare(&pairs, options.resources(), progress, &|name| {
        differing
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .get_or_insert(name.to_owned());
    })?;
    match differing
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
    {
        None => Ok(()),
        Some(name) => Err(Error::TiedWeightsDiffer(format!(
            "tensor `{name}` of {} differs from the weight that the config ties it to; set tie_word_embeddings to \
             false in config.json if it is a weight of its own, or remove it from the checkpoint",
            model.source().describe()
        ))),
    }
}
