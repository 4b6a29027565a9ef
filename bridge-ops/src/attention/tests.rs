//! Attention against Burn's autodiff of the formula, kernels against the portable body, and properties.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData, activation::softmax};
use burn_flex::{Flex, FlexTensor};
use proptest::prelude::*;

use super::*;
use crate::primitive::dims;
use crate::shape::slices_along;
use crate::testing::{DEVICE, ROUNDING, assert_close, assert_fast, check, random, run};
use crate::{Ops, Param, Tape, to_f32_vec};

type Ad = Autodiff<Flex>;

/// q, k, v for the given sizes; scores of some spread.
fn inputs(
    batch: usize,
    (s, t): (usize, usize),
    (heads, kv_heads): (usize, usize),
    (d, dv): (usize, usize),
) -> [FlexTensor; 3] {
    [
        Flex::scale(random(&[batch, s, heads, d], 1), 2.0),
        Flex::scale(random(&[batch, t, kv_heads, d], 2), 2.0),
        random(&[batch, t, kv_heads, dv], 3),
    ]
}

/// Whether query i of row b sees key j, by the words of the documentation.
fn sees(rule: &AttentionRule, b: usize, i: usize, j: usize, s: usize) -> bool {
    let position = rule.q_offset + i;
    let document = |token: usize| {
        rule.cu_seqlens
            .as_ref()
            .map(|offsets| offsets.iter().filter(|&&offset| offset <= token).count())
    };
    rule.kv_len.is_none_or(|len| j < len)
        && (!rule.causal || j <= position)
        && rule
            .window
            .is_none_or(|window| position < j + window && j < position + window)
        && document(b * s + i) == document(b * s + j)
}

/// The formula in Burn operations, with the mask spelled out.
fn formula(
    q: Tensor<Ad, 4>,
    k: Tensor<Ad, 4>,
    v: Tensor<Ad, 4>,
    sinks: Option<Tensor<Ad, 1>>,
    rule: &AttentionRule,
) -> Tensor<Ad, 4> {
    let [batch, s, heads, d] = q.dims();
    let [_, t, kv_heads, dv] = v.dims();
    let group = heads / kv_heads;
    let repeat = |x: Tensor<Ad, 4>, width: usize| {
        let x = x.swap_dims(1, 2).reshape([batch, kv_heads, 1, t, width]);
        x.repeat_dim(2, group).reshape([batch, heads, t, width])
    };
    let scale = rule.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let mut scores = q
        .swap_dims(1, 2)
        .matmul(repeat(k, d).swap_dims(2, 3))
        .mul_scalar(scale);
    if let Some(cap) = rule.softcap {
        scores = scores.div_scalar(cap).tanh().mul_scalar(cap);
    }
    let mut mask = Vec::new();
    for b in 0..batch {
        for i in 0..s {
            mask.extend((0..t).map(|j| {
                if sees(rule, b, i, j, s) {
                    0.0_f32
                } else {
                    -1e9
                }
            }));
        }
    }
    scores = scores + Tensor::from_data(TensorData::new(mask, [batch, 1, s, t]), &DEVICE);
    if let Some(sinks) = sinks {
        let sinks = sinks.reshape([1, heads, 1, 1]).expand([batch, heads, s, 1]);
        scores = Tensor::cat(vec![scores, sinks], 3);
    }
    softmax(scores, 3)
        .narrow(3, 0, t)
        .matmul(repeat(v, dv))
        .swap_dims(1, 2)
}

#[track_caller]
fn check_spec(inputs: &[FlexTensor; 3], spec: AttentionSpec<Flex>, with_sinks: bool) {
    let heads = dims(&inputs[0])[2];
    let params = if with_sinks {
        vec![random(&[heads], 4)]
    } else {
        vec![]
    };
    let rule = spec.rule.clone();
    check(
        &format!("{rule:?}, sinks: {with_sinks}"),
        inputs,
        &params,
        |tape, x, p| {
            attention(
                tape,
                &x[0],
                &x[1],
                &x[2],
                &spec.clone().with_sinks(p.first().cloned()),
            )
        },
        |x, p| {
            formula(
                x[0].tensor(),
                x[1].tensor(),
                x[2].tensor(),
                p.first().map(|p| p.tensor()),
                &rule,
            )
        },
    );
    assert_fast(&["attention_backward"]);
}

