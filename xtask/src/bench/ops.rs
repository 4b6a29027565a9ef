//! `bench ops`: the operations of a decoder layer, forward and backward.

use std::time::Instant;

use bridge_ops::{
    Activation, AttentionSpec, CrossEntropySpec, DType, NormSpec, Param, RotaryStyle, RotaryTable,
    Tape, Var, attention, float_from_f32, gated_activation, int_from_i64, linear,
    linear_cross_entropy, rms_norm, rotary,
};
use serde_json::{Value, json};

use super::{random_ids, rounded};
use crate::backend::{Machine, OnBackend, dispatch};
use crate::failure::{Failure, Result};
use crate::flags::BackendFlags;
use crate::report::Report;

/// Times single operations forward and backward, on the shapes of one decoder layer.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Example:\n  cargo xtask bench ops --hidden 576 --heads 9 --kv-heads 3 --intermediate 1536 --vocab 49152"
)]
pub(crate) struct Args {
    /// Tokens per sample.
    #[arg(long, value_name = "N", default_value_t = 256)]
    seq: usize,
    /// Samples.
    #[arg(long, value_name = "N", default_value_t = 2)]
    batch: usize,
    /// Width of the residual stream.
    #[arg(long, value_name = "N", default_value_t = 576)]
    hidden: usize,
    /// Inner width of the MLP.
    #[arg(long, value_name = "N", default_value_t = 1536)]
    intermediate: usize,
    /// Query heads.
    #[arg(long, value_name = "N", default_value_t = 9)]
    heads: usize,
    /// Key and value heads.
    #[arg(long, value_name = "N", default_value_t = 3)]
    kv_heads: usize,
    /// Width of a head.
    #[arg(long, value_name = "N", default_value_t = 64)]
    head_dim: usize,
    /// Size of the vocabulary.
    #[arg(long, value_name = "N", default_value_t = 49152)]
    vocab: usize,
    /// Seconds to spend on each case.
    #[arg(long, value_name = "S", default_value_t = 0.5)]
    seconds: f64,
    /// Only operations whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    #[command(flatten)]
    backend: BackendFlags,
}

pub(crate) fn run(args: Args, report: Report) -> Result {
    let sizes = [
        args.seq,
        args.batch,
        args.hidden,
        args.intermediate,
        args.heads,
        args.kv_heads,
        args.head_dim,
        args.vocab,
    ];
    if sizes.contains(&0)
        || !args.heads.is_multiple_of(args.kv_heads)
        || !args.head_dim.is_multiple_of(2)
    {
        return Err(Failure::input(
            "sizes must be at least 1, --heads a multiple of --kv-heads, --head-dim even",
        ));
    }
    dispatch(
        args.backend,
        OpsBench {
            args: &args,
            report,
        },
    )
}

struct OpsBench<'a> {
    args: &'a Args,
    report: Report,
}

impl OnBackend for OpsBench<'_> {
    type Output = ();

    fn run<B: Machine>(self, device: B::Device) -> Result {
        let Args {
            seq,
            batch,
            hidden,
            intermediate,
            heads,
            kv_heads,
            head_dim,
            vocab,
            ..
        } = *self.args;
        let tokens = batch * seq;
        let random = |shape: &[usize]| random::<B>(shape, &device);
        let param = |name: &str, shape: &[usize]| Param::<B>::new(name, random(shape));
        let bench = Bench::<B> {
            args: self.args,
            report: self.report,
            device: device.clone(),
        };

        for (name, out, inner) in [
            ("linear_up", intermediate, hidden),
            ("linear_down", hidden, intermediate),
        ] {
            let weight = param("weight", &[out, inner]);
            bench.case(
                name,
                2.0 * (tokens * out * inner) as f64,
                &[&[batch, seq, inner]],
                |tape, x| linear(tape, &x[0], &weight, None),
            )?;
        }
        let norm = param("norm", &[hidden]);
        bench.case("rms_norm", 0.0, &[&[batch, seq, hidden]], |tape, x| {
            rms_norm(tape, &x[0], &norm, NormSpec::new(1e-5))
        })?;

        let inv_freq: Vec<f32> = (0..head_dim / 2)
            .map(|i| 1e4f32.powf(-(2.0 * i as f32) / head_dim as f32))
            .collect();
        let table =
            RotaryTable::<B>::from_positions(&inv_freq, 1.0, 0..seq, RotaryStyle::Halves, &device);
        bench.case(
            "rotary",
            0.0,
            &[&[batch, seq, heads, head_dim]],
            |tape, x| rotary(tape, &x[0], &table),
        )?;

        let spec = AttentionSpec::causal();
        let (q, kv) = (
            [batch, seq, heads, head_dim],
            [batch, seq, kv_heads, head_dim],
        );
        // Scores and weighted sum, of which the causal half counts.
        let flops = 2.0 * (batch * heads * seq * seq * head_dim) as f64;
        bench.case("attention", flops, &[&q, &kv, &kv], |tape, x| {
            attention(tape, &x[0], &x[1], &x[2], &spec)
        })?;

        let wide = [batch, seq, intermediate];
        bench.case("gated_activation", 0.0, &[&wide, &wide], |tape, x| {
            gated_activation(tape, &x[0], &x[1], Activation::Silu)
        })?;

        let head = param("head", &[vocab, hidden]);
        let targets: Vec<i64> = random_ids(tokens, vocab)
            .into_iter()
            .map(i64::from)
            .collect();
        let targets = int_from_i64::<B>(&targets, &[tokens], &device);
        bench.case(
            "linear_cross_entropy",
            2.0 * (tokens * vocab * hidden) as f64,
            &[&[tokens, hidden]],
            |tape, x| {
                linear_cross_entropy(tape, &x[0], &head, &targets, CrossEntropySpec::default())
            },
        )
    }
}

