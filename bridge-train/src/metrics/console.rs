//! Progress on stderr: a bar on a terminal, plain lines otherwise.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::callback::{Callback, EvalReport, RunInfo, SaveReport, StepReport, StopReason, Summary};
use crate::error::Result;

/// Shows the progress of a run to a person.
#[derive(Debug)]
pub struct Console {
    log_interval: u64,
    bar: Option<ProgressBar>,
    train_iters: u64,
    /// Running mean of the seconds per step, for the time left.
    seconds_per_step: Option<f64>,
}

impl Console {
    /// On a terminal a bar that moves with every step, elsewhere a line every `log_interval` steps (and for the first
    /// and the last).
    pub fn new(log_interval: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}")
                .expect("a fixed template");
            ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
        });
        Self {
            log_interval: log_interval.max(1),
            bar,
            train_iters: 0,
            seconds_per_step: None,
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }
}

impl Callback for Console {
    fn on_train_start(&mut self, run: &RunInfo) -> Result<()> {
        self.train_iters = run.train_iters;
        if let Some(bar) = &self.bar {
            bar.set_length(run.train_iters);
            bar.set_position(run.first_iteration);
        }
        for note in &run.notes {
            self.line(&format!("note: {note}"));
        }
        let from = match run.first_iteration {
            0 => String::new(),
            n => format!(", continuing after step {n}"),
        };
        self.line(&format!(
            "training {} parameters for {} steps of {} tokens{from}",
            short(run.num_parameters as f64),
            run.train_iters,
            run.tokens_per_step
        ));
        Ok(())
    }

    fn on_step_end(&mut self, step: &StepReport) -> Result<()> {
        let seconds = step.elapsed.as_secs_f64();
        let mean = self
            .seconds_per_step
            .map_or(seconds, |mean| 0.9 * mean + 0.1 * seconds);
        self.seconds_per_step = Some(mean);
        let left =
            Duration::from_secs_f64(mean * self.train_iters.saturating_sub(step.iteration) as f64);
        let others: String = (step.auxiliary_losses.iter())
            .map(|(name, loss)| format!("  {name} {loss:.4}"))
            .collect();
        let mut text = format!(
            "loss {:.4}{others}  lr {:.2e}  grad norm {:.3}  {} tokens/s  ETA {}",
            step.loss,
            step.lr,
            step.grad_norm,
            short(step.tokens_per_s()),
            clock(left)
        );
        if step.skipped {
            text.push_str("  SKIPPED (not finite)");
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(step.iteration);
                bar.set_message(text);
            }
            None if step.iteration == 1
                || step.iteration.is_multiple_of(self.log_interval)
                || step.iteration == self.train_iters
                || step.skipped =>
            {
                eprintln!("step {}/{}  {text}", step.iteration, self.train_iters);
            }
            None => {}
        }
        Ok(())
    }

    fn on_eval(&mut self, eval: &EvalReport) -> Result<()> {
        self.line(&format!(
            "step {}: evaluation loss {:.4}, perplexity {:.2} ({} tokens in {:.1} s)",
            eval.iteration,
            eval.loss,
            eval.loss.exp(),
            eval.valid_tokens,
            eval.elapsed.as_secs_f64()
        ));
        Ok(())
    }

    fn on_checkpoint_save(&mut self, save: &SaveReport<'_>) -> Result<()> {
        self.line(&format!(
            "step {}: saved {} in {:.1} s",
            save.iteration,
            save.path.display(),
            save.elapsed.as_secs_f64()
        ));
        Ok(())
    }

    fn on_train_end(&mut self, summary: &Summary) -> Result<()> {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let what = match summary.reason {
            StopReason::Finished => "finished",
            StopReason::AlreadyFinished => "nothing to do: every step was done before",
            StopReason::Interrupted => "stopped on request",
            StopReason::TimeUp => "stopped: the time is up",
        };
        let loss = summary
            .last_loss
            .map(|loss| format!(", loss {loss:.4}"))
            .unwrap_or_default();
        let eval = summary
            .last_eval_loss
            .map(|loss| format!(", evaluation loss {loss:.4}"))
            .unwrap_or_default();
        let speed = match summary.tokens {
            0 => String::new(),
            _ => format!(", {} tokens/s", short(summary.tokens_per_s())),
        };
        eprintln!(
            "{what} at step {} in {}{loss}{eval}{speed}",
            summary.iteration,
            clock(summary.elapsed)
        );
        Ok(())
    }
}

/// A large number in three digits: 1234567 as `1.23M`.
fn short(value: f64) -> String {
    let (scaled, unit) = match value {
        v if v >= 1e9 => (v / 1e9, "B"),
        v if v >= 1e6 => (v / 1e6, "M"),
        v if v >= 1e4 => (v / 1e3, "k"),
        v => return format!("{v:.0}"),
    };
    let digits = if scaled < 10.0 {
        2
    } else {
        usize::from(scaled < 100.0)
    };
    format!("{scaled:.digits$}{unit}")
}

/// Hours, minutes and seconds as `1:02:03`, or `02:03`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if h > 0 {
        format!("{h}:{m:02}:{s:02}")
    } else {
        format!("{m:02}:{s:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_times_readable() {
        assert_eq!(short(812.4), "812");
        assert_eq!(short(9_999.0), "9999");
        assert_eq!(short(12_345.0), "12.3k");
        assert_eq!(short(1_235_746_816.0), "1.24B");
        assert_eq!(short(123_000.0), "123k");
        assert_eq!(clock(Duration::from_secs(125)), "02:05");
        assert_eq!(clock(Duration::from_secs(3723)), "1:02:03");
    }
}
