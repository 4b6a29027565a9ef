//! `bench train`: full training steps on random tokens.

use std::time::Instant;

use bridge_core::config::{Ffn, MlpLayer};
use bridge_core::{DecoderConfig, HfConfig};
use bridge_data::Batch;
use bridge_models::{Decoder, DtypePolicy, Init, RandomInit};
use bridge_ops::DType;
use bridge_train::config::{RecomputeGranularity, StateDType};
use bridge_train::engine::Executor;
use bridge_train::flops::train_flops_per_token;
use bridge_train::optimizer::{AdamWOptions, DataParallelOptions, Optimizer};
use bridge_train::step::{StepOptions, train_step};
use serde_json::{Value, json};

use super::{memory, random_ids, rounded};
use crate::backend::{Machine, OnBackend, dispatch};
use crate::cli::unknown_name;
use crate::failure::{Failure, Result};
use crate::flags::BackendFlags;
use crate::model::{ModelFlags, ModelOnDisk};
use crate::report::Report;

/// Times full training steps: forward, backward, gradient clipping, AdamW, on random tokens.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench train --hf HuggingFaceTB/SmolLM2-135M-Instruct --seq 256 --batch 2 --steps 4 --threads 2\n  \
    cargo xtask bench train --shape llama32_1b --seq 4096 --batch 4")]
pub(crate) struct Args {
    #[command(flatten)]
    model: Model,
    /// Tokens per sample.
    #[arg(long, value_name = "N", default_value_t = 256)]
    seq: usize,
    /// Samples per step.
    #[arg(long, value_name = "N", default_value_t = 2)]
    batch: usize,
    /// Steps to time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before them that are not timed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u32,
    /// What is kept of a layer for its backward pass: `full` keeps its input alone and runs it again.
    #[arg(long, value_name = "WHAT", default_value_t = RecomputeGranularity::None, num_args = 0..=1, default_missing_value = "full")]
    recompute: RecomputeGranularity,
    /// Number formats: fp32, or bf16 weights and activations with fp32 master weights, gradients and optimizer state
    /// [default: bf16 on a GPU, fp32 on the CPU].
    #[arg(long, value_enum, value_name = "FORMAT")]
    precision: Option<Precision>,
    /// What gradients are kept in.
    #[arg(long, value_name = "FORMAT", default_value_t = StateDType::Fp32)]
    main_grads_dtype: StateDType,
    /// What the running mean of the gradient is kept in.
    #[arg(long, value_name = "FORMAT", default_value_t = StateDType::Fp32)]
    exp_avg_dtype: StateDType,
    #[command(flatten)]
    backend: BackendFlags,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Precision {
    Fp32,
    Bf16,
}

#[derive(clap::Args, Debug)]
#[group(required = true, multiple = false)]
struct Model {
    /// Hugging Face folder or hub id (org/name[@revision]).
    #[arg(long, value_name = "DIR")]
    hf: Option<String>,
    /// A shape with fresh weights: tiny, llama3_8b_4l, qwen3_30b_a3b_4l, deepseek_v2_lite_4l (four layers of each),
    /// qwen3_600m, nemotron_h_stack, qwen3_next_stack (a few layers of each), or a named size of `models list`.
    #[arg(long, value_name = "NAME")]
    shape: Option<String>,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    if args.seq == 0 || args.batch == 0 {
        return Err(Failure::input("--seq and --batch must be at least 1"));
    }
    let result = dispatch(args.backend, Train(&args))?;
    report.line(&result)
}

/// Four layers, the first ones, of models that do not fit one GPU with their optimizer state.
const FOUR_LAYERS: [&str; 3] = ["llama3_8b_4l", "qwen3_30b_a3b_4l", "deepseek_v2_lite_4l"];

/// The shapes that the plain PyTorch trainer used for comparison knows, and every named size.
fn shape(name: &str) -> Result<DecoderConfig> {
    let sized = |preset: &str, layers: usize| -> Result<DecoderConfig> {
        let (_, mut config) = bridge_models::families::preset(preset)?;
        config.layers.truncate(layers);
        config.num_hidden_layers = config.layers.len();
        Ok(config)
    };
    if let Some(shape) = hybrid_shape(name) {
        return shape;
    }
    if let Some(known) = FOUR_LAYERS.iter().find(|shape| **shape == name)
        && let Some(preset) = known.strip_suffix("_4l")
    {
        return sized(preset, 4);
    }
    match name {
        "qwen3_600m" => sized("qwen3_0_6b", usize::MAX),
        "tiny" => {
            let json = json!({
                "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024,
                "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "silu",
                "tie_word_embeddings": true
            });
            let config = HfConfig::from_slice(json.to_string().as_bytes(), "the shape `tiny`")?;
            Ok(bridge_models::registry().detect(&config)?.config(&config)?)
        }
        _ => {
            let presets = || {
                bridge_models::families::FAMILIES
                    .iter()
                    .flat_map(|f| f.presets.iter().map(|p| p.name))
            };
            if !presets().any(|p| p == name) {
                return Err(unknown_name(
                    "shape",
                    name,
                    presets()
                        .chain(FOUR_LAYERS)
                        .chain(["tiny", "qwen3_600m"])
                        .chain(HYBRID_SHAPES),
                ));
            }
            sized(name, usize::MAX)
        }
    }
}

const HYBRID_SHAPES: [&str; 2] = ["nemotron_h_stack", "qwen3_next_stack"];

/// Layers of models with recurrent parts, as many as fit one GPU with their optimizer state.
fn hybrid_shape(name: &str) -> Option<Result<DecoderConfig>> {
    let part = |preset: &str, layers: std::ops::Range<usize>| -> Result<DecoderConfig> {
        let (_, mut config) = bridge_models::families::preset(preset)?;
        config.layers = config.layers[layers].to_vec();
        config.num_hidden_layers = config.layers.len();
        Ok(config)
    };
    match name {
        // The stretch around the first attention: M-M*-M-.
        "nemotron_h_stack" => Some(part("nemotron_h_8b", 4..11)),
        // Three delta nets and one attention. The experts of four such layers alone take 103 GB with their optimizer state,
        // so these layers have the dense MLP of the same config instead.
        "qwen3_next_stack" => Some(part("qwen3_next_80b_a3b", 0..4).map(|mut config| {
            for layer in &mut config.layers {
                layer.ffn = Ffn::Mlp(MlpLayer::default());
            }
            config.moe = None;
            config
        })),
        _ => None,
    }
}

struct Train<'a>(&'a Args);

