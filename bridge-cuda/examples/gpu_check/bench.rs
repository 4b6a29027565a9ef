//! Times of the kernels a training step is made of, as the rate of their floor: TFLOP/s or GB/s.

#[path = "bench_recurrent.rs"]
mod recurrent;

use bridge_cuda::{
    AttentionPath, Cuda, CudaDevice, CudaTensor, GroupedPath, attention_calls, attention_refusals,
    force_attention_path, force_grouped_path,
};
use bridge_ops::{
    Activation, AdamWStep, AdamWTensors, AttentionSpec, CrossEntropySpec, DType, ExpertOrder,
    GradSlot, LossGradRequest, NormSpec, Ops, RotaryDirection, RotaryStyle, RouterScore,
    RouterSpec,
};
use burn_backend::ops::{FloatTensorOps, IntTensorOps};
use burn_backend::{Distribution, FloatDType, IntDType, Shape};

struct Bench<'a> {
    device: CudaDevice,
    only: Option<&'a str>,
}

impl Bench<'_> {
    fn random(&self, shape: &[usize], dtype: FloatDType) -> CudaTensor {
        Cuda::float_random(
            Shape::from(shape.to_vec()),
            Distribution::Normal(0.0, 1.0),
            &self.device,
            dtype,
        )
    }

    fn bf16(&self, shape: &[usize]) -> CudaTensor {
        self.random(shape, FloatDType::BF16)
    }

    fn wanted(&self, name: &str) -> bool {
        self.only.is_none_or(|only| name.contains(only))
    }

    /// Median milliseconds of several runs, printed with the rate for `work` operations or bytes in units of 1e9.
    fn time(&self, name: &str, unit: &str, work: f64, mut run: impl FnMut()) {
        for _ in 0..3 {
            run();
        }
        let mut times: Vec<f32> = (0..7)
            .map(|_| {
                self.device
                    .time(|| (0..3).for_each(|_| run()))
                    .expect("the kernels run")
                    / 3.0
            })
            .collect();
        times.sort_by(f32::total_cmp);
        let median = f64::from(times[times.len() / 2]);
        let (rate, unit) = if unit == "FLOP" {
            (work / median * 1e-9, "TFLOP/s")
        } else {
            (work / median * 1e-6, "GB/s")
        };
        println!("{name:44} {median:9.3} ms {rate:9.1} {unit}");
    }
}

/// Runs the benchmarks whose names contain `only`.
pub(crate) fn run(device: CudaDevice, only: Option<&str>) {
    let b = Bench { device, only };
    products(&b);
    experts(&b);
    attention(&b);
    memory_bound(&b);
    recurrent::run(&b);
    loss(&b);
    optimizer(&b);
    println!("{:?}", device.memory().expect("the device is open"));
}

fn products(b: &Bench) {
    let shapes = [
        (4096, 4096, 4096),
        (8192, 8192, 8192),
        (8192, 2048, 8192),
        (8192, 2048, 2048),
        (8192, 8192, 2048),
        (16384, 2048, 2048),
        (16384, 2048, 512),
        (16384, 2048, 8192),
        (16384, 8192, 2048),
    ];
    for (m, k, n) in shapes {
        let name = format!("product {m}x{k}x{n}");
        if !b.wanted(&name) {
            continue;
        }
        let flop = 2.0 * m as f64 * k as f64 * n as f64;
        let (x, w, dy) = (b.bf16(&[m, k]), b.bf16(&[n, k]), b.bf16(&[m, n]));
        b.time(&format!("{name} y = x w^T"), "FLOP", flop, || {
            Cuda::linear_forward(x.clone(), w.clone(), None);
        });
        b.time(&format!("{name} dx"), "FLOP", flop, || {
            Cuda::linear_backward_input(dy.clone(), w.clone());
        });
        let mut sum = Some(b.random(&[n, k], FloatDType::F32));
        b.time(&format!("{name} dw (f32 +=)"), "FLOP", flop, || {
            let slot = GradSlot::Sum(sum.take().expect("put back below"));
            sum = Some(Cuda::linear_accumulate_weight_grad(
                x.clone(),
                dy.clone(),
                slot,
            ));
        });
    }
}

