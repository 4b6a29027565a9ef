//! A fresh model of a named size as a Hugging Face folder, which transformers loads:
//! `cargo run --release -p bridge-models --example new_model -- llama_tiny OUT`.

use std::error::Error;
use std::path::Path;

use bridge_core::ModelBridge;
use bridge_core::checkpoint::native::{Group, NativeWriter, PieceSpec};
use bridge_core::convert::{ExportOptions, HF_DIR, export};
use bridge_core::dtype::DType;
use bridge_models::weights::export_weights;
use bridge_models::{Decoder, Init, RandomInit, families, registry};
use burn_flex::Flex;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, out] = args.as_slice() else {
        return Err("expected the name of a size and a folder to write".into());
    };
    let (family, config) = families::preset(name)?;
    let mut weights = RandomInit::new(&Init::default(), &config);
    let model = Decoder::<Flex>::build(config, &mut weights, &Default::default())?;

    // A native checkpoint holds canonical weights; the family's weight map turns them into a Hugging Face folder.
    let native = Path::new(out).with_extension("native");
    let writer = NativeWriter::begin(&native, 0, Default::default())?;
    let hf_config = serde_json::to_string_pretty(&family.hf_config(model.config())?)?;
    writer.add_file(&format!("{HF_DIR}/config.json"), hf_config.as_bytes())?;
    let params = model.params();
    let pieces = params
        .iter()
        .map(|param| PieceSpec::whole(param.name(), DType::F32, param.shape()));
    let file = writer.piece_file(Group::Model, 0, pieces.collect())?;
    let mut piece = 0;
    export_weights(&model, Some(DType::F32), |weight| {
        file.write_at(piece, 0, weight.bytes)?;
        piece += 1;
        Ok::<_, bridge_core::checkpoint::CheckpointError>(())
    })?;
    file.finish()?;
    writer.finish(1, 0)?;

    let report = export(
        &native,
        Path::new(out),
        &registry(),
        &ExportOptions::default(),
        &(),
    )?;
    std::fs::remove_dir_all(native)?;
    println!(
        "wrote {} tensors to {}",
        report.tensors,
        report.dir.display()
    );
    Ok(())
}
