//! The linear layer.
//!
//! ```text
//! y  = x W^T + b         x: [.., in], W: [out, in], b: [out] -> y: [.., out]
//! dx = dy W
//! dW = dy^T x            accumulated in fp32
//! db = sum of rows of dy
//! ```

use burn_backend::TensorMetadata;

use crate::deferred::{Deferred, now_or_later};
use crate::grad_slot::GradSlot;
use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{
    Float, dims, float, matrix, reshaped, rows_and_last, tensor, to_dtype, to_f32,
};
use crate::tape::{Tape, Var};

/// `y = x W^T + b`. x: [.., in], weight: [out, in], bias: `[out]` -> [.., out].
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn linear<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
) -> Var<B> {
    check_shapes(&x.shape(), weight, bias);
    let output = B::linear_forward(x.value(), weight.value(), bias.map(Param::value));

    let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
    let weight = weight.clone();
    let bias = bias.cloned();
    let input_tracked = x.is_tracked();
    let later = tape.deferred();
    // A frozen weight needs no x, which may then be freed early.
    let input = weight.requires_grad().then(|| x.saved());
    tape.record_accumulating(output, x, &params, move |dy, so_far| {
        if let Some(bias) = bias.filter(|bias| bias.requires_grad()) {
            bias.accumulate_with(|slot| B::linear_accumulate_bias_grad(dy.clone(), slot));
        }
        let dx =
            input_tracked.then(|| B::linear_backward_input_add(dy.clone(), weight.value(), so_far));
        if let Some(input) = input {
            input.use_when_made(move |input| accumulate(&weight, input, dy, later));
        }
        dx
    })
}

/// [`linear`] whose result is fp32 whatever the dtype of x, with nothing rounded on the way there: for scores that a choice
/// depends on. x: [.., in], weight: [out, in], bias: `[out]` -> [.., out] fp32.
///
/// # Panics
/// When the shapes do not fit.
#[track_caller]
pub fn linear_f32<B: Ops>(
    tape: &Tape<B>,
    x: &Var<B>,
    weight: &Param<B>,
    bias: Option<&Param<B>>,
) -> Var<B> {
    check_shapes(&x.shape(), weight, bias);
    let output = B::linear_forward_f32(x.value(), weight.value(), bias.map(Param::value));
    let params: Vec<&Param<B>> = std::iter::once(weight).chain(bias).collect();
    let (weight, bias, dtype) = (weight.clone(), bias.cloned(), x.dtype());
    let (input_tracked, later) = (x.is_tracked(), tape.deferred());
    let input = weight.requires_grad().then(|| x.saved());
    tape.record_accumulating(output, x, &params, move |dy, so_far| {
        if let Some(bias) = bias.filter(|bias| bias.requires_grad()) {
            bias.accumulate_with(|slot| B::linear_accumulate_bias_grad(dy.clone(), slot));
        }
        // From here on the gradient has the precision of every other one.
        let dy = to_dtype::<B>(dy, dtype);
        let dx =
            input_tracked.then(|| B::linear_backward_input_add(dy.clone(), weight.value(), so_far));
        if let Some(input) = input {
            input.use_when_made(move |input| accumulate(&weight, input, dy, later));
        }
        dx
    })
}

/// Adds `dy^T x` to the weight's gradient, now or later.
fn accumulate<B: Ops>(weight: &Param<B>, x: Float<B>, dy: Float<B>, later: Option<Deferred>) {
    let (rows, _) = rows_and_last(&dims(&dy));
    let flops = 2.0 * rows as f64 * weight.numel() as f64;
    let weight = weight.clone();
    now_or_later(later, flops, move || {
        weight.accumulate_in_dtype_with(|slot| B::linear_accumulate_weight_grad(x, dy, slot));
    });
}

#[track_caller]
fn check_shapes<B: Ops>(x: &[usize], weight: &Param<B>, bias: Option<&Param<B>>) {
    let w = weight.shape();
    assert!(
        w.len() == 2 && x.last() == Some(&w[1]),
        "linear: `{}` has shape {w:?} ([out, in]), which does not fit an input of shape {x:?}",
        weight.name()
    );
    if let Some(bias) = bias {
        let b = bias.shape();
        assert_eq!(
            b,
            [w[0]],
            "linear: bias `{}` has shape {b:?}, the weight {w:?}",
            bias.name()
        );
    }
}

pub(crate) fn portable<B: Ops>(x: Float<B>, weight: Float<B>, bias: Option<Float<B>>) -> Float<B> {
    let mut shape = dims(&x);
    let dtype = x.dtype();
    let weight = tensor::<B, 2>(to_dtype::<B>(weight, dtype));
    let mut y = matrix::<B>(x).matmul(weight.transpose()); // [rows, out]
    if let Some(bias) = bias {
        y = y + tensor::<B, 1>(to_dtype::<B>(bias, dtype)).unsqueeze();
    }
    *shape.last_mut().expect("x has at least one dimension") = y.dims()[1];
    reshaped::<B>(float(y), &shape)
}

