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

use burn_backend::{DType, TensorMetadata, read_sync};

use crate::data::{float_from_bytes, float_from_f32, to_f32_vec};
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

/// A weight with its gradient and optimizer state, for [`Ops::adamw_step_many`].
#[derive(Debug)]
pub struct AdamWTensors<B: Ops> {
    /// The fp32 weight. On a backend that splits it ([`Ops::SPLITS_MASTER_WEIGHTS`]) and for a bf16 `copy`, its lower
    /// half (see [`Ops::split_halves`]); the copy is then the upper one.
    pub master: Float<B>,
    /// Its gradient, fp32 or narrower. Dropped by the update.
    pub grad: Option<Float<B>>,
    /// Mean of gradients, fp32 or narrower.
    pub m: Float<B>,
    /// Mean of squared gradients, fp32.
    pub v: Float<B>,
    /// The weight in the narrower dtype that the model computes with, if that is not `master` itself.
    pub copy: Option<Float<B>>,
}

impl<B: Ops> AdamWTensors<B> {
    /// The update by the operations for one weight, one after the other: what a kernel for many falls back to.
    pub fn step_by_parts(self, step: &AdamWStep) -> Self {
        let Some(grad) = self.grad else { return self };
        let is_lower = self.master.dtype() != DType::F32;
        let (master, copy) = match self.copy {
            Some(copy) if is_lower => (B::join_halves(copy, self.master), None),
            copy => (self.master, copy),
        };
        let (master, m, v) = B::adamw_step(master, grad, self.m, self.v, step);
        let (master, copy) = if is_lower {
            let (upper, lower) = B::split_halves(master);
            (lower, Some(upper))
        } else {
            let copy = copy.map(|copy| B::cast(master.clone(), copy.dtype()));
            (master, copy)
        };
        Self {
            master,
            grad: None,
            m,
            v,
            copy,
        }
    }
}

pub(crate) fn portable_many<B: Ops>(
    tensors: Vec<AdamWTensors<B>>,
    step: &AdamWStep,
) -> Vec<AdamWTensors<B>> {
    tensors
        .into_iter()
        .map(|tensors| tensors.step_by_parts(step))
        .collect()
}

pub(crate) fn portable_split_halves<B: Ops>(weight: Float<B>) -> (Float<B>, Float<B>) {
    let (shape, device) = (dims(&weight), B::float_device(&weight));
    let halves: Vec<[[u8; 2]; 2]> = (to_f32_vec::<B>(weight).into_iter())
        .map(|x| {
            let upper = (x.to_bits().wrapping_add(0x8000) >> 16) as u16;
            let lower = x.to_bits().wrapping_sub(u32::from(upper) << 16) as u16;
            [upper.to_le_bytes(), lower.to_le_bytes()]
        })
        .collect();
    let half = |which: usize| {
        let bytes = halves.iter().flat_map(|pair| pair[which]).collect();
        float_from_bytes::<B>(DType::BF16, bytes, &shape, &device)
    };
    (half(0), half(1))
}

pub(crate) fn portable_join_halves<B: Ops>(upper: Float<B>, lower: Float<B>) -> Float<B> {
    let (shape, device) = (dims(&upper), B::float_device(&upper));
    // Bits, not numbers: converting the lower half would change those that happen to be no number.
    let bits = |half: Float<B>| {
        let data = read_sync(B::float_into_data(half)).expect("reading a tensor back");
        let pairs: Vec<u16> = (data.as_bytes().chunks_exact(2))
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
            .collect();
        pairs
    };
    let joined: Vec<f32> = (bits(upper).into_iter().zip(bits(lower)))
        .map(|(upper, lower)| {
            let lower = i32::from(lower as i16) as u32;
            f32::from_bits((u32::from(upper) << 16).wrapping_add(lower))
        })
        .collect();
    float_from_f32::<B>(&joined, &shape, &device)
}

