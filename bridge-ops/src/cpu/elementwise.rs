//! Elementwise kernels, in place where an operand's buffer is not shared.

use std::ops::Range;

use burn_backend::DType;
use burn_flex::FlexTensor;

use super::math::tanh;
use super::simd::{fma, vectorized};
use super::storage::{contiguous_f32, owned_f32, unique_values, values};
use super::threads::{SharedMut, num_parts, part, run_jobs};
use super::{fast_path, pool};
use crate::primitive::dims;

/// A job handles at least this many elements.
const MIN_PART: usize = 32 << 10;

/// An operation on two values.
pub(super) trait Binary {
    /// Whether the operands may be swapped.
    const COMMUTES: bool;

    fn apply(a: f32, b: f32) -> f32;
}

pub(super) struct Add;
pub(super) struct Sub;
pub(super) struct Mul;

impl Binary for Add {
    const COMMUTES: bool = true;

    #[inline(always)]
    fn apply(a: f32, b: f32) -> f32 {
        a + b
    }
}

impl Binary for Sub {
    const COMMUTES: bool = false;

    #[inline(always)]
    fn apply(a: f32, b: f32) -> f32 {
        a - b
    }
}

impl Binary for Mul {
    const COMMUTES: bool = true;

    #[inline(always)]
    fn apply(a: f32, b: f32) -> f32 {
        a * b
    }
}

/// `Err` gives the operands back when they are not fp32 tensors of one shape.
#[expect(
    clippy::result_large_err,
    reason = "the error is the arguments, which the caller goes on with"
)]
pub(super) fn binary<Op: Binary>(
    a: FlexTensor,
    b: FlexTensor,
) -> Result<FlexTensor, (FlexTensor, FlexTensor)> {
    let shape = dims(&a);
    if a.dtype() != DType::F32 || b.dtype() != DType::F32 || shape != dims(&b) {
        return Err((a, b));
    }
    fast_path::took("binary");
    let (Ok(mut a), Ok(mut b)) = (owned_f32(a), owned_f32(b)) else {
        unreachable!("both are fp32")
    };
    if let Some(out) = unique_values(&mut a) {
        let b = values(&b);
        in_parts(out, |out, range| binary_left::<Op>(out, &b[range]));
        return Ok(a);
    }
    if Op::COMMUTES
        && let Some(out) = unique_values(&mut b)
    {
        let a = values(&a);
        in_parts(out, |out, range| binary_left::<Op>(out, &a[range]));
        return Ok(b);
    }
    let (a, b) = (values(&a), values(&b));
    Ok(pool::new_f32(&shape, |out| {
        in_parts(out, |out, range| {
            binary_new::<Op>(&a[range.clone()], &b[range], out)
        });
    }))
}

/// `Err` gives a tensor that is not fp32 back.
pub(super) fn scale(x: FlexTensor, factor: f32) -> Result<FlexTensor, FlexTensor> {
    let mut x = owned_f32(x)?;
    fast_path::took("scale");
    if let Some(out) = unique_values(&mut x) {
        in_parts(out, |out, _| scale_left(out, factor));
        return Ok(x);
    }
    let shape = dims(&x);
    let x = values(&x);
    Ok(pool::new_f32(&shape, |out| {
        in_parts(out, |out, range| scale_new(&x[range], factor, out))
    }))
}

/// `None` when the dtype is not covered.
pub(super) fn softcap(x: &FlexTensor, cap: f32) -> Option<FlexTensor> {
    let x = contiguous_f32(x)?;
    fast_path::took("softcap_forward");
    let shape = dims(&x);
    let x = values(&x);
    Some(pool::new_f32(&shape, |out| {
        in_parts(out, |out, range| softcap_values(&x[range], cap, out))
    }))
}

/// `None` when the dtypes are not covered.
pub(super) fn softcap_backward(x: &FlexTensor, dy: &FlexTensor, cap: f32) -> Option<FlexTensor> {
    let (x, dy) = (contiguous_f32(x)?, contiguous_f32(dy)?);
    fast_path::took("softcap_backward");
    let shape = dims(&x);
    let (x, dy) = (values(&x), values(&dy));
    Some(pool::new_f32(&shape, |out| {
        in_parts(out, |out, range| {
            softcap_grads(&x[range.clone()], &dy[range], cap, out)
        });
    }))
}

/// Calls `kernel` with parts of `out` and where they are, in parallel.
pub(super) fn in_parts(out: &mut [f32], kernel: impl Fn(&mut [f32], Range<usize>) + Send + Sync) {
    let len = out.len();
    let jobs = num_parts(len, MIN_PART);
    let out = SharedMut::new(out);
    run_jobs(jobs, |job| {
        let range = part(len, jobs, 16, job);
        // SAFETY: parts are disjoint.
        kernel(unsafe { out.slice(range.clone()) }, range);
    });
}

vectorized! {
    fn binary_new[Op: Binary](a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = Op::apply(*a, *b);
        }
    }
}

vectorized! {
    fn binary_left[Op: Binary](a: &mut [f32], b: &[f32]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a = Op::apply(*a, *b);
        }
    }
}

vectorized! {
    fn scale_new(x: &[f32], factor: f32, out: &mut [f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x * factor;
        }
    }
}

vectorized! {
    fn scale_left(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

vectorized! {
    /// `cap tanh(x / cap)`; also the scores of attention and the logits of a loss.
    pub(super) fn softcap_values(x: &[f32], cap: f32, out: &mut [f32]) {
        let inverse = 1.0 / cap;
        for (out, x) in out.iter_mut().zip(x) {
            *out = cap * tanh::<FMA>(x * inverse);
        }
    }
}

vectorized! {
    fn softcap_grads(x: &[f32], dy: &[f32], cap: f32, out: &mut [f32]) {
        let inverse = 1.0 / cap;
        for ((out, x), dy) in out.iter_mut().zip(x).zip(dy) {
            let t = tanh::<FMA>(x * inverse);
            *out = dy * fma::<FMA>(-t, t, 1.0);
        }
    }
}