/// The parts of a mixture of experts, for 16384 tokens of Qwen3-30B-A3B and of DeepSeek-V2-Lite.
fn experts(b: &Bench) {
    for (name, count, top_k, hidden, inner) in [
        ("experts qwen3_30b_a3b", 128, 8, 2048, 768),
        ("experts deepseek_v2_lite", 64, 6, 2048, 1408),
    ] {
        if !b.wanted(name) {
            continue;
        }
        let tokens = 16384;
        let rows = tokens * top_k;
        let spec = RouterSpec {
            top_k,
            score: RouterScore::Softmax,
            normalize: true,
            scale: 1.0,
            groups: None,
        };
        let logits = b.random(&[tokens, count], FloatDType::F32);
        let bytes = |elements: usize| (elements * 2) as f64;
        b.time(
            &format!("{name} router"),
            "B",
            2.0 * bytes(tokens * count),
            || {
                Cuda::router_forward(logits.clone(), None, &spec);
            },
        );
        let routed = Cuda::router_forward(logits.clone(), None, &spec);
        b.time(
            &format!("{name} router backward"),
            "B",
            4.0 * bytes(tokens * count),
            || {
                let (experts, dweights) = (routed.experts.clone(), routed.weights.clone());
                Cuda::router_backward(logits.clone(), experts, dweights, &spec);
            },
        );
        b.time(&format!("{name} order"), "B", 6.0 * bytes(rows), || {
            Cuda::sort_by_expert(routed.experts.clone(), count);
        });
        let order = ExpertOrder::<Cuda>::new(routed.experts.clone(), count);
        let x = b.bf16(&[tokens, hidden]);
        let moved = bytes((rows + tokens) * hidden);
        b.time(&format!("{name} permute"), "B", moved, || {
            Cuda::permute_rows(x.clone(), &order, None);
        });
        let sorted = Cuda::permute_rows(x.clone(), &order, None);
        let (inverse, offsets) = (order.inverse(), order.offsets());
        b.time(&format!("{name} unpermute"), "B", moved, || {
            let (rows, inverse, weights) =
                (sorted.clone(), inverse.clone(), routed.weights.clone());
            Cuda::unpermute_rows(rows, inverse, Some(weights), offsets.device().clone());
        });
        b.time(&format!("{name} dweights"), "B", moved, || {
            let (rows, inverse) = (sorted.clone(), inverse.clone());
            Cuda::unpermute_weight_grad(rows, inverse, x.clone(), offsets.device().clone());
        });
        let flop = 2.0 * (rows * hidden * inner) as f64;
        let up = b.bf16(&[count, inner, hidden]);
        let down = b.bf16(&[count, hidden, inner]);
        let dy = b.bf16(&[rows, inner]);
        let mut sum = Some(b.random(&[count, inner, hidden], FloatDType::F32));
        for (path, path_name) in [
            (GroupedPath::Hopper, "wgmma"),
            (GroupedPath::TensorCores, "mma"),
        ] {
            force_grouped_path(Some(path));
            let time = |what: &str, run: &mut dyn FnMut()| {
                b.time(&format!("{name} {what} {path_name}"), "FLOP", flop, run);
            };
            time("up", &mut || {
                Cuda::grouped_linear_forward(sorted.clone(), up.clone(), None, offsets);
            });
            time("down", &mut || {
                Cuda::grouped_linear_forward(dy.clone(), down.clone(), None, offsets);
            });
            time("up dx", &mut || {
                Cuda::grouped_linear_backward_input(dy.clone(), up.clone(), offsets);
            });
            time("up dx (+=)", &mut || {
                let (dy, up, so_far) = (dy.clone(), up.clone(), Some(sorted.clone()));
                Cuda::grouped_linear_backward_input_add(dy, up, offsets, so_far);
            });
            time("gate and up dx, of 2", &mut || {
                let (dy, up) = ([dy.clone(), dy.clone()], [up.clone(), up.clone()]);
                Cuda::grouped_linear_backward_input_pair(dy, up, offsets, None);
            });
            time("down dx", &mut || {
                Cuda::grouped_linear_backward_input(sorted.clone(), down.clone(), offsets);
            });
            for accumulate in [false, true] {
                let what = if accumulate {
                    "up dw (f32 +=)"
                } else {
                    "up dw (f32)"
                };
                time(what, &mut || {
                    let own = sum.take().expect("put back below");
                    let slot = if accumulate {
                        GradSlot::Sum(own)
                    } else {
                        GradSlot::Stale(own)
                    };
                    let (x, dy) = (sorted.clone(), dy.clone());
                    sum = Some(Cuda::grouped_linear_accumulate_weight_grad(
                        x, dy, offsets, slot,
                    ));
                });
            }
        }
        force_grouped_path(None);
    }
}

