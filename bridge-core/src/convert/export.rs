//! Native checkpoint to Hugging Face folder.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::canonical::CanonicalSource;
use super::companions::{Companions, SkippedFile};
use super::config_edit::{add_value, replace_values};
use super::less_one::{Shift, ShiftedReader};
use super::source_record::{CARRIED_DIR, SourceRecord};
use super::transfer::{self, Quantization, Segment, SegmentReader, Sink, Transfer};
use super::{ConvertOptions, HF_DIR, Progress};
use crate::checkpoint::native::{Group, NativeCheckpoint, NativeTensor};
use crate::checkpoint::{
    Checkpoint, DEFAULT_MAX_SHARD_BYTES, RangeReader, ShardedWriter, TensorSpec, WriterOptions,
};
use crate::config::HfConfig;
use crate::dtype::DType;
use crate::error::{Error, Problems, Result};
use crate::mapping::{View, ViewPair};
use crate::plan::{ExportPlan, TensorHeader, plan_export};
use crate::quant::{QuantScheme, Quantized, fold, quantizable};
use crate::registry::Registry;

/// What an export writes.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Type to write weights as; `None` keeps the stored ones, and quantizes again what the source had quantized.
    pub dtype: Option<DType>,
    /// Scheme to quantize weights by, whatever the source's was: FP8 for the matrices of layers, MXFP4 for the experts of
    /// families that are published so. Not together with `dtype`.
    pub quantize: Option<QuantScheme>,
    /// Most bytes of tensors per file; `None` keeps the files of the source, or takes
    /// [`DEFAULT_MAX_SHARD_BYTES`] where there was none.
    pub max_shard_bytes: Option<u64>,
    /// How to work.
    pub convert: ConvertOptions,
}

/// What an export did.
#[derive(Debug)]
pub struct ExportReport {
    /// Name of the model's family.
    pub family: &'static str,
    /// The new folder.
    pub dir: PathBuf,
    /// Number of tensors written.
    pub tensors: usize,
    /// Bytes of tensors written.
    pub bytes: u64,
    /// The safetensors files written.
    pub files: Vec<String>,
    /// The type now stated in `config.json`, where it had to change.
    pub changed_dtype: Option<DType>,
    /// Files beside the weights that were left behind.
    pub skipped_files: Vec<SkippedFile>,
}

/// Exports the native checkpoint `native` (its folder, or that of one iteration) as the Hugging Face folder `out`.
///
/// An import that was not changed comes back as the same files, byte for byte. `config.json` is the source's, except
/// for the dtype key where the dtype really changed.
///
/// # Errors
/// Before anything is written: if the checkpoint cannot be read, does not fit the model, or `out` exists. While
/// writing: if the disk fails or `progress` stops it; nothing is left behind then.
pub fn export(
    native: &Path,
    out: &Path,
    registry: &Registry,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let native = NativeCheckpoint::open(native)?;
    let hf = native.dir().join(HF_DIR);
    let config = HfConfig::load(&hf)?;
    export_opened(&native, config, &hf, out, registry, options, progress)
}

/// Exports canonical weights from anywhere, of the model that `config` describes; `hf` is the folder of the files beside
/// the weights.
pub(super) fn export_opened(
    weights: &dyn CanonicalSource,
    config: HfConfig,
    hf: &Path,
    out: &Path,
    registry: &Registry,
    options: &ExportOptions,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let bridge = registry.detect(&config)?;
    let typed = bridge.config(&config)?;
    let record = SourceRecord::load(hf)?;
    let source = record.as_ref().map(SourceRecord::headers).transpose()?;
    let source_headers: Option<Vec<TensorHeader>> = source
        .as_ref()
        .map(|source| source.tensors().iter().map(TensorHeader::from).collect());
    let stored = weights.headers();
    if options.quantize.is_some() && options.dtype.is_some() {
        return Err(Error::InvalidArgument(
            "an export is either quantized or of another dtype, not both".to_owned(),
        ));
    }
    let (source_headers, from_source) = quantized_source(&config, source_headers)?;
    let quantized = match options.quantize {
        None => from_source.clone(),
        Some(scheme) => {
            let map = bridge.weights(&typed);
            quantizable(scheme, &map, &bridge.tensors(&typed), bridge.name())?
        }
    };
    let plan = plan_export(
        bridge,
        &typed,
        &stored,
        options.dtype,
        source_headers.as_deref(),
        &quantized,
    )?;
    let carried_dir = hf.join(CARRIED_DIR);
    let carried = carried_dir
        .is_dir()
        .then(|| Checkpoint::open(&carried_dir))
        .transpose()?;
    let companions = Companions::find(hf, options.convert.copy_code)?;

    let mut specs: Vec<TensorSpec> = plan
        .headers()
        .map(|h| TensorSpec::new(h.name, h.dtype, h.shape))
        .collect();
    let (mut transfers, quantizations) = transfers(weights, &plan, carried.as_ref())?;
    if let Some(carried) = &carried {
        // Scales are written with their codes, or not at all.
        let scales: HashSet<&str> = from_source
            .values()
            .map(|stored| stored.scales.name.as_str())
            .collect();
        carry(carried, &scales, &mut specs, &mut transfers);
    }
    let layout = match (&record, &source, options.max_shard_bytes) {
        (Some(record), Some(source), None) if same_names(source, &specs) => {
            Some(record.layout(source, &specs)?)
        }
        _ => None,
    };
    let (config_bytes, changed_dtype) = export_config(
        &config,
        source.as_ref(),
        &specs,
        &quantizations,
        options.quantize,
    );

    let writer = ShardedWriter::create(
        out,
        specs,
        WriterOptions {
            max_shard_bytes: options.max_shard_bytes.unwrap_or(DEFAULT_MAX_SHARD_BYTES),
            durability: options.convert.durability,
            existing: options.convert.existing,
            layout,
            ..WriterOptions::default()
        },
    )?;
    writer.add_file("config.json", &config_bytes)?;
    companions.copy(hf, writer.staging_dir())?;
    let made = transfers
        .iter()
        .chain(quantizations.iter().map(|job| &job.values));
    let bytes = made.map(Transfer::bytes).sum();
    progress.begin("export", bytes);
    let resources = options.convert.resources();
    transfer::run(&transfers, &writer, resources, progress)?;
    transfer::run_quantized(&quantizations, &writer, resources, progress)?;
    let tensors = writer.tensors().len();
    drop((transfers, quantizations));
    let dir = writer.finish()?;
    let files = Checkpoint::open(&dir)?
        .files()
        .iter()
        .map(|file| file.name().to_owned())
        .collect();
    Ok(ExportReport {
        family: bridge.name(),
        dir,
        tensors,
        bytes,
        files,
        changed_dtype,
        skipped_files: companions.skipped,
    })
}

