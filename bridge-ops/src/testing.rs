//! What tests of several operations share: an operation is compared, forward and backward, with Burn's autodiff of the
//! formula it stands for.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn_backend::{DType, TensorMetadata};
use burn_flex::{Flex, FlexDevice, FlexTensor};

use crate::cpu::fast_path;
use crate::{Param, Tape, TrackedTensor, Var, burn_fn, float_from_f32, to_f32_vec};

pub(crate) const DEVICE: FlexDevice = FlexDevice;

/// fp32 sums of some hundred terms of order one, taken in different orders.
pub(crate) const ROUNDING: f32 = 2e-5;

/// Values in -1..1 that depend on the seed alone.
pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A tensor of such values.
pub(crate) fn random(shape: &[usize], seed: u64) -> FlexTensor {
    float_from_f32::<Flex>(&numbers(shape.iter().product(), seed), shape, &DEVICE)
}

/// A tensor of such values, rounded to bf16.
pub(crate) fn random_bf16(shape: &[usize], seed: u64) -> FlexTensor {
    crate::primitive::to_dtype::<Flex>(random(shape, seed), DType::BF16)
}

/// Asserts equal shapes, and elements that differ by at most `tolerance` times the largest expected magnitude (at
/// least one).
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &FlexTensor, expected: &FlexTensor, tolerance: f32) {
    assert_eq!(found.shape(), expected.shape(), "{what}: shapes differ");
    let (found, expected) = (
        to_f32_vec::<Flex>(found.clone()),
        to_f32_vec::<Flex>(expected.clone()),
    );
    let scale = expected.iter().fold(1.0_f32, |max, x| max.max(x.abs()));
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let difference = (found - expected).abs();
        assert!(
            difference <= tolerance * scale,
            "{what}: element {i} is {found}, expected {expected}"
        );
    }
}

/// Asserts that the named kernels, and not only their portable bodies, ran since the last call.
#[track_caller]
pub(crate) fn assert_fast(kernels: &[&str]) {
    let taken = fast_path::drain();
    for kernel in kernels {
        assert!(
            taken.contains(kernel),
            "kernel `{kernel}` did not run, only {taken:?}"
        );
    }
}

/// What a run of an operation left behind.
pub(crate) struct Outcome {
    pub(crate) output: FlexTensor,
    pub(crate) input_grads: Vec<FlexTensor>,
    pub(crate) param_grads: Vec<FlexTensor>,
}

/// Runs an operation forward and backward, with a seed that is the same for every run.
#[track_caller]
pub(crate) fn run(
    inputs: &[FlexTensor],
    params: &[FlexTensor],
    op: impl FnOnce(&Tape<Flex>, &[Var<Flex>], &[Param<Flex>]) -> Var<Flex>,
) -> Outcome {
    let tape = Tape::new();
    let inputs: Vec<_> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
    let params: Vec<_> = params
        .iter()
        .enumerate()
        .map(|(i, x)| Param::new(format!("param{i}"), x.clone()))
        .collect();
    let output = op(&tape, &inputs, &params);
    let value = output.value();
    let seed = random(&output.shape(), 999);
    let leaves: Vec<_> = inputs.iter().collect();
    let input_grads = tape.backward(vec![(output, seed)], &leaves);
    Outcome {
        output: value,
        input_grads: input_grads
            .into_iter()
            .map(|grad| grad.expect("a gradient of each input"))
            .collect(),
        param_grads: params
            .iter()
            .map(|param| param.grad().expect("a gradient of each parameter"))
            .collect(),
    }
}

/// Asserts that output and gradients of an operation are those of the formula.
#[track_caller]
pub(crate) fn check<const D: usize>(
    what: &str,
    inputs: &[FlexTensor],
    params: &[FlexTensor],
    op: impl FnOnce(&Tape<Flex>, &[Var<Flex>], &[Param<Flex>]) -> Var<Flex>,
    formula: impl FnOnce(&[TrackedTensor<Flex>], &[TrackedTensor<Flex>]) -> Tensor<Autodiff<Flex>, D>,
) {
    let found = run(inputs, params, op);
    let widened: Vec<_> = params
        .iter()
        .map(|x| crate::primitive::to_f32::<Flex>(x.clone()))
        .collect();
    let expected = run(inputs, &widened, |tape, inputs, params| {
        burn_fn(
            tape,
            &inputs.iter().collect::<Vec<_>>(),
            &params.iter().collect::<Vec<_>>(),
            formula,
        )
    });
    assert_close(
        &format!("{what}: output"),
        &found.output,
        &expected.output,
        ROUNDING,
    );
    for (i, (found, expected)) in found
        .input_grads
        .iter()
        .zip(&expected.input_grads)
        .enumerate()
    {
        assert_close(
            &format!("{what}: gradient of input {i}"),
            found,
            expected,
            ROUNDING,
        );
    }
    for (i, (found, expected)) in found
        .param_grads
        .iter()
        .zip(&expected.param_grads)
        .enumerate()
    {
        assert_close(
            &format!("{what}: gradient of parameter {i}"),
            found,
            expected,
            ROUNDING,
        );
    }
}
