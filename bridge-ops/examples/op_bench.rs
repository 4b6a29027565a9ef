//! Speed of the CPU kernels on the shapes of a 135M-parameter Llama (SmolLM2-135M) at 2 x 256 tokens.
//!
//! `cargo run --release -p bridge-ops --example op_bench [-- NAME..]` prints, for each case whose name contains one of
//! the arguments, the best time of several runs, and what the kernels of one training step and of one generated token
//! come to. `RAYON_NUM_THREADS` sets the number of threads.

use std::time::Instant;

use bridge_ops::{
    Activation, AdamWStep, AttentionSpec, CrossEntropySpec, DType, Float, GradSlot,
    LossGradRequest, NormSpec, Ops, RotaryDirection, RotaryStyle, float_from_f32, float_zeros,
    int_from_i64,
};
use burn_backend::ops::FloatTensorOps;
use burn_flex::Flex;

const BATCH: usize = 2;
const SEQ: usize = 256;
const TOKENS: usize = BATCH * SEQ;
const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCAB: usize = 49152;
const PARAMS: usize = 134_515_008;
/// Keys in the cache when a token is generated.
const CACHED: usize = 256;

fn main() {
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let mut bench = Bench {
        filters,
        step: 0.0,
        token: 0.0,
    };
    println!("{} threads", rayon::current_num_threads());
    linear(&mut bench);
    head(&mut bench);
    attention(&mut bench);
    elementwise(&mut bench);
    optimizer(&mut bench);
    generation(&mut bench);
    println!("kernels of one training step   {:>8.3} s", bench.step);
    println!(
        "kernels of one generated token {:>8.3} ms",
        bench.token * 1e3
    );
}

fn linear(bench: &mut Bench) {
    // (out, in, how many in a layer)
    let shapes = [
        (HIDDEN, HIDDEN, 2),
        (KV_HEADS * HEAD_DIM, HIDDEN, 2),
        (INTERMEDIATE, HIDDEN, 2),
        (HIDDEN, INTERMEDIATE, 1),
    ];
    for (out, inner, count) in shapes {
        let (x, dy) = (random(&[TOKENS, inner]), random(&[TOKENS, out]));
        let weight = random(&[out, inner]);
        let flops = 2.0 * (TOKENS * out * inner) as f64;
        let count = count * LAYERS;
        let name = |kind: &str| format!("linear {kind} out={out} in={inner}");
        bench.step(&name("forward"), count, Work::Flops(flops), || {
            Flex::linear_forward(x.clone(), weight.clone(), None);
        });
        bench.step(&name("input-grad"), count, Work::Flops(flops), || {
            Flex::linear_backward_input(dy.clone(), weight.clone());
        });
        let mut grad = Some(zeros(&[out, inner]));
        bench.step(&name("weight-grad"), count, Work::Flops(flops), || {
            let slot = GradSlot::Sum(grad.take().unwrap());
            grad = Some(Flex::linear_accumulate_weight_grad(
                x.clone(),
                dy.clone(),
                slot,
            ));
        });
    }
}

fn head(bench: &mut Bench) {
    let (x, weight) = (random(&[TOKENS, HIDDEN]), random(&[VOCAB, HIDDEN]));
    let targets: Vec<i64> = (0..TOKENS).map(|t| (t * 95 % VOCAB) as i64).collect();
    let targets = int_from_i64::<Flex>(&targets, &[TOKENS], &Default::default());
    let dloss = random(&[TOKENS]);
    let spec = CrossEntropySpec::default();
    let flops = 2.0 * (TOKENS * HIDDEN * VOCAB) as f64;
    bench.other("head loss only", Work::Flops(flops), || {
        Flex::linear_cross_entropy_forward(x.clone(), weight.clone(), targets.clone(), &spec);
    });
    let mut grad = Some(zeros(&[VOCAB, HIDDEN]));
    bench.step(
        "head loss with gradients",
        1,
        Work::Flops(3.0 * flops),
        || {
            let request = LossGradRequest {
                input: true,
                weight: Some(GradSlot::Stale(grad.take().unwrap())),
            };
            let (_, grads) = Flex::linear_cross_entropy_with_grads(
                x.clone(),
                weight.clone(),
                targets.clone(),
                dloss.clone(),
                &spec,
                request,
            );
            grad = grads.weight;
        },
    );
}

