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

/// [`generate_streaming`](super::generate_streaming) with every rank of `layout` a thread. Each rank calls `load` for its
/// part of the model; `on_token` is called on the calling thread.
///
/// # Errors
/// As [`generate_streaming`](super::generate_streaming), if `layout` has axes that generation does not divide by, if
/// `load` fails, or a rank does.
pub fn generate_parallel<B: Ops>(
    layout: LayoutSpec,
    load: impl Fn(&Arc<ParallelContext<B>>) -> Result<Decoder<B>> + Send + Sync + 'static,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    if layout.pp * layout.cp * layout.dp > 1 || layout.sp {
        return Err(Error::Layout {
            layout: layout.to_string(),
            problem: "generation divides a model by tp (with ep and etp within it) alone; leave out the rest".to_owned(),
        });
    }
    let stop = Arc::new(AtomicBool::new(false));
    let (tokens, inbox) = channel();
    let work = {
        let (stop, prompt, options) = (Arc::clone(&stop), prompt.to_vec(), options.clone());
        move |ctx: Arc<ParallelContext<B>>| -> Result<Generation> {
            let model = load(&ctx)?;
            let group = ctx.group(Axis::World);
            // Ranks choose the same token from the same logits, and agree on when to stop.
            let mut agreed = |token: u32| {
                if ctx.rank() == 0 {
                    // Nobody listens any more when the caller has stopped.
                    let _ = tokens.send(token);
                }
                let wishes = group.all_gather_bytes(&[u8::from(stop.load(Ordering::Relaxed))]);
                match wishes {
                    Ok(wishes) if wishes.iter().all(|wish| wish == &[0]) => {
                        ControlFlow::Continue(())
                    }
                    _ => ControlFlow::Break(()),
                }
            };
            let generation = generate_streaming(&model, &prompt, &options, &mut agreed);
            ctx.health()?;
            generation
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
    let mut ranks = ranks.into_iter();
    let Some(mut generation) = ranks.next() else {
        return Err(bridge_parallel::Error::Invalid("a layout without ranks".to_owned()).into());
    };
    if let Some(other) = ranks.find(|other| other.token_ids != generation.token_ids) {
        let problem = format!(
            "ranks chose different tokens: {:?} and {:?}",
            generation.token_ids, other.token_ids
        );
        return Err(bridge_parallel::Error::Invalid(problem).into());
    }
    // Ranks may have gone on for a token before they heard of the stop.
    generation.token_ids.truncate(wanted);
    Ok(generation)
}
