//! Router losses against numbers of the reference implementations, and padding.

use burn::tensor::Slice;
use burn_flex::Flex;

use super::*;
use crate::testing::{DEVICE, random};
use crate::{Float, Ops, Tape, float_from_f32, int_from_i64, to_f32_vec, to_i64_vec};

const TOKENS: usize = 6;
const EXPERTS: usize = 5;
const TOP_K: usize = 2;

// In double precision, of the logits below: `switch_load_balancing_loss_func` of `compute_routing_scores_for_aux_loss` and
// `z_loss_func` of Megatron-Core 0.16.1, with the gradients that torch gives. `load_balancing_loss_func` of transformers'
// Qwen3-MoE, which does not divide by the number of experts per token, gives twice the first, 1.957444190979004.
const SOFTMAX: f32 = 0.978_722_2;
const SOFTMAX_GRAD: [f32; 30] = [
    0.0046944, 0.0121091, -0.0009104, -0.0007549, -0.0151382, 0.012157, 0.0007049, -0.0008577,
    -0.010529, -0.0014753, 0.0008673, 0.0103663, -0.0103041, -0.0006069, -0.0003225, 0.0092852,
    0.0080756, -0.0004222, -0.0010406, -0.0158981, 0.0079231, 0.0007841, -0.0012203, -0.0069931,
    -0.0004938, 0.0008539, 0.015902, -0.0148478, -0.0007362, -0.0011719,
];
const SIGMOID: f32 = 1.006_336_5;
const SIGMOID_GRAD: [f32; 30] = [
    0.0024149, 0.0014362, -0.0024076, -0.0021608, -0.0019321, 0.0034805, 0.0020872, -0.0020465,
    -0.0009336, -0.0021915, 0.0022953, 0.0050858, -0.0014344, -0.0024438, -0.0017096, 0.0017465,
    0.0018931, -0.0016768, -0.0027571, -0.0014435, 0.004943, 0.0021287, -0.0019901, -0.0008786,
    -0.001781, 0.0023281, 0.0033951, -0.0020707, -0.0019819, -0.0025848,
];
const Z: f32 = 5.769_596_5;
const Z_GRAD: [f32; 30] = [
    0.1417878, 0.3657367, 0.01914, 0.0158697, 0.3182479, 0.1904825, 0.0110449, 0.041308, 0.5071128,
    0.0710543, 0.0113376, 0.1355189, 0.5290235, 0.0311587, 0.016559, 0.2419139, 0.2103992,
    0.0109149, 0.0269014, 0.4110044, 0.1036807, 0.0102613, 0.092667, 0.5310571, 0.0375003,
    0.0145781, 0.2714894, 0.3698817, 0.01834, 0.0291936,
];

fn logits(rows: usize) -> Float<Flex> {
    let values: Vec<f32> = (0..rows * EXPERTS)
        .map(|i| (2.0 * (1.7 * i as f64 + 0.4).sin()) as f32)
        .collect();
    float_from_f32::<Flex>(&values, &[rows, EXPERTS], &DEVICE)
}

fn rule(score: RouterScore) -> RouterSpec {
    RouterSpec {
        top_k: TOP_K,
        score,
        normalize: true,
        scale: 1.0,
        groups: None,
    }
}

#[test]
fn router_losses_are_those_of_megatron_core_and_transformers() {
    for (score, weights, value, grad) in [
        (RouterScore::Softmax, [1.0, 0.0], SOFTMAX, SOFTMAX_GRAD),
        (RouterScore::Sigmoid, [1.0, 0.0], SIGMOID, SIGMOID_GRAD),
        (RouterScore::Softmax, [0.0, 1.0], Z, Z_GRAD),
    ] {
        let spec = RouterLossSpec::<Flex> {
            score,
            balance: BalanceLoss::PerBatch,
            balance_weight: weights[0],
            z_weight: weights[1],
            across_ranks: None,
            valid: None,
        };
        let experts = Flex::router_forward(logits(TOKENS), None, &rule(score)).experts;
        let tape = Tape::new();
        let x = tape.leaf(logits(TOKENS));
        let routing = tape.leaf(random(&[TOKENS, TOP_K], 1));
        let (y, losses) = with_router_losses(&tape, &routing, &x, &experts, &spec);
        let found = if weights[0] == 0.0 {
            losses.z
        } else {
            losses.balance
        };
        let found = to_f32_vec::<Flex>(found)[0];
        assert!((found - value).abs() < 1e-5, "{found}, expected {value}");
        let seed = random(&[TOKENS, TOP_K], 2);
        let dx = tape.backward(vec![(y, seed)], &[&x]).pop().flatten();
        for (found, expected) in to_f32_vec::<Flex>(dx.expect("a gradient")).iter().zip(grad) {
            assert!(
                (found - expected).abs() < 1e-6,
                "{found}, expected {expected}"
            );
        }
    }
}

/// The first `n` rows.
fn cut<B: Ops>(x: Float<B>, n: usize) -> Float<B> {
    B::float_slice(x, &[Slice::from(0..n)])
}

#[test]
fn padding_has_no_part_in_router_losses() {
    // Five tokens and three rows of padding against the five tokens alone.
    let (rows, tokens, k) = (8, 5, TOP_K);
    let experts = Flex::router_forward(logits(rows), None, &rule(RouterScore::Softmax)).experts;
    let run_with = |n: usize, valid: Option<ValidTokens<Flex>>| {
        let losses = RouterLossSpec {
            score: RouterScore::Softmax,
            balance: BalanceLoss::PerBatch,
            balance_weight: 0.7,
            z_weight: 0.3,
            across_ranks: None,
            valid,
        };
        let tape = Tape::new();
        let logits = tape.leaf(cut::<Flex>(logits(rows), n));
        let weights = tape.leaf(cut::<Flex>(random(&[rows, k], 1), n));
        let ids = to_i64_vec::<Flex>(experts.clone());
        let experts = int_from_i64::<Flex>(&ids[..n * k], &[n, k], &DEVICE);
        let (y, values) = with_router_losses(&tape, &weights, &logits, &experts, &losses);
        let seed = random(&[n, k], 2);
        let grad = tape.backward(vec![(y, seed)], &[&logits]).pop().flatten();
        let values = [values.balance, values.z, values.counts];
        (
            values.map(to_f32_vec::<Flex>),
            to_f32_vec::<Flex>(grad.unwrap()),
        )
    };
    let mask: Vec<f32> = (0..rows)
        .map(|row| f32::from(u8::from(row < tokens)))
        .collect();
    let valid = ValidTokens {
        mask: float_from_f32::<Flex>(&mask, &[rows], &DEVICE),
        count: tokens,
    };
    let (padded, padded_grad) = run_with(rows, Some(valid));
    let (alone, alone_grad) = run_with(tokens, None);
    for (padded, alone) in padded.iter().zip(&alone) {
        for (a, b) in padded.iter().zip(alone) {
            assert!((a - b).abs() < 1e-5, "{a} and {b}");
        }
    }
    let (own, rest) = padded_grad.split_at(alone_grad.len());
    for (a, b) in own.iter().zip(&alone_grad) {
        assert!((a - b).abs() < 1e-6, "{a} and {b}");
    }
    assert!(rest.iter().all(|gradient| *gradient == 0.0));
}
