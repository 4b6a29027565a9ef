//! The weights of the model between an update and their use: at hand, on their way from the ranks that have parts of them,
//! or nowhere but in those parts.
//!
//! With the distributed optimizer every rank updates its part of a bucket, and all gather the new weights. They may travel
//! while the next forward pass is at work: a bucket is waited for before the first segment that uses it.
//!
//! With fully sharded parameters (ZeRO-3; Rajbhandari et al. 2020) the whole weights exist only around the segment that
//! uses them. They are gathered before each of its passes, forward and backward, and let go of after it; those of the
//! segment after it are on their way meanwhile, so that a rank holds the weights of two segments at most.

use std::cell::RefCell;

use bridge_ops::{Ops, Param};
use bridge_parallel::{ParallelContext, Pending};

use super::buckets::{Bucket, model_weights};
use super::sharded::BucketState;
use crate::engine::SegmentHooks;

/// Where the weights of a bucket are.
enum Place<B: Ops> {
    /// In the parameters.
    Here,
    /// On their way there.
    Coming(Pending<B>),
    /// In the ranks' parts alone.
    Away,
}

/// Where the weights of every bucket are.
pub(super) struct Weights<B: Ops> {
    places: RefCell<Vec<Place<B>>>,
    /// By segment, the buckets that it uses.
    by_segment: Vec<Vec<usize>>,
    /// Whether weights are let go of after use.
    sharded: bool,
}

/// What gathering needs to know.
pub(super) struct Parts<'a, B: Ops> {
    pub(super) params: &'a [Param<B>],
    pub(super) buckets: &'a [Bucket],
    pub(super) states: &'a [BucketState<B>],
    pub(super) parallel: &'a ParallelContext<B>,
}

impl<B: Ops> Clone for Parts<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Ops> Copy for Parts<'_, B> {}

impl<B: Ops> Parts<'_, B> {
    fn start(&self, index: usize) -> Pending<B> {
        let (bucket, state) = (&self.buckets[index], &self.states[index]);
        let [weight, ..] = state.parts();
        let group = self.parallel.group(bucket.kind.replicas);
        group.start_all_gather(model_weights::<B>(weight, bucket.kind.dtype), 0)
    }

    fn arrived(&self, index: usize, pending: Pending<B>) {
        let weights = pending.wait();
        self.buckets[index].split(&weights, self.params, |param, value| param.set_value(value));
    }

    fn let_go(&self, index: usize) {
        for slot in &self.buckets[index].slots {
            self.params[slot.param].release();
        }
    }
}

impl<B: Ops> Weights<B> {
    /// Weights that are all at hand. `segments`: by segment, the weights that it uses.
    pub(super) fn new(buckets: &[Bucket], segments: &[Vec<usize>], sharded: bool) -> Self {
        let uses = |bucket: &Bucket, segment: &[usize]| {
            bucket
                .slots
                .iter()
                .any(|slot| segment.contains(&slot.param))
        };
        let of_segment = |segment: &Vec<usize>| {
            let used = buckets.iter().enumerate();
            used.filter(|(_, bucket)| uses(bucket, segment))
                .map(|(index, _)| index)
                .collect()
        };
        Self {
            places: RefCell::new(buckets.iter().map(|_| Place::Here).collect()),
            by_segment: segments.iter().map(of_segment).collect(),
            sharded,
        }
    }

    /// Whether weights are let go of after use.
    pub(super) fn are_sharded(&self) -> bool {
        self.sharded
    }

    /// The buckets that a segment uses.
    pub(super) fn of_segment(&self, segment: usize) -> &[usize] {
        self.by_segment.get(segment).map_or(&[], Vec::as_slice)
    }

    /// A segment is about to run, and then perhaps `next`.
    pub(super) fn before_pass(&self, parts: Parts<'_, B>, segment: usize, next: Option<usize>) {
        let mut places = self.places.borrow_mut();
        for &bucket in self.of_segment(segment) {
            let pending = match std::mem::replace(&mut places[bucket], Place::Here) {
                Place::Here => continue,
                Place::Coming(pending) => pending,
                Place::Away => parts.start(bucket),
            };
            parts.arrived(bucket, pending);
        }
        for &bucket in next.map_or(&[][..], |next| self.of_segment(next)) {
            if matches!(places[bucket], Place::Away) {
                places[bucket] = Place::Coming(parts.start(bucket));
            }
        }
    }

    /// A segment has run; `next` may still need what it used.
    pub(super) fn after_pass(&self, parts: Parts<'_, B>, segment: usize, next: Option<usize>) {
        if !self.sharded {
            return;
        }
        let needed = next.map_or(&[][..], |next| self.of_segment(next));
        let mut places = self.places.borrow_mut();
        for &bucket in self.of_segment(segment) {
            if !needed.contains(&bucket) {
                places[bucket] = Place::Away;
                parts.let_go(bucket);
            }
        }
    }

    /// The ranks' parts of bucket `index` are new. Sharded weights are gathered when they are used, others set out now.
    pub(super) fn renewed(&self, parts: Parts<'_, B>, index: usize) {
        let place = if self.sharded {
            parts.let_go(index);
            Place::Away
        } else {
            Place::Coming(parts.start(index))
        };
        self.places.borrow_mut()[index] = place;
    }

    /// Waits for what is on its way; with `all`, brings everything else as well.
    pub(super) fn bring(&self, parts: Parts<'_, B>, all: bool) {
        let mut places = self.places.borrow_mut();
        for (index, place) in places.iter_mut().enumerate() {
            let pending = match std::mem::replace(place, Place::Here) {
                Place::Here => continue,
                Place::Coming(pending) => pending,
                Place::Away if all => parts.start(index),
                Place::Away => {
                    *place = Place::Away;
                    continue;
                }
            };
            parts.arrived(index, pending);
            if self.sharded && !all {
                *place = Place::Away;
                parts.let_go(index);
            }
        }
    }
}

/// Brings the weights that segments run with, where nothing is trained.
pub struct WeightHooks<'a, B: Ops> {
    pub(super) weights: Option<(&'a Weights<B>, Parts<'a, B>)>,
}

impl<B: Ops> SegmentHooks for WeightHooks<'_, B> {
    fn before_pass(&mut self, segment: usize, next: Option<usize>) {
        if let Some((weights, parts)) = self.weights {
            weights.before_pass(parts, segment, next);
        }
    }

    fn forward_done(&mut self, segment: usize, next: Option<usize>) {
        if let Some((weights, parts)) = self.weights {
            weights.after_pass(parts, segment, next);
        }
    }
}
