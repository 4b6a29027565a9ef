//! Experts on several ranks against all of them on one.

use bridge_core::LayoutSpec;
use bridge_core::layout::{ShardRule, local_slice};
use bridge_ops::{
    DType, ExpertOrder, Float, Ops, Param, Tape, Var, grouped_linear, int_from_i64, permute,
    unpermute,
};
use burn_backend::Slice;
use burn_backend::ops::FloatTensorOps;
use burn_flex::Flex;

use super::ExpertParallel;
use crate::tensors::dims;
use crate::testing::{DEVICE, assert_close, on_ranks, random};
use crate::{Axis, ParallelContext, ReduceOp};

const EXPERTS: usize = 4;
const HIDDEN: usize = 6;
const INNER: usize = 8;
const TOKENS: usize = 12;
const TOP_K: usize = 2;

/// Up and down projections of all experts, or a rank's part of them.
struct Experts {
    up: Param<Flex>,
    down: Param<Flex>,
    down_bias: Param<Flex>,
}

impl Experts {
    fn new(part: impl Fn(Float<Flex>, &ShardRule) -> Float<Flex>) -> Self {
        let cut = |dim| ShardRule::StackedExperts { inner: Some(dim) };
        let param = |name: &str, shape: &[usize], seed, rule| {
            Param::new(name, part(random(shape, seed), &rule))
        };
        Self {
            up: param("up", &[EXPERTS, INNER, HIDDEN], 1, cut(1)),
            down: param("down", &[EXPERTS, HIDDEN, INNER], 2, cut(2)),
            down_bias: param(
                "bias",
                &[EXPERTS, HIDDEN],
                3,
                ShardRule::StackedExperts { inner: None },
            ),
        }
    }

    fn forward(
        &self,
        tape: &Tape<Flex>,
        rows: &Var<Flex>,
        offsets: &bridge_ops::ExpertOffsets<Flex>,
        bias: bool,
    ) -> Var<Flex> {
        let inner = grouped_linear(tape, rows, &self.up, None, offsets);
        let bias = bias.then_some(&self.down_bias);
        grouped_linear(tape, &inner, &self.down, bias, offsets)
    }
}

/// Runs the layer on `x`; returns the output and the gradient of `x`.
fn run(
    experts: &Experts,
    parallel: &ExpertParallel<Flex>,
    x: Float<Flex>,
    choice: &[i64],
    seed: Float<Flex>,
) -> [Float<Flex>; 2] {
    let tokens = dims(&x)[0];
    let ids = int_from_i64::<Flex>(choice, &[tokens, TOP_K], &DEVICE);
    let order = ExpertOrder::new(parallel.own_assignments(ids, EXPERTS), EXPERTS);
    let tape = Tape::new();
    let leaf = tape.leaf(x);
    let rows = permute(&tape, &leaf, &order);
    let rows = parallel.dispatch(&tape, &rows, order.offsets(), |rows, offsets| {
        experts.forward(&tape, rows, offsets, parallel.adds_output_bias())
    });
    let weights = tape.constant(random(&[tokens, TOP_K], 7));
    let y = unpermute(&tape, &rows, &weights, &order);
    let value = y.value();
    let dx = tape.backward(vec![(y, seed)], &[&leaf]).remove(0);
    [value, dx.expect("a gradient")]
}

/// All tokens choose expert 0 or 1, so that other ranks have nothing to do; or all experts have work.
fn choices(crowded: bool, tokens: usize) -> Vec<i64> {
    let pick = |token: usize, slot: usize| match (crowded, slot) {
        (true, slot) => slot as i64,
        (false, slot) => ((token * 7 + slot * (1 + token % 3)) % EXPERTS) as i64,
    };
    (0..tokens)
        .flat_map(|token| (0..TOP_K).map(move |slot| pick(token, slot)))
        .collect()
}