impl Sink for ShardedWriter {
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

    fn file(&self, tensor: usize) -> usize {
        self.file_of(tensor)
    }
}

/// The tensors of the source as the model knows them, and those that were quantized by their names.
fn quantized_source(
    config: &HfConfig,
    source: Option<Vec<TensorHeader>>,
) -> Result<(Option<Vec<TensorHeader>>, HashMap<String, Quantized>)> {
    let Some(source) = source else {
        return Ok((None, HashMap::new()));
    };
    let mut problems = Problems::new();
    let folded = fold(config, &source, &mut problems);
    if !problems.is_empty() {
        return Err(Error::Config {
            file: config.origin().to_owned(),
            problems,
        });
    }
    let headers = folded.iter().map(|tensor| tensor.header.clone()).collect();
    let quantized = folded
        .into_iter()
        .filter_map(|tensor| Some((tensor.header.name, tensor.quantized?)));
    Ok((Some(headers), quantized.collect()))
}

/// What makes each foreign tensor of the plan: those that are written as they are, and those that are quantized. Targets
/// count as [`ExportPlan::headers`] does.
pub(super) fn transfers<'a>(
    weights: &'a dyn CanonicalSource,
    plan: &ExportPlan,
    carried: Option<&'a Checkpoint>,
) -> Result<(Vec<Transfer<'a>>, Vec<Quantization<'a>>)> {
    let mut transfers = Vec::with_capacity(plan.written.len());
    let mut quantizations = Vec::new();
    let mut position = 0;
    for written in &plan.written {
        let tensor = &plan.mapping.foreign[written.foreign];
        let mut segments = Vec::new();
        for piece in plan.mapping.pieces_of_foreign(written.foreign) {
            let name = &plan.mapping.canonical[piece.canonical].name;
            let (canonical, foreign) = (&piece.canonical_view, &piece.foreign_view);
            segments.extend(weights.segments(name, canonical, foreign)?);
        }
        if plan.mapping.is_less_one(written.foreign) {
            segments = segments
                .into_iter()
                .map(|segment| less_one(segment, &tensor.name, plan.rounds))
                .collect();
        }
        let transfer = Transfer {
            tensor: position,
            name: tensor.name.clone(),
            numel: tensor.shape.iter().product(),
            dtype: written.dtype,
            segments,
        };
        match &written.quantized {
            None => {
                transfers.push(transfer);
                position += 1;
            }
            Some(stored) => {
                let scales = carried.and_then(|carried| {
                    let info = carried.get(&stored.scales.name)?;
                    let fits =
                        info.shape == stored.scales.shape && info.dtype == stored.scales.dtype;
                    fits.then(|| (carried.reader(info), info.offset))
                });
                quantizations.push(Quantization {
                    values: transfer,
                    scheme: stored.scheme,
                    cols: tensor.shape.last().copied().unwrap_or(1),
                    targets: [position, position + 1],
                    stored: scales,
                });
                position += 2;
            }
        }
    }
    Ok((transfers, quantizations))
}

