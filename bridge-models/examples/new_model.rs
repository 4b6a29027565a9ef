//! A fresh model of a named size as a Hugging Face folder, which transformers loads:
//! `cargo run --release -p bridge-models --example new_model -- llama_tiny OUT`.

use std::error::Error;
use std::path::Path;

use bridge_core::dtype::DType;
use bridge_models::weights::write_hf_folder;
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
    let report = write_hf_folder(&model, family, &registry(), Path::new(out), DType::F32)?;
    println!(
        "wrote {} tensors to {}",
        report.tensors,
        report.dir.display()
    );
    Ok(())
}
