//! `verify`: a model against reference numbers.

use std::path::PathBuf;

use bridge_core::LayoutSpec;
use bridge_models::verify::{
    LayoutOptions, Tolerances, VerifyOptions, VerifyReport, verify_bf16, verify_layout,
};
use bridge_parallel::CpCommType;
use serde_json::to_value;

use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Blame, Failure, Result};
use crate::flags::{BackendFlags, BackendName, LayoutFlags, hugging_face_folder};
use crate::report::Report;

/// Runs a model and compares logits, loss, gradients and greedy text with a reference.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask verify --hf tests/fixtures/llama3_1 --reference tests/fixtures/llama3_1 --grads\n  cargo xtask verify --hf tests/fixtures/llama3_1 --reference tests/fixtures/llama3_1 --grads --tp 2 --cp 2 --sp"
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
    /// How attention reaches other context-parallel ranks: p2p, all_gather or a2a.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "p2p",
        help_heading = "Layout"
    )]
    cp_comm_type: CpCommType,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    if !(args.atol > 0.0 && args.rtol > 0.0) {
        return Err(Failure::input(format!(
            "--atol {} --rtol {}: both must be above 0",
            args.atol, args.rtol
        )));
    }
    let layout = args.layout.spec();
    if layout.world_size() != 1 && args.backend.backend != BackendName::Cpu {
        return Err(Failure::input(format!(
            "layout {layout}: ranks are threads here, which share one device; leave out --backend, or the layout flags"
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
        let layout = args.layout.spec();
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
            let reference = &args.reference;
            return Ok(verify_bf16::<B>(
                &registry, &folder, reference, &device, name,
            )?);
        }
        if layout != LayoutSpec::default() {
            let mut divided = LayoutOptions::new(layout);
            divided.parallel.cp_comm_type = args.cp_comm_type;
            return Ok(verify_layout::<B>(
                &registry,
                &folder,
                &args.reference,
                &options,
                &divided,
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
