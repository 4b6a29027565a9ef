//! `generate`: text from a model.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use bridge_core::LayoutSpec;
use bridge_models::DtypePolicy;
use bridge_models::generate::{
    Finish, GenerateOptions, Generation, Sampling, generate_on_rank, generate_parallel,
    generate_streaming,
};
use bridge_parallel::ParallelContext;
use bridge_tokenizers::{ChatRequest, DecodeStream, SpecialTokens, Tokenizer};
use bridge_train::signals::StopFlag;
use serde_json::json;

use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Blame, Failure, Result};
use crate::flags::{BackendFlags, BackendName, token_ids};
use crate::job::{self, Job};
use crate::model::{ModelFlags, ModelOnDisk};
use crate::report::Report;
use crate::transport::as_rank;

/// Continues a prompt: the likeliest token each time, unless a temperature is given.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask generate --hf HuggingFaceTB/SmolLM2-135M-Instruct --prompt \"What is a whale?\" --chat --max-new-tokens 64\n  \
    cargo xtask generate --checkpoint runs/tiny_llama --prompt \"The sea \" --temperature 0.8 --top-p 0.95\n  \
    cargo xtask generate --hf meta-llama/Llama-3.2-1B --adapter runs/llama32_1b_lora --prompt \"The sea \"")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// LoRA or DoRA adapter to run the model with: a PEFT folder, or a checkpoint of adapters.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Take the adapter also where the model is not the one that it was trained beside.
    #[arg(long, requires = "adapter")]
    any_base: bool,
    #[command(flatten)]
    prompt: Prompt,
    /// Treat the prompt as a user's turn and use the model's chat template.
    #[arg(long, requires = "text")]
    chat: bool,
    /// Most tokens to generate; fewer where the model ends its text or its context is full.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
    /// Draw tokens at random; below 1 sharpens the model's probabilities, above 1 flattens them. 0 is greedy.
    #[arg(long, value_name = "T")]
    temperature: Option<f64>,
    /// Draw only from the likeliest tokens that together reach this probability.
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Draw only from this many of the likeliest tokens.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Seed of the draws.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Tensor parallel size: ranks that divide the model, processes under a launcher, else threads of this one.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Layout")]
    tp: usize,
    #[command(flatten)]
    backend: BackendFlags,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// Text to continue.
    #[arg(id = "text", long = "prompt", value_name = "TEXT")]
    text: Option<String>,
    /// Token ids to continue, separated by commas.
    #[arg(id = "ids", long = "prompt-ids", value_name = "1,2,3")]
    ids: Option<String>,
}

impl Args {
    fn sampling(&self) -> Sampling {
        let asked = self.temperature.is_some() || self.top_p.is_some() || self.top_k.is_some();
        if !asked || self.temperature == Some(0.0) {
            return Sampling::Greedy;
        }
        let temperature = self.temperature.unwrap_or(1.0);
        Sampling::Random {
            temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
        }
    }
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let job = job::from_environment()?;
    if args.tp != 1 && args.backend.backend != BackendName::Cpu && job.is_none() {
        return Err(Failure::input(format!(
            "--tp: ranks are threads here, which share one device; start one process a rank (`cargo xtask launch --nproc {} \
             -- generate ...`), or leave out --backend",
            args.tp
        )));
    }
    // Rank 0 speaks for all.
    let speaks = job.as_ref().is_none_or(|job| job.options.rank == 0);
    let mut model = ModelOnDisk::open(&args.model)?;
    if let Some(adapter) = &args.adapter {
        model = model.with_adapter(adapter, args.any_base)?;
    }
    let model = Arc::new(model);
    let tokenizer = model.tokenizer()?;
    let prompt_ids = prompt_ids(&args, &model, tokenizer.as_ref())?;
    let work = Generate {
        args: &args,
        job,
        report: speaks.then_some(report),
        model: &model,
        tokenizer: tokenizer.as_ref(),
        prompt_ids: &prompt_ids,
    };
    let generation = dispatch(args.backend, work)?;
    if !speaks {
        return match generation.finish {
            Finish::Callback => Err(Failure::interrupted("stopped on request")),
            _ => Ok(()),
        };
    }
    let text = match &tokenizer {
        Some(tokenizer) => Some(tokenizer.decode(&generation.token_ids, SpecialTokens::Omit)?),
        None => None,
    };
    report.json(&json!({
        "prompt_ids": prompt_ids,
        "token_ids": generation.token_ids,
        "text": text,
        "tokens_per_s": generation.tokens_per_s(),
    }))?;
    match generation.finish {
        Finish::ContextFull => eprintln!("the model's context is full; the text ends there"),
        Finish::Callback => return Err(Failure::interrupted("stopped on request")),
        Finish::StopToken | Finish::MaxNewTokens => {}
    }
    eprintln!(
        "{} tokens, {:.1} tokens/s ({:.1} after the first)",
        generation.token_ids.len(),
        generation.tokens_per_s(),
        generation.decode_tokens_per_s()
    );
    Ok(())
}

