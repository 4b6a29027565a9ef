//! Text from a model: the prompt is run once, then one token at a time on top of the keys and values of those before.

mod parallel;
mod sampling;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bridge_ops::{Ops, to_f32_vec};

pub use parallel::{check_generation_layout, generate_on_rank, generate_parallel};
pub use sampling::{Sampler, Sampling};

use crate::context::{DecoderCache, ForwardContext};
use crate::decoder::Decoder;
use crate::error::{Error, Result};

/// Room that a cache starts with for new tokens; beyond it the cache grows by doubling. A caller may ask for as many
/// tokens as the context holds and stop early, and should not pay for all of them.
const INITIAL_ROOM: usize = 1024;

/// What to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to add to the prompt.
    pub max_new_tokens: usize,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Tokens that end the text; the one that did is the last of the result. Usually the config's `eos_token_ids`.
    pub stop_ids: Vec<u32>,
    /// Whether keys and values are kept from token to token. Without, every token runs the whole text again: for
    /// checks.
    pub use_cache: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            sampling: Sampling::Greedy,
            stop_ids: Vec::new(),
            use_cache: true,
        }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// One of the stop tokens came.
    StopToken,
    /// As many tokens as asked for.
    MaxNewTokens,
    /// The model's context is full.
    ContextFull,
    /// The callback asked to stop.
    Callback,
}

/// A generated text.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The new tokens, without the prompt.
    pub token_ids: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
    /// Time from the start to the first token.
    pub prefill: Duration,
    /// Time from the first token to the last.
    pub decode: Duration,
}

impl Generation {
    /// Tokens per second after the first one, which the prompt's length decides; 0 if there is no second.
    pub fn decode_tokens_per_s(&self) -> f64 {
        let tokens = self.token_ids.len().saturating_sub(1);
        if tokens == 0 {
            0.0
        } else {
            tokens as f64 / self.decode.as_secs_f64()
        }
    }

    /// Tokens per second over the whole time, reading the prompt included; 0 if there is no token.
    pub fn tokens_per_s(&self) -> f64 {
        let tokens = self.token_ids.len();
        if tokens == 0 {
            0.0
        } else {
            tokens as f64 / (self.prefill + self.decode).as_secs_f64()
        }
    }
}

/// Continues `prompt`.
///
/// # Errors
/// If the prompt is empty, does not fit the context or holds unknown tokens; if a sampling option is out of range; if
/// the model yields numbers that are not finite.
pub fn generate<B: Ops>(
    model: &Decoder<B>,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Result<Generation> {
    generate_streaming(model, prompt, options, &mut |_| ControlFlow::Continue(()))
}

/// [`generate`], handing each token to `on_token` as it comes; breaking ends the text after that token.
///
/// # Errors
/// As [`generate`].
pub fn generate_streaming<B: Ops>(
    model: &Decoder<B>,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    let context = model.context_length();
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    if prompt.len() >= context {
        return Err(Error::PromptTooLong {
            prompt: prompt.len(),
            context,
        });
    }
    model.check_token_ids(prompt)?;
    let mut sampler = Sampler::new(options.sampling)?;

    let room = options
        .max_new_tokens
        .min(INITIAL_ROOM)
        .min(context - prompt.len());
    let mut text = Text {
        model,
        tokens: prompt.to_vec(),
        cache: options
            .use_cache
            .then(|| model.new_cache(prompt.len() + room)),
    };
    let start = Instant::now();
    let mut first = None;
    let finish = loop {
        let new = text.tokens.len() - prompt.len();
        if new == options.max_new_tokens {
            break Finish::MaxNewTokens;
        }
        if text.tokens.len() == context {
            break Finish::ContextFull;
        }
        let token = text.next(&mut sampler)?;
        first.get_or_insert_with(Instant::now);
        if on_token(token).is_break() {
            break Finish::Callback;
        }
        if options.stop_ids.contains(&token) {
            break Finish::StopToken;
        }
    };
    let end = Instant::now();
    let first = first.unwrap_or(end);
    let token_ids = text.tokens.split_off(prompt.len());
    Ok(Generation {
        token_ids,
        finish,
        prefill: first - start,
        decode: end - first,
    })
}

/// A text as it grows.
struct Text<'a, B: Ops> {
    model: &'a Decoder<B>,
    tokens: Vec<u32>,
    cache: Option<DecoderCache<B>>,
}

impl<B: Ops> Text<'_, B> {
    /// Chooses the next token and adds it.
    fn next(&mut self, sampler: &mut Sampler) -> Result<u32> {
        let seen = self.cache.as_ref().map_or(0, DecoderCache::len);
        let unseen = &self.tokens[seen..];
        let mut ctx = ForwardContext::new(unseen, [1, unseen.len()], self.model.device());
        if let Some(cache) = &self.cache {
            ctx = ctx.with_cache(cache);
        }
        let logits = to_f32_vec::<B>(self.model.forward_last(&ctx)); // [vocab]
        let token = sampler.choose(&logits).map_err(|found| {
            let (position, found) = (self.tokens.len() - 1, found.to_string());
            Error::NonFiniteLogits { position, found }
        })?;
        self.tokens.push(token);
        Ok(token)
    }
}

#[cfg(test)]
mod tests;
