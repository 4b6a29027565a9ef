//! Mixture of experts: routers, the order of rows, and the experts' products, forward and backward. And the heads of latent
//! attention, its usual companion.

use std::any::TypeId;

use bridge_cuda::{Cuda, GroupedPath, force_grouped_path};
use bridge_ops::{
    DType, DropPolicy, ExpertOffsets, ExpertOrder, Float, GradSlot, GroupScore, Ops,
    RotaryDirection, RotaryStyle, RouterGroups, RouterScore, RouterSpec, SwigluClamp, int_from_i64,
};
use burn::tensor::{Int as IntKind, Tensor};
use burn_backend::TensorMetadata;

use super::{Context, Group, group};

const FLOATS: &[DType] = &[DType::F32, DType::BF16, DType::F16];

pub(crate) fn groups() -> Vec<Group> {
    vec![
        group!(router, FLOATS),
        group!(expert_order, &[DType::F32]),
        group!(drop_over_capacity, &[DType::F32]),
        group!(permute_rows, FLOATS),
        group!(grouped_linear, FLOATS),
        group!(grouped_linear_views, FLOATS),
        group!(grouped_linear_other_chips, &[DType::BF16, DType::F16]),
        group!(latent_heads, FLOATS),
        group!(clamped_swiglu, FLOATS),
    ]
}

fn router<B: Ops>(c: &mut Context<B>) {
    let groups = |groups, top_groups, score| {
        Some(RouterGroups {
            groups,
            top_groups,
            score,
        })
    };
    for (seed, tokens, experts, top_k, groups) in [
        (700, 37, 12, 3, None),
        (701, 37, 12, 3, groups(4, 2, GroupScore::Max)),
        (702, 37, 12, 3, groups(4, 2, GroupScore::SumOfTopTwo)),
        (703, 5, 130, 8, None),
        (704, 1, 1, 1, None),
        (705, 9, 64, 6, groups(8, 3, GroupScore::SumOfTopTwo)),
        // Fewer experts in the groups than a token is given: the portable body.
        (706, 9, 12, 5, groups(4, 1, GroupScore::Max)),
    ] {
        for score in [RouterScore::Softmax, RouterScore::Sigmoid] {
            for normalize in [false, true] {
                let spec = RouterSpec {
                    top_k,
                    score,
                    normalize,
                    scale: 2.5,
                    groups,
                };
                let logits = c.float(seed, &[tokens, experts]);
                for bias in [None, Some(c.float32(seed + 10, &[experts]))] {
                    let output = B::router_forward(logits.clone(), bias, &spec);
                    c.push("weights", output.weights);
                    let chosen = Tensor::<B, 2, IntKind>::from_primitive(output.experts.clone());
                    // Two experts out of order would make a small difference among large numbers.
                    c.put_int("experts", chosen.mul_scalar(1000));
                    let dweights = c.float32(seed + 20, &[tokens, top_k]);
                    let dlogits =
                        B::router_backward(logits.clone(), output.experts, dweights, &spec);
                    // The weight of an only expert is a constant, and its gradient what rounding leaves.
                    if experts > 1 {
                        c.push("dlogits", dlogits);
                    }
                }
            }
        }
    }
}

/// Assignments of tokens to experts, some of them to none.
fn assignments<B: Ops>(
    c: &Context<B>,
    seed: u64,
    shape: [usize; 2],
    experts: usize,
) -> bridge_ops::Int<B> {
    let values: Vec<i64> = super::numbers(seed, shape[0] * shape[1])
        .iter()
        .map(|x| ((x + 2.0) * 1e6) as i64 % (experts as i64 + 1))
        .collect();
    int_from_i64::<B>(&values, &shape, &c.device)
}

fn expert_order<B: Ops>(c: &mut Context<B>) {
    for (seed, tokens, k, experts) in [
        (710, 5, 2, 4),
        (711, 1, 1, 1),
        (712, 3001, 3, 37),
        (713, 700, 8, 1500),
        (714, 600, 1, 1),
    ] {
        let sorted = B::sort_by_expert(assignments(c, seed, [tokens, k], experts), experts);
        c.put_int(
            "order",
            Tensor::<B, 1, IntKind>::from_primitive(sorted.order),
        );
        c.put_int(
            "inverse",
            Tensor::<B, 2, IntKind>::from_primitive(sorted.inverse),
        );
        c.put_int(
            "offsets",
            Tensor::<B, 1, IntKind>::from_primitive(sorted.offsets),
        );
    }
}

fn drop_over_capacity<B: Ops>(c: &mut Context<B>) {
    for (seed, tokens, k, experts, capacity) in [
        (715, 5, 2, 4, 2),
        (716, 1, 1, 1, 0),
        (717, 3001, 3, 37, 200),
        (718, 700, 8, 1500, 3),
        (719, 600, 1, 1, 1000),
    ] {
        for policy in [DropPolicy::Position, DropPolicy::Weight] {
            let ids = assignments(c, seed, [tokens, k], experts);
            // Few enough different weights that many are equal; some are zero.
            let weights: Vec<f32> = super::numbers(seed + 20, tokens * k)
                .iter()
                .map(|x| ((x.abs() * 40.0) as i32 % 16) as f32 / 16.0)
                .collect();
            let weights = bridge_ops::float_from_f32::<B>(&weights, &[tokens, k], &c.device);
            let kept = bridge_ops::drop_over_capacity::<B>(ids, weights, experts, capacity, policy);
            c.put_int("kept", Tensor::<B, 2, IntKind>::from_primitive(kept));
        }
    }
}

