//! A recipe run from a program, with a callback of one's own:
//!
//! ```text
//! cargo run --release -p bridge-recipes --example pretrain -- tiny_llama train.train_iters=20 checkpoint.dir=/tmp/run
//! ```

use std::sync::Arc;

use bridge_models::generate::{GenerateOptions, generate};
use bridge_parallel::ParallelContext;
use bridge_tokenizers::SpecialTokens;
use bridge_train::callback::{Callback, Callbacks, StepReport};
use bridge_train::config::{Platform, ResolveContext, resolve};
use bridge_train::metrics::Console;
use bridge_train::signals::StopFlag;
use bridge_train::{PretrainContext, pretrain};
use burn::backend::Flex;

/// Remembers the lowest loss.
struct Lowest(f64);

impl Callback for Lowest {
    fn on_step_end(&mut self, step: &StepReport) -> bridge_train::Result<()> {
        self.0 = self.0.min(step.loss);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let name = arguments
        .next()
        .unwrap_or_else(|| bridge_recipes::DEFAULT_RECIPE.to_owned());
    let mut layers = bridge_recipes::layers(&name)?;
    arguments.for_each(|argument| layers.push_override(&argument));

    let registry = bridge_models::registry();
    let config = resolve(&layers, &ResolveContext::new(&registry, &name))?;
    let mut lowest = Lowest(f64::INFINITY);
    let mut callbacks = Callbacks::new()
        .with(Console::new(config.logging.log_interval))
        .with(&mut lowest);
    let outcome = pretrain::<Flex>(
        &config,
        PretrainContext {
            parallel: Arc::new(ParallelContext::single(Default::default())),
            platform: Platform::cpu(),
            registry: &registry,
            hf_folder: &|name| Err(format!("{name}: this example fetches nothing")),
            name: &name,
            callback: &mut callbacks,
            stop: StopFlag::on_signals()?,
        },
    )?;
    drop(callbacks);
    println!("lowest loss {:.4}", lowest.0);

    let prompt = outcome
        .tokenizer
        .encode("The old captain", SpecialTokens::Omit)?;
    let options = GenerateOptions {
        max_new_tokens: 80,
        ..Default::default()
    };
    let text = generate(&outcome.model, &prompt, &options)?;
    let ids: Vec<u32> = prompt.into_iter().chain(text.token_ids).collect();
    println!("{}", outcome.tokenizer.decode(&ids, SpecialTokens::Omit)?);
    Ok(())
}
