//! A model that came from nowhere as a Hugging Face folder.

use std::path::Path;

use bridge_core::checkpoint::CheckpointError;
use bridge_core::checkpoint::native::{Group, NativeWriter, PieceSpec};
use bridge_core::convert::{ExportOptions, ExportReport, HF_DIR, export};
use bridge_core::dtype::DType;
use bridge_core::{ModelBridge, Registry};
use bridge_ops::Ops;

use super::export_weights;
use crate::decoder::Decoder;
use crate::error::Result;

/// Writes `model` as a Hugging Face folder of `bridge`'s family at `dir`, its weights as `dtype`.
///
/// For models that did not come from such a folder: made from a config and fresh weights. The `config.json` is the
/// family's own for a new model; there is no tokenizer. A native checkpoint stands beside `dir`, with the extension
/// `native`, while the folder is written.
///
/// # Errors
/// If the family's config cannot say what the model is, `registry` does not know the family, or writing fails.
pub fn write_hf_folder<B: Ops>(
    model: &Decoder<B>,
    bridge: &dyn ModelBridge,
    registry: &Registry,
    dir: &Path,
    dtype: DType,
) -> Result<ExportReport> {
    let core = bridge_core::Error::from;
    let config = bridge.hf_config(model.config())?;
    let config = serde_json::to_string_pretty(&config).expect("a JSON object can be written");
    let native = dir.with_extension("native");
    let writer = NativeWriter::begin(&native, 0, Default::default()).map_err(core)?;
    writer
        .add_file(&format!("{HF_DIR}/config.json"), config.as_bytes())
        .map_err(core)?;
    let params = model.params();
    let pieces = params
        .iter()
        .map(|param| PieceSpec::whole(param.name(), dtype, param.shape()));
    let file = writer
        .piece_file(Group::Model, 0, pieces.collect())
        .map_err(core)?;
    let mut piece = 0;
    export_weights(model, Some(dtype), |weight| {
        file.write_at(piece, 0, weight.bytes)?;
        piece += 1;
        Ok::<_, CheckpointError>(())
    })
    .map_err(core)?;
    file.finish().map_err(core)?;
    writer.finish(1, 0).map_err(core)?;

    let report = export(&native, dir, registry, &ExportOptions::default(), &())?;
    std::fs::remove_dir_all(&native)
        .map_err(|error| bridge_core::Error::io("remove", &native, error))?;
    Ok(report)
}
