use burn::backend::Autodiff;
use burn::tensor::{Int as IntKind, Tensor, activation};
use burn_flex::Flex;

use super::*;
use crate::testing::{
    DEVICE, ROUNDING, assert_close, assert_fast, check, numbers, random, random_bf16, run,
};
use crate::{
    Float, GradSlot, Int, Ops, Param, Tape, float_from_f32, int_from_i64, to_f32_vec, to_i64_vec,
};

fn spec(score: RouterScore, normalize: bool, groups: Option<RouterGroups>) -> RouterSpec {
    RouterSpec {
        top_k: 3,
        score,
        normalize,
        scale: 2.5,
        groups,
    }
}

fn specs() -> Vec<RouterSpec> {
    let groups = |score| RouterGroups {
        groups: 4,
        top_groups: 2,
        score,
    };
    let mut all = Vec::new();
    for score in [RouterScore::Softmax, RouterScore::Sigmoid] {
        for normalize in [false, true] {
            for groups in [
                None,
                Some(groups(GroupScore::Max)),
                Some(groups(GroupScore::SumOfTopTwo)),
            ] {
                all.push(spec(score, normalize, groups));
            }
        }
    }
    all
}

/// Spread wide enough that no two choices are close.
fn logits(tokens: usize) -> Float<Flex> {
    Flex::scale(random(&[tokens, 12], 5), 3.0)
}

#[test]
fn experts_chosen_before_get_the_weights_of_a_choice() {
    for spec in specs() {
        let run = |given: Option<Int<Flex>>| {
            let tape = Tape::<Flex>::new();
            let x = tape.leaf(logits(37));
            let routing = match given {
                Some(experts) => route_to(&tape, &x, experts, &spec),
                None => route(&tape, &x, None, &spec),
            };
            let weights = routing.weights.value();
            let grads = tape.backward(vec![(routing.weights, random(&[37, 3], 7))], &[&x]);
            (
                weights,
                grads[0].clone().expect("a gradient"),
                routing.experts,
            )
        };
        let (weights, gradient, experts) = run(None);
        let (same_weights, same_gradient, _) = run(Some(experts));
        assert_close("weights", &same_weights, &weights, ROUNDING);
        assert_close("gradient", &same_gradient, &gradient, ROUNDING);
    }
}

#[test]
fn routing_kernels_agree_with_portable_bodies() {
    for spec in specs() {
        for bias in [None, Some(random(&[12], 6))] {
            let found = Flex::router_forward(logits(37), bias.clone(), &spec);
            let expected = router::portable::<Flex>(logits(37), bias, &spec);
            let experts = to_i64_vec::<Flex>(found.experts.clone());
            assert_eq!(experts, to_i64_vec::<Flex>(expected.experts), "{spec:?}");
            assert_close("weights", &found.weights, &expected.weights, ROUNDING);
            let dweights = random(&[37, 3], 7);
            let dlogits =
                Flex::router_backward(logits(37), found.experts.clone(), dweights.clone(), &spec);
            let expected =
                router::portable_backward::<Flex>(logits(37), found.experts, dweights, &spec);
            assert_close("dlogits", &dlogits, &expected, ROUNDING);
            assert_fast(&["router_forward", "router_backward"]);
        }
    }
}

#[test]
fn routing_gradients_match_autodiff() {
    for spec in specs() {
        let chosen = Flex::router_forward(logits(9), None, &spec).experts;
        let experts = to_i64_vec::<Flex>(chosen);
        check(
            &format!("{spec:?}"),
            &[logits(9)],
            &[],
            |tape, x, _| route(tape, &x[0], None, &spec).weights,
            |x, _| {
                let experts = int_from_i64::<Autodiff<Flex>>(&experts, &[9, 3], &DEVICE);
                let experts = Tensor::<Autodiff<Flex>, 2, IntKind>::from_primitive(experts);
                let x = x[0].tensor::<2>();
                let scores = match spec.score {
                    RouterScore::Softmax => activation::softmax(x, 1),
                    RouterScore::Sigmoid => activation::sigmoid(x),
                };
                let w = scores.gather(1, experts);
                let w = if spec.normalize {
                    w.clone() / w.sum_dim(1)
                } else {
                    w
                };
                w.mul_scalar(2.5)
            },
        );
    }
}

