//! The proof: import, cut for a layout, export, compare every byte.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::export::{ExportOptions, export_opened};
use super::import::import;
use super::reshard::reshard;
use super::{ConvertOptions, HF_DIR, Progress};
use crate::checkpoint::native::NativeCheckpoint;
use crate::checkpoint::{Checkpoint, RangeReader, TensorInfo};
use crate::config::HfConfig;
use crate::error::{Error, Result};
use crate::layout::LayoutSpec;
use crate::registry::Registry;

/// A tensor or file that did not come back as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mismatch {
    /// The tensor or file.
    pub name: String,
    /// What differs.
    pub problem: String,
}

/// What a round trip found.
#[derive(Debug, Clone, Serialize)]
pub struct RoundtripReport {
    /// Model family.
    pub family: String,
    /// The layout in between.
    pub layout: LayoutSpec,
    /// Number of tensors compared.
    pub tensors: usize,
    /// Bytes of tensors compared.
    pub bytes: u64,
    /// Whether `config.json` came back byte for byte.
    pub config_identical: bool,
    /// Safetensors files and their index that came back byte for byte, headers included.
    pub identical_files: usize,
    /// Safetensors files and index in the source.
    pub files: usize,
    /// Everything that differs in tensors or `config.json`.
    pub mismatches: Vec<Mismatch>,
}

impl RoundtripReport {
    /// Whether every tensor and `config.json` came back byte for byte.
    pub fn passed(&self) -> bool {
        self.mismatches.is_empty()
    }
}

/// Imports the model in `hf_dir`, writes it again as the ranks of `layout` would, exports that, and compares every
/// tensor and `config.json` with the source.
///
/// Works in a temporary folder in `work_dir`, or else beside `hf_dir`; it takes room for two copies of the model and is
/// gone in the end.
///
/// # Errors
/// If the model cannot be converted at all. Differences are no error but findings of the report.
pub fn roundtrip(
    hf_dir: &Path,
    registry: &Registry,
    layout: &LayoutSpec,
    work_dir: Option<&Path>,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<RoundtripReport> {
    let config = HfConfig::load(hf_dir)?;
    let bridge = registry.detect(&config)?;
    let typed = bridge.config(&config)?;
    let tensors = bridge.tensors(&typed);
    layout.validate(&tensors, typed.num_hidden_layers)?;

    let beside =
        fs::canonicalize(hf_dir).map_err(|source| Error::io("open folder", hf_dir, source))?;
    let base = work_dir.or(beside.parent()).unwrap_or(&beside);
    let work = tempfile::Builder::new()
        .prefix(".roundtrip-")
        .tempdir_in(base)
        .map_err(|source| Error::io("create a temporary folder in", base, source))?;
    let imported = import(
        hf_dir,
        &work.path().join("imported"),
        registry,
        options,
        progress,
    )?;
    let native = NativeCheckpoint::open(&imported.dir)?;
    let cut = work.path().join("cut");
    reshard(
        &native,
        &cut,
        &tensors,
        typed.num_hidden_layers,
        layout,
        options,
        progress,
    )?;
    // The pieces now hold everything; the first copy makes room for the export.
    drop(native);
    let model_dir = imported.dir.join("model");
    fs::remove_dir_all(&model_dir).map_err(|source| Error::io("remove", &model_dir, source))?;
    let export_options = ExportOptions {
        convert: options.clone(),
        ..ExportOptions::default()
    };
    let hf = imported.dir.join(HF_DIR);
    let exported = work.path().join("exported");
    export_opened(
        &NativeCheckpoint::open(&cut)?,
        HfConfig::load(&hf)?,
        &hf,
        &exported,
        registry,
        &export_options,
        progress,
    )?;

    let mut report = RoundtripReport {
        family: bridge.name().to_owned(),
        layout: *layout,
        tensors: 0,
        bytes: 0,
        config_identical: true,
        identical_files: 0,
        files: 0,
        mismatches: Vec::new(),
    };
    compare_tensors(hf_dir, &exported, &mut report, progress)?;
    if HfConfig::load(&exported)?.raw() != config.raw() {
        report.config_identical = false;
        report.mismatch("config.json", "its bytes differ");
    }
    Ok(report)
}

impl RoundtripReport {
    fn mismatch(&mut self, name: &str, problem: impl Into<String>) {
        self.mismatches.push(Mismatch {
            name: name.to_owned(),
            problem: problem.into(),
        });
    }
}

fn compare_tensors(
    before: &Path,
    after: &Path,
    report: &mut RoundtripReport,
    progress: &dyn Progress,
) -> Result<()> {
    let (before, after) = (Checkpoint::open(before)?, Checkpoint::open(after)?);
    progress.begin("compare", before.total_bytes());
    for old in before.tensors() {
        let Some(new) = after.get(&old.name) else {
            report.mismatch(&old.name, "it is missing from the export");
            continue;
        };
        report.tensors += 1;
        report.bytes += old.len;
        if (old.dtype, &old.shape) != (new.dtype, &new.shape) {
            report.mismatch(
                &old.name,
                format!(
                    "it was {} {:?} and came back as {} {:?}",
                    old.dtype, old.shape, new.dtype, new.shape
                ),
            );
        } else if let Some(at) = first_difference(&before, old, &after, new, progress)? {
            report.mismatch(&old.name, format!("byte {at} of {} differs", old.len));
        }
    }
    for new in after
        .tensors()
        .iter()
        .filter(|new| before.get(&new.name).is_none())
    {
        report.mismatch(&new.name, "it was not in the source");
    }
    report.files = before.files().len() + usize::from(before.index_json().is_some());
    report.identical_files =
        usize::from(before.index_json().is_some() && before.index_json() == after.index_json());
    for old in before.files() {
        // Equal headers and equal tensors make equal files.
        let same = after
            .files()
            .iter()
            .find(|new| new.name() == old.name())
            .is_some_and(|new| {
                let headers = (
                    crate::checkpoint::Header::read_json(old.reader()),
                    crate::checkpoint::Header::read_json(new.reader()),
                );
                matches!(headers, (Ok(old), Ok(new)) if old == new)
            });
        let intact = |entry: &crate::checkpoint::HeaderEntry| {
            report
                .mismatches
                .iter()
                .all(|mismatch| mismatch.name != entry.spec.name)
        };
        report.identical_files += usize::from(same && old.header().entries.iter().all(intact));
    }
    Ok(())
}

/// The first byte in which two tensors of equal size differ.
fn first_difference(
    before: &Checkpoint,
    old: &TensorInfo,
    after: &Checkpoint,
    new: &TensorInfo,
    progress: &dyn Progress,
) -> Result<Option<u64>> {
    const CHUNK: u64 = 4 << 20;
    let mut buffers = (Vec::new(), Vec::new());
    let mut at = 0;
    while at < old.len {
        let len = CHUNK.min(old.len - at) as usize;
        let read =
            |checkpoint: &Checkpoint, info: &TensorInfo, buffer: &mut Vec<u8>| -> Result<()> {
                buffer.resize(len, 0);
                let reader: &dyn RangeReader = checkpoint.reader(info);
                Ok(reader.read_exact_at(info.offset + at, buffer)?)
            };
        read(before, old, &mut buffers.0)?;
        read(after, new, &mut buffers.1)?;
        if buffers.0 != buffers.1 {
            let same = buffers
                .0
                .iter()
                .zip(&buffers.1)
                .take_while(|(a, b)| a == b)
                .count();
            return Ok(Some(at + same as u64));
        }
        if !progress.advance(&old.name, len as u64) {
            return Err(Error::Cancelled);
        }
        at += len as u64;
    }
    Ok(None)
}
