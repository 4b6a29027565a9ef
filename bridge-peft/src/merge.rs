//! Merging adapters into the weights of a checkpoint.

use std::path::Path;

use bridge_core::checkpoint::native::{Group, NativeCheckpoint, NativeWriter, PieceSpec};
use bridge_core::convert::{
    ConvertOptions, ExportOptions, ExportReport, HF_DIR, Progress, export, import,
};
use bridge_core::dtype::{decode_f32, encode_f32};
use bridge_core::{ModelBridge, Registry};
use bridge_models::weights::native_config;
use rayon::prelude::*;

use crate::config::AdapterConfig;
use crate::error::{Error, Result};
use crate::weights::{AdapterWeights, Factors};

/// Makes a weight `[out, in]` the adapted one, in fp32: `W + s B A`, and of DoRA its rows brought to their lengths.
///
/// # Panics
/// If the sizes do not fit together.
pub fn merge_weight(weight: &mut [f32], config: &AdapterConfig, factors: &Factors) {
    let (dim, scale) = (config.dim, config.scale() as f32);
    let columns = factors.a.len() / dim;
    assert_eq!(
        weight.len(),
        columns * (factors.b.len() / dim),
        "an adapter of [{}, {dim}] x [{dim}, {columns}] for a weight of {} elements",
        factors.b.len() / dim,
        weight.len()
    );
    let rows = weight.par_chunks_mut(columns).enumerate();
    rows.for_each(|(index, row)| {
        let b = &factors.b[index * dim..(index + 1) * dim];
        let mut delta = vec![0.0f32; columns];
        for (b, a) in b.iter().zip(factors.a.chunks_exact(columns)) {
            for (delta, a) in delta.iter_mut().zip(a) {
                *delta += b * a;
            }
        }
        for (weight, delta) in row.iter_mut().zip(&delta) {
            *weight += scale * delta;
        }
        if let Some(magnitude) = &factors.magnitude {
            let squares: f64 = row.iter().map(|w| f64::from(*w).powi(2)).sum();
            let factor = magnitude[index] / squares.sqrt() as f32;
            row.iter_mut().for_each(|weight| *weight *= factor);
        }
    });
}

/// Writes a native checkpoint at `out` with the weights of `base` and the adapters merged into them: computed in fp32, and
/// cast back to what each weight is stored as. One tensor at a time is in memory.
///
/// # Errors
/// If the adapters do not fit the model, or reading or writing fails; nothing is left of `out` then.
pub fn merge_native(
    base: &NativeCheckpoint,
    weights: &AdapterWeights,
    registry: &Registry,
    out: &Path,
) -> Result<&'static dyn ModelBridge> {
    let (bridge, hf, config) = native_config(base, registry)?;
    weights.check(&config)?;
    if hf.json().contains_key("quantization_config") {
        return Err(Error::File {
            path: base.dir().join(HF_DIR).join("config.json"),
            problem: "the base is quantized, and merged weights are not what its codes stand for; export it with --dtype \
                      bf16 and without codes first, and merge into that"
                .to_owned(),
        });
    }
    let writer = NativeWriter::begin(out, 0, Default::default())?;
    add_files(&writer, base, HF_DIR)?;
    let model = &base.index().model;
    let pieces = model
        .iter()
        .map(|(name, tensor)| PieceSpec::whole(name, tensor.dtype, tensor.shape.clone()));
    let file = writer.piece_file(Group::Model, 0, pieces.collect())?;
    for (piece, (name, tensor)) in model.iter().enumerate() {
        let mut bytes = base.read(Group::Model, name)?;
        let layer = name.strip_suffix(".weight");
        if let Some(factors) = layer.and_then(|layer| weights.layers.get(layer)) {
            let cast = |error| Error::File {
                path: base.dir().to_owned(),
                problem: format!("`{name}`: {error}"),
            };
            let mut values = vec![0.0; tensor.shape.iter().product()];
            decode_f32(&bytes, tensor.dtype, &mut values).map_err(cast)?;
            merge_weight(&mut values, &weights.config, factors);
            encode_f32(&values, tensor.dtype, &mut bytes).map_err(cast)?;
        }
        file.write_at(piece, 0, &bytes)?;
    }
    file.finish()?;
    writer.finish(1, 0)?;
    Ok(bridge)
}

/// Writes a Hugging Face folder at `out`: that of `hf_dir` with the adapters merged into its weights. Native checkpoints
/// stand beside `out` while it is written, and take twice the room of the weights.
///
/// # Errors
/// As [`merge_native`].
pub fn merge_hf(
    hf_dir: &Path,
    weights: &AdapterWeights,
    registry: &Registry,
    out: &Path,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let work = beside(out)?;
    let imported = work.path().join("base");
    import(
        hf_dir,
        &imported,
        registry,
        &ConvertOptions::default(),
        progress,
    )?;
    let base = NativeCheckpoint::open(&imported)?;
    let merged = work.path().join("merged");
    merge_native(&base, weights, registry, &merged)?;
    Ok(export(
        &merged,
        out,
        registry,
        &ExportOptions::default(),
        progress,
    )?)
}

/// As [`merge_hf`], of a native checkpoint.
///
/// # Errors
/// As [`merge_native`].
pub fn merge_native_to_hf(
    base: &NativeCheckpoint,
    weights: &AdapterWeights,
    registry: &Registry,
    out: &Path,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let work = beside(out)?;
    let merged = work.path().join("merged");
    merge_native(base, weights, registry, &merged)?;
    Ok(export(
        &merged,
        out,
        registry,
        &ExportOptions::default(),
        progress,
    )?)
}

/// As [`merge_native`], of a Hugging Face folder.
///
/// # Errors
/// As [`merge_native`].
pub fn merge_hf_to_native(
    hf_dir: &Path,
    weights: &AdapterWeights,
    registry: &Registry,
    out: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let work = beside(out)?;
    let imported = work.path().join("base");
    import(
        hf_dir,
        &imported,
        registry,
        &ConvertOptions::default(),
        progress,
    )?;
    merge_native(&NativeCheckpoint::open(&imported)?, weights, registry, out)?;
    Ok(())
}

/// A folder on the same disk as `out`, gone when it is dropped.
fn beside(out: &Path) -> Result<tempfile::TempDir> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)
        .map_err(|error| bridge_core::Error::io("create folder", parent, error))?;
    tempfile::Builder::new()
        .prefix(".merge-")
        .tempdir_in(parent)
        .map_err(|error| bridge_core::Error::io("create a folder in", parent, error).into())
}

/// Copies the files of `folder` in a checkpoint: its config and tokenizer.
fn add_files(writer: &NativeWriter, base: &NativeCheckpoint, folder: &str) -> Result<()> {
    let dir = base.dir().join(folder);
    let failed = |error| bridge_core::Error::io("read folder", &dir, error);
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
        if entry.file_type().map_err(failed)?.is_dir() {
            add_files(writer, base, &name)?;
        } else {
            writer.add_file(&name, &base.read_file(&name)?)?;
        }
    }
    Ok(())
}