/// The first `rows` rows.
fn first<B: Ops>(x: Float<B>, rows: usize) -> Float<B> {
    let all = x.shape()[0];
    if rows == all {
        return x;
    }
    B::float_slice(x, &[(0..rows as i64).into()])
}

fn permute_rows<B: Ops>(c: &mut Context<B>) {
    for (seed, tokens, k, h, experts) in [
        (720, 13, 3, 136, 4),
        (721, 1, 1, 7, 1),
        (722, 70, 8, 2048, 16),
        (723, 5, 2, 33, 300),
    ] {
        let order = ExpertOrder::new(assignments(c, seed, [tokens, k], experts), experts);
        let x = c.float(seed + 1, &[tokens, h]);
        let used = *order
            .offsets()
            .host()
            .last()
            .expect("one offset more than experts");
        let weights = c.float32(seed + 2, &[tokens, k]);
        for weights in [None, Some(weights)] {
            c.push(
                "permuted",
                B::permute_rows(x.clone(), &order, weights.clone()),
            );
            // What lies in rows of no expert is not looked at.
            let mut values = super::numbers(seed + 3, tokens * k * h);
            values[used * h..].fill(f32::NAN);
            let rows = c.with_values(&values, &[tokens * k, h]);
            let (inverse, offsets) = (order.inverse().clone(), order.offsets().device().clone());
            let y = B::unpermute_rows(rows.clone(), inverse.clone(), weights, offsets.clone());
            c.push("unpermuted", y);
            c.push(
                "dweights",
                B::unpermute_weight_grad(rows, inverse, x.clone(), offsets),
            );
        }
    }
}

fn grouped_linear<B: Ops>(c: &mut Context<B>) {
    // Counts, unused rows, columns in and out. The last ones are beyond the tensor cores' sizes.
    let cases: [(&[usize], usize, usize, usize); 7] = [
        (&[5, 0, 130, 1, 0, 257], 7, 136, 72),
        (&[300], 0, 64, 200),
        (&[0, 0, 3], 2, 8, 8),
        (&[1], 0, 128, 128),
        (&[64, 128, 0, 129], 1, 264, 392),
        (&[40, 3, 0, 70], 1, 33, 20),
        (&[0, 0], 4, 7, 24),
    ];
    for (seed, (counts, spare, inner, out)) in (730..).zip(cases) {
        let (used, experts) = (counts.iter().sum::<usize>(), counts.len());
        let offsets = ExpertOffsets::<B>::from_counts(counts, &c.device);
        let x = c.float(seed, &[used + spare, inner]);
        let dy = c.float(seed + 10, &[used + spare, out]);
        let w = c.float(seed + 20, &[experts, out, inner]);
        let bias = c.float(seed + 30, &[experts, out]);
        if used > 0 {
            let y = B::grouped_linear_forward(x.clone(), w.clone(), None, &offsets);
            c.push("y", first::<B>(y, used));
            let y = B::grouped_linear_forward(x.clone(), w.clone(), Some(bias), &offsets);
            c.push("y with bias", first::<B>(y, used));
            let dx = B::grouped_linear_backward_input(dy.clone(), w.clone(), &offsets);
            c.push("dx", first::<B>(dx, used));
            let so_far = c.float(seed + 40, &[used + spare, inner]);
            let (shared, own) = (so_far.clone(), B::scale(so_far.clone(), 2.0));
            for so_far in [shared, own] {
                let (dy, w) = (dy.clone(), w.clone());
                let dx = B::grouped_linear_backward_input_add(dy, w, &offsets, Some(so_far));
                c.push("dx added", first::<B>(dx, used));
            }
            let pair = |so_far| {
                let other = c.float(seed + 70, &[used + spare, out]);
                let other_w = c.float(seed + 80, &[experts, out, inner]);
                let (dy, w) = ([dy.clone(), other], [w.clone(), other_w]);
                B::grouped_linear_backward_input_pair(dy, w, &offsets, so_far)
            };
            let (alone, added) = (pair(None), pair(Some(so_far.clone())));
            c.push("dx of a pair", first::<B>(alone, used));
            c.push("dx of a pair added", first::<B>(added, used));
            c.push("so far unchanged", so_far);
        }
        weight_gradients(c, seed, x, dy, &offsets);
    }
}