#[test]
fn specs_match_autodiff() {
    // Several blocks of keys and runs of queries, none a multiple of a block.
    let x = inputs(2, (150, 150), (6, 2), (16, 20));
    check_spec(&x, AttentionSpec::causal(), false);
    check_spec(&x, AttentionSpec::bidirectional().with_scale(0.3), false);
    check_spec(&x, AttentionSpec::causal().with_window(Some(37)), true);
    check_spec(
        &x,
        AttentionSpec::bidirectional()
            .with_window(Some(5))
            .with_softcap(Some(1.5)),
        false,
    );
    check_spec(&x, AttentionSpec::causal().with_softcap(Some(2.0)), true);
    let documents: Arc<[usize]> = [0, 40, 41, 150, 150, 290, 300].into();
    check_spec(
        &x,
        AttentionSpec::causal().with_cu_seqlens(Some(documents.clone())),
        true,
    );
    check_spec(
        &x,
        AttentionSpec::bidirectional().with_cu_seqlens(Some(documents)),
        false,
    );
    // Queries at the end of the keys, and keys with room to spare.
    let x = inputs(2, (70, 190), (4, 4), (7, 5));
    check_spec(
        &x,
        AttentionSpec::causal().with_q_offset(110).with_kv_len(180),
        false,
    );
    check_spec(&x, AttentionSpec::bidirectional().with_kv_len(133), true);
}

#[test]
fn one_query_head_group_per_key_head_works_at_any_ratio() {
    for (heads, kv_heads) in [(1, 1), (5, 1), (8, 8), (12, 3)] {
        check_spec(
            &inputs(1, (33, 33), (heads, kv_heads), (9, 9)),
            AttentionSpec::causal(),
            false,
        );
    }
}

/// Sizes and a spec that fit each other.
fn cases() -> impl Strategy<
    Value = (
        usize,
        usize,
        usize,
        (usize, usize),
        (usize, usize),
        AttentionRule,
    ),
