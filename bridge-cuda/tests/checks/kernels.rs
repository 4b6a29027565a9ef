//! The kernels of `bridge_ops::Ops`, forward and backward. Attention has a file of its own.

use bridge_ops::{
    Activation, AdamWStep, AdamWTensors, CrossEntropySpec, DType, GradSlot, LossGradRequest,
    NormSpec, Ops, RotaryDirection, RotaryStyle, int_from_i64,
};
use burn_backend::TensorMetadata;

use super::{Context, Group, group};

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];

pub(crate) fn groups() -> Vec<Group> {
    vec![
        group!(linear, FLOATS),
        group!(embedding, FLOATS),
        group!(rms_norm, FLOATS),
        group!(layer_norm, FLOATS),
        group!(rotary, FLOATS),
        group!(activation, FLOATS),
        group!(cross_entropy, FLOATS),
        group!(linear_cross_entropy, FLOATS),
        group!(adamw_many, &[DType::F32]),
        group!(adamw, &[DType::F32]),
        group!(normal_region, &[DType::F32]),
        group!(sum_squares, FLOATS),
    ]
}

fn linear<B: Ops>(c: &mut Context<B>) {
    for (seed, shape, out) in [
        (1, [3, 5, 24], 40),
        (2, [1, 64, 128], 96),
        (3, [2, 3, 7], 5),
        (4, [1, 1, 64], 128),
    ] {
        let x = c.float(seed, &shape);
        let w = c.float(seed + 10, &[out, shape[2]]);
        let bias = c.float(seed + 20, &[out]);
        let dy = c.float(seed + 30, &[shape[0], shape[1], out]);
        c.push("forward", B::linear_forward(x.clone(), w.clone(), None));
        c.push(
            "forward with bias",
            B::linear_forward(x.clone(), w.clone(), Some(bias)),
        );
        let wide = B::linear_forward_f32(x.clone(), w.clone(), Some(c.float(seed + 20, &[out])));
        c.push("forward in f32", wide);
        c.push("dx", B::linear_backward_input(dy.clone(), w.clone()));
        let first = B::linear_accumulate_weight_grad(x.clone(), dy.clone(), GradSlot::Empty);
        c.push("dw", first.clone());
        c.push(
            "dw added",
            B::linear_accumulate_weight_grad(x.clone(), dy.clone(), GradSlot::Sum(first.clone())),
        );
        let junk = c.float32(seed + 40, &[out, shape[2]]);
        let narrow = GradSlot::Stale(B::cast(junk.clone(), c.dtype));
        c.push(
            "dw over stale",
            B::linear_accumulate_weight_grad(x.clone(), dy.clone(), GradSlot::Stale(junk)),
        );
        let narrow = B::linear_accumulate_weight_grad(x.clone(), dy.clone(), narrow);
        assert_eq!(narrow.dtype(), c.dtype);
        c.push("narrow dw", narrow.clone());
        c.push(
            "narrow dw added",
            B::linear_accumulate_weight_grad(x, dy.clone(), GradSlot::Sum(narrow)),
        );
        c.push("dw unchanged", first);
        let sum = B::linear_accumulate_bias_grad(dy.clone(), GradSlot::Empty);
        c.push("db", sum.clone());
        c.push(
            "db added",
            B::linear_accumulate_bias_grad(dy, GradSlot::Sum(sum)),
        );
    }
}

fn embedding<B: Ops>(c: &mut Context<B>) {
    for (seed, vocab, hidden, tokens) in [(50, 131, 48, 37), (51, 17, 7, 600), (52, 5, 256, 64)] {
        let ids = c.indices(seed, &[1, tokens], vocab);
        let w = c.float(seed + 1, &[vocab, hidden]);
        let dtype = c.dtype;
        c.push("forward", B::embedding_forward(ids.clone(), w, dtype));
        let dy = c.float(seed + 2, &[1, tokens, hidden]);
        let sum = B::embedding_accumulate_grad(ids.clone(), dy.clone(), vocab, GradSlot::Empty);
        c.push("gradient", sum.clone());
        c.push(
            "gradient added",
            B::embedding_accumulate_grad(ids.clone(), dy.clone(), vocab, GradSlot::Sum(sum)),
        );
        let narrow = GradSlot::Stale(c.float(seed + 3, &[vocab, hidden]));
        let narrow = B::embedding_accumulate_grad(ids.clone(), dy.clone(), vocab, narrow);
        assert_eq!(narrow.dtype(), dtype);
        c.push(
            "narrow gradient added",
            B::embedding_accumulate_grad(ids, dy, vocab, GradSlot::Sum(narrow)),
        );
    }
}