#[test]
fn experts_from_outside_fill_up_groups_that_are_too_small() {
    let rule = RouterGroups {
        groups: 4,
        top_groups: 1,
        score: GroupScore::Max,
    };
    for score in [RouterScore::Softmax, RouterScore::Sigmoid] {
        let spec = RouterSpec {
            top_k: 5,
            ..spec(score, false, Some(rule))
        };
        let found = Flex::router_forward(logits(37), None, &spec);
        let expected = router::portable::<Flex>(logits(37), None, &spec);
        let experts = to_i64_vec::<Flex>(found.experts.clone());
        assert_eq!(experts, to_i64_vec::<Flex>(expected.experts));
        assert_close("weights", &found.weights, &expected.weights, ROUNDING);
        let weights = to_f32_vec::<Flex>(found.weights);
        for (experts, weights) in experts.chunks(5).zip(weights.chunks(5)) {
            let distinct: std::collections::BTreeSet<_> = experts.iter().collect();
            assert_eq!(distinct.len(), 5);
            let counted = weights.iter().filter(|w| **w > 0.0).count();
            assert_eq!(counted, if score == RouterScore::Softmax { 3 } else { 5 });
        }
    }
    // What numpy's and PyTorch's library makes of ties: torch.topk(x, 3, sorted=False) of these on a CPU.
    let inf = f32::NEG_INFINITY;
    let mut found = router::select(&[inf, inf, 0.3, 0.9, inf, inf, inf, inf], 3);
    found.sort_unstable();
    assert_eq!(found, [2, 3, 6]);
}

#[test]
fn groups_and_bias_sway_the_choice_and_nothing_else() {
    // Two groups of three. By their best expert the first wins, by their best two the second.
    let logits = float_from_f32::<Flex>(&[2.0, -5.0, -5.0, 1.0, 1.5, -5.0], &[1, 6], &DEVICE);
    let chosen = |score, bias: Option<[f32; 6]>| {
        let spec = RouterSpec {
            top_k: 2,
            groups: Some(RouterGroups {
                groups: 2,
                top_groups: 1,
                score,
            }),
            ..spec(RouterScore::Sigmoid, false, None)
        };
        let bias = bias.map(|bias| float_from_f32::<Flex>(&bias, &[6], &DEVICE));
        let routed = Flex::router_forward(logits.clone(), bias, &spec);
        (
            to_i64_vec::<Flex>(routed.experts),
            to_f32_vec::<Flex>(routed.weights),
        )
    };
    assert_eq!(chosen(GroupScore::Max, None).0[0], 0);
    assert_eq!(chosen(GroupScore::SumOfTopTwo, None).0, [4, 3]);
    let (experts, weights) = chosen(
        GroupScore::SumOfTopTwo,
        Some([0.0, 0.0, 3.0, 0.0, 0.0, 0.0]),
    );
    assert_eq!(experts, [2, 0]);
    let sigmoid = |x: f32| 2.5 / (1.0 + (-x).exp());
    assert!((weights[0] - sigmoid(-5.0)).abs() < 1e-6 && (weights[1] - sigmoid(2.0)).abs() < 1e-6);
}

/// Assignments of 5 tokens to 4 experts, expert 2 idle; 4 and 9 are no experts.
const ASSIGNED: [i64; 10] = [3, 0, 0, 1, 3, 1, 4, 0, 9, 3];

fn order() -> ExpertOrder<Flex> {
    ExpertOrder::new(int_from_i64::<Flex>(&ASSIGNED, &[5, 2], &DEVICE), 4)
}

#[test]
fn rows_are_sorted_by_expert_and_found_again() {
    let sorted = Flex::sort_by_expert(int_from_i64::<Flex>(&ASSIGNED, &[5, 2], &DEVICE), 4);
    assert_fast(&["sort_by_expert"]);
    assert_eq!(
        to_i64_vec::<Flex>(sorted.order),
        [1, 2, 7, 3, 5, 0, 4, 9, 6, 8]
    );
    assert_eq!(
        to_i64_vec::<Flex>(sorted.inverse),
        [5, 0, 1, 3, 6, 4, 8, 2, 9, 7]
    );
    assert_eq!(order().offsets().host(), [0, 3, 5, 5, 8]);
    assert_eq!(order().offsets().counts(), [3, 2, 0, 3]);
    let portable =
        permute::portable_sort::<Flex>(int_from_i64::<Flex>(&ASSIGNED, &[5, 2], &DEVICE), 4);
    assert_eq!(
        to_i64_vec::<Flex>(portable.order),
        [1, 2, 7, 3, 5, 0, 4, 9, 6, 8]
    );
}

