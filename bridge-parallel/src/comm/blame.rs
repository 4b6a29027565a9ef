//! Who holds a job up.

use std::time::Duration;

use crate::error::Error;

/// What is known of each rank: whether it has ended, and what it waits for.
#[derive(Debug, Clone)]
pub(crate) struct RankStates(Vec<RankState>);

#[derive(Debug, Clone, Default)]
struct RankState {
    ended: bool,
    /// What the rank waits for, if it does, and the ranks that have not come.
    waits: Option<(String, Vec<usize>)>,
}

impl RankStates {
    pub(crate) fn new(world_size: usize) -> Self {
        Self(vec![RankState::default(); world_size])
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn set_ended(&mut self, rank: usize) {
        self.0[rank].ended = true;
    }

    pub(crate) fn set_waits(&mut self, rank: usize, waits: Option<(String, Vec<usize>)>) {
        self.0[rank].waits = waits;
    }

    /// The first of `ranks` that has ended.
    pub(crate) fn first_ended(&self, ranks: &[usize]) -> Option<usize> {
        ranks
            .iter()
            .copied()
            .find(|rank| self.0.get(*rank).is_some_and(|state| state.ended))
    }

    /// Which failure it is when `rank` has waited for `missing` in `call` for longer than `timeout`.
    ///
    /// A missing rank may wait for another in turn, so this follows the waits to ranks that wait for nobody.
    pub(crate) fn blame(
        &self,
        rank: usize,
        call: &str,
        missing: &[usize],
        timeout: Duration,
    ) -> Error {
        let mut seen = vec![false; self.0.len()];
        let mut open = missing.to_vec();
        let (mut hung, mut waits) = (Vec::new(), vec![format!("rank {rank} in {call}")]);
        while let Some(other) = open.pop() {
            let Some(state) = self.0.get(other) else {
                continue;
            };
            if std::mem::replace(&mut seen[other], true) {
                continue;
            }
            match &state.waits {
                None => hung.push(other),
                Some((call, missing)) => {
                    if other != rank {
                        waits.push(format!("rank {other} in {call}"));
                    }
                    open.extend(missing);
                }
            }
        }
        hung.sort_unstable();
        if hung.is_empty() {
            return Error::Deadlock { waits };
        }
        Error::Timeout {
            ranks: hung,
            call: call.to_owned(),
            waiting: rank,
            seconds: timeout.as_secs(),
        }
    }
}
