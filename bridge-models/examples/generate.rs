//! Greedy text from a Hugging Face folder, as token ids:
//! `cargo run --release -p bridge-models --example generate -- DIR 1,2,3 64`.

use std::error::Error;
use std::path::Path;

use bridge_core::LayoutSpec;
use bridge_core::convert::HfModel;
use bridge_models::generate::{GenerateOptions, generate};
use bridge_models::weights::load_hf;
use bridge_models::{DtypePolicy, registry};
use burn_flex::Flex;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, prompt, count] = args.as_slice() else {
        return Err(
            "expected a folder, token ids with commas between, and how many tokens to add".into(),
        );
    };
    let prompt = prompt
        .split(',')
        .map(str::parse)
        .collect::<Result<Vec<u32>, _>>()?;
    let options = GenerateOptions {
        max_new_tokens: count.parse()?,
        ..GenerateOptions::default()
    };

    let folder = HfModel::open(Path::new(dir), &registry(), &LayoutSpec::default())?;
    let model = load_hf::<Flex>(&folder, DtypePolicy::Source, &Default::default())?;
    let text = generate(&model, &prompt, &options)?;
    println!("{:?}", text.token_ids);
    eprintln!(
        "first token after {:?}, then {:.1} tokens/s",
        text.prefill,
        text.decode_tokens_per_s()
    );
    Ok(())
}