fn attention(b: &Bench) {
    // The last two numbers: window, and length of packed documents; 0 is none.
    for (batch, seq, heads, kv, d, dv, window, document) in [
        (4, 2048, 32, 32, 64, 64, 0, 0),
        (2, 4096, 32, 32, 128, 128, 0, 0),
        (4, 4096, 32, 8, 64, 64, 0, 0),
        (1, 8192, 32, 8, 128, 128, 0, 0),
        (2, 8192, 32, 8, 64, 64, 0, 0),
        (1, 4096, 16, 4, 256, 256, 0, 0),
        (1, 4096, 32, 32, 192, 128, 0, 0),
        (1, 8192, 32, 8, 128, 128, 1024, 0),
        (4, 4000, 32, 8, 64, 64, 0, 0),
        (4, 4096, 32, 8, 64, 64, 0, 512),
        (1, 8192, 32, 8, 128, 128, 0, 1000),
    ] {
        let mut shape = format!("attention b{batch} s{seq} h{heads}/{kv} d{d}/{dv}");
        if window > 0 {
            shape += &format!(" w{window}");
        }
        if document > 0 {
            shape += &format!(" docs{document}");
        }
        if !b.wanted(&shape) {
            continue;
        }
        // Half of the scores are seen; of a window, about its width for every query; of a document, half of its own.
        let scores = match (window, document) {
            (0, 0) => (seq * seq) as f64 / 2.0,
            (0, length) => (seq * length) as f64 / 2.0,
            (window, _) => (window * seq - window * window / 2) as f64,
        };
        let flop = 2.0 * (batch * heads) as f64 * scores * (d + dv) as f64;
        let q = b.bf16(&[batch, seq, heads, d]);
        let (k, v) = (b.bf16(&[batch, seq, kv, d]), b.bf16(&[batch, seq, kv, dv]));
        let dout = b.bf16(&[batch, seq, heads, dv]);
        let mut rule = AttentionSpec::<Cuda>::causal().rule;
        rule.window = (window > 0).then_some(window);
        if document > 0 {
            let rows = (0..batch).flat_map(|row| {
                (0..seq)
                    .step_by(document)
                    .map(move |start| row * seq + start)
            });
            rule.cu_seqlens = Some(rows.chain([batch * seq]).collect());
        }
        let mut paths = vec![(AttentionPath::Cudnn, "cudnn")];
        if d == dv && (d == 64 || d == 128) {
            paths.push((AttentionPath::TensorCores, "own"));
        }
        for (path, name) in paths {
            force_attention_path(Some(path));
            let forward = || Cuda::attention_forward(q.clone(), k.clone(), v.clone(), None, &rule);
            let start = std::time::Instant::now();
            // A path that does not serve the shape says so and the others go on.
            let Ok(output) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(forward)) else {
                println!("{shape} {name}: not served");
                continue;
            };
            b.device.synchronize().expect("the kernels run");
            let first = start.elapsed().as_secs_f64();
            b.time(&format!("{shape} {name} fwd"), "FLOP", flop, || {
                forward();
            });
            let backward = || {
                Cuda::attention_backward(
                    q.clone(),
                    k.clone(),
                    v.clone(),
                    None,
                    output.clone(),
                    dout.clone(),
                    &rule,
                );
            };
            let start = std::time::Instant::now();
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(backward)).is_err() {
                println!("{shape} {name}: backward not served");
                continue;
            }
            b.device.synchronize().expect("the kernels run");
            let first_backward = start.elapsed().as_secs_f64();
            b.time(&format!("{shape} {name} bwd"), "FLOP", 2.5 * flop, backward);
            println!("{shape} {name}: first calls took {first:.2} s and {first_backward:.2} s");
        }
        force_attention_path(None);
    }
    println!("{:?}", attention_calls());
    for refusal in attention_refusals() {
        println!("refused: {refusal}");
    }
}

