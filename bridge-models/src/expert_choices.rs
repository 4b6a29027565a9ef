//! Which experts a model's routers chose, to be chosen again when the same model runs in another precision.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bridge_ops::{Int, Ops, to_i64_vec};
use burn::tensor::TensorMetadata;

/// The experts that routers gave tokens to.
///
/// A choice between two experts of like scores is a step: rounding that moves scores by a thousandth turns it over, and a
/// token then passes through other weights. Nothing can be said of how well such a model is computed from how far its
/// outputs are off. So one pass, in full precision, writes down its choices, and the pass in question makes the same ones,
/// while it counts how many would have been others.
#[derive(Debug)]
pub struct ExpertChoices<B: Ops> {
    state: Mutex<State<B>>,
    replays: bool,
}

#[derive(Debug)]
struct State<B: Ops> {
    /// `[tokens, k]` by the name of the layer.
    chosen: BTreeMap<String, Int<B>>,
    assignments: usize,
    different: usize,
}

impl<B: Ops> Default for ExpertChoices<B> {
    fn default() -> Self {
        Self::new()
    }
}

impl<B: Ops> ExpertChoices<B> {
    /// To be written down in a pass.
    pub fn new() -> Self {
        Self {
            state: Mutex::new(State {
                chosen: BTreeMap::new(),
                assignments: 0,
                different: 0,
            }),
            replays: false,
        }
    }

    /// To be made again in a pass over the same tokens.
    pub fn replay(self) -> Self {
        Self {
            replays: true,
            ..self
        }
    }

    /// Whether routers are to make the choices that were written down.
    pub(crate) fn replays(&self) -> bool {
        self.replays
    }

    /// Whether a router chose anything.
    pub fn is_empty(&self) -> bool {
        self.state().chosen.is_empty()
    }

    /// How many of a replaying pass's assignments of tokens to experts would have been others, and how many there were.
    pub fn different(&self) -> (usize, usize) {
        let state = self.state();
        (state.different, state.assignments)
    }

    /// What a router is to choose, which by itself would choose `own`, [tokens, k].
    pub(crate) fn decide(&self, router: &str, own: Int<B>) -> Int<B> {
        let mut state = self.state();
        if !self.replays {
            state.chosen.insert(router.to_owned(), own.clone());
            return own;
        }
        let Some(given) = state.chosen.get(router).cloned() else {
            return own;
        };
        let top_k = own.shape()[1];
        let [found, given_ids] = [own, given.clone()].map(to_i64_vec::<B>);
        state.assignments += found.len();
        // The order in which a token's experts are listed says nothing.
        for (found, given) in found.chunks(top_k).zip(given_ids.chunks(top_k)) {
            state.different += found.iter().filter(|id| !given.contains(id)).count();
        }
        given
    }

    fn state(&self) -> MutexGuard<'_, State<B>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bridge_ops::int_from_i64;
    use burn_flex::Flex;

    use super::*;

    #[test]
    fn choices_are_made_again_and_what_differs_is_counted() {
        let device = Default::default();
        let ids = |ids: &[i64]| int_from_i64::<Flex>(ids, &[2, 2], &device);
        let choices = ExpertChoices::<Flex>::new();
        assert!(choices.is_empty());
        choices.decide("router", ids(&[3, 1, 0, 2]));
        let choices = choices.replay();
        let given = choices.decide("router", ids(&[1, 3, 0, 5]));
        assert_eq!(to_i64_vec::<Flex>(given), [3, 1, 0, 2]);
        assert_eq!(choices.different(), (1, 4));
        // A router that was not there chooses by itself.
        let own = choices.decide("other", ids(&[7, 6, 5, 4]));
        assert_eq!(to_i64_vec::<Flex>(own), [7, 6, 5, 4]);
    }
}
