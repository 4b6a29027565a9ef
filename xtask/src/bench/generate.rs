//! `bench generate`: greedy decoding with a KV cache.

use std::time::Instant;

use bridge_models::DtypePolicy;
use bridge_models::generate::{GenerateOptions, generate};
use serde_json::{Value, json};

use super::{memory, random_ids, rounded};
use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Failure, Result};
use crate::flags::BackendFlags;
use crate::model::{ModelFlags, ModelOnDisk};
use crate::report::Report;

/// Times greedy decoding with a KV cache after a prompt of random tokens.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask bench generate --hf HuggingFaceTB/SmolLM2-135M-Instruct --tokens 32 --threads 2"
)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// Tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 32)]
    tokens: usize,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N", default_value_t = 16)]
    prompt: usize,
    /// Hold weights in fp32 even where the checkpoint has them narrower.
    #[arg(long)]
    fp32_weights: bool,
    #[command(flatten)]
    backend: BackendFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    if args.tokens < 2 || args.prompt == 0 {
        return Err(Failure::input(
            "--tokens must be at least 2 and --prompt at least 1",
        ));
    }
    let result = dispatch(args.backend, Generate(&args))?;
    report.line(&result)
}

struct Generate<'a>(&'a Args);

impl OnBackend for Generate<'_> {
    type Output = Value;

    fn run<B: Machine>(self, device: B::Device) -> Result<Value> {
        let args = self.0;
        let started = Instant::now();
        let policy = if args.fp32_weights {
            DtypePolicy::Float32
        } else {
            DtypePolicy::Source
        };
        let model = ModelOnDisk::open(&args.model)?.load::<B>(&device, policy)?;
        let prompt = random_ids(args.prompt, model.config().vocab_size);
        let options = |max_new_tokens| GenerateOptions {
            max_new_tokens,
            ..GenerateOptions::default()
        };
        generate(&model, &prompt, &options(4))?;
        let startup = started.elapsed().as_secs_f64();
        let run = generate(&model, &prompt, &options(args.tokens))?;
        if run.token_ids.len() < args.tokens {
            let context = model.context_length();
            return Err(Failure::input(format!(
                "--prompt {} and --tokens {} do not fit the model's context of {context} tokens",
                args.prompt, args.tokens
            )));
        }
        Ok(json!({
            "bench": "generate",
            "backend": args.backend.backend.as_str(),
            "threads": rayon::current_num_threads(),
            "prompt": args.prompt,
            "tokens": args.tokens,
            "tokens_per_s": rounded(run.tokens_per_s(), 1),
            "decode_tokens_per_s": rounded(run.decode_tokens_per_s(), 1),
            "prefill_ms": rounded(run.prefill.as_secs_f64() * 1e3, 2),
            "peak_gib": memory::gib(B::peak_memory(&device)),
            "startup_s": rounded(startup, 2),
            "gpu": B::gpu_name(&device),
        }))
    }
}
