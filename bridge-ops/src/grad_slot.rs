//! Where a weight gradient is accumulated.

use crate::ops::Ops;
use crate::primitive::{Float, to_f32};

/// The fp32 buffer that a kernel adds a weight gradient to, in the state the kernel finds it.
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
        let grad = to_f32::<B>(grad);
        match self {
            Self::Empty | Self::Stale(_) => grad,
            Self::Sum(sum) => B::add(sum, grad),
        }
    }
}