fn rms_norm<B: Ops>(c: &mut Context<B>) {
    for (seed, rows, hidden) in [
        (60, 37, 48),
        (61, 5, 2048),
        (62, 700, 64),
        (63, 3, 33),
        (64, 2, 9000),
        (65, 2, 5001),
    ] {
        for unit_offset in [false, true] {
            let spec = NormSpec {
                eps: 1e-5,
                unit_offset,
            };
            let (x, dy) = (
                c.float(seed, &[1, rows, hidden]),
                c.float(seed + 100, &[1, rows, hidden]),
            );
            let w = c.float(seed + 200, &[hidden]);
            c.push("forward", B::rms_norm_forward(x.clone(), w.clone(), spec));
            let so_far = c.float(seed + 300, &[1, rows, hidden]);
            let (dx, dw) = B::rms_norm_backward(x.clone(), w.clone(), dy.clone(), spec);
            c.push("dx", dx);
            c.push("dw", dw);
            let shared = Some(so_far.clone());
            let (dx, _) = B::rms_norm_backward_add(x.clone(), w.clone(), dy.clone(), spec, shared);
            c.push("dx added", dx);
            let (dx, _) = B::rms_norm_backward_add(x, w, dy, spec, Some(so_far));
            c.push("dx added in place", dx);
        }
    }
}

fn layer_norm<B: Ops>(c: &mut Context<B>) {
    for (seed, rows, hidden) in [(70, 37, 48), (71, 5, 2048), (72, 600, 64), (73, 3, 33)] {
        let spec = NormSpec {
            eps: 1e-5,
            unit_offset: seed == 71,
        };
        let (x, dy) = (
            c.float(seed, &[1, rows, hidden]),
            c.float(seed + 100, &[1, rows, hidden]),
        );
        let (w, b) = (
            c.float(seed + 200, &[hidden]),
            c.float(seed + 300, &[hidden]),
        );
        c.push(
            "forward",
            B::layer_norm_forward(x.clone(), w.clone(), Some(b), spec),
        );
        c.push(
            "forward without bias",
            B::layer_norm_forward(x.clone(), w.clone(), None, spec),
        );
        let (dx, dw, db) = B::layer_norm_backward(x, w, dy, spec);
        c.push("dx", dx);
        c.push("dw", dw);
        c.push("db", db);
    }
}

fn rotary<B: Ops>(c: &mut Context<B>) {
    for (seed, heads, d, half) in [
        (80, 6, 64, 32),
        (81, 2, 16, 8),
        (82, 3, 20, 6),
        (83, 1, 10, 5),
    ] {
        for (style, tables) in [(RotaryStyle::Halves, 1), (RotaryStyle::Pairs, 2)] {
            let x = c.float(seed, &[2, 7, heads, d]);
            let (cos, sin) = (
                c.float32(seed + 1, &[tables, 7, half]),
                c.float32(seed + 2, &[tables, 7, half]),
            );
            for direction in [RotaryDirection::Forward, RotaryDirection::Backward] {
                c.push(
                    "rotary",
                    B::rotary(x.clone(), cos.clone(), sin.clone(), style, direction),
                );
            }
            let by_head = B::float_swap_dims(c.float(seed + 3, &[2, heads, 7, d]), 1, 2);
            c.push(
                "of a view",
                B::rotary(by_head, cos, sin, style, RotaryDirection::Forward),
            );
        }
    }
}

