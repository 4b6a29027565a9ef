//! `verify`: a model against reference numbers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bridge_core::LayoutSpec;
use bridge_models::verify::{Tolerances, VerifyOptions, VerifyReport, verify_bf16};
use bridge_parallel::ParallelContext;
use bridge_train::verify::{Verdict, Verification};
use serde_json::to_value;

use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Blame, Failure, Result};
use crate::flags::{BackendFlags, BackendName, ContextFlags, LayoutFlags, hugging_face_folder};
use crate::job;
use crate::report::Report;
use crate::transport::as_rank;

/// How long a rank that is a thread waits for another.
const RANK_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs a model and compares logits, loss, gradients and greedy text with a reference.
///
/// Everything runs as in training but the update of the weights: pipeline schedules, exchanges between ranks, sums of
/// gradients. Ranks are processes under `launch`, torchrun, srun or mpirun, else threads of this one.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask verify --hf tests/fixtures/llama3_1 --reference tests/fixtures/llama3_1 --grads\n  cargo xtask verify --hf tests/fixtures/llama3_1 --reference tests/fixtures/llama3_1 --grads --tp 2 --cp 2 --sp\n  cargo xtask launch --nproc 8 -- verify --hf DIR --reference DIR --grads --backend cuda --tp 2 --pp 2 --dp 2"
)]
pub(crate) struct Args {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    hf: String,
    /// Folder with oracle.safetensors and oracle.json (see tests/oracle/README.md).
    #[arg(long, value_name = "DIR")]
    reference: PathBuf,
    /// Compare the gradient of every weight as well.
    #[arg(long)]
    grads: bool,
    /// Run in bf16 (needs --backend cuda): the loss may differ by 1 %, the cosine between the logits must be above 0.999.
    #[arg(long, conflicts_with = "grads")]
    bf16: bool,
    /// Largest difference of a logit that passes; the loss may differ by a tenth of it.
    #[arg(long, value_name = "X", default_value_t = 1e-4)]
    atol: f64,
    /// Largest relative difference of a gradient's norm that passes.
    #[arg(long, value_name = "X", default_value_t = 1e-3)]
    rtol: f64,
    #[command(flatten)]
    backend: BackendFlags,
    #[command(flatten)]
    layout: LayoutFlags,
    #[command(flatten)]
    context: ContextFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    if !(args.atol > 0.0 && args.rtol > 0.0) {
        return Err(Failure::input(format!(
            "--atol {} --rtol {}: both must be above 0",
            args.atol, args.rtol
        )));
    }
    let folder = hugging_face_folder(&args.hf)?;
    let backend = args.backend;
    let found = dispatch(backend, Verify { args, folder })?;
    let Some(found) = found.report else {
        // Rank 0 tells.
        return if found.passed {
            Ok(())
        } else {
            Err(Failure::check(
                "the model does not agree with the reference; rank 0 says where",
            ))
        };
    };
    let value = to_value(&found).running("cannot write the result as JSON")?;
    if !found.passed {
        return Err(Failure::check(format!(
            "the model does not agree with the reference\n{found}"
        ))
        .with(value));
    }
    report.text(found.to_string())?;
    report.json(&value)
}

struct Verify {
    args: Args,
    folder: PathBuf,
}

impl OnBackend for Verify {
    type Output = Verdict;

    fn run<B: Machine>(self, device: B::Device) -> Result<Verdict> {
        let Self { args, folder } = self;
        let name = args.backend.backend.as_str();
        let layout = args.layout.spec();
        let registry = bridge_models::registry();
        if args.bf16 {
            if !B::platform().bf16 {
                return Err(Failure::input(format!(
                    "--bf16: the {name} backend does not compute in bf16; use --backend cuda"
                )));
            }
            if layout != LayoutSpec::default() {
                return Err(Failure::input(
                    "--bf16 compares on one rank; leave out the layout flags",
                ));
            }
            let found = verify_bf16::<B>(&registry, &folder, &args.reference, &device, name)?;
            return Ok(told(found));
        }
        let options = VerifyOptions {
            gradients: args.grads,
            tolerances: Tolerances {
                logits: args.atol,
                loss: args.atol / 10.0,
                gradient: args.rtol,
                ..Tolerances::default()
            },
        };
        let parallel = args.context.options();
        let (hf, reference) = (&folder, &args.reference);
        let found = Verification::open(&registry, hf, reference, &options, &layout, &parallel)?;
        if let Some(job) = job::from_environment()? {
            return as_rank::<B, _, _>(&job, layout, |rank| found.on_rank(rank, name));
        }
        if layout.world_size() == 1 {
            let alone = Arc::new(ParallelContext::<B>::single(device));
            return Ok(found.on_rank(&alone, name)?);
        }
        if args.backend.backend != BackendName::Cpu {
            return Err(Failure::input(format!(
                "layout {layout}: ranks are threads here, which share one device; start one process a rank \
                 (`cargo xtask launch --nproc {} -- verify ...`), or leave out --backend",
                layout.world_size()
            )));
        }
        Ok(told(found.on_threads::<B>(RANK_TIMEOUT, name)?))
    }
}

fn told(report: VerifyReport) -> Verdict {
    Verdict {
        passed: report.passed,
        report: Some(report),
    }
}
