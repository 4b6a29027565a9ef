//! What the engine tells of its way through the segments.

/// Hears of each pass of each segment, in the order in which they run: whoever brings weights before they are used and
/// takes gradients away when they are there. The defaults do nothing.
pub trait SegmentHooks {
    /// `segment` is about to run, forward or backward. `next` is the segment whose pass comes after that, if that is known
    /// here and is another.
    fn before_pass(&mut self, segment: usize, next: Option<usize>) {
        let _ = (segment, next);
    }

    /// `segment` has run forward. `next` is the segment whose pass comes next, if that is known here; it may be the same.
    fn forward_done(&mut self, segment: usize, next: Option<usize>) {
        let _ = (segment, next);
    }

    /// `segment` has run backward for one micro-batch; `last` if no more gradients will come from it in this step. `next`
    /// as in [`forward_done`](Self::forward_done).
    fn backward_done(&mut self, segment: usize, last: bool, next: Option<usize>) {
        let _ = (segment, last, next);
    }
}

/// Nothing to do.
pub struct NoHooks;

impl SegmentHooks for NoHooks {}

/// A function that is told each segment once no more gradients will come from it.
pub struct WhenComplete<'f>(pub &'f mut dyn FnMut(usize));

impl SegmentHooks for WhenComplete<'_> {
    fn backward_done(&mut self, segment: usize, last: bool, _next: Option<usize>) {
        if last {
            (self.0)(segment);
        }
    }
}
