//! Cutting work into jobs for several threads.
//!
//! Kernels cut their output into disjoint parts and compute each part the same way whoever does it, so results do not
//! depend on the number of threads.

use std::marker::PhantomData;

/// The number of threads that work can be shared among: that of the rayon pool the caller is in, so that these kernels
/// and those of Burn are configured alike.
pub(crate) fn num_threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `job(0) .. job(count - 1)`, on several threads when there is more than one.
pub(crate) fn run_jobs(count: usize, job: impl Fn(usize) + Sync) {
    run_jobs_on(num_threads(), count, job);
}

/// [`run_jobs`] on at most `threads` threads.
pub(crate) fn run_jobs_on(threads: usize, count: usize, job: impl Fn(usize) + Sync) {
    if count <= 1 || threads <= 1 {
        (0..count).for_each(job);
    } else {
        super::team::share(threads, count, &job);
    }
}

/// Cuts `0..len` into `count` ranges of like size, each but the last a multiple of `unit`, and returns the `index`-th.
pub(crate) fn part(len: usize, count: usize, unit: usize, index: usize) -> std::ops::Range<usize> {
    let units = len.div_ceil(unit);
    let bound = |index: usize| (units * index / count * unit).min(len);
    bound(index)..bound(index + 1)
}

/// How many parts to cut `len` elements into when each is cheap: none smaller than `min_part`, and a few per thread so
/// that a slow thread does not hold up the rest.
pub(crate) fn num_parts(len: usize, min_part: usize) -> usize {
    (len / min_part.max(1)).clamp(1, 4 * num_threads())
}

/// A mutable slice of which several threads write disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose caller promises that parts are disjoint.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            ptr: slice.as_mut_ptr(),
            len: slice.len(),
            _borrow: PhantomData,
        }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No two ranges in use at the same time may overlap.
    #[expect(
        clippy::mut_from_ref,
        reason = "the caller promises that ranges are disjoint"
    )]
    pub(crate) unsafe fn slice(&self, range: std::ops::Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {} elements",
            self.len
        );
        // SAFETY: in bounds by the assertion, disjoint from other slices by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.end - range.start)
        }
    }

    /// The address of element `index`, for strided access.
    ///
    /// # Safety
    /// What is accessed through it must be in bounds and not in use elsewhere at the same time.
    pub(crate) unsafe fn at(&self, index: usize) -> *mut T {
        debug_assert!(index <= self.len);
        // SAFETY: in bounds by the caller's promise.
        unsafe { self.ptr.add(index) }
    }
}