fn activation<B: Ops>(c: &mut Context<B>) {
    let (gate, up, dy) = (
        c.float(90, &[3, 5, 77]),
        c.float(91, &[3, 5, 77]),
        c.float(92, &[3, 5, 77]),
    );
    for act in Activation::ALL {
        let name = act.as_str();
        c.push(name, B::activation_forward(gate.clone(), act));
        c.push(name, B::activation_backward(gate.clone(), dy.clone(), act));
        c.push(
            name,
            B::gated_activation_forward(gate.clone(), up.clone(), act),
        );
        let once_more = c.float(seed_again(act), &[5, 77]);
        let own = |i: u64| B::scale(once_more.clone(), 0.5 + i as f64 / 4.0);
        // Operands that nobody else has, which the results take the place of.
        let (dgate, dup, y) = B::gated_activation_backward_with_output(own(0), own(1), own(2), act);
        c.push("dgate with y", dgate);
        c.push("dup with y", dup);
        c.push("y on the side", y);
        let (dgate, dup) = B::gated_activation_backward(gate.clone(), up.clone(), dy.clone(), act);
        c.push(name, dgate);
        c.push(name, dup);
    }
}

fn targets<B: Ops>(c: &Context<B>, seed: u64, tokens: usize, vocab: usize) -> bridge_ops::Int<B> {
    let values: Vec<i64> = super::numbers(seed, tokens)
        .iter()
        .enumerate()
        .map(|(i, x)| {
            if i % 5 == 3 {
                -100
            } else {
                ((x + 2.0) * 1e5) as i64 % vocab as i64
            }
        })
        .collect();
    int_from_i64::<B>(&values, &[tokens], &c.device)
}

fn cross_entropy<B: Ops>(c: &mut Context<B>) {
    for (seed, tokens, vocab) in [(240, 13, 131), (241, 7, 4096), (242, 3, 50_001)] {
        for logit_softcap in [None, Some(5.0)] {
            let spec = CrossEntropySpec {
                logit_softcap,
                ..Default::default()
            };
            let logits = c.float(seed, &[tokens, vocab]);
            let targets = targets(c, seed + 1, tokens, vocab);
            let output = B::cross_entropy_forward(logits.clone(), targets.clone(), &spec);
            c.push("loss", output.loss);
            c.push("lse", output.lse.clone());
            let dloss = c.float32(seed + 2, &[tokens]);
            c.push(
                "dlogits",
                B::cross_entropy_backward(logits, targets, output.lse, dloss, &spec),
            );
        }
    }
}

fn linear_cross_entropy<B: Ops>(c: &mut Context<B>) {
    for (seed, tokens, hidden, vocab) in [(250, 37, 48, 131), (251, 300, 64, 1000)] {
        let spec = CrossEntropySpec::default();
        let x = c.float(seed, &[tokens, hidden]);
        // Logits of the size that a trained model's have. In 16 bits they are rounded, which larger ones would show.
        let w = B::scale(c.float(seed + 1, &[vocab, hidden]), 0.125);
        let targets = targets(c, seed + 2, tokens, vocab);
        let dloss = c.float32(seed + 3, &[tokens]);
        let output = B::linear_cross_entropy_forward(x.clone(), w.clone(), targets.clone(), &spec);
        c.push("loss", output.loss);
        let request = || LossGradRequest {
            input: true,
            weight: Some(GradSlot::Empty),
        };
        let grads = B::linear_cross_entropy_backward(
            x.clone(),
            w.clone(),
            targets.clone(),
            output.lse,
            dloss.clone(),
            &spec,
            request(),
        );
        c.push("dx", grads.input.expect("asked for"));
        c.push("dw", grads.weight.expect("asked for"));
        let (output, grads) =
            B::linear_cross_entropy_with_grads(x, w, targets, dloss, &spec, request());
        c.push("loss at once", output.loss);
        c.push("dx at once", grads.input.expect("asked for"));
        c.push("dw at once", grads.weight.expect("asked for"));
    }
}

/// A seed that differs from activation to activation.
fn seed_again(act: Activation) -> u64 {
    320 + Activation::ALL.iter().position(|a| *a == act).unwrap_or(0) as u64
}

