//! Where a weight gradient is accumulated.

use burn_backend::{DType, TensorMetadata};

use crate::ops::Ops;
use crate::primitive::{Float, to_dtype, to_f32};

/// The buffer that a kernel adds a weight gradient to, in the state the kernel finds it.
///
/// It is fp32, and so is what a kernel returns. Only kernels that say so are given a narrower one (see
/// [`Param::set_grad_dtype`](crate::Param::set_grad_dtype)): they sum in fp32 all the same, round what they add up, and
/// return a gradient of the buffer's dtype.
///
/// A training step clears the gradients of the step before it. Keeping the buffers and overwriting them, rather than
/// freeing and allocating them anew, matters on a CPU: fresh memory costs a page fault per 4 KiB.
#[derive(Debug)]
pub enum GradSlot<B: Ops> {
    /// No buffer yet: the kernel allocates one and writes the gradient.
    Empty,
    /// A buffer of the right shape whose content is worthless: the kernel overwrites it.
    Stale(Float<B>),
    /// The gradient so far: the kernel adds to it, in place when it is the only owner.
    Sum(Float<B>),
}

impl<B: Ops> GradSlot<B> {
    /// Adds a gradient that was computed as a tensor of its own. The portable kernels end with this.
    pub fn accumulate(self, grad: Float<B>) -> Float<B> {
        self.rounded_once(|slot| {
            let grad = to_f32::<B>(grad);
            match slot {
                Self::Empty | Self::Stale(_) => grad,
                Self::Sum(sum) => B::add(sum, grad),
            }
        })
    }

    /// Lets a kernel that knows fp32 only work on a slot of any dtype.
    pub fn rounded_once(self, kernel: impl FnOnce(Self) -> Float<B>) -> Float<B> {
        match self.dtype() {
            DType::F32 => kernel(self),
            dtype => to_dtype::<B>(kernel(self.widened()), dtype),
        }
    }

    /// The slot for an fp32 sum that goes on from what is here.
    pub fn widened(self) -> Self {
        match self {
            Self::Sum(sum) => Self::Sum(to_f32::<B>(sum)),
            Self::Stale(buffer) if buffer.dtype() == DType::F32 => Self::Stale(buffer),
            Self::Empty | Self::Stale(_) => Self::Empty,
        }
    }

    /// The dtype that the gradient is to have.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Empty => DType::F32,
            Self::Stale(buffer) | Self::Sum(buffer) => buffer.dtype(),
        }
    }
}