#[test]
fn permuting_there_and_back_is_a_weighted_sum_per_token() {
    let used = |assignment: usize| ASSIGNED[assignment] < 4;
    check(
        "permute and unpermute",
        &[random(&[5, 7], 1), random(&[5, 2], 2)],
        &[],
        |tape, x, _| {
            let order = order();
            let rows = permute(tape, &x[0], &order);
            unpermute(tape, &rows, &x[1], &order)
        },
        |x, _| {
            let mask: Vec<f32> = (0..10).map(|a| f32::from(u8::from(used(a)))).collect();
            let mask = float_from_f32::<Autodiff<Flex>>(&mask, &[5, 2], &DEVICE);
            let mask: Tensor<Autodiff<Flex>, 2> = crate::primitive::tensor(mask);
            x[0].tensor::<2>() * (x[1].tensor::<2>() * mask).sum_dim(1)
        },
    );
    assert_fast(&["permute_rows", "unpermute_rows", "unpermute_weight_grad"]);
}

#[test]
fn permuting_kernels_agree_with_portable_bodies_and_ignore_unused_rows() {
    let sorted = order();
    let inverse = sorted.inverse().clone();
    let offsets = sorted.offsets().device().clone();
    let mut rows = numbers(10 * 7, 3);
    rows[8 * 7..].fill(f32::NAN);
    let rows = float_from_f32::<Flex>(&rows, &[10, 7], &DEVICE);
    for weights in [None, Some(random(&[5, 2], 4))] {
        let x = random(&[5, 7], 1);
        let found = Flex::permute_rows(x.clone(), &sorted, weights.clone());
        let expected = permute::portable_permute::<Flex>(x, &sorted, weights.clone());
        assert_close("permuted", &found, &expected, ROUNDING);
        let (inverse, offsets) = (inverse.clone(), offsets.clone());
        let found = Flex::unpermute_rows(
            rows.clone(),
            inverse.clone(),
            weights.clone(),
            offsets.clone(),
        );
        let expected = permute::portable_unpermute::<Flex>(rows.clone(), inverse, weights, offsets);
        assert_close("unpermuted", &found, &expected, ROUNDING);
    }
    let dy = random(&[5, 7], 8);
    let found =
        Flex::unpermute_weight_grad(rows.clone(), inverse.clone(), dy.clone(), offsets.clone());
    let expected = permute::portable_weight_grad::<Flex>(rows, inverse, dy, offsets);
    assert_close("weight gradient", &found, &expected, ROUNDING);
}

#[test]
fn grouped_products_match_autodiff() {
    let counts = [3, 0, 5, 1];
    for (inner, out) in [(6, 5), (65, 40)] {
        check(
            "grouped linear",
            &[random(&[9, inner], 1)],
            &[random(&[4, out, inner], 2), random(&[4, out], 3)],
            |tape, x, p| {
                let offsets = ExpertOffsets::from_counts(&counts, &DEVICE);
                grouped_linear(tape, &x[0], &p[0], Some(&p[1]), &offsets)
            },
            |x, p| {
                let (x, w, b) = (x[0].tensor::<2>(), p[0].tensor::<3>(), p[1].tensor::<2>());
                let mut start = 0;
                let mut parts = Vec::new();
                for (expert, &count) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
                    let w = w.clone().narrow(0, expert, 1).reshape([out, inner]);
                    let y = x.clone().narrow(0, start, count).matmul(w.transpose());
                    parts.push(y + b.clone().narrow(0, expert, 1));
                    start += count;
                }
                Tensor::cat(parts, 0)
            },
        );
        assert_fast(&[
            "grouped_linear_forward",
            "grouped_linear_backward_input",
            "grouped_linear_accumulate_weight_grad",
            "grouped_linear_accumulate_bias_grad",
        ]);
    }
}

