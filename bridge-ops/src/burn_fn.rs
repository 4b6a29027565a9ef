//! A way out of the tape: any function of Burn tensors as one node, differentiated by Burn's own autodiff.
//!
//! Use it for a layer this crate has no operation for, before (or instead of) writing a kernel with a hand-written
//! gradient. It costs the usual price of autodiff: every intermediate result of the function is kept until the backward
//! pass, and Burn's autodiff holds a process-wide lock while its backward pass runs, so the function must not wait for
//! another rank.
//!
//! ```
//! use bridge_ops::{Param, Tape, burn_fn, float_from_f32, to_f32_vec};
//! use burn_flex::Flex;
//!
//! // A custom activation with a learned slope: y = x * sigmoid(beta * x).
//! let device = Default::default();
//! let beta = Param::<Flex>::new("beta", float_from_f32::<Flex>(&[0.5], &[1], &device));
//!
//! let tape = Tape::<Flex>::new();
//! let x = tape.leaf(float_from_f32::<Flex>(&[0.0, 1.0, 2.0, -1.0], &[2, 2], &device));
//! let y = burn_fn(&tape, &[&x], &[&beta], |inputs, params| {
//!     let x = inputs[0].tensor::<2>();
//!     let beta = params[0].tensor::<1>().unsqueeze::<2>();
//!     x.clone() * burn::tensor::activation::sigmoid(x * beta)
//! });
//! assert_eq!(y.shape(), [2, 2]);
//!
//! let seed = float_from_f32::<Flex>(&[1.0; 4], &[2, 2], &device);
//! let grads = tape.backward(vec![(y, seed)], &[&x]);
//! assert_eq!(to_f32_vec::<Flex>(grads[0].clone().unwrap())[0], 0.5);
//! assert!(beta.grad().is_some());
//! ```

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorPrimitive};
use burn_backend::AutodiffBackend;

use crate::ops::Ops;
use crate::param::Param;
use crate::primitive::{Float, dims, float, tensor};
use crate::tape::{Tape, Var};

/// A tensor of `Autodiff<B>` whose rank the function knows.
#[derive(Debug, Clone)]
pub struct TrackedTensor<B: Ops> {
    primitive: Float<Autodiff<B>>,
}

impl<B: Ops> TrackedTensor<B> {
    fn new(value: Float<B>, tracked: bool) -> Self {
        let primitive = Autodiff::<B>::from_inner(value);
        let primitive = if tracked {
            primitive.require_grad()
        } else {
            primitive
        };
        Self { primitive }
    }

    /// The tensor, which must have rank `D`.
    ///
    /// # Panics
    /// When the rank is not `D`.
    #[track_caller]
    pub fn tensor<const D: usize>(&self) -> Tensor<Autodiff<B>, D> {
        tensor(self.primitive.clone())
    }
}

/// Runs `function` on the values of `inputs` and `params` and records it as one node. Gradients of `params` are added
/// to their slots.
///
/// The function gets tensors that are tracked where a gradient is needed, and may use whatever Burn offers. Values it
/// captures are constants.
pub fn burn_fn<B: Ops, const D: usize>(
    tape: &Tape<B>,
    inputs: &[&Var<B>],
    params: &[&Param<B>],
    function: impl FnOnce(&[TrackedTensor<B>], &[TrackedTensor<B>]) -> Tensor<Autodiff<B>, D>,
) -> Var<B> {
    let needs_grad = tape.needs_grad(inputs, params);
    let tracked_inputs: Vec<TrackedTensor<B>> = inputs
        .iter()
        .map(|x| TrackedTensor::new(x.value(), needs_grad && x.is_tracked()))
        .collect();
    let tracked_params: Vec<TrackedTensor<B>> = params
        .iter()
        .map(|p| TrackedTensor::new(p.value(), needs_grad && p.requires_grad()))
        .collect();

    let output = function(&tracked_inputs, &tracked_params);
    let value = float(output.clone().inner());
    let owned: Vec<Param<B>> = params.iter().map(|&param| param.clone()).collect();
    tape.record_with_params(value, inputs, params, move |dy| {
        // Burn seeds a backward pass with ones; multiplied by dy, those are the gradient of the output.
        let dy = Tensor::<Autodiff<B>, D>::from_primitive(TensorPrimitive::Float(
            Autodiff::<B>::from_inner(dy),
        ));
        let mut grads = (output * dy).backward();
        let mut grad_of =
            |x: &TrackedTensor<B>| Autodiff::<B>::grad_remove(&x.primitive, &mut grads);
        for (param, tracked) in owned.iter().zip(&tracked_params) {
            if let Some(grad) = grad_of(tracked).filter(|_| param.requires_grad()) {
                debug_assert_eq!(dims(&grad), param.shape());
                param.accumulate_grad(grad);
            }
        }
        tracked_inputs.iter().map(grad_of).collect()
    })
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{ROUNDING, assert_close, check, random};
    use crate::{mul, scale, to_f32_vec};

    #[test]
    fn gradients_are_those_of_the_tape() {
        // The roles swapped: here the function of Burn tensors is under test.
        check(
            "x (x + y)",
            &[random(&[3, 4], 1), random(&[3, 4], 2)],
            &[],
            |tape, x, _| {
                burn_fn(tape, &[&x[0], &x[1]], &[], |x, _| {
                    x[0].tensor::<2>() * (x[0].tensor() + x[1].tensor())
                })
            },
            |x, _| x[0].tensor::<2>().square() + x[0].tensor::<2>() * x[1].tensor(),
        );
    }

    #[test]
    fn it_is_a_node_among_others() {
        let tape = Tape::<Flex>::new();
        let x = tape.leaf(random(&[5], 1));
        let doubled = scale(&tape, &x, 2.0);
        let cubed = burn_fn(&tape, &[&doubled], &[], |x, _| {
            x[0].tensor::<1>().powi_scalar(3)
        });
        let y = mul(&tape, &cubed, &x); // 8 x^4
        let grads = tape.backward(vec![(y, random(&[5], 2))], &[&x]);
        let values = to_f32_vec::<Flex>(random(&[5], 1)).into_iter();
        let slopes: Vec<f32> = values.map(|x| 32.0 * x.powi(3)).collect();
        let slopes = crate::float_from_f32::<Flex>(&slopes, &[5], &Default::default());
        let expected = Flex::mul(slopes, random(&[5], 2));
        assert_close("dx", grads[0].as_ref().unwrap(), &expected, ROUNDING);
    }

    #[test]
    fn only_what_needs_a_gradient_gets_one() {
        let (free, frozen) = (
            Param::<Flex>::new("a", random(&[4], 1)),
            Param::new("b", random(&[4], 2)),
        );
        frozen.set_requires_grad(false);
        let product = |tape: &Tape<Flex>, x: &Var<Flex>| {
            burn_fn(tape, &[x], &[&free, &frozen], |x, p| {
                x[0].tensor::<1>() * p[0].tensor() * p[1].tensor()
            })
        };
        let tape = Tape::inference();
        assert!(!product(&tape, &tape.constant(random(&[4], 3))).is_tracked());
        assert!(free.grad().is_none());

        let tape = Tape::new();
        let y = product(&tape, &tape.constant(random(&[4], 3)));
        tape.backward(vec![(y, random(&[4], 4))], &[]);
        assert!(free.grad().is_some() && frozen.grad().is_none());
    }
}