pub(crate) fn portable_f32<B: Ops>(
    x: Float<B>,
    weight: Float<B>,
    bias: Option<Float<B>>,
) -> Float<B> {
    B::linear_forward(to_f32::<B>(x), weight, bias)
}

pub(crate) fn portable_backward_input<B: Ops>(dy: Float<B>, weight: Float<B>) -> Float<B> {
    let mut shape = dims(&dy);
    let weight = tensor::<B, 2>(to_dtype::<B>(weight, dy.dtype()));
    *shape.last_mut().expect("dy has at least one dimension") = weight.dims()[1];
    reshaped::<B>(float(matrix::<B>(dy).matmul(weight)), &shape)
}

pub(crate) fn portable_backward_input_add<B: Ops>(
    dy: Float<B>,
    weight: Float<B>,
    so_far: Option<Float<B>>,
) -> Float<B> {
    let dx = B::linear_backward_input(dy, weight);
    match so_far {
        Some(so_far) => B::add(so_far, dx),
        None => dx,
    }
}

pub(crate) fn portable_accumulate_weight_grad<B: Ops>(
    x: Float<B>,
    dy: Float<B>,
    slot: GradSlot<B>,
) -> Float<B> {
    let x = matrix::<B>(to_f32::<B>(x));
    let dy = matrix::<B>(to_f32::<B>(dy));
    slot.accumulate(float(dy.transpose().matmul(x)))
}

