//! Divided weights against whole ones.

use bridge_core::LayoutSpec;
use bridge_core::layout::{ShardRule, local_slice};
use bridge_ops::{
    CrossEntropySpec, DType, Float, GradReduction, NormSpec, Ops, Param, ParamShard, Tape,
    embedding, float_from_f32, int_from_i64, linear_cross_entropy, rms_norm,
};
use burn_flex::Flex;

use super::*;
use crate::context::ParallelContext;
use crate::groups::Axis;
use crate::tensors::{dims, narrow, replaced, zeros};
use crate::testing::{DEVICE, assert_close, on_ranks, random};

const HIDDEN: usize = 12;

fn layout(tp: usize, sp: bool) -> LayoutSpec {
    LayoutSpec {
        tp,
        sp,
        ..LayoutSpec::default()
    }
}

/// A rank's part of `whole` along dimension 0, padded with zeros.
fn shard(whole: &Float<Flex>, rule: &ShardRule, ctx: &ParallelContext<Flex>) -> Param<Flex> {
    let shape = dims(whole);
    let slice = local_slice(rule, &shape, ctx.layout(), ctx.coords())
        .expect("divides")
        .expect("held");
    let held = slice.ranges[0].clone();
    let mut value = zeros::<Flex>(&slice.local_shape, &DEVICE, DType::F32);
    if !held.is_empty() {
        let part = narrow::<Flex>(whole.clone(), 0, held.clone());
        value = replaced::<Flex>(value, 0, 0..held.len(), part);
    }
    Param::sharded(
        "weight",
        value,
        ParamShard {
            global_shape: shape,
            ranges: slice.ranges,
            owner: slice.owner,
            reduction: GradReduction::None,
        },
    )
}

/// Asserts that the gradient of a rank's part is that part of the whole gradient, and zero in the padding.
#[track_caller]
fn assert_part(what: &str, param: &Param<Flex>, whole: &Float<Flex>) {
    let shard = param.shard().expect("a part");
    let mut expected = zeros::<Flex>(&param.shape(), &DEVICE, DType::F32);
    let held = shard.ranges[0].clone();
    if !held.is_empty() {
        let part = narrow::<Flex>(whole.clone(), 0, held.clone());
        expected = replaced::<Flex>(expected, 0, 0..held.len(), part);
    }
    assert_close(what, &param.grad().expect("a gradient"), &expected);
}

/// This rank's part of the sequence of `x`: [batch, seq, hidden], under sequence parallelism.
fn own_sequence(x: &Float<Flex>, ctx: &ParallelContext<Flex>) -> Float<Flex> {
    let (tp, rank) = (ctx.layout().tp, ctx.coords().tp);
    if !ctx.layout().sp {
        return x.clone();
    }
    let size = dims(x)[1] / tp;
    narrow::<Flex>(x.clone(), 1, rank * size..(rank + 1) * size)
}

const VOCAB_RULE: ShardRule = ShardRule::Vocab {
    dim: 0,
    multiple: 1,
};

#[test]
fn the_embedding_divides_by_vocabulary() {
    // 11 rows for 8 ranks: two each, the sixth has one, the last two have none.
    for (tp, sp) in [(2, false), (2, true), (4, true), (8, false)] {
        on_ranks(layout(tp, sp), move |ctx| {
            let table = random(&[11, HIDDEN], 1);
            let ids = int_from_i64::<Flex>(&[3, 0, 10, 3, 9, 5, 1, 2], &[2, 4], &DEVICE);
            let dy = random(&[2, 4, HIDDEN], 2);
            let whole = Param::<Flex>::new("weight", table.clone());
            let tape = Tape::new();
            let expected = embedding(&tape, &ids, &whole);
            let value = expected.value();
            tape.backward(vec![(expected, dy.clone())], &[]);

            let weight = shard(&table, &VOCAB_RULE, ctx);
            let tape = Tape::new();
            let found = vocab_parallel_embedding(&tape, &ids, &weight, &TensorRegion::new(ctx));
            let what = format!("tp {tp} sp {sp}");
            assert_close(&what, &found.value(), &own_sequence(&value, ctx));
            tape.backward(vec![(found, own_sequence(&dy, ctx))], &[]);
            assert_part(&what, &weight, &whole.grad().expect("a gradient"));
        });
    }
}

