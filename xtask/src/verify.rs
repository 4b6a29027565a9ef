//! `verify`: a model against reference numbers.

use std::path::PathBuf;

use bridge_models::verify::{Tolerances, VerifyOptions, VerifyReport};
use serde_json::to_value;

use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Blame, Failure, Result};
use crate::flags::{BackendFlags, LayoutFlags, hugging_face_folder};
use crate::report::Report;

/// Runs a model and compares logits, loss, gradients and greedy text with a reference.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask verify --hf tests/fixtures/llama3_1 --reference tests/fixtures/llama3_1 --grads"
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
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    if !(args.atol > 0.0 && args.rtol > 0.0) {
        return Err(Failure::input(format!(
            "--atol {} --rtol {}: both must be above 0",
            args.atol, args.rtol
        )));
    }
    let layout = args.layout.spec();
    if layout.world_size() != 1 {
        return Err(Failure::input(format!(
            "layout {layout}: models run on one rank in this build; leave out the layout flags"
        )));
    }
    let folder = hugging_face_folder(&args.hf)?;
    let backend = args.backend;
    let found = dispatch(backend, Verify { args, folder })?;
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
    type Output = VerifyReport;

    fn run<B: Machine>(self, device: B::Device) -> Result<VerifyReport> {
        let Self { args, folder } = self;
        let tolerances = Tolerances {
            logits: args.atol,
            loss: args.atol / 10.0,
            gradient: args.rtol,
            ..Tolerances::default()
        };
        let options = VerifyOptions {
            gradients: args.grads,
            tolerances,
        };
        let registry = bridge_models::registry();
        let name = args.backend.backend.as_str();
        if args.bf16 {
            if !B::platform().bf16 {
                return Err(Failure::input(format!(
                    "--bf16: the {name} backend does not compute in bf16; use --backend cuda"
                )));
            }
            return Ok(bridge_models::verify::verify_bf16::<B>(
                &registry,
                &folder,
                &args.reference,
                &device,
                name,
            )?);
        }
        Ok(bridge_models::verify::verify::<B>(
            &registry,
            &folder,
            &args.reference,
            &options,
            &device,
            name,
        )?)
    }
}
