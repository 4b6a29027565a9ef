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

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{assert_close, assert_fast, random, random_bf16};
    use crate::{DType, to_f32_vec};

    fn step(t: u64) -> AdamWStep {
        AdamWStep {
            grad_scale: 0.5,
            ..AdamWStep::new(t, 1e-2, (0.9, 0.95), 1e-8, 0.1)
        }
    }

    /// The formula in f64, element by element.
    fn reference(p: &mut f64, g: f64, m: &mut f64, v: &mut f64, s: &AdamWStep) {
        let g = s.grad_scale * g;
        *p *= 1.0 - s.lr * s.weight_decay;
        *m += (1.0 - s.beta1) * (g - *m);
        *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
        *p -= s.lr / s.bias_correction1 * *m / (v.sqrt() / s.bias_correction2.sqrt() + s.eps);
    }

    #[test]
    fn several_steps_follow_the_formula() {
        let shape = [7, 19];
        let wide = |x: &Float<Flex>| {
            to_f32_vec::<Flex>(x.clone())
                .into_iter()
                .map(f64::from)
                .collect::<Vec<_>>()
        };
        let mut state = (
            random(&shape, 1),
            random(&shape, 2),
            Flex::mul(random(&shape, 3), random(&shape, 3)),
        );
        let (mut p, mut m, mut v) = (wide(&state.0), wide(&state.1), wide(&state.2));
        for t in 1..=5 {
            let grad = random(&shape, 10 + t);
            for (i, g) in wide(&grad).into_iter().enumerate() {
                reference(&mut p[i], g, &mut m[i], &mut v[i], &step(t));
            }
            let portable = portable::<Flex>(
                state.0.clone(),
                grad.clone(),
                state.1.clone(),
                state.2.clone(),
                &step(t),
            );
            state = Flex::adamw_step(state.0, grad, state.1, state.2, &step(t));
            assert_fast(&["adamw_step"]);
            for (what, found, portable, expected) in [
                ("p", &state.0, &portable.0, &p),
                ("m", &state.1, &portable.1, &m),
                ("v", &state.2, &portable.2, &v),
            ] {
                let expected: Vec<f32> = expected.iter().map(|&x| x as f32).collect();
                let expected =
                    crate::float_from_f32::<Flex>(&expected, &shape, &Default::default());
                assert_close(what, found, &expected, 1e-6);
                assert_close(what, portable, &expected, 1e-6);
            }
        }
    }

    #[test]
    fn works_in_place() {
        let [p, g, m, v] = [1, 2, 3, 4].map(|seed| Flex::scale(random(&[1000], seed), 1.0));
        let v = Flex::mul(v.clone(), v);
        let addresses = [&p, &m, &v].map(|x| x.bytes().as_ptr());
        let before = to_f32_vec::<Flex>(g.clone());
        let (p, m, v) = Flex::adamw_step(p, g.clone(), m, v, &step(1));
        assert_eq!([&p, &m, &v].map(|x| x.bytes().as_ptr()), addresses);
        assert_eq!(to_f32_vec::<Flex>(g), before);
    }

    #[test]
    fn other_dtypes_take_the_portable_body() {
        let zeros = || crate::float_zeros::<Flex>(&[5], DType::F32, &Default::default());
        let (p, m, _) = Flex::adamw_step(
            random_bf16(&[5], 1),
            random(&[5], 2),
            zeros(),
            zeros(),
            &step(1),
        );
        assert_eq!((p.dtype(), m.dtype()), (DType::BF16, DType::F32));
    }
}