fn weight_gradients<B: Ops>(
    c: &mut Context<B>,
    seed: u64,
    x: Float<B>,
    dy: Float<B>,
    offsets: &ExpertOffsets<B>,
) {
    let (experts, inner, out) = (offsets.num_experts(), x.shape()[1], dy.shape()[1]);
    let dw = |slot| B::grouped_linear_accumulate_weight_grad(x.clone(), dy.clone(), offsets, slot);
    let db = |slot| B::grouped_linear_accumulate_bias_grad(dy.clone(), offsets, slot);
    let sum = c.float32(seed + 50, &[experts, out, inner]);
    c.push("dw", dw(GradSlot::Empty));
    c.push("dw added", dw(GradSlot::Sum(sum.clone())));
    c.push(
        "dw over stale",
        dw(GradSlot::Stale(B::scale(sum.clone(), 3.0))),
    );
    if c.precision() == DType::BF16 {
        let narrow = B::cast(sum.clone(), DType::BF16);
        let own = B::cast(B::scale(sum.clone(), 1.0), DType::BF16);
        c.push("dw added in bf16", dw(GradSlot::Sum(narrow)));
        c.push("dw over stale bf16", dw(GradSlot::Stale(own)));
    }
    c.push("dw unchanged", sum);
    let sum = c.float32(seed + 60, &[experts, out]);
    c.push("db", db(GradSlot::Empty));
    c.push("db added", db(GradSlot::Sum(sum)));
}

/// Rows that lie apart, and rows that begin anywhere.
fn grouped_linear_views<B: Ops>(c: &mut Context<B>) {
    let counts = [9, 0, 30];
    let offsets = ExpertOffsets::<B>::from_counts(&counts, &c.device);
    let (inner, out) = (72, 40);
    let w = c.float(790, &[3, out, inner]);
    for start in [0, 8, 3] {
        let columns = |x: Float<B>, width: usize| {
            let range = start as i64..(start + width) as i64;
            B::float_slice(x, &[(0..39).into(), range.into()])
        };
        let x = columns(c.float(791, &[39, inner + 16]), inner);
        let dy = columns(c.float(792, &[39, out + 16]), out);
        c.push(
            "y",
            B::grouped_linear_forward(x.clone(), w.clone(), None, &offsets),
        );
        c.push(
            "dx",
            B::grouped_linear_backward_input(dy.clone(), w.clone(), &offsets),
        );
        weight_gradients(c, 793, x, dy, &offsets);
    }
    let x = B::float_swap_dims(c.float(799, &[inner, 39]), 0, 1);
    c.push(
        "y of a transposed view",
        B::grouped_linear_forward(x, w, None, &offsets),
    );
}

/// What chips other than Hopper run.
fn grouped_linear_other_chips<B: Ops>(c: &mut Context<B>) {
    let on_gpu = TypeId::of::<B>() == TypeId::of::<Cuda>();
    if on_gpu {
        force_grouped_path(Some(GroupedPath::TensorCores));
    }
    grouped_linear(c);
    grouped_linear_views(c);
    if on_gpu {
        force_grouped_path(None);
    }
}

fn latent_heads<B: Ops>(c: &mut Context<B>) {
    for (seed, batch, seq, heads, nope, half, value) in [
        (800, 2, 7, 3, 16, 4, 24),
        (801, 1, 130, 16, 128, 32, 128),
        (802, 2, 5, 2, 5, 3, 7),
        (803, 1, 1, 1, 6, 1, 2),
    ] {
        let d = nope + 2 * half;
        let x = c.float(seed, &[batch, seq, heads, d]);
        let by_head = B::float_swap_dims(c.float(seed + 1, &[batch, heads, seq, d]), 1, 2);
        for tables in [1, batch] {
            let cos = c.float32(seed + 2, &[tables, seq, half]);
            let sin = c.float32(seed + 3, &[tables, seq, half]);
            for style in [RotaryStyle::Halves, RotaryStyle::Pairs] {
                for direction in [RotaryDirection::Forward, RotaryDirection::Backward] {
                    for x in [x.clone(), by_head.clone()] {
                        let (cos, sin) = (cos.clone(), sin.clone());
                        c.push("tail", B::rotary_tail(x, cos, sin, style, direction, nope));
                    }
                }
            }
        }
        let kv = c.float(seed + 4, &[batch, seq, heads, nope + value]);
        let rotated = c.float(seed + 5, &[batch, seq, 1, 2 * half]);
        c.push("keys", B::latent_keys(kv, rotated, nope));
        let dv = c.float(seed + 6, &[batch, seq, heads, value]);
        let (dkv, drotated) = B::latent_keys_backward(x, dv, nope);
        c.push("dkv", dkv);
        c.push("drotated", drotated);
    }
}

fn clamped_swiglu<B: Ops>(c: &mut Context<B>) {
    let clamp = SwigluClamp {
        alpha: 1.702,
        limit: 1.5,
    };
    for (seed, shape) in [(820, [5, 77]), (821, [64, 128])] {
        let (gate, up) = (c.float(seed, &shape), c.float(seed + 10, &shape));
        let dy = c.float(seed + 20, &shape);
        c.push(
            "y",
            B::clamped_swiglu_forward(gate.clone(), up.clone(), clamp),
        );
        let (dgate, dup) = B::clamped_swiglu_backward(gate, up, dy, clamp);
        c.push("dgate", dgate);
        c.push("dup", dup);
    }
}
