//! Flags that several verbs share.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bridge_core::LayoutSpec;
use bridge_hub::{Event, HubOptions};
use bridge_models::ParallelOptions;
use bridge_parallel::CpCommType;
use clap::{Args, ValueEnum};

use crate::failure::{Failure, Result};
use crate::progress::ByteProgress;

/// Degrees of parallelism.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Layout")]
pub(crate) struct LayoutFlags {
    /// Tensor parallel size.
    #[arg(long, default_value_t = 1, value_name = "N")]
    tp: usize,
    /// Pipeline parallel size.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pp: usize,
    /// Model chunks per pipeline stage (virtual pipeline).
    #[arg(long, default_value_t = 1, value_name = "N")]
    vpp: usize,
    /// Context parallel size.
    #[arg(long, default_value_t = 1, value_name = "N")]
    cp: usize,
    /// Expert parallel size.
    #[arg(long, default_value_t = 1, value_name = "N")]
    ep: usize,
    /// Tensor parallel size inside an expert.
    #[arg(long, default_value_t = 1, value_name = "N")]
    etp: usize,
    /// Data parallel size.
    #[arg(long, default_value_t = 1, value_name = "N")]
    dp: usize,
    /// Sequence parallelism.
    #[arg(long)]
    sp: bool,
}

/// How attention reaches the keys and values of other ranks.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Layout")]
pub(crate) struct ContextFlags {
    /// How attention reaches other context-parallel ranks: p2p, all_gather or a2a [default: p2p].
    #[arg(long, value_name = "NAME")]
    pub(crate) cp_comm_type: Option<CpCommType>,
}

impl ContextFlags {
    /// What models are divided by beyond the degrees, stages having as many layers as each other.
    pub(crate) fn options(self) -> ParallelOptions {
        ParallelOptions {
            cp_comm_type: self.cp_comm_type.unwrap_or_default(),
            ..ParallelOptions::default()
        }
    }
}

impl LayoutFlags {
    /// The flags that were given, as keys of a configuration's `parallel` section.
    pub(crate) fn overrides(self) -> Vec<(&'static str, String)> {
        let spec = self.spec();
        let degrees = [
            ("tensor_model_parallel_size", spec.tp),
            ("pipeline_model_parallel_size", spec.pp),
            ("virtual_pipeline_model_parallel_size", spec.vpp),
            ("context_parallel_size", spec.cp),
            ("expert_model_parallel_size", spec.ep),
            ("expert_tensor_parallel_size", spec.etp),
            ("data_parallel_size", spec.dp),
        ];
        let mut given: Vec<(&'static str, String)> = degrees
            .into_iter()
            .filter(|(_, degree)| *degree != 1)
            .map(|(key, degree)| (key, degree.to_string()))
            .collect();
        if spec.sp {
            given.push(("sequence_parallel", "true".to_owned()));
        }
        given
    }

    pub(crate) fn spec(self) -> LayoutSpec {
        let Self {
            tp,
            pp,
            vpp,
            cp,
            ep,
            etp,
            dp,
            sp,
        } = self;
        LayoutSpec {
            tp,
            pp,
            vpp,
            cp,
            ep,
            etp,
            dp,
            sp,
        }
    }
}

/// What computes.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Backend")]
pub(crate) struct BackendFlags {
    /// What computes.
    #[arg(long, value_enum, default_value_t = BackendName::Cpu)]
    pub(crate) backend: BackendName,
    /// Which device of the backend.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) device: usize,
}

/// The backends that the command line knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendName {
    /// The CPU, always there, the reference.
    Cpu,
    /// This project's CUDA backend.
    Cuda,
    /// Burn's own CUDA backend, as a cross-check.
    BurnCuda,
}

impl BackendName {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::BurnCuda => "burn-cuda",
        }
    }
}

/// The folder that `--hf` names: a folder as it is, a hub id fetched first.
pub(crate) fn hugging_face_folder(source: &str) -> Result<PathBuf> {
    let mut options = HubOptions::from_vars(|name| std::env::var(name).ok())?;
    let shown = Mutex::new(Fetch::default());
    options.progress = Some(Arc::new(move |event: &Event| {
        if let Ok(mut fetch) = shown.lock() {
            fetch.show(event);
        }
    }));
    Ok(bridge_hub::resolve(source, &options)?)
}

/// One progress display over all files of a fetch.
#[derive(Default)]
struct Fetch {
    progress: Option<ByteProgress>,
    total: u64,
    finished: u64,
    current: u64,
}

impl Fetch {
    fn show(&mut self, event: &Event) {
        match event {
            Event::Plan { bytes, .. } => self.total = *bytes,
            Event::Progress { file, done, total } => {
                self.current = *total;
                let shown = self.finished + done;
                let progress = self
                    .progress
                    .get_or_insert_with(|| ByteProgress::new("fetching"));
                progress.update(shown, self.total.max(shown), file);
            }
            Event::Done { .. } => self.finished += std::mem::take(&mut self.current),
            Event::Notice(text) => match &self.progress {
                Some(progress) => progress.note(text),
                None => eprintln!("{text}"),
            },
        }
    }
}

/// Reads `5GB`, `500MB`, `2GiB` or plain bytes.
pub(crate) fn byte_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "tb" | "t" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => {
            return Err(format!(
                "{text:?} is no size; write it as 5GB, 500MB or 2GiB"
            ));
        }
    };
    let value = number
        .parse::<f64>()
        .map_err(|_| format!("{text:?} is no size; write it as 5GB, 500MB or 2GiB"))?
        * scale;
    if (1.0..1e18).contains(&value) {
        Ok(value as u64)
    } else {
        Err(format!("{text:?} is no size between 1 byte and 10^18"))
    }
}

/// Splits a comma-separated list of token ids.
pub(crate) fn token_ids(text: &str) -> Result<Vec<u32>> {
    text.split(',')
        .map(|id| {
            id.trim().parse().map_err(|_| {
                Failure::input(format!(
                    "--prompt-ids: {id:?} is no token id; write them as 1,2,3"
                ))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        for (text, value) in [
            ("5GB", 5_000_000_000),
            ("1.5kb", 1500),
            ("2GiB", 2 << 30),
            ("77", 77),
            ("8 GB", 8_000_000_000),
        ] {
            assert_eq!(byte_size(text), Ok(value), "{text}");
        }
        for text in ["", "GB", "5 bananas", "-5GB", "0", "nanGB", "1e400"] {
            byte_size(text).expect_err(text);
        }
    }

    #[test]
    fn token_ids_are_read_or_named() {
        assert_eq!(token_ids("1, 2,3").expect("ids"), [1, 2, 3]);
        assert!(
            token_ids("1,x")
                .expect_err("no id")
                .text()
                .contains("\"x\"")
        );
        token_ids("").expect_err("nothing");
        token_ids("-1").expect_err("negative");
    }
}