fn attention(bench: &mut Bench) {
    for (batch, seq, count) in [(BATCH, SEQ, LAYERS), (1, 2048, 0)] {
        let q = random(&[batch, seq, HEADS, HEAD_DIM]);
        let k = random(&[batch, seq, KV_HEADS, HEAD_DIM]);
        let v = random(&[batch, seq, KV_HEADS, HEAD_DIM]);
        let rule = AttentionSpec::<Flex>::causal().rule;
        let out = Flex::attention_forward(q.clone(), k.clone(), v.clone(), None, &rule);
        // Two products of which causality needs half.
        let flops = 2.0 * (batch * HEADS * seq * seq * HEAD_DIM) as f64;
        bench.step(
            &format!("attention forward {batch} x {seq}"),
            count,
            Work::Flops(flops),
            || {
                Flex::attention_forward(q.clone(), k.clone(), v.clone(), None, &rule);
            },
        );
        let work = Work::Flops(2.5 * flops);
        bench.step(
            &format!("attention backward {batch} x {seq}"),
            count,
            work,
            || {
                let dout = out.output.clone();
                Flex::attention_backward(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    None,
                    out.clone(),
                    dout,
                    &rule,
                );
            },
        );
    }
}

fn elementwise(bench: &mut Bench) {
    let bytes = |arrays: usize, width: usize| Work::Bytes((4 * arrays * TOKENS * width) as f64);
    let (x, weight) = (random(&[TOKENS, HIDDEN]), random(&[HIDDEN]));
    let spec = NormSpec::new(1e-5);
    let norms = 2 * LAYERS + 1;
    bench.step("rms_norm forward", norms, bytes(2, HIDDEN), || {
        Flex::rms_norm_forward(x.clone(), weight.clone(), spec);
    });
    bench.step("rms_norm backward", norms, bytes(3, HIDDEN), || {
        Flex::rms_norm_backward(x.clone(), weight.clone(), x.clone(), spec);
    });
    // Residuals forward; gradients of values used twice or three times backward.
    bench.step("add", 6 * LAYERS, bytes(3, HIDDEN), || {
        Flex::add(x.clone(), x.clone());
    });
    let q = random(&[BATCH, SEQ, HEADS + KV_HEADS, HEAD_DIM]);
    let table = random(&[1, SEQ, HEAD_DIM / 2]);
    let width = (HEADS + KV_HEADS) * HEAD_DIM;
    bench.step("rotary", 2 * LAYERS, bytes(2, width), || {
        let direction = RotaryDirection::Forward;
        Flex::rotary(
            q.clone(),
            table.clone(),
            table.clone(),
            RotaryStyle::Halves,
            direction,
        );
    });
    let (gate, up) = (
        random(&[TOKENS, INTERMEDIATE]),
        random(&[TOKENS, INTERMEDIATE]),
    );
    bench.step("swiglu forward", LAYERS, bytes(3, INTERMEDIATE), || {
        Flex::gated_activation_forward(gate.clone(), up.clone(), Activation::Silu);
    });
    bench.step("swiglu backward", LAYERS, bytes(5, INTERMEDIATE), || {
        Flex::gated_activation_backward(gate.clone(), up.clone(), up.clone(), Activation::Silu);
    });
}

fn optimizer(bench: &mut Bench) {
    // One tensor of the size of the embedding stands for the whole model.
    let shape = [VOCAB, HIDDEN];
    let scale = PARAMS as f64 / (VOCAB * HIDDEN) as f64;
    let mut state = Some((random(&shape), zeros(&shape), zeros(&shape)));
    let grad = random(&shape);
    let bytes = |arrays: usize| Work::Bytes((4 * arrays * VOCAB * HIDDEN) as f64);
    let step = AdamWStep::new(10, 1e-4, (0.9, 0.95), 1e-8, 0.1);
    let adamw = bench.other("adamw embedding", bytes(7), || {
        let (p, m, v) = state.take().unwrap();
        state = Some(Flex::adamw_step(p, grad.clone(), m, v, &step));
    });
    let norm = bench.other("sum_squares embedding", bytes(1), || {
        Flex::sum_squares(grad.clone());
    });
    bench.step += scale * (adamw + norm);
}

