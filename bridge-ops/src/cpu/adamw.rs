//! AdamW in one pass over its four arrays. Maths: `adamw.rs`.

use burn_backend::DType;
use burn_flex::FlexTensor;

use super::elementwise::in_parts;
use super::fast_path;
use super::simd::{fma, vectorized};
use super::storage::{contiguous_f32, owned_f32, unique_values, values};
use super::threads::SharedMut;
use crate::adamw::AdamWStep;

/// In place where buffers are not shared. `Err` gives param, m and v back when the dtypes are not covered.
#[expect(
    clippy::result_large_err,
    reason = "the error is the arguments, which the caller goes on with"
)]
pub(super) fn step(
    param: FlexTensor,
    grad: &FlexTensor,
    m: FlexTensor,
    v: FlexTensor,
    step: &AdamWStep,
) -> Result<[FlexTensor; 3], [FlexTensor; 3]> {
    let state = [param, m, v];
    let covered = |x: &FlexTensor| x.dtype() == DType::F32;
    let (Some(grad), true) = (contiguous_f32(grad), state.iter().all(covered)) else {
        return Err(state);
    };
    fast_path::took("adamw_step");

    let [mut param, mut m, mut v] = state.map(writable);
    {
        let grad = values(&grad);
        let [param, m, v] =
            [&mut param, &mut m, &mut v].map(|x| unique_values(x).expect("a buffer of its own"));
        assert!(
            m.len() == param.len() && v.len() == param.len() && grad.len() == param.len(),
            "sizes differ"
        );
        let numbers = Numbers::new(step);
        let (m, v) = (SharedMut::new(m), SharedMut::new(v));
        in_parts(param, |param, range| {
            // SAFETY: parts are disjoint.
            let (m, v) = unsafe { (m.slice(range.clone()), v.slice(range.clone())) };
            update(param, &grad[range], m, v, numbers);
        });
    }
    Ok([param, m, v])
}

/// The tensor with a buffer that nobody shares.
fn writable(x: FlexTensor) -> FlexTensor {
    let mut x = owned_f32(x).expect("fp32");
    if unique_values(&mut x).is_some() {
        return x;
    }
    let shape = crate::primitive::dims(&x);
    super::pool::new_f32(&shape, |copy| copy.copy_from_slice(values(&x)))
}

#[derive(Clone, Copy)]
struct Numbers {
    grad_scale: f32,
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    inverse_sqrt_correction2: f32,
    eps: f32,
    step_size: f32,
}

impl Numbers {
    fn new(step: &AdamWStep) -> Self {
        Self {
            grad_scale: step.grad_scale as f32,
            decay: (1.0 - step.lr * step.weight_decay) as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            inverse_sqrt_correction2: step.bias_correction2.sqrt().recip() as f32,
            eps: step.eps as f32,
            step_size: (step.lr / step.bias_correction1) as f32,
        }
    }
}

vectorized! {
    fn update(param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32], n: Numbers) {
        for (((p, g), m), v) in param.iter_mut().zip(grad).zip(m).zip(v) {
            let g = g * n.grad_scale;
            *m = fma::<FMA>(n.one_minus_beta1, g - *m, *m);
            *v = fma::<FMA>(n.one_minus_beta2 * g, g, n.beta2 * *v);
            let denominator = fma::<FMA>(v.sqrt(), n.inverse_sqrt_correction2, n.eps);
            *p = fma::<FMA>(*p, n.decay, -n.step_size * (*m / denominator));
        }
    }
}