fn prompt_ids(args: &Args, model: &ModelOnDisk, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>> {
    let Some(text) = &args.prompt.text else {
        return token_ids(args.prompt.ids.as_deref().unwrap_or_default());
    };
    let tokenizer = tokenizer.ok_or_else(|| {
        Failure::input(format!(
            "{} holds no tokenizer, so --prompt cannot be read; give --prompt-ids 1,2,3, or put tokenizer.json there",
            model.folder().display()
        ))
    })?;
    if args.chat {
        // The template writes the special tokens itself.
        let chat = tokenizer.render_chat(&ChatRequest::user(text))?;
        return Ok(tokenizer.encode(&chat.text, SpecialTokens::Omit)?);
    }
    Ok(tokenizer.encode(text, SpecialTokens::Add)?)
}

struct Generate<'a> {
    args: &'a Args,
    job: Option<Job>,
    /// Where the text goes, if this process is the one to show it.
    report: Option<Report>,
    model: &'a Arc<ModelOnDisk>,
    tokenizer: Option<&'a Tokenizer>,
    prompt_ids: &'a [u32],
}

impl OnBackend for Generate<'_> {
    type Output = Generation;

    fn run<B: Machine>(self, device: B::Device) -> Result<Generation> {
        let Self {
            args,
            job,
            report,
            model,
            tokenizer,
            prompt_ids,
        } = self;
        let stop = StopFlag::on_signals().running("cannot listen for signals")?;
        let options = GenerateOptions {
            max_new_tokens: args.max_new_tokens,
            sampling: args.sampling(),
            stop_ids: model.stop_ids(&model.config()?)?,
            ..GenerateOptions::default()
        };
        let mut shown = Shown {
            report,
            stream: tokenizer.map(|t| t.decode_stream(SpecialTokens::Omit)),
            first: true,
        };
        let mut problem = None;
        let mut on_token = |id: u32| match shown.token(id) {
            Ok(()) if stop.is_raised() => ControlFlow::Break(()),
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                problem = Some(failure);
                ControlFlow::Break(())
            }
        };
        let layout = LayoutSpec::tp_pp(args.tp, 1);
        let generation = if let Some(job) = job {
            as_rank::<B, _, _>(&job, layout, |rank| {
                let part = model.load_parallel(rank, DtypePolicy::Source)?;
                generate_on_rank(rank, &part, prompt_ids, &options, &mut on_token)
            })?
        } else if args.tp == 1 {
            let decoder = model.load::<B>(&device, DtypePolicy::Source)?;
            generate_streaming(&decoder, prompt_ids, &options, &mut on_token)?
        } else {
            let model = Arc::clone(model);
            let load =
                move |ctx: &Arc<ParallelContext<B>>| model.load_parallel(ctx, DtypePolicy::Source);
            generate_parallel(layout, load, prompt_ids, &options, &mut on_token)?
        };
        if let Some(failure) = problem {
            return Err(failure);
        }
        shown.finish()?;
        Ok(generation)
    }
}

/// The text on stdout, as it comes.
struct Shown<'a> {
    report: Option<Report>,
    /// Without a tokenizer the ids are shown.
    stream: Option<DecodeStream<'a>>,
    first: bool,
}

impl Shown<'_> {
    fn token(&mut self, id: u32) -> Result {
        let Some(report) = self.report else {
            return Ok(());
        };
        let separator = if std::mem::take(&mut self.first) {
            ""
        } else {
            ","
        };
        match &mut self.stream {
            Some(stream) => report.piece(&stream.push(id)?),
            None => report.piece(&format!("{separator}{id}")),
        }
    }

    fn finish(self) -> Result {
        let Some(report) = self.report else {
            return Ok(());
        };
        let rest = self
            .stream
            .map(DecodeStream::finish)
            .transpose()?
            .unwrap_or_default();
        report.text(rest)
    }
}