pub(crate) fn portable_accumulate_bias_grad<B: Ops>(dy: Float<B>, slot: GradSlot<B>) -> Float<B> {
    let (_, out) = rows_and_last(&dims(&dy));
    let sum = matrix::<B>(to_f32::<B>(dy)).sum_dim(0); // [1, out]
    slot.accumulate(reshaped::<B>(float(sum), &[out]))
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, assert_fast, check, random, random_bf16, run};
    use crate::{DType, to_f32_vec};

    #[test]
    fn matches_autodiff() {
        // Few rows take the matrix-vector kernel, many the matrix product.
        for rows in [1, 3, 7, 50] {
            check(
                &format!("{rows} rows"),
                &[random(&[1, rows, 37], 1)],
                &[random(&[45, 37], 2), random(&[45], 3)],
                |tape, x, p| linear(tape, &x[0], &p[0], Some(&p[1])),
                |x, p| {
                    let (x, w) = (x[0].tensor::<3>(), p[0].tensor::<2>());
                    x.matmul(w.transpose().unsqueeze()) + p[1].tensor::<1>().unsqueeze()
                },
            );
        }
    }

    #[test]
    fn a_wide_result_is_the_product_of_widened_factors() {
        check(
            "linear_f32",
            &[random(&[1, 7, 37], 1)],
            &[random(&[45, 37], 2), random(&[45], 3)],
            |tape, x, p| linear_f32(tape, &x[0], &p[0], Some(&p[1])),
            |x, p| {
                let (x, w) = (x[0].tensor::<3>(), p[0].tensor::<2>());
                x.matmul(w.transpose().unsqueeze()) + p[1].tensor::<1>().unsqueeze()
            },
        );
        let weight = Param::<Flex>::new("w", random_bf16(&[5, 6], 2));
        let x = random_bf16(&[2, 6], 1);
        let tape = Tape::new();
        let leaf = tape.leaf(x.clone());
        let y = linear_f32(&tape, &leaf, &weight, None);
        let wide = Flex::linear_forward(to_f32::<Flex>(x), weight.value(), None);
        assert_eq!(to_f32_vec::<Flex>(y.value()), to_f32_vec::<Flex>(wide));
        let grads = tape.backward(vec![(y, random(&[2, 5], 4))], &[&leaf]);
        assert_eq!(grads[0].as_ref().unwrap().dtype(), DType::BF16);
    }

    #[test]
    fn weight_gradients_that_are_put_off_are_there_when_the_pass_ends() {
        let gradient = |put_off: bool| {
            let weight = Param::<Flex>::new("w", random(&[5, 6], 2));
            let tape = Tape::new();
            let x = tape.leaf(random(&[2, 6], 1));
            // Comes last on the way back, when nobody has asked for the gradient yet.
            let waits = put_off.then(|| tape.defer());
            let probe = weight.clone();
            let x = tape.record(x.value(), &[&x], move |dx| {
                assert_eq!(waits.is_some_and(|waits| !waits.is_empty()), put_off);
                assert_eq!(probe.grad().is_none(), put_off);
                vec![Some(dx)]
            });
            let y = linear(&tape, &x, &weight, None);
            tape.backward(vec![(y, random(&[2, 5], 4))], &[]);
            to_f32_vec::<Flex>(weight.grad().expect("a gradient"))
        };
        assert_eq!(gradient(true), gradient(false));
    }

    #[test]
    fn kernels_agree_with_portable_bodies() {
        for (rows, inner, out) in [(1, 64, 48), (5, 131, 33), (70, 33, 131)] {
            for weight in [random(&[out, inner], 2), random_bf16(&[out, inner], 2)] {
                let (x, dy) = (random(&[2, rows, inner], 1), random(&[2, rows, out], 3));
                let bias = Some(random_bf16(&[out], 4));
                let sum = random(&[out, inner], 5);

                let found = Flex::linear_forward(x.clone(), weight.clone(), bias.clone());
                assert_close(
                    "forward",
                    &found,
                    &portable::<Flex>(x.clone(), weight.clone(), bias),
                    ROUNDING,
                );
                let found = Flex::linear_backward_input(dy.clone(), weight.clone());
                assert_close(
                    "dx",
                    &found,
                    &portable_backward_input::<Flex>(dy.clone(), weight),
                    ROUNDING,
                );
                let slots: [fn(Float<Flex>) -> GradSlot<Flex>; 3] =
                    [|_| GradSlot::Empty, GradSlot::Stale, GradSlot::Sum];
                for slot in slots {
                    let (x, dy) = (x.clone(), dy.clone());
                    let found = Flex::linear_accumulate_weight_grad(
                        x.clone(),
                        dy.clone(),
                        slot(sum.clone()),
                    );
                    let expected =
                        portable_accumulate_weight_grad::<Flex>(x, dy, slot(sum.clone()));
                    assert_close("dW", &found, &expected, ROUNDING);
                }
                let found = Flex::linear_accumulate_bias_grad(dy.clone(), GradSlot::Empty);
                let expected = portable_accumulate_bias_grad::<Flex>(dy, GradSlot::Empty);
                assert_close("db", &found, &expected, ROUNDING);
                assert_fast(&[
                    "linear_forward",
                    "linear_backward_input",
                    "linear_accumulate_weight_grad",
                    "linear_accumulate_bias_grad",
                ]);
            }
        }
    }

    #[test]
    fn half_precision_weights_give_the_result_of_widened_ones() {
        let weight = random_bf16(&[40, 65], 1);
        let wide = to_f32::<Flex>(weight.clone());
        for rows in [2, 30] {
            let x = random(&[rows, 65], 2);
            let found = Flex::linear_forward(x.clone(), weight.clone(), None);
            assert_eq!(found.dtype(), DType::F32);
            let expected = Flex::linear_forward(x, wide.clone(), None);
            assert_eq!(to_f32_vec::<Flex>(found), to_f32_vec::<Flex>(expected));
        }
    }

    #[test]
    fn other_dtypes_take_the_portable_body() {
        let narrow = |x| to_dtype::<Flex>(x, DType::F64);
        let (x, weight) = (narrow(random(&[3, 4], 1)), narrow(random(&[5, 4], 2)));
        let y = Flex::linear_forward(x, weight, None);
        assert_eq!((y.dtype(), dims(&y)), (DType::F64, vec![3, 5]));
    }

    #[test]
    fn gradients_accumulate_in_place_over_micro_batches() {
        let (x, weight) = (random(&[8, 6], 1), random(&[5, 6], 2));
        let (inputs, params) = ([x.clone()], [weight.clone()]);
        let whole = run(&inputs, &params, |tape, x, p| {
            linear(tape, &x[0], &p[0], None)
        });

        let param = Param::<Flex>::new("w", weight);
        let seed = random(&[8, 5], 999);
        let half = |x: &Float<Flex>, range: std::ops::Range<usize>| {
            Flex::float_slice(x.clone(), &crate::shape::slices_along(2, 0, range))
        };
        use burn_backend::ops::FloatTensorOps;
        for range in [0..4, 4..8] {
            let tape = Tape::new();
            let y = linear(&tape, &tape.leaf(half(&x, range.clone())), &param, None);
            tape.backward(vec![(y, half(&seed, range))], &[]);
        }
        assert_close(
            "dW",
            &param.grad().unwrap(),
            &whole.param_grads[0],
            ROUNDING,
        );

        let address = |grad: &Float<Flex>| grad.bytes().as_ptr();
        let before = address(&param.grad().unwrap());
        param.clear_grad();
        assert!(param.grad().is_none());
        let tape = Tape::new();
        let y = linear(&tape, &tape.leaf(x), &param, None);
        tape.backward(vec![(y, seed)], &[]);
        assert_eq!(
            address(&param.grad().unwrap()),
            before,
            "the buffer is used again"
        );
        assert_close(
            "dW",
            &param.grad().unwrap(),
            &whole.param_grads[0],
            ROUNDING,
        );
    }

    #[test]
    fn frozen_weights_get_no_gradient_but_pass_one_on() {
        let weight = Param::<Flex>::new("w", random(&[5, 6], 2));
        let bias = Param::<Flex>::new("b", random(&[5], 3));
        weight.set_requires_grad(false);
        let tape = Tape::new();
        let x = tape.leaf(random(&[2, 6], 1));
        let y = linear(&tape, &x, &weight, Some(&bias));
        let grads = tape.backward(vec![(y, random(&[2, 5], 4))], &[&x]);
        assert!(grads[0].is_some() && weight.grad().is_none() && bias.grad().is_some());
    }

    #[test]
    #[should_panic(expected = "does not fit an input of shape [2, 7]")]
    fn shapes_are_checked() {
        let weight = Param::<Flex>::new("w", random(&[5, 6], 2));
        let tape = Tape::inference();
        linear(&tape, &tape.constant(random(&[2, 7], 1)), &weight, None);
    }
}