impl OnBackend for Train<'_> {
    type Output = Value;

    fn run<B: Machine>(self, device: B::Device) -> Result<Value> {
        let args = self.0;
        let started = Instant::now();
        let (name, model) = match (&args.model.hf, &args.model.shape) {
            (_, Some(name)) => {
                let config = shape(name)?;
                let mut weights = RandomInit::new(&Init::default(), &config);
                (
                    name.clone(),
                    Decoder::<B>::build(config.clone(), &mut weights, &device)?,
                )
            }
            (hf, None) => {
                let flags = ModelFlags {
                    hf: hf.clone(),
                    checkpoint: None,
                };
                let model = ModelOnDisk::open(&flags)?;
                let name = hf
                    .as_deref()
                    .unwrap_or_default()
                    .trim_end_matches('/')
                    .rsplit('/')
                    .next()
                    .unwrap_or_default();
                (
                    name.to_owned(),
                    model.load::<B>(&device, DtypePolicy::Float32)?,
                )
            }
        };
        let weights_s = started.elapsed().as_secs_f64();
        let config = model.config().clone();
        if args.seq > config.max_position_embeddings {
            let context = config.max_position_embeddings;
            return Err(Failure::input(format!(
                "--seq {} is longer than the model's context of {context} tokens",
                args.seq
            )));
        }
        let precision = args.precision.unwrap_or(if B::platform().bf16 {
            Precision::Bf16
        } else {
            Precision::Fp32
        });
        if precision == Precision::Bf16 {
            if !B::platform().bf16 {
                return Err(Failure::input(
                    "--precision bf16: the cpu backend trains in fp32; leave the flag out",
                ));
            }
            for param in model.params() {
                param.set_value(B::cast(param.value(), DType::BF16));
            }
        }
        let options = StepOptions {
            lr: 1e-5,
            weight_decay: 0.01,
            clip_grad: 1.0,
            auxiliary: Default::default(),
        };
        let executor = Executor::single(&model, &device, args.recompute)?;
        let mut optimizer = Optimizer::new(
            &model,
            executor.parallel(),
            &AdamWOptions {
                main_grads_dtype: args.main_grads_dtype.dtype(),
                exp_avg_dtype: args.exp_avg_dtype.dtype(),
                ..AdamWOptions::default()
            },
            &DataParallelOptions::default(),
        )?;
        let batch = batch(args, config.vocab_size);
        let mut times = Vec::new();
        let mut startup = 0.0;
        for step in 0..args.warmup + args.steps {
            let start = Instant::now();
            let outcome = train_step(
                &executor,
                &model,
                &mut optimizer,
                std::slice::from_ref(&batch),
                &options,
                [false; 2],
            )?;
            if let Some(problem) = outcome.non_finite {
                return Err(Failure::running(format!("step {step}: {problem}")));
            }
            if step + 1 == args.warmup {
                B::reset_peak_memory(&device);
            }
            if step == 0 {
                startup = started.elapsed().as_secs_f64();
            }
            if step >= args.warmup {
                times.push(start.elapsed().as_secs_f64());
            }
        }
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        let tokens = (args.batch * args.seq) as f64;
        Ok(json!({
            "bench": "train",
            "shape": name,
            "backend": args.backend.backend.as_str(),
            "threads": rayon::current_num_threads(),
            "seq": args.seq,
            "micro_batch": args.batch,
            "precision": if precision == Precision::Bf16 { "bf16" } else { "fp32" },
            "recompute": args.recompute.as_str(),
            "main_grads_dtype": args.main_grads_dtype.as_str(),
            "exp_avg_dtype": args.exp_avg_dtype.as_str(),
            "step_ms": rounded(median * 1e3, 2),
            "min_ms": rounded(times[0] * 1e3, 2),
            "tokens_per_s": rounded(tokens / median, 1),
            "model_tflops": rounded(train_flops_per_token(&config, args.seq) * tokens / median / 1e12, 4),
            "peak_gib": memory::gib(B::peak_memory(&device)),
            "weights_s": rounded(weights_s, 2),
            "startup_s": rounded(startup, 2),
            "gpu": B::gpu_name(&device),
        }))
    }
}

/// Random tokens, each the target of the one before.
fn batch(args: &Args, vocab: usize) -> Batch {
    let (batch, seq) = (args.batch, args.seq);
    let ids: Vec<i64> = random_ids(batch * (seq + 1), vocab)
        .into_iter()
        .map(i64::from)
        .collect();
    let rows = || ids.chunks(seq + 1);
    Batch {
        batch,
        seq,
        tokens: rows().flat_map(|row| row[..seq].iter().copied()).collect(),
        labels: rows().flat_map(|row| row[1..].iter().copied()).collect(),
        position_ids: (0..batch).flat_map(|_| 0..seq as i64).collect(),
        cu_seqlens: None,
    }
}
