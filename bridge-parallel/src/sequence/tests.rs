//! Sequences in parts against whole ones.

use std::sync::Arc;

use bridge_core::LayoutSpec;
use bridge_ops::{AttentionSpec, Float, Ops, Param, Tape, attention};
use burn_backend::ops::FloatTensorOps;
use burn_flex::Flex;

use super::{ContextParallel, CpCommType, SequenceShard, context_attention};
use crate::tensor::SEQ_DIM;
use crate::tensors::narrow;
use crate::testing::{assert_close, on_ranks, random};

const BATCH: usize = 2;
const SEQ: usize = 24;
const D: usize = 8;

/// What attention gave: output, and the gradients of q, k, v and the sinks.
struct Outcome {
    output: Float<Flex>,
    grads: [Float<Flex>; 3],
    sinks: Option<Float<Flex>>,
}

fn part(x: &Float<Flex>, shard: &SequenceShard) -> Float<Flex> {
    let parts = shard.ranges().into_iter();
    let parts = parts
        .map(|range| narrow::<Flex>(x.clone(), SEQ_DIM, range))
        .collect();
    Flex::float_cat(parts, SEQ_DIM)
}

/// Runs attention over the tokens that `cut` keeps.
fn run(
    (heads, kv_heads): (usize, usize),
    spec: &AttentionSpec<Flex>,
    with_sinks: bool,
    context: &ContextParallel<Flex>,
    cut: impl Fn(&Float<Flex>) -> Float<Flex>,
) -> Outcome {
    let sinks = with_sinks.then(|| Param::<Flex>::new("sinks", random(&[heads], 9)));
    let spec = spec.clone().with_sinks(sinks.clone());
    let tape = Tape::new();
    let leaf = |heads: usize, seed| {
        let x = Flex::scale(random(&[BATCH, SEQ, heads, D], seed), 2.0);
        tape.leaf(cut(&x))
    };
    let (q, k, v) = (leaf(heads, 1), leaf(kv_heads, 2), leaf(kv_heads, 3));
    let output = context_attention(&tape, &q, &k, &v, &spec, context);
    let value = output.value();
    let seed = cut(&random(&[BATCH, SEQ, heads, D], 4));
    let grads = tape.backward(vec![(output, seed)], &[&q, &k, &v]);
    Outcome {
        output: value,
        grads: grads
            .into_iter()
            .map(|grad| grad.expect("a gradient"))
            .collect::<Vec<_>>()
            .try_into()
            .unwrap_or_else(|_| unreachable!("three gradients")),
        sinks: sinks.and_then(|sinks| sinks.take_grad()),
    }
}

#[track_caller]
fn check(
    cp: usize,
    comm: CpCommType,
    heads: (usize, usize),
    spec: AttentionSpec<Flex>,
    with_sinks: bool,
) {
    let layout = LayoutSpec {
        cp,
        ..LayoutSpec::default()
    };
    on_ranks(layout, move |ctx| {
        let whole = run(
            heads,
            &spec,
            with_sinks,
            &ContextParallel::single(),
            Clone::clone,
        );
        let shard = SequenceShard::new(SEQ, ctx.layout(), ctx.coords().cp);
        let context = ContextParallel::new(ctx, comm);
        let found = run(heads, &spec, with_sinks, &context, |x| part(x, &shard));
        let what = format!("cp {cp}, {comm}, {heads:?}, {:?}", spec.rule);
        assert_close(
            &format!("{what}: output"),
            &found.output,
            &part(&whole.output, &shard),
        );
        for (name, (found, expected)) in ["dq", "dk", "dv"]
            .iter()
            .zip(found.grads.iter().zip(&whole.grads))
        {
            assert_close(&format!("{what}: {name}"), found, &part(expected, &shard));
        }
        if let (Some(found), Some(expected)) = (found.sinks, whole.sinks) {
            let group = context.group().expect("several ranks");
            let sum = group.all_reduce(found, crate::ReduceOp::Sum);
            assert_close(&format!("{what}: dsinks"), &sum, &expected);
        }
    });
}

/// Two rows, each with documents of its own; the second has one that spans chunks.
fn documents() -> Option<Arc<[usize]>> {
    Some([0, 3, 11, SEQ, SEQ + 20, 2 * SEQ].into())
}

#[test]
fn every_way_of_talking_gives_the_whole_attention() {
    for cp in [2, 3, 4] {
        for comm in CpCommType::ALL {
            // As many heads as divide among 2, 3 and 4 ranks, and key-value heads that do, or the other way round.
            for heads in [(12, 12), (12, 1)] {
                for (window, cu_seqlens) in [
                    (None, None),
                    (Some(5), None),
                    (None, documents()),
                    (Some(5), documents()),
                ] {
                    let spec = AttentionSpec::causal()
                        .with_window(window)
                        .with_cu_seqlens(cu_seqlens);
                    check(cp, comm, heads, spec, false);
                }
            }
        }
    }
}

#[test]
fn softcaps_scales_sinks_and_bidirectional_attention_work_as_well() {
    for comm in CpCommType::ALL {
        let capped = AttentionSpec::causal()
            .with_softcap(Some(3.0))
            .with_scale(0.7);
        check(2, comm, (4, 2), capped, false);
        check(2, comm, (4, 2), AttentionSpec::bidirectional(), false);
    }
    for comm in [CpCommType::P2p, CpCommType::AllGather] {
        check(2, comm, (4, 2), AttentionSpec::causal(), true);
        check(
            3,
            comm,
            (4, 2),
            AttentionSpec::causal().with_window(Some(5)),
            true,
        );
    }
}

#[test]
fn one_rank_is_the_ordinary_attention() {
    let x = random(&[BATCH, SEQ, 2, D], 1);
    let tape = Tape::<Flex>::inference();
    let x = tape.constant(x);
    let spec = AttentionSpec::causal();
    let found = context_attention(&tape, &x, &x, &x, &spec, &ContextParallel::single());
    let expected = attention(&tape, &x, &x, &x, &spec);
    assert_close("output", &found.value(), &expected.value());
}
