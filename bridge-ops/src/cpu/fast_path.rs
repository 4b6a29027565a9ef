//! Lets tests see that a kernel ran rather than its portable body.

#[cfg(test)]
thread_local! {
    static TAKEN: std::cell::RefCell<Vec<&'static str>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Notes that a kernel covers its arguments. Does nothing outside tests.
pub(super) fn took(_kernel: &'static str) {
    #[cfg(test)]
    TAKEN.with_borrow_mut(|taken| taken.push(_kernel));
}

/// The kernels that ran on this thread since the last call.
#[cfg(test)]
pub(crate) fn drain() -> Vec<&'static str> {
    TAKEN.take()
}