#[test]
fn a_pair_of_products_is_two_products() {
    let counts = [3, 0, 5, 1];
    let params: Vec<_> = (2..6u64)
        .map(|seed| random(if seed < 4 { &[4, 5, 6] } else { &[4, 5] }, seed))
        .collect();
    let pass = |pair: bool| {
        run(&[random(&[9, 6], 1)], &params, |tape, x, p| {
            let offsets = ExpertOffsets::from_counts(&counts, &DEVICE);
            let x = crate::scale(tape, &x[0], 1.0);
            let [a, b] = if pair {
                let biases = [Some(&p[2]), Some(&p[3])];
                grouped_linear_pair(tape, &x, [&p[0], &p[1]], biases, &offsets)
            } else {
                [0, 1].map(|i| grouped_linear(tape, &x, &p[i], Some(&p[i + 2]), &offsets))
            };
            crate::mul(tape, &crate::mul(tape, &a, &b), &a)
        })
    };
    let (one, two) = (pass(true), pass(false));
    assert_close("y", &one.output, &two.output, ROUNDING);
    assert_close("dx", &one.input_grads[0], &two.input_grads[0], ROUNDING);
    for (one, two) in one.param_grads.iter().zip(&two.param_grads) {
        assert_close("gradient of a weight", one, two, ROUNDING);
    }
}

#[test]
fn grouped_kernels_agree_with_portable_bodies() {
    // Few and many rows, many experts and few, unused rows at the end, half precision weights.
    for (counts, spare) in [
        (vec![1, 0, 2, 1], 2),
        (vec![40, 3, 0, 70], 0),
        ((0..24).map(|e| e % 5 + 7).collect::<Vec<_>>(), 3),
        (vec![0, 0], 4),
    ] {
        let offsets = ExpertOffsets::<Flex>::from_counts(&counts, &DEVICE);
        let (used, experts) = (counts.iter().sum::<usize>(), counts.len());
        let (inner, out) = (33, 20);
        for weight in [
            random(&[experts, out, inner], 1),
            random_bf16(&[experts, out, inner], 1),
        ] {
            let x = random(&[used + spare, inner], 2);
            let dy = random(&[used + spare, out], 3);
            let bias = Some(random(&[experts, out], 4));
            let part = |x: &Float<Flex>, cols: usize| {
                float_from_f32::<Flex>(
                    &to_f32_vec::<Flex>(x.clone())[..used * cols],
                    &[used, cols],
                    &DEVICE,
                )
            };
            let found =
                Flex::grouped_linear_forward(x.clone(), weight.clone(), bias.clone(), &offsets);
            let expected =
                grouped_linear::portable::<Flex>(x.clone(), weight.clone(), bias, &offsets);
            assert_close("y", &part(&found, out), &part(&expected, out), ROUNDING);
            let found = Flex::grouped_linear_backward_input(dy.clone(), weight.clone(), &offsets);
            let expected =
                grouped_linear::portable_backward_input::<Flex>(dy.clone(), weight, &offsets);
            assert_close(
                "dx",
                &part(&found, inner),
                &part(&expected, inner),
                ROUNDING,
            );
            let sum = random(&[experts, out, inner], 5);
            let slots: [fn(Float<Flex>) -> GradSlot<Flex>; 3] =
                [|_| GradSlot::Empty, GradSlot::Stale, GradSlot::Sum];
            for slot in slots {
                let found = Flex::grouped_linear_accumulate_weight_grad(
                    x.clone(),
                    dy.clone(),
                    &offsets,
                    slot(sum.clone()),
                );
                let expected = grouped_linear::portable_accumulate_weight_grad::<Flex>(
                    x.clone(),
                    dy.clone(),
                    &offsets,
                    slot(sum.clone()),
                );
                assert_close("dW", &found, &expected, ROUNDING);
                let sum = random(&[experts, out], 6);
                let found = Flex::grouped_linear_accumulate_bias_grad(
                    dy.clone(),
                    &offsets,
                    slot(sum.clone()),
                );
                let expected = grouped_linear::portable_accumulate_bias_grad::<Flex>(
                    dy.clone(),
                    &offsets,
                    slot(sum),
                );
                assert_close("db", &found, &expected, ROUNDING);
            }
        }
    }
}