pub(crate) fn portable<B: Ops>(
    param: Float<B>,
    grad: Float<B>,
    m: Float<B>,
    v: Float<B>,
    step: &AdamWStep,
) -> (Float<B>, Float<B>, Float<B>) {
    let (shape, dtype, m_dtype) = (dims(&param), param.dtype(), m.dtype());
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
    (
        to_dtype::<B>(unflat(param), dtype),
        to_dtype::<B>(unflat(m), m_dtype),
        unflat(v),
    )
}

#[cfg(test)]
mod tests {
    use burn_flex::Flex;

    use super::*;
    use crate::testing::{assert_close, assert_fast, random, random_bf16};

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
    fn halves_join_to_the_very_same_bits() {
        let mut values: Vec<f32> = [
            0u32,
            1,
            0x7fff,
            0x8000,
            0x8001,
            0x1_8000,
            0x3f80_8000,
            0x3f81_8000,
            0xbf80_7fff,
        ]
        .map(f32::from_bits)
        .to_vec();
        values.extend(to_f32_vec::<Flex>(random(&[50], 4)));
        let weight = crate::float_from_f32::<Flex>(&values, &[values.len()], &Default::default());
        let (upper, lower) = Flex::split_halves(weight);
        let rounded = to_f32_vec::<Flex>(upper.clone());
        assert!(
            values
                .iter()
                .zip(&rounded)
                .all(|(x, y)| (x - y).abs() <= x.abs() / 256.0 + 1e-38)
        );
        let joined = to_f32_vec::<Flex>(Flex::join_halves(upper, lower));
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&joined), bits(&values));
    }

    #[test]
    fn an_update_of_halves_is_that_of_the_whole() {
        let tensors = |master, copy| AdamWTensors::<Flex> {
            master,
            grad: Some(random(&[33], 2)),
            m: random(&[33], 3),
            v: crate::float_from_f32::<Flex>(&[0.25; 33], &[33], &Default::default()),
            copy,
        };
        let weight = random(&[33], 1);
        let (upper, lower) = Flex::split_halves(weight.clone());
        let whole = Flex::adamw_step_many(vec![tensors(weight, None)], &step(3)).remove(0);
        let halves = Flex::adamw_step_many(vec![tensors(lower, Some(upper))], &step(3)).remove(0);
        let joined = Flex::join_halves(halves.copy.unwrap(), halves.master);
        assert_eq!(to_f32_vec::<Flex>(joined), to_f32_vec::<Flex>(whole.master));
        assert_eq!(to_f32_vec::<Flex>(halves.v), to_f32_vec::<Flex>(whole.v));
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
        let zeros = |dtype| crate::float_zeros::<Flex>(&[5], dtype, &Default::default());
        let (p, m, _) = Flex::adamw_step(
            random_bf16(&[5], 1),
            random(&[5], 2),
            zeros(DType::F32),
            zeros(DType::F32),
            &step(1),
        );
        assert_eq!((p.dtype(), m.dtype()), (DType::BF16, DType::F32));
        // The new mean is rounded after the weight has been updated from it.
        let update = |grad, m| {
            let (p, m, _) = Flex::adamw_step(random(&[5], 1), grad, m, zeros(DType::F32), &step(1));
            (to_f32_vec::<Flex>(p), m)
        };
        let grad = random_bf16(&[5], 2);
        let (wide, m) = update(Flex::cast(grad.clone(), DType::F32), zeros(DType::F32));
        let (narrow, narrow_m) = update(grad, zeros(DType::BF16));
        assert_eq!(narrow_m.dtype(), DType::BF16);
        for (narrow, wide) in narrow.iter().zip(&wide) {
            assert!((narrow - wide).abs() <= 1e-6, "{narrow} and {wide}");
        }
        assert_eq!(
            to_f32_vec::<Flex>(narrow_m),
            to_f32_vec::<Flex>(Flex::cast(m, DType::BF16))
        );
    }
}