fn memory_bound(b: &Bench) {
    if !b.wanted("memory") {
        return;
    }
    let (tokens, hidden, intermediate) = (16384, 2048, 8192);
    let bytes = (tokens * hidden * 2) as f64;
    let (x, w, dy) = (
        b.bf16(&[1, tokens, hidden]),
        b.bf16(&[hidden]),
        b.bf16(&[1, tokens, hidden]),
    );
    let spec = NormSpec::new(1e-5);
    b.time("memory: copy 1 GiB", "B", 2.0 * (1u64 << 30) as f64, {
        let big = b.bf16(&[1 << 29]);
        move || {
            Cuda::float_mul_scalar(big.clone(), 1.0.into());
        }
    });
    b.time("memory: add", "B", 3.0 * bytes, || {
        Cuda::add(x.clone(), dy.clone());
    });
    b.time("memory: rms_norm forward", "B", 2.0 * bytes, || {
        Cuda::rms_norm_forward(x.clone(), w.clone(), spec);
    });
    b.time("memory: rms_norm backward", "B", 3.0 * bytes, || {
        Cuda::rms_norm_backward(x.clone(), w.clone(), dy.clone(), spec);
    });
    let (gate, up, dg) = (
        b.bf16(&[tokens, intermediate]),
        b.bf16(&[tokens, intermediate]),
        b.bf16(&[tokens, intermediate]),
    );
    let bytes = (tokens * intermediate * 2) as f64;
    b.time("memory: swiglu forward", "B", 3.0 * bytes, || {
        Cuda::gated_activation_forward(gate.clone(), up.clone(), Activation::Silu);
    });
    b.time("memory: swiglu backward", "B", 5.0 * bytes, || {
        Cuda::gated_activation_backward(gate.clone(), up.clone(), dg.clone(), Activation::Silu);
    });
    let q = b.bf16(&[4, 4096, 32, 64]);
    let (cos, sin) = (
        b.random(&[1, 4096, 32], FloatDType::F32),
        b.random(&[1, 4096, 32], FloatDType::F32),
    );
    b.time(
        "memory: rotary",
        "B",
        2.0 * (16384 * 2048 * 2) as f64,
        || {
            Cuda::rotary(
                q.clone(),
                cos.clone(),
                sin.clone(),
                RotaryStyle::Halves,
                RotaryDirection::Forward,
            );
        },
    );
    let vocab = 128_256;
    let table = b.bf16(&[vocab, hidden]);
    let ids = Cuda::int_random(
        Shape::from(vec![4, 4096]),
        Distribution::Uniform(0.0, vocab as f64),
        &b.device,
        IntDType::I32,
    );
    let dy = b.bf16(&[4, 4096, hidden]);
    b.time(
        "memory: embedding forward",
        "B",
        2.0 * (16384 * 2048 * 2) as f64,
        || {
            Cuda::embedding_forward(ids.clone(), table.clone(), DType::BF16);
        },
    );
    let mut sum = Some(b.random(&[vocab, hidden], FloatDType::F32));
    b.time(
        "memory: embedding gradient",
        "B",
        (16384 * 2048 * 10) as f64,
        || {
            let slot = GradSlot::Sum(sum.take().expect("put back below"));
            sum = Some(Cuda::embedding_accumulate_grad(
                ids.clone(),
                dy.clone(),
                vocab,
                slot,
            ));
        },
    );
}

