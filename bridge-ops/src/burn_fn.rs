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