#[track_caller]
fn check(layout: LayoutSpec, crowded: bool) {
    on_ranks(layout, move |ctx: &ParallelContext<Flex>| {
        // Every rank has tokens of its own, but for the copies of plain tensor parallelism.
        let data = ctx.coords().dp + 100 * if layout.sp { ctx.coords().tp } else { 0 };
        let x = random(&[TOKENS, HIDDEN], 11 + data as u64);
        let seed = random(&[TOKENS, HIDDEN], 12 + data as u64);
        let choice = choices(crowded, TOKENS);

        let whole = Experts::new(|x, _| x);
        let [y, dx] = run(
            &whole,
            &ExpertParallel::single(),
            x.clone(),
            &choice,
            seed.clone(),
        );
        let part = |x: Float<Flex>, rule: &ShardRule| {
            let slice = local_slice(rule, &dims(&x), ctx.layout(), ctx.coords())
                .expect("divides")
                .expect("held");
            let slices: Vec<Slice> = slice.ranges.into_iter().map(Slice::from).collect();
            Flex::float_slice(x, &slices)
        };
        let own = Experts::new(part);
        let parallel = ExpertParallel::new(ctx);
        let [mut found, mut found_dx] = run(&own, &parallel, x, &choice, seed);
        let what = format!("{layout}, crowded {crowded}");
        if layout.tp > 1 && !layout.sp {
            // Each copy did its tokens.
            let group = ctx.group(Axis::Tp);
            found = group.all_reduce(found, ReduceOp::Sum);
            found_dx = group.all_reduce(found_dx, ReduceOp::Sum);
        }
        assert_close(&format!("{what}: y"), &found, &y);
        assert_close(&format!("{what}: dx"), &found_dx, &dx);

        // Gradients of the experts, summed over all data: each data set once.
        let over_data = |grad: Float<Flex>| {
            let grad = if layout.sp || layout.tp == 1 {
                grad
            } else {
                Flex::scale(grad, 1.0 / layout.tp as f64)
            };
            ctx.group(Axis::Stage).all_reduce(grad, ReduceOp::Sum)
        };
        for (own, whole, rule) in [
            (
                &own.up,
                &whole.up,
                ShardRule::StackedExperts { inner: Some(1) },
            ),
            (
                &own.down,
                &whole.down,
                ShardRule::StackedExperts { inner: Some(2) },
            ),
            (
                &own.down_bias,
                &whole.down_bias,
                ShardRule::StackedExperts { inner: None },
            ),
        ] {
            let expected = part(over_data(whole.grad().expect("a gradient")), &rule);
            let zeros = || crate::tensors::zeros::<Flex>(&own.shape(), &DEVICE, DType::F32);
            let mut sum = ctx
                .group(Axis::Edp)
                .all_reduce(own.grad().unwrap_or_else(zeros), ReduceOp::Sum);
            if rule == (ShardRule::StackedExperts { inner: None }) {
                sum = ctx.group(Axis::Etp).all_reduce(sum, ReduceOp::Sum);
            }
            assert_close(&format!("{what}: {}", own.name()), &sum, &expected);
        }
    });
}

#[test]
fn experts_on_several_ranks_give_what_one_rank_gives() {
    let layout = |tp, sp, dp, ep, etp| LayoutSpec {
        tp,
        sp,
        dp,
        ep,
        etp,
        ..LayoutSpec::default()
    };
    for layout in [
        layout(1, false, 2, 2, 1),
        layout(1, false, 4, 4, 1),
        layout(1, false, 4, 2, 1),
        layout(1, false, 2, 1, 2),
        layout(1, false, 4, 2, 2),
        layout(2, true, 1, 2, 1),
        layout(2, true, 2, 2, 2),
        layout(2, false, 1, 2, 1),
        layout(2, false, 1, 1, 1),
        layout(2, false, 2, 2, 2),
    ] {
        for crowded in [false, true] {
            check(layout, crowded);
        }
    }
}