> {
    let sizes = (
        1..3_usize,
        1..200_usize,
        0..200_usize,
        1..4_usize,
        1..4_usize,
        1..20_usize,
        1..20_usize,
    );
    let options = (
        any::<bool>(),
        prop::option::of(1..100_usize),
        prop::option::of(0.5..4.0_f64),
        0..9_usize,
    );
    (sizes, options).prop_map(
        |((batch, s, extra, group, kv_heads, d, dv), (causal, window, softcap, spare))| {
            let rule = AttentionRule {
                causal,
                window,
                softcap,
                q_offset: extra,
                kv_len: (spare > 4).then_some(s + extra),
                ..AttentionSpec::<Flex>::causal().rule
            };
            let spare = if rule.kv_len.is_some() { spare } else { 0 };
            (
                batch,
                s,
                extra + spare,
                (group * kv_heads, kv_heads),
                (d, dv),
                rule,
            )
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn kernels_agree_with_portable_bodies((batch, s, more, heads, widths, rule) in cases(), with_sinks in any::<bool>()) {
        let [q, k, v] = inputs(batch, (s, s + more), heads, widths);
        let sinks = with_sinks.then(|| random(&[heads.0], 4));
        let found = Flex::attention_forward(q.clone(), k.clone(), v.clone(), sinks.clone(), &rule);
        let expected = portable::<Flex>(q.clone(), k.clone(), v.clone(), sinks.clone(), &rule);
        assert_close("output", &found.output, &expected.output, ROUNDING);
        assert_close("lse", &found.lse, &expected.lse, ROUNDING);

        let dout = random(&dims(&found.output), 5);
        let (q2, k2, v2, sinks2) = (q.clone(), k.clone(), v.clone(), sinks.clone());
        let found = Flex::attention_backward(q2, k2, v2, sinks2, found, dout.clone(), &rule);
        let expected = portable_backward::<Flex>(q, k, v, sinks, expected, dout, &rule);
        assert_close("dq", &found.dq, &expected.dq, ROUNDING);
        assert_close("dk", &found.dk, &expected.dk, ROUNDING);
        assert_close("dv", &found.dv, &expected.dv, ROUNDING);
        if let (Some(found), Some(expected)) = (found.dsinks, expected.dsinks) {
            assert_close("dsinks", &found, &expected, 4.0 * ROUNDING);
        }
    }
}

#[test]
fn decoding_over_a_cache_gives_the_rows_of_the_whole() {
    use burn_backend::ops::FloatTensorOps;
    let (batch, s, kv_heads, d) = (2, 700, 2, 24);
    let [q, k, v] = inputs(batch, (s, s), (6, kv_heads), (d, d));
    let sinks = Some(Param::new("sinks", random(&[6], 4)));
    let tape = Tape::<Flex>::inference();
    for window in [None, Some(130)] {
        let spec = AttentionSpec::causal()
            .with_window(window)
            .with_sinks(sinks.clone());
        let whole = {
            let [q, k, v] = [&q, &k, &v].map(|x| tape.constant(x.clone()));
            attention(&tape, &q, &k, &v, &spec).into_value()
        };
        assert_fast(&["attention_forward"]);
        let part = |x: &FlexTensor, range| Flex::float_slice(x.clone(), &slices_along(4, 1, range));
        for range in [5..6, 511..513, 699..700] {
            let q = tape.constant(part(&q, range.clone()));
            let [k, v] = [&k, &v].map(|x| tape.constant(x.clone()));
            let spec = spec
                .clone()
                .with_q_offset(range.start)
                .with_kv_len(range.end);
            let found = attention(&tape, &q, &k, &v, &spec).into_value();
            assert_fast(&["attention_decode"]);
            assert_close("rows", &found, &part(&whole, range), ROUNDING);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x = inputs(1, (300, 300), (6, 3), (16, 16));
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let outcome = pool.install(|| {
            run(&x, &[], |tape, x, _| {
                attention(tape, &x[0], &x[1], &x[2], &AttentionSpec::causal())
            })
        });
        let mut all = vec![outcome.output];
        all.extend(outcome.input_grads);
        all.into_iter().map(to_f32_vec::<Flex>).collect::<Vec<_>>()
    };
    assert_eq!(on(1), on(2));
    assert_eq!(on(1), on(5));
}

#[test]
fn packed_documents_give_the_results_of_separate_ones() {
    use burn_backend::ops::FloatTensorOps;
    let [q, k, v] = inputs(1, (50, 50), (4, 2), (8, 8));
    let tape = Tape::<Flex>::inference();
    let run = |range: std::ops::Range<usize>, spec: &AttentionSpec<Flex>| {
        let [q, k, v] = [&q, &k, &v].map(|x| {
            tape.constant(Flex::float_slice(
                x.clone(),
                &slices_along(4, 1, range.clone()),
            ))
        });
        attention(&tape, &q, &k, &v, spec).into_value()
    };
    let packed = run(
        0..50,
        &AttentionSpec::causal().with_cu_seqlens(Some([0, 13, 50].into())),
    );
    for document in [0..13, 13..50] {
        let found = Flex::float_slice(packed.clone(), &slices_along(4, 1, document.clone()));
        assert_close(
            "document",
            &found,
            &run(document, &AttentionSpec::causal()),
            ROUNDING,
        );
    }
}

#[test]
#[should_panic(expected = "must rise from 0 to 1 * 50 and hold every multiple of 50")]
fn document_offsets_are_checked() {
    let [q, k, v] = inputs(1, (50, 50), (4, 2), (8, 8));
    let tape = Tape::<Flex>::inference();
    let [q, k, v] = [q, k, v].map(|x| tape.constant(x));
    attention(
        &tape,
        &q,
        &k,
        &v,
        &AttentionSpec::causal().with_cu_seqlens(Some([0, 13, 49].into())),
    );
}

/// Keys in blocks, as context parallelism sees them: each block's result is joined by its log-sum-exp, and each block's
/// gradient comes from the joined output and log-sum-exp.
#[test]
fn blocks_of_keys_join_to_the_whole() {
    use burn_backend::ops::FloatTensorOps;
    const S: usize = 36;
    const BLOCK: usize = 12;
    let [q, k, v] = inputs(2, (S, S), (4, 2), (16, 24));
    let dout = random(&[2, S, 4, 24], 5);
    let part = |x: &FlexTensor, start: usize, len: usize| {
        Flex::float_slice(x.clone(), &slices_along(4, 1, start..start + len))
    };
    let documents: Arc<[usize]> = [0, 7, 20, S, S + 30, 2 * S].into();
    for (window, cu_seqlens) in [(None, None), (Some(9), None), (Some(9), Some(documents))] {
        let mut whole = AttentionSpec::<Flex>::causal().with_window(window).rule;
        whole.cu_seqlens = cu_seqlens.clone();
        let expected = Flex::attention_forward(q.clone(), k.clone(), v.clone(), None, &whole);
        let expected_grads = Flex::attention_backward(
            q.clone(),
            k.clone(),
            v.clone(),
            None,
            expected.clone(),
            dout.clone(),
            &whole,
        );
        for q_start in (0..S).step_by(BLOCK) {
            // The blocks up to the queries' own.
            let mut blocks = Vec::new();
            for k_start in (0..=q_start).step_by(BLOCK) {
                let mut rule = whole.clone();
                rule.q_offset = q_start - k_start;
                rule.cu_seqlens = cu_seqlens.as_ref().map(|offsets| {
                    let span = rule.q_offset + BLOCK;
                    let mut own = vec![0];
                    for row in 0..2 {
                        let inner = offsets.iter().filter_map(|offset| {
                            let position = offset.checked_sub(row * S)?.checked_sub(k_start)?;
                            (position < span).then_some(row * span + position)
                        });
                        own.extend(inner);
                        own.push((row + 1) * span);
                    }
                    own.dedup();
                    own.into()
                });
                let operands = (
                    part(&q, q_start, BLOCK),
                    part(&k, k_start, BLOCK),
                    part(&v, k_start, BLOCK),
                );
                let (bq, bk, bv) = operands.clone();
                let found = Flex::attention_forward(bq, bk, bv, None, &rule);
                let (bq, bk, bv) = operands.clone();
                let reference = portable::<Flex>(bq, bk, bv, None, &rule);
                assert_close("block output", &found.output, &reference.output, ROUNDING);
                blocks.push((operands, rule, found));
            }
            // [batch, heads, s]: the joined log-sum-exp.
            let lses = blocks
                .iter()
                .map(|(.., found)| to_f32_vec::<Flex>(found.lse.clone()));
            let mut sums = vec![0.0f64; 2 * 4 * BLOCK];
            for lse in lses {
                sums.iter_mut()
                    .zip(lse)
                    .for_each(|(sum, lse)| *sum += f64::from(lse).exp());
            }
            let lse: Vec<f32> = sums.iter().map(|sum| sum.ln() as f32).collect();
            let lse = crate::float_from_f32::<Flex>(&lse, &[2, 4, BLOCK], &DEVICE);
            let expected_lse = Flex::float_slice(
                expected.lse.clone(),
                &slices_along(3, 2, q_start..q_start + BLOCK),
            );
            assert_close("lse", &lse, &expected_lse, ROUNDING);
            let joined = AttentionOutput {
                output: part(&expected.output, q_start, BLOCK),
                lse,
            };
            let mut dq: Option<FlexTensor> = None;
            for ((bq, bk, bv), rule) in blocks
                .iter()
                .map(|(operands, rule, _)| (operands.clone(), rule))
            {
                let seed = part(&dout, q_start, BLOCK);
                let reference = portable_backward::<Flex>(
                    bq.clone(),
                    bk.clone(),
                    bv.clone(),
                    None,
                    joined.clone(),
                    seed.clone(),
                    rule,
                );
                let found = Flex::attention_backward(bq, bk, bv, None, joined.clone(), seed, rule);
                assert_close("block dk", &found.dk, &reference.dk, ROUNDING);
                assert_close("block dv", &found.dv, &reference.dv, ROUNDING);
                dq = Some(match dq {
                    None => found.dq,
                    Some(sum) => Flex::add(sum, found.dq),
                });
            }
            let dq = dq.expect("each query has a block");
            let expected = part(&expected_grads.dq, q_start, BLOCK);
            assert_close("dq", &dq, &expected, ROUNDING);
        }
    }
}
