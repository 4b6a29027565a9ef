//! Work of a backward pass that nothing after it waits for, kept for the time that exchanges with other ranks take.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Work = Box<dyn FnOnce() + Send>;

/// Products of weights' gradients that wait for something to run beside. The rest of a backward pass does not depend on
/// them, so a tape whose values are exchanged with other ranks puts them off, and an exchange that has been started does
/// as many as it takes to fill its time. What is left is done when the pass ends. They are done in the order in which they
/// were put off, so sums come out the same, bit for bit.
///
/// Clones share the queue.
#[derive(Clone, Default)]
pub struct Deferred {
    queue: Arc<Mutex<VecDeque<(f64, Work)>>>,
}

impl Deferred {
    /// Keeps `work` of so many floating-point operations for later.
    pub fn put_off(&self, flops: f64, work: impl FnOnce() + Send + 'static) {
        self.queue().push_back((flops, Box::new(work)));
    }

    /// Whether nothing waits.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.queue().is_empty()
    }

    /// Does the oldest of the work, until it comes to `flops` or nothing is left.
    pub fn work_for(&self, mut flops: f64) {
        while flops > 0.0 {
            // The lock is not held while the work runs.
            let next = self.queue().pop_front();
            let Some((cost, work)) = next else { return };
            work();
            flops -= cost;
        }
    }

    /// Does all of it.
    pub fn finish(&self) {
        self.work_for(f64::INFINITY);
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<(f64, Work)>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Deferred {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deferred")
            .field("waiting", &self.queue().len())
            .finish()
    }
}

/// Does `work` at once, or keeps it for later where it is put off.
pub(crate) fn now_or_later(
    later: Option<Deferred>,
    flops: f64,
    work: impl FnOnce() + Send + 'static,
) {
    match later {
        Some(later) => later.put_off(flops, work),
        None => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_order_and_as_much_as_asked_for() {
        let deferred = Deferred::default();
        let done = Arc::new(Mutex::new(Vec::new()));
        for (number, flops) in [(0, 5.0), (1, 5.0), (2, 1.0), (3, 0.0)] {
            let done = Arc::clone(&done);
            deferred.put_off(flops, move || done.lock().unwrap().push(number));
        }
        deferred.work_for(0.0);
        assert!(done.lock().unwrap().is_empty());
        deferred.work_for(6.0);
        assert_eq!(*done.lock().unwrap(), [0, 1]);
        assert!(!deferred.is_empty());
        deferred.finish();
        assert_eq!(*done.lock().unwrap(), [0, 1, 2, 3]);
        assert!(deferred.is_empty());
    }
}
