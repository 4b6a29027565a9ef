//! Text from a model whose heads are divided among ranks.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_ops::Ops;
use bridge_parallel::{Axis, ParallelContext, run_threads};

use super::{GenerateOptions, Generation, generate_streaming};
use crate::decoder::Decoder;
use crate::error::{Error, Result};

/// How long a rank waits for another. A prompt's pass may take this long on a slow machine.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Checks that generation can divide a model as `layout` says.
///
/// # Errors
/// [`Error::Layout`] for axes that generation does not divide by.
pub fn check_generation_layout(layout: &LayoutSpec) -> Result<()> {
    if layout.pp * layout.cp * layout.dp == 1 && !layout.sp {
        return Ok(());
    }
    Err(Error::Layout {
        layout: layout.to_string(),
        problem:
            "generation divides a model by tp (with ep and etp within it) alone; leave out the rest"
                .to_owned(),
    })
}

/// [`generate_streaming`](super::generate_streaming) as one rank of several, with this rank's part of the model. Every rank
/// calls this with the same prompt and options. `on_token` is called on each; one that breaks ends the text on all.
///
/// # Errors
/// As [`generate_streaming`](super::generate_streaming), if the layout has axes that generation does not divide by, or a
/// rank fails.
pub fn generate_on_rank<B: Ops>(
    parallel: &ParallelContext<B>,
    model: &Decoder<B>,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    check_generation_layout(parallel.layout())?;
    let group = parallel.group(Axis::World);
    // Ranks choose the same token from the same logits, and agree on when to stop.
    let mut agreed = |token: u32| {
        let stops = on_token(token).is_break();
        match group.all_gather_bytes(&[u8::from(stops)]) {
            Ok(wishes) if wishes.iter().all(|wish| wish == &[0]) => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    };
    let generation = generate_streaming(model, prompt, options, &mut agreed);
    parallel.health()?;
    let generation = generation?;
    let ids = generation.token_ids.iter();
    let own: Vec<u8> = ids.flat_map(|id| id.to_le_bytes()).collect();
    let all = group.all_gather_bytes(&own)?;
    match all.iter().position(|other| *other != own) {
        None => Ok(generation),
        Some(other) => {
            let problem = format!(
                "ranks {} and {other} chose different tokens; every rank must be given the same model and prompt",
                parallel.rank()
            );
            Err(bridge_parallel::Error::Invalid(problem).into())
        }
    }
}

/// [`generate_on_rank`] with every rank of `layout` a thread. Each rank calls `load` for its part of the model;
/// `on_token` is called once a token, on the calling thread.
///
/// # Errors
/// As [`generate_on_rank`], or if `load` fails.
pub fn generate_parallel<B: Ops>(
    layout: LayoutSpec,
    load: impl Fn(&Arc<ParallelContext<B>>) -> Result<Decoder<B>> + Send + Sync + 'static,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    check_generation_layout(&layout)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (tokens, inbox) = channel();
    let work = {
        let (stop, prompt, options) = (Arc::clone(&stop), prompt.to_vec(), options.clone());
        move |ctx: Arc<ParallelContext<B>>| -> Result<Generation> {
            let model = load(&ctx)?;
            let mut heard = |token: u32| {
                if ctx.rank() == 0 {
                    // Nobody listens any more when the caller has stopped.
                    let _ = tokens.send(token);
                }
                match stop.load(Ordering::Relaxed) {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            generate_on_rank(&ctx, &model, &prompt, &options, &mut heard)
        }
    };
    let (ranks, wanted) = std::thread::scope(|scope| {
        let job = scope.spawn(move || run_threads::<B, Generation, Error>(layout, TIMEOUT, work));
        let mut seen = 0;
        // The channel ends with the ranks.
        for token in &inbox {
            seen += 1;
            if on_token(token).is_break() {
                stop.store(true, Ordering::Relaxed);
                break;
            }
        }
        (job.join(), seen)
    });
    let ranks = ranks.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    let Some(mut generation) = ranks.into_iter().next() else {
        return Err(bridge_parallel::Error::Invalid("a layout without ranks".to_owned()).into());
    };
    // Ranks may have gone on for a token before they heard of the stop.
    generation.token_ids.truncate(wanted);
    Ok(generation)
}
