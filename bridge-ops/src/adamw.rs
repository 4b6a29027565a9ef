//! AdamW (Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"), in the form and order of operations of
//! `torch.optim.AdamW`.
//!
//! ```text
//! g  = grad_scale * grad
//! p  = p (1 - lr wd)
//! m  = m + (1 - beta1) (g - m)
//! v  = beta2 v + (1 - beta2) g^2
//! p  = p - lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)         bc1 = 1 - beta1^t, bc2 = 1 - beta2^t
//! ```

use burn_backend::TensorMetadata;

use crate::ops::Ops;
use crate::primitive::{Float, dims, float, reshaped, tensor, to_dtype, to_f32};

/// The numbers of one AdamW update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// `1 - beta1^t`.
    pub bias_correction1: f64,
    /// `1 - beta2^t`.
    pub bias_correction2: f64,
    /// Multiplies the gradient, for clipping and averaging.
    pub grad_scale: f64,
}

impl AdamWStep {
    /// The `t`-th update, counted from 1, with a gradient scale of 1.
    pub fn new(t: u64, lr: f64, (beta1, beta2): (f64, f64), eps: f64, weight_decay: f64) -> Self {
        let power = |beta: f64| beta.powf(t as f64);
        Self {
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            bias_correction1: 1.0 - power(beta1),
            bias_correction2: 1.0 - power(beta2),
            grad_scale: 1.0,
        }
    }
}

pub(crate) fn portable<B: Ops>(
    param: Float<B>,
    grad: Float<B>,
    m: Float<B>,
    v: Float<B>,
    step: &AdamWStep,
) -> (Float<B>, Float<B>, Float<B>) {
    let (shape, dtype) = (dims(&param), param.dtype());
    let count = shape.iter().product();
    let flat = |x: Float<B>| tensor::<B, 1>(reshaped::<B>(to_f32::<B>(x), &[count]));
    let (param, grad, m, v) = (flat(param), flat(grad), flat(m), flat(v));

    let grad = grad.mul_scalar(step.grad_scale);
    let m = m.clone() + (grad.clone() - m).mul_scalar(1.0 - step.beta1);
    let v = v.mul_scalar(step.beta2) + grad.square().mul_scalar(1.0 - step.beta2);
    let denominator = v
        .clone()
        .sqrt()
        .div_scalar(step.bias_correction2.sqrt())
        .add_scalar(step.eps);
    let param = param.mul_scalar(1.0 - step.lr * step.weight_decay)
        - (m.clone() / denominator).mul_scalar(step.lr / step.bias_correction1);

    let unflat = |x| reshaped::<B>(float(x), &shape);
    (to_dtype::<B>(unflat(param), dtype), unflat(m), unflat(v))
}