fn loss(b: &Bench) {
    if !b.wanted("linear_cross_entropy") {
        return;
    }
    let (tokens, hidden, vocab) = (16384, 2048, 128_256);
    let flop = 2.0 * tokens as f64 * hidden as f64 * vocab as f64;
    let (x, w) = (
        b.bf16(&[tokens, hidden]),
        b.random(&[vocab, hidden], FloatDType::BF16),
    );
    let w = Cuda::float_mul_scalar(w, 0.02.into());
    let targets = Cuda::int_random(
        Shape::from(vec![tokens]),
        Distribution::Uniform(0.0, vocab as f64),
        &b.device,
        IntDType::I32,
    );
    let dloss = Cuda::float_full(
        Shape::from(vec![tokens]),
        (1.0 / tokens as f64).into(),
        &b.device,
        FloatDType::F32,
    );
    let spec = CrossEntropySpec::default();
    b.time("linear_cross_entropy forward", "FLOP", flop, || {
        Cuda::linear_cross_entropy_forward(x.clone(), w.clone(), targets.clone(), &spec);
    });
    let mut sum = Some(Cuda::float_zeros(
        Shape::from(vec![vocab, hidden]),
        &b.device,
        FloatDType::F32,
    ));
    b.time(
        "linear_cross_entropy with gradients",
        "FLOP",
        3.0 * flop,
        || {
            let weight = Some(GradSlot::Sum(sum.take().expect("put back below")));
            let request = LossGradRequest {
                input: true,
                weight,
            };
            let (_, grads) = Cuda::linear_cross_entropy_with_grads(
                x.clone(),
                w.clone(),
                targets.clone(),
                dloss.clone(),
                &spec,
                request,
            );
            sum = grads.weight;
        },
    );
}

fn optimizer(b: &Bench) {
    if !b.wanted("adamw") {
        return;
    }
    // The 1.24e9 parameters of a Llama 3.2 1B, in tensors of 16 Mi elements.
    let (count, size) = (74, 1 << 24);
    let new = |dtype| -> Vec<CudaTensor> { (0..count).map(|_| b.random(&[size], dtype)).collect() };
    let step = AdamWStep::new(10, 1e-4, (0.9, 0.95), 1e-8, 0.1);
    let grads = new(FloatDType::F32);
    let mut tensors: Vec<AdamWTensors<Cuda>> = (0..count)
        .map(|_| {
            let (copy, master) = Cuda::split_halves(b.random(&[size], FloatDType::F32));
            AdamWTensors {
                master,
                grad: None,
                m: b.random(&[size], FloatDType::F32),
                v: Cuda::float_abs(b.random(&[size], FloatDType::F32)),
                copy: Some(copy),
            }
        })
        .collect();
    b.time(
        "adamw, 1.24e9 parameters",
        "B",
        (count * size * 28) as f64,
        || {
            for (tensors, grad) in tensors.iter_mut().zip(&grads) {
                tensors.grad = Some(grad.clone());
            }
            tensors = Cuda::adamw_step_many(std::mem::take(&mut tensors), &step);
        },
    );
    b.time(
        "adamw: norm of all gradients",
        "B",
        (count * size * 4) as f64,
        || {
            Cuda::sum_squares_many(grads.clone());
        },
    );
}