#[test]
fn the_loss_divides_by_vocabulary() {
    for tp in [2, 4, 8] {
        for logit_softcap in [None, Some(2.0)] {
            for known in [false, true] {
                on_ranks(layout(tp, false), move |ctx| {
                    let spec = CrossEntropySpec {
                        logit_softcap,
                        ..CrossEntropySpec::default()
                    };
                    let table = Flex::scale(random(&[11, HIDDEN], 1), 3.0);
                    let x = random(&[6, HIDDEN], 2);
                    let targets = int_from_i64::<Flex>(&[3, -100, 10, 0, 7, 5], &[6], &DEVICE);
                    let dloss = float_from_f32::<Flex>(&[0.3; 6], &[6], &DEVICE);

                    let whole = Param::<Flex>::new("weight", table.clone());
                    let tape = Tape::new();
                    let leaf = tape.leaf(x.clone());
                    let loss = linear_cross_entropy(&tape, &leaf, &whole, &targets, spec.clone());
                    let expected = loss.value();
                    let dx = tape
                        .backward(vec![(loss, dloss.clone())], &[&leaf])
                        .remove(0);

                    let weight = shard(&table, &VOCAB_RULE, ctx);
                    let region = TensorRegion::new(ctx);
                    let tape = Tape::new();
                    let leaf = tape.leaf(x);
                    let entered = region.enter(&tape, &leaf);
                    let loss = vocab_parallel_linear_cross_entropy(
                        &tape,
                        &entered,
                        &weight,
                        &targets,
                        known.then(|| dloss.clone()),
                        spec,
                        ctx.group(Axis::Tp),
                    );
                    let what = format!("tp {tp}, softcap {logit_softcap:?}, known {known}");
                    assert_close(&what, &loss.value(), &expected);
                    let found = tape.backward(vec![(loss, dloss)], &[&leaf]).remove(0);
                    let (found, dx) = (found.expect("dx"), dx.expect("dx"));
                    assert_close(&format!("{what}: dx"), &found, &dx);
                    assert_part(&what, &weight, &whole.grad().expect("a gradient"));
                });
            }
        }
    }
}

/// Also where there are more ranks than key-value heads, whose ranks hold copies and see different queries.
#[test]
fn a_norm_over_all_heads_divides() {
    for (tp, heads) in [(2, 4), (4, 4), (4, 2)] {
        on_ranks(layout(tp, false), move |ctx| {
            let width = heads * 3;
            let scale = random(&[width], 1);
            let (x, dy) = (random(&[5, width], 2), random(&[5, width], 3));
            let spec = NormSpec {
                eps: 1e-5,
                unit_offset: true,
            };
            let whole = Param::<Flex>::new("weight", scale.clone());
            let tape = Tape::new();
            let leaf = tape.leaf(x.clone());
            let y = rms_norm(&tape, &leaf, &whole, spec);
            let expected = y.value();
            let dx = tape.backward(vec![(y, dy.clone())], &[&leaf]).remove(0);

            let copies = (tp / heads).max(1);
            let weight = shard(&scale, &ShardRule::Heads { dim: 0, heads }, ctx);
            let held = weight.shard().expect("a part").ranges[0].clone();
            let own = |x: &Float<Flex>| narrow::<Flex>(x.clone(), 1, held.clone());
            let tape = Tape::new();
            let leaf = tape.leaf(own(&x));
            let y = rms_norm_across(&tape, &leaf, &weight, spec, &TensorRegion::new(ctx));
            let what = format!("tp {tp}, {heads} heads");
            assert_close(&what, &y.value(), &own(&expected));
            // Each copy gets its share of the gradient.
            let seed = Flex::scale(own(&dy), 1.0 / copies as f64);
            let found = tape.backward(vec![(y, seed)], &[&leaf]).remove(0);
            let found = Flex::scale(found.expect("dx"), copies as f64);
            assert_close(&format!("{what}: dx"), &found, &own(&dx.expect("dx")));
            let grad = Flex::scale(weight.take_grad().expect("dw"), copies as f64);
            weight.set_grad(Some(grad));
            assert_part(&what, &weight, &whole.grad().expect("a gradient"));
        });
    }
}

#[test]
fn gradients_are_completed_over_the_ranks_that_share_a_weight() {
    on_ranks(layout(4, false), |ctx| {
        let rank = ctx.coords().tp as f32;
        let part = |ranges: std::ops::Range<usize>, reduction| {
            let value = zeros::<Flex>(&[2], &DEVICE, DType::F32);
            let shard = ParamShard {
                global_shape: vec![4],
                ranges: vec![ranges],
                owner: true,
                reduction,
            };
            let param = Param::sharded("weight", value, shard);
            param.set_grad(Some(float_from_f32::<Flex>(
                &[rank, 10.0 * rank],
                &[2],
                &DEVICE,
            )));
            param
        };
        let half = (ctx.coords().tp / 2) * 2;
        let params = [
            part(0..2, GradReduction::None),
            part(0..2, GradReduction::TensorParallel),
            part(half..half + 2, GradReduction::TensorParallelCopies(2)),
            Param::new("whole", random(&[3], 1)),
        ];
        if ctx.coords().tp == 3 {
            // Nothing flowed here on this rank.
            params[1].take_grad();
        }
        complete_gradients(&params, ctx);
        let grads =
            |index: usize| bridge_ops::to_f32_vec::<Flex>(params[index].grad().expect("a sum"));
        assert_eq!(grads(0), [rank, 10.0 * rank]);
        assert_eq!(grads(1), [3.0, 30.0]);
        let sum = if half == 0 { 1.0 } else { 5.0 };
        assert_eq!(grads(2), [sum, 10.0 * sum]);
        assert!(params[3].grad().is_none());
    });
}