#[test]
fn router_losses_match_autodiff() {
    let (tokens, k) = (12, 3);
    for score in [RouterScore::Softmax, RouterScore::Sigmoid] {
        let rule = spec(score, true, None);
        let experts = Flex::router_forward(logits(tokens), None, &rule).experts;
        let ids = to_i64_vec::<Flex>(experts.clone());
        let earlier: Vec<f32> = (0..12).map(|e| (e % 5) as f32).collect();
        for kind in 0..3 {
            let balance = match kind {
                0 => BalanceLoss::PerSequence(3),
                1 => BalanceLoss::PerBatch,
                _ => BalanceLoss::Since(float_from_f32::<Flex>(&earlier, &[12], &DEVICE)),
            };
            let losses = RouterLossSpec {
                score,
                balance,
                balance_weight: 0.7,
                z_weight: 0.3,
                across_ranks: None,
                valid: None,
            };
            // The share of the assignments that each token's expert has, by hand.
            let mut f = vec![0.0f32; tokens * 12];
            for t in 0..tokens {
                let span = match kind {
                    0 => t / 4 * 4..t / 4 * 4 + 4,
                    _ => 0..tokens,
                };
                for e in 0..12 {
                    let chosen = |t: &usize| ids[t * k..][..k].contains(&(e as i64));
                    let count = span.clone().filter(chosen).count();
                    f[t * 12 + e] = match kind {
                        2 => (count as f32 + earlier[e]) / (36.0 + earlier.iter().sum::<f32>()),
                        _ => count as f32 / (span.len() * k) as f32,
                    };
                }
            }
            let found = run(&[logits(tokens)], &[], |tape, x, _| {
                let weights = tape.leaf(random(&[tokens, k], 1));
                let (weights, values) =
                    with_router_losses(tape, &weights, &x[0], &experts, &losses);
                assert_eq!(to_f32_vec::<Flex>(values.counts).iter().sum::<f32>(), 36.0);
                weights
            });
            let expected = crate::testing::run(&[logits(tokens)], &[], |tape, x, _| {
                let loss = crate::burn_fn(tape, &[&x[0]], &[], |x, _| {
                    let x = x[0].tensor::<2>();
                    let f = float_from_f32::<Autodiff<Flex>>(&f, &[tokens, 12], &DEVICE);
                    let f: Tensor<Autodiff<Flex>, 2> = crate::primitive::tensor(f);
                    let p = match score {
                        RouterScore::Softmax => activation::softmax(x.clone(), 1),
                        RouterScore::Sigmoid => {
                            let s = activation::sigmoid(x.clone());
                            s.clone() / s.sum_dim(1)
                        }
                    };
                    let balance = (p * f).sum().mul_scalar(12.0 / tokens as f64);
                    let z = x.exp().sum_dim(1).log().square().mean();
                    balance.mul_scalar(0.7) + z.mul_scalar(0.3)
                });
                // The seed of the whole is random; undo it so that the loss counts once.
                let seed = to_f32_vec::<Flex>(random(&[1], 999))[0];
                crate::scale(tape, &loss, 1.0 / f64::from(seed))
            });
            assert_close(
                "dlogits",
                &found.input_grads[0],
                &expected.input_grads[0],
                ROUNDING,
            );
        }
    }
}

#[test]
fn equally_busy_experts_have_a_balance_loss_of_one() {
    let tape = Tape::<Flex>::inference();
    let logits = tape.constant(float_from_f32::<Flex>(&[0.0; 16], &[4, 4], &DEVICE));
    let experts = int_from_i64::<Flex>(&[0, 1, 2, 3, 0, 1, 2, 3], &[4, 2], &DEVICE);
    let weights = tape.constant(random(&[4, 2], 1));
    let spec = RouterLossSpec {
        score: RouterScore::Softmax,
        balance: BalanceLoss::PerBatch,
        balance_weight: 1.0,
        z_weight: 1.0,
        across_ranks: None,
        valid: None,
    };
    let (_, losses) = with_router_losses(&tape, &weights, &logits, &experts, &spec);
    assert!((to_f32_vec::<Flex>(losses.balance)[0] - 1.0).abs() < 1e-6);
    let z = 4.0f32.ln().powi(2);
    assert!((to_f32_vec::<Flex>(losses.z)[0] - z).abs() < 1e-5);
}

#[test]
#[should_panic(expected = "does not fit rows [3, 6] of 2 experts")]
fn grouped_shapes_are_checked() {
    let weight = Param::<Flex>::new("w", random(&[2, 4, 5], 1));
    let tape = Tape::inference();
    let offsets = ExpertOffsets::from_counts(&[1, 2], &DEVICE);
    grouped_linear(
        &tape,
        &tape.constant(random(&[3, 6], 2)),
        &weight,
        None,
        &offsets,
    );
}