fn generation(bench: &mut Bench) {
    let shapes = [
        (HIDDEN, HIDDEN, 2 * LAYERS),
        (KV_HEADS * HEAD_DIM, HIDDEN, 2 * LAYERS),
        (INTERMEDIATE, HIDDEN, 2 * LAYERS),
        (HIDDEN, INTERMEDIATE, LAYERS),
        (VOCAB, HIDDEN, 1),
    ];
    for (out, inner, count) in shapes {
        let x = random(&[1, 1, inner]);
        // As many weights as the model has, so that they come from memory and not from a cache.
        let weights: Vec<_> = (0..count)
            .map(|_| Flex::float_cast(random(&[out, inner]), DType::BF16.into()))
            .collect();
        let bytes = Work::Bytes((2 * count * out * inner) as f64);
        bench.token(
            &format!("decode linear bf16 out={out} in={inner} x{count}"),
            1,
            bytes,
            || {
                for weight in &weights {
                    Flex::linear_forward(x.clone(), weight.clone(), None);
                }
            },
        );
    }
    let q = random(&[1, 1, HEADS, HEAD_DIM]);
    let cache = random(&[1, 2 * CACHED, KV_HEADS, HEAD_DIM]);
    let rule = AttentionSpec::<Flex>::causal()
        .with_q_offset(CACHED - 1)
        .with_kv_len(CACHED)
        .rule;
    let bytes = Work::Bytes((8 * CACHED * KV_HEADS * HEAD_DIM) as f64);
    bench.token(
        &format!("decode attention over {CACHED}"),
        LAYERS,
        bytes,
        || {
            Flex::attention_forward(q.clone(), cache.clone(), cache.clone(), None, &rule);
        },
    );
    let (x, weight) = (random(&[1, 1, HIDDEN]), random(&[HIDDEN]));
    let bytes = Work::Bytes((8 * HIDDEN) as f64);
    bench.token("decode rms_norm", 2 * LAYERS + 1, bytes, || {
        Flex::rms_norm_forward(x.clone(), weight.clone(), NormSpec::new(1e-5));
    });
}

/// What a case does, for its rate.
enum Work {
    Flops(f64),
    Bytes(f64),
}

struct Bench {
    filters: Vec<String>,
    /// Seconds of the kernels of one training step, and of one generated token.
    step: f64,
    token: f64,
}

impl Bench {
    /// A kernel that a training step runs `count` times.
    fn step(&mut self, name: &str, count: usize, work: Work, f: impl FnMut()) {
        self.step += count as f64 * self.other(name, work, f);
    }

    /// A kernel that a generated token runs `count` times.
    fn token(&mut self, name: &str, count: usize, work: Work, f: impl FnMut()) {
        self.token += count as f64 * self.other(name, work, f);
    }

    /// Runs `f` for about half a second; returns and prints the best time in seconds.
    fn other(&mut self, name: &str, work: Work, mut f: impl FnMut()) -> f64 {
        if !self.filters.is_empty() && !self.filters.iter().any(|filter| name.contains(filter)) {
            return 0.0;
        }
        f();
        let start = Instant::now();
        let mut best = f64::INFINITY;
        while start.elapsed().as_secs_f64() < 0.5 {
            let run = Instant::now();
            f();
            best = best.min(run.elapsed().as_secs_f64());
        }
        let rate = match work {
            Work::Flops(flops) => format!("{:>8.1} GFLOP/s", flops / best / 1e9),
            Work::Bytes(bytes) => format!("{:>8.1} GB/s", bytes / best / 1e9),
        };
        println!("{name:<44} {:>9.3} ms {rate}", best * 1e3);
        best
    }
}

fn zeros(shape: &[usize]) -> Float<Flex> {
    float_zeros::<Flex>(shape, DType::F32, &Default::default())
}

fn random(shape: &[usize]) -> Float<Flex> {
    let mut state = 12345_u32;
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    float_from_f32::<Flex>(&values, shape, &Default::default())
}