fn adamw_many<B: Ops>(c: &mut Context<B>) {
    let step = AdamWStep {
        grad_scale: 0.7,
        ..AdamWStep::new(2, 1e-2, (0.9, 0.95), 1e-8, 0.1)
    };
    // One larger than a block's share; some that no vector fits in.
    let shapes = [vec![300, 257], vec![7], vec![2], vec![64, 128]];
    for (halves, kept) in [(false, DType::F32), (true, DType::F32), (true, DType::BF16)] {
        let tensors = (0u64..)
            .zip(&shapes)
            .map(|(i, shape)| {
                let weight = c.float32(270 + i, shape);
                let v = c.float32(290 + i, shape);
                let (master, copy) = if halves {
                    let (upper, lower) = B::split_halves(weight);
                    (lower, Some(upper))
                } else {
                    let copy = B::cast(weight.clone(), DType::BF16);
                    (weight, Some(copy))
                };
                AdamWTensors {
                    master,
                    grad: Some(B::cast(c.float32(280 + i, shape), kept)),
                    m: B::cast(c.float32(300 + i, shape), kept),
                    v: B::mul(v.clone(), v),
                    copy,
                }
            })
            .collect();
        for tensors in B::adamw_step_many(tensors, &step) {
            let copy = tensors.copy.expect("a copy was given");
            let weight = if halves {
                B::join_halves(copy, tensors.master)
            } else {
                // Nearly equal numbers may round to neighbours, so what is compared is how far the copy is off.
                let off = B::sub(B::cast(copy, DType::F32), tensors.master.clone());
                c.push("copy", B::add(B::scale(off, 1e-4), tensors.master.clone()));
                tensors.master
            };
            c.push("weight", weight);
            assert_eq!(tensors.m.dtype(), kept);
            if kept == DType::F32 {
                c.push("m", tensors.m);
                c.push("v", tensors.v);
            } else {
                // As with the copy: what matters is that a rounded mean is near.
                let m = B::scale(B::cast(tensors.m, DType::F32), 1e-3);
                c.push("m and v", B::add(m, tensors.v));
            }
        }
    }
    let grads: Vec<_> = (0u64..)
        .zip(&shapes)
        .map(|(i, s)| c.float32(310 + i, s))
        .collect();
    let narrow = grads.iter().map(|x| B::cast(x.clone(), DType::BF16));
    let narrow = B::sum_squares_many(narrow.collect());
    let sums = B::sum_squares_many(grads);
    c.push("norm", B::float_sum(sums));
    c.push("norm of narrow numbers", B::float_sum(narrow));
}

fn adamw<B: Ops>(c: &mut Context<B>) {
    for (seed, shape) in [(260, [33, 7]), (261, [64, 128])] {
        let mut param = c.float32(seed, &shape);
        let zeros = || bridge_ops::float_zeros::<B>(&shape, DType::F32, &c.device);
        let (mut m, mut v) = (zeros(), zeros());
        for t in 1..=3 {
            let mut step = AdamWStep::new(t, 1e-2, (0.9, 0.95), 1e-8, 0.1);
            step.grad_scale = 0.7;
            let grad = c.float32(seed + 10 + t, &shape);
            (param, m, v) = B::adamw_step(param, grad, m, v, &step);
        }
        c.push("param", param);
        c.push("m", m);
        c.push("v", v);
    }
}

fn normal_region<B: Ops>(c: &mut Context<B>) {
    for (key, shape, ranges) in [
        (1, vec![300, 41], vec![0..300, 0..41]),
        (2, vec![7, 30, 11], vec![2..5, 1..30, 3..4]),
        (3, vec![5], std::iter::once(3..3).collect()),
    ] {
        let part = B::normal_region(key, 0.3, &shape, &ranges, &c.device);
        c.push("normal", part);
    }
}

fn sum_squares<B: Ops>(c: &mut Context<B>) {
    for (seed, count) in [(270, 5), (271, 100_001), (272, 4096)] {
        let x = c.float(seed, &[count]);
        assert_eq!(x.shape().num_elements(), count);
        c.push("sum of squares", B::sum_squares(x));
    }
}