struct Bench<'a, B: Machine> {
    args: &'a Args,
    report: Report,
    device: B::Device,
}

impl<B: Machine> Bench<'_, B> {
    /// Times one operation; `flops` is what its forward pass computes, 0 where memory decides.
    fn case(
        &self,
        name: &str,
        flops: f64,
        inputs: &[&[usize]],
        op: impl Fn(&Tape<B>, &[Var<B>]) -> Var<B>,
    ) -> Result {
        if self
            .args
            .only
            .as_ref()
            .is_some_and(|only| !name.contains(only.as_str()))
        {
            return Ok(());
        }
        let values: Vec<_> = inputs
            .iter()
            .map(|shape| random::<B>(shape, &self.device))
            .collect();
        let started = Instant::now();
        let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
        let mut runs = 0;
        while runs < 3 || started.elapsed().as_secs_f64() < self.args.seconds {
            let tape = Tape::new();
            let x: Vec<Var<B>> = values.iter().map(|v| tape.leaf(v.clone())).collect();
            let time = Instant::now();
            let y = op(&tape, &x);
            self.wait()?;
            let there = time.elapsed().as_secs_f64();
            let seed = B::cast(random::<B>(&y.shape(), &self.device), y.dtype());
            self.wait()?;
            let time = Instant::now();
            tape.backward(vec![(y, seed)], &x.iter().collect::<Vec<_>>());
            self.wait()?;
            let back = time.elapsed().as_secs_f64();
            // The first run pays for memory that later ones reuse.
            if runs > 0 {
                (forward, backward) = (forward.min(there), backward.min(back));
            }
            runs += 1;
        }
        let rate = |work: f64, seconds: f64| {
            if work > 0.0 {
                rounded(work / seconds / 1e9, 1).into()
            } else {
                Value::Null
            }
        };
        self.report.line(&json!({
            "bench": "ops",
            "op": name,
            "backend": self.args.backend.backend.as_str(),
            "threads": rayon::current_num_threads(),
            "inputs": inputs,
            "forward_ms": rounded(forward * 1e3, 3),
            "backward_ms": rounded(backward * 1e3, 3),
            "forward_gflops": rate(flops, forward),
            "backward_gflops": rate(2.0 * flops, backward),
            "gpu": B::gpu_name(&self.device),
        }))
    }

    fn wait(&self) -> Result {
        B::sync(&self.device).map_err(|e| Failure::running(format!("the device failed: {e}")))
    }
}

/// Numbers in [-1, 1), in the format that the backend trains in.
fn random<B: Machine>(shape: &[usize], device: &B::Device) -> bridge_ops::Float<B> {
    let values: Vec<f32> = random_ids(shape.iter().product(), 1 << 20)
        .into_iter()
        .map(|i| i as f32 / 524_288.0 - 1.0)
        .collect();
    let values = float_from_f32::<B>(&values, shape, device);
    if B::platform().bf16 {
        B::cast(values, DType::BF16)
    } else {
        values
    }
}
