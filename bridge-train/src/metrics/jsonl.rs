//! `metrics.jsonl`: one JSON object per step and per evaluation, for scripts.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::callback::{Callback, EvalReport, RunInfo, StepReport};
use crate::error::{Error, Result};

/// Name of the file.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Appends to `metrics.jsonl`.
///
/// A run that continues from a checkpoint first drops the lines after that checkpoint, which the process before wrote
/// for steps that are about to be done again.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: Option<File>,
}

impl JsonLines {
    /// Will write `metrics.jsonl` in `dir`, which must exist by the start of the run.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join(METRICS_FILE),
            file: None,
        }
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        // One write per line, so that a reader that follows the file sees whole lines.
        file.write_all(format!("{line}\n").as_bytes())
            .map_err(|source| Error::io("write", &self.path, source))
    }

    /// Opens the file with only the lines up to `iteration`.
    fn open(&self, iteration: u64) -> io::Result<File> {
        let kept: String = match std::fs::read_to_string(&self.path) {
            Ok(text) => text
                .split_inclusive('\n')
                .filter(|line| {
                    line.ends_with('\n') && iteration_of(line).is_some_and(|i| i <= iteration)
                })
                .collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let temporary = self.path.with_extension("jsonl.tmp");
        std::fs::write(&temporary, kept)?;
        std::fs::rename(&temporary, &self.path)?;
        OpenOptions::new().append(true).open(&self.path)
    }
}

fn iteration_of(line: &str) -> Option<u64> {
    serde_json::from_str::<Value>(line)
        .ok()?
        .get("iteration")?
        .as_u64()
}

/// JSON has no NaN; a value that is not finite is written as text.
fn number(value: f64) -> Value {
    if value.is_finite() {
        json!(value)
    } else {
        json!(value.to_string())
    }
}

impl Callback for JsonLines {
    fn on_train_start(&mut self, run: &RunInfo) -> Result<()> {
        // Steps of a fresh run start at 1, so everything of an older run in this folder goes.
        let file = self
            .open(run.first_iteration)
            .map_err(|source| Error::io("write", &self.path, source))?;
        self.file = Some(file);
        Ok(())
    }

    fn on_step_end(&mut self, step: &StepReport) -> Result<()> {
        let mut line = json!({
            "iteration": step.iteration,
            "consumed_samples": step.consumed_samples,
            "loss": number(step.loss),
            "lr": step.lr,
            "grad_norm": number(step.grad_norm),
            "tokens": step.tokens,
            "valid_tokens": step.valid_tokens,
            "step_ms": step.elapsed.as_secs_f64() * 1e3,
            "tokens_per_s": step.tokens_per_s(),
        });
        if let Some(tflops) = step.tflops_per_s {
            line["tflops_per_s"] = json!(tflops);
        }
        for (name, loss) in &step.auxiliary_losses {
            line[name.replace(' ', "_")] = number(*loss);
        }
        if step.skipped {
            line["skipped"] = json!(true);
        }
        self.write(&line)
    }

    fn on_eval(&mut self, eval: &EvalReport) -> Result<()> {
        self.write(&json!({
            "iteration": eval.iteration,
            "eval_loss": number(eval.loss),
            "eval_perplexity": number(eval.loss.exp()),
            "eval_tokens": eval.valid_tokens,
            "eval_s": eval.elapsed.as_secs_f64(),
        }))
    }
}

/// The loss curves of a run, as points of (iteration, loss).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// Loss of each step.
    pub train: Vec<(u64, f64)>,
    /// Loss of each evaluation.
    pub eval: Vec<(u64, f64)>,
}

impl History {
    /// Reads the curves back from `metrics.jsonl` in `dir`. Lines that are not ours are passed over, and so are values
    /// that are not finite.
    ///
    /// # Errors
    /// If the file cannot be read. A missing file is an empty history.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(METRICS_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(Error::io("read", path, source)),
        };
        let mut history = Self::default();
        for line in text.lines() {
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                continue;
            };
            let Some(iteration) = line["iteration"].as_u64() else {
                continue;
            };
            history
                .train
                .extend(line["loss"].as_f64().map(|loss| (iteration, loss)));
            history
                .eval
                .extend(line["eval_loss"].as_f64().map(|loss| (iteration, loss)));
        }
        Ok(history)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn step(iteration: u64, loss: f64) -> StepReport {
        StepReport {
            iteration,
            consumed_samples: 4 * iteration,
            loss,
            lr: 1e-3,
            grad_norm: 0.5,
            tokens: 64,
            valid_tokens: 60,
            elapsed: Duration::from_millis(20),
            tflops_per_s: Some(0.5),
            auxiliary_losses: vec![("mtp_1 loss".into(), 3.5)],
            skipped: false,
        }
    }

    fn run(dir: &Path, first_iteration: u64, losses: &[(u64, f64)]) {
        let mut lines = JsonLines::new(dir);
        let info = RunInfo {
            first_iteration,
            train_iters: 9,
            num_parameters: 1,
            tokens_per_step: 64,
            notes: Vec::new(),
        };
        lines.on_train_start(&info).unwrap();
        for (iteration, loss) in losses {
            lines.on_step_end(&step(*iteration, *loss)).unwrap();
        }
    }

    #[test]
    fn a_continued_run_replaces_the_steps_after_its_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), 0, &[(1, 5.0), (2, 4.0), (3, 3.0)]);
        // The process died while writing a line.
        let path = dir.path().join(METRICS_FILE);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(b"{\"iteration\": 2, \"lo").unwrap();
        run(dir.path(), 2, &[(3, 3.5)]);
        assert_eq!(
            History::read(dir.path()).unwrap().train,
            [(1, 5.0), (2, 4.0), (3, 3.5)]
        );
        run(dir.path(), 0, &[(1, 6.0)]);
        assert_eq!(History::read(dir.path()).unwrap().train, [(1, 6.0)]);
    }

    #[test]
    fn values_that_are_not_finite_stay_valid_json() {
        let dir = tempfile::tempdir().unwrap();
        run(dir.path(), 0, &[(1, f64::NAN), (2, 4.0)]);
        let text = std::fs::read_to_string(dir.path().join(METRICS_FILE)).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(
            (&first["loss"], &first["mtp_1_loss"]),
            (&json!("NaN"), &json!(3.5))
        );
        assert_eq!(History::read(dir.path()).unwrap().train, [(2, 4.0)]);
    }
}