/// The same elements, each less one.
fn less_one<'a>(segment: Segment<'a>, name: &str, rounds: bool) -> Segment<'a> {
    Segment {
        reader: SegmentReader::Computed(Arc::new(ShiftedReader {
            inner: segment.reader,
            base: segment.base,
            dtype: segment.dtype,
            name: name.to_owned(),
            shift: Shift::Subtract,
            rounds,
        })),
        ..segment
    }
}

/// The stored elements of the view `canonical` of a native tensor, piece by piece, each with its part of `target`.
pub(super) fn stored_segments<'a>(
    native: &'a NativeCheckpoint,
    name: &str,
    stored: &NativeTensor,
    canonical: &View,
    target: &View,
) -> Result<Vec<Segment<'a>>> {
    let pair = ViewPair {
        near: canonical.clone(),
        far: target.clone(),
    };
    let mut segments = Vec::new();
    for piece in &stored.pieces {
        let region = piece.region();
        let ranges: Vec<Range<usize>> = region
            .offset
            .iter()
            .zip(&region.shape)
            .map(|(start, extent)| *start..start + extent)
            .collect();
        let parts = pair.within(&stored.shape, &ranges);
        if parts.is_empty() {
            continue;
        }
        // A piece is one row-major block, so the run of its own region is all of it.
        let mut place = None;
        native.for_each_run(Group::Model, name, &region, |run| {
            place.get_or_insert((run.reader, run.offset));
            Ok(())
        })?;
        if let Some((reader, base)) = place {
            segments.extend(parts.into_iter().map(|part| Segment {
                target: part.far,
                source: part.near,
                dtype: stored.dtype,
                reader: reader.into(),
                base,
            }));
        }
    }
    Ok(segments)
}

/// Adds the tensors that the model does not use and the import kept.
fn carry<'a>(
    carried: &'a Checkpoint,
    scales: &HashSet<&str>,
    specs: &mut Vec<TensorSpec>,
    transfers: &mut Vec<Transfer<'a>>,
) {
    let unused = carried.tensors().iter();
    for info in unused.filter(|info| !scales.contains(info.name.as_str())) {
        let numel = info.shape.iter().product();
        let view = View::whole(&[numel]);
        transfers.push(Transfer {
            tensor: specs.len(),
            name: info.name.clone(),
            numel,
            dtype: info.dtype,
            segments: vec![Segment {
                target: view.clone(),
                source: view,
                dtype: info.dtype,
                reader: carried.reader(info).into(),
                base: info.offset,
            }],
        });
        specs.push(TensorSpec::new(
            info.name.as_str(),
            info.dtype,
            info.shape.as_slice(),
        ));
    }
}

fn same_names(source: &Checkpoint, specs: &[TensorSpec]) -> bool {
    source.tensors().len() == specs.len()
        && specs.iter().all(|spec| source.get(&spec.name).is_some())
}

/// The bytes of `config.json`, and the dtype that was put into it, if it had to change.
fn export_config(
    config: &HfConfig,
    source: Option<&Checkpoint>,
    specs: &[TensorSpec],
    quantizations: &[Quantization<'_>],
    scheme: Option<QuantScheme>,
) -> (Vec<u8>, Option<DType>) {
    let written = main_dtype(specs.iter().map(|spec| (spec.dtype, spec.shape.as_slice())));
    let had = match source {
        Some(source) => main_dtype(
            source
                .tensors()
                .iter()
                .map(|info| (info.dtype, info.shape.as_slice())),
        ),
        None => config.reader().dtype(),
    };
    let mut json = config.raw().to_vec();
    // What is not quantized any more must not say that it is, and the other way round.
    let settings = match scheme {
        Some(scheme) => Some(scheme.settings().to_string()),
        None => quantizations.is_empty().then(|| "null".to_owned()),
    };
    if let Some(settings) = settings {
        match replace_values(&json, &["quantization_config"], &settings) {
            Some(edited) => json = edited,
            None if scheme.is_some() => json = add_value(&json, "quantization_config", &settings),
            None => {}
        }
    }
    let name = match written {
        Some(DType::F64) => "\"float64\"",
        Some(DType::F32) => "\"float32\"",
        Some(DType::F16) => "\"float16\"",
        Some(DType::BF16) => "\"bfloat16\"",
        _ => return (json, None),
    };
    if written == had {
        return (json, None);
    }
    match replace_values(&json, &["dtype", "torch_dtype"], name) {
        Some(edited) if edited != json => (edited, written),
        _ => (json, None),
    }
}

/// The type of most elements.
fn main_dtype<'a>(tensors: impl Iterator<Item = (DType, &'a [usize])>) -> Option<DType> {
    let mut counts: HashMap<DType, u64> = HashMap::new();
    for (dtype, shape) in tensors {
        *counts.entry(dtype).or_default() +=
            shape.iter().map(|extent| *extent as u64).product::<u64>();
    }
    counts
        .into_iter()
        .max_by_key(|(dtype, count)| (*count, *dtype))
        .map(|(dtype, _)| dtype)
}
