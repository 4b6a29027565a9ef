//! The order in which pipeline stages run forward and backward passes and exchange tensors, as data.
//!
//! The layers of a model are cut into `pp * vpp` chunks, numbered in the order of the forward pass; chunk `c` belongs to
//! stage `c % pp`. A schedule lists, for each stage, the forward and backward passes of every micro-batch through every
//! chunk it holds, with the sends and receives around them. Nothing is computed here, so that a schedule can be drawn,
//! simulated and checked on its own.
//!
//! Orders are those of Megatron-Core:
//! - 1F1B (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021): stage `s` of `pp` runs
//!   `pp - s - 1` forward passes ahead, then alternates. One stage alone alternates from the start, which is gradient
//!   accumulation without a pipeline.
//! - interleaved (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
//!   2021): with `vpp` chunks a stage, micro-batches go through the chunks in groups of `pp`, and stage `s` runs
//!   `2 * (pp - s - 1) + (vpp - 1) * pp` forward passes ahead. The bubble shrinks by about the factor `vpp`.
//!
//! **Sends do not wait for their receivers**: a stage goes on at once, and messages from one stage to another arrive in
//! the order they were sent. Mailboxes between threads are like that, and so is NCCL with a communicator and a stream of
//! its own for each ordered pair of stages. Where a stage needs a message that the other stage sends after one that is
//! needed later, it receives both, in the order of sending.

use std::collections::{HashSet, VecDeque};

use super::simulate::Timeline;

/// What travels between stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransferKind {
    /// The output of a chunk, on its way to the next chunk.
    Activation,
    /// The gradient of a chunk's input, on its way to the chunk before.
    Gradient,
}

/// A tensor on its way from one stage to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// What it is.
    pub kind: TransferKind,
    /// The chunk that is going to use it.
    pub to_chunk: usize,
    /// The micro-batch.
    pub micro_batch: usize,
    /// The stage at the other end.
    pub peer: usize,
}

/// One thing that a stage does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Runs a micro-batch forward through a chunk.
    Forward {
        /// The chunk.
        chunk: usize,
        /// The micro-batch.
        micro_batch: usize,
    },
    /// Runs a micro-batch backward through a chunk.
    Backward {
        /// The chunk.
        chunk: usize,
        /// The micro-batch.
        micro_batch: usize,
    },
    /// Sends a tensor that an earlier pass of this stage made.
    Send(Transfer),
    /// Receives the tensor that a later pass of this stage needs.
    Recv(Transfer),
}

impl Action {
    /// Whether this is a send or a receive.
    pub fn is_transfer(&self) -> bool {
        matches!(self, Action::Send(_) | Action::Recv(_))
    }
}

/// Why a schedule cannot be made, or is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A size is zero.
    #[error("a pipeline schedule needs at least one {0}, found 0")]
    Empty(&'static str),
    /// The interleaved schedule deals micro-batches in whole groups.
    #[error(
        "the interleaved schedule deals micro-batches in groups of pp={pp}, so their number must be a multiple of it, \
         found {found}; the nearest that fit are {} and {}, or set vpp=1",
        (found / pp).max(1) * pp, (found / pp + 1) * pp
    )]
    Groups {
        /// Pipeline stages.
        pp: usize,
        /// Micro-batches per data-parallel rank and step.
        found: usize,
    },
    /// A schedule does something twice, never, or in the wrong place.
    #[error("stage {stage}: {problem}")]
    Wrong {
        /// The stage.
        stage: usize,
        /// What is wrong.
        problem: String,
    },
    /// The stages wait for one another.
    #[error("the schedule deadlocks: {0}")]
    Deadlock(String),
}

/// Who does what, in which order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    pub(super) pp: usize,
    pub(super) vpp: usize,
    pub(super) micro_batches: usize,
    pub(super) stages: Vec<Vec<Action>>,
}

impl Schedule {
    /// The training schedule of `pp` stages with `vpp` chunks each: 1F1B, or interleaved where `vpp` is above 1.
    ///
    /// # Errors
    /// [`ScheduleError::Empty`] or [`ScheduleError::Groups`].
    pub fn training(pp: usize, vpp: usize, micro_batches: usize) -> Result<Self, ScheduleError> {
        Self::check_sizes(pp, vpp, micro_batches)?;
        if vpp > 1 && !micro_batches.is_multiple_of(pp) {
            return Err(ScheduleError::Groups {
                pp,
                found: micro_batches,
            });
        }
        let passes = |stage| {
            let forward = forward_order(pp, vpp, micro_batches, stage);
            // Backward meets the chunks from the last to the first, in the same groups.
            let backward: Vec<Action> = forward
                .iter()
                .map(|(local, micro_batch)| Action::Backward {
                    chunk: (vpp - 1 - local) * pp + stage,
                    micro_batch: *micro_batch,
                })
                .collect();
            let forward = forward.iter().map(|(local, micro_batch)| Action::Forward {
                chunk: local * pp + stage,
                micro_batch: *micro_batch,
            });
            let ahead = warm_up(pp, vpp, stage).min(backward.len());
            interleave(forward.collect(), backward, ahead)
        };
        Ok(Self::with_transfers(
            pp,
            vpp,
            micro_batches,
            (0..pp).map(passes).collect(),
        ))
    }

    /// Forward passes alone, as evaluation needs: every micro-batch through every chunk.
    ///
    /// # Errors
    /// [`ScheduleError::Empty`].
    pub fn forward_only(
        pp: usize,
        vpp: usize,
        micro_batches: usize,
    ) -> Result<Self, ScheduleError> {
        Self::check_sizes(pp, vpp, micro_batches)?;
        let passes = |stage| {
            let order = forward_order(pp, vpp, micro_batches, stage).into_iter();
            order
                .map(|(local, micro_batch)| Action::Forward {
                    chunk: local * pp + stage,
                    micro_batch,
                })
                .collect()
        };
        Ok(Self::with_transfers(
            pp,
            vpp,
            micro_batches,
            (0..pp).map(passes).collect(),
        ))
    }

    fn check_sizes(pp: usize, vpp: usize, micro_batches: usize) -> Result<(), ScheduleError> {
        for (size, what) in [
            (pp, "stage"),
            (vpp, "chunk per stage"),
            (micro_batches, "micro-batch"),
        ] {
            if size == 0 {
                return Err(ScheduleError::Empty(what));
            }
        }
        Ok(())
    }

    /// Adds the sends and receives that `passes` imply: a tensor is sent right after the pass that makes it and received
    /// right before the pass that needs it, after those that its sender sends before it.
    fn with_transfers(
        pp: usize,
        vpp: usize,
        micro_batches: usize,
        passes: Vec<Vec<Action>>,
    ) -> Self {
        let mut schedule = Self {
            pp,
            vpp,
            micro_batches,
            stages: Vec::new(),
        };
        // What each stage sends to each other one, in order, as the receiver names it.
        let mut on_the_way: Vec<Vec<VecDeque<Transfer>>> = vec![vec![VecDeque::new(); pp]; pp];
        for (stage, passes) in passes.iter().enumerate() {
            for transfer in passes.iter().filter_map(|pass| schedule.sent(stage, *pass)) {
                let as_received = Transfer {
                    peer: stage,
                    ..transfer
                };
                on_the_way[stage][transfer.peer].push_back(as_received);
            }
        }
        for (stage, passes) in passes.into_iter().enumerate() {
            let mut actions = Vec::with_capacity(3 * passes.len());
            let mut received = HashSet::new();
            for pass in passes {
                if let Some(needed) = schedule.received(stage, pass) {
                    let queue = &mut on_the_way[needed.peer][stage];
                    while !received.contains(&needed) {
                        let Some(next) = queue.pop_front() else {
                            break;
                        };
                        received.insert(next);
                        actions.push(Action::Recv(next));
                    }
                }
                actions.push(pass);
                actions.extend(schedule.sent(stage, pass).map(Action::Send));
            }
            schedule.stages.push(actions);
        }
        schedule
    }

    /// What a pass needs from another stage.
    fn received(&self, stage: usize, pass: Action) -> Option<Transfer> {
        let (kind, to_chunk, micro_batch, from) = match pass {
            Action::Forward { chunk, micro_batch } => (
                TransferKind::Activation,
                chunk,
                micro_batch,
                chunk.checked_sub(1)?,
            ),
            Action::Backward { chunk, micro_batch } => (
                TransferKind::Gradient,
                chunk,
                micro_batch,
                (chunk + 1 < self.num_chunks()).then_some(chunk + 1)?,
            ),
            Action::Send(_) | Action::Recv(_) => return None,
        };
        let peer = self.stage_of_chunk(from);
        (peer != stage).then_some(Transfer {
            kind,
            to_chunk,
            micro_batch,
            peer,
        })
    }

    /// What a pass makes for another stage.
    fn sent(&self, stage: usize, pass: Action) -> Option<Transfer> {
        let (kind, to_chunk, micro_batch) = match pass {
            Action::Forward { chunk, micro_batch } => (
                TransferKind::Activation,
                (chunk + 1 < self.num_chunks()).then_some(chunk + 1)?,
                micro_batch,
            ),
            Action::Backward { chunk, micro_batch } => {
                (TransferKind::Gradient, chunk.checked_sub(1)?, micro_batch)
            }
            Action::Send(_) | Action::Recv(_) => return None,
        };
        let peer = self.stage_of_chunk(to_chunk);
        (peer != stage).then_some(Transfer {
            kind,
            to_chunk,
            micro_batch,
            peer,
        })
    }

    /// Number of stages.
    pub fn num_stages(&self) -> usize {
        self.pp
    }

    /// Number of chunks over all stages.
    pub fn num_chunks(&self) -> usize {
        self.pp * self.vpp
    }

    /// Number of micro-batches.
    pub fn num_micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// The stage that runs a chunk.
    pub fn stage_of_chunk(&self, chunk: usize) -> usize {
        chunk % self.pp
    }

    /// What `stage` does, in order.
    ///
    /// # Panics
    /// If there is no such stage.
    pub fn stage(&self, stage: usize) -> &[Action] {
        &self.stages[stage]
    }

    /// The most micro-batches, counted once per chunk, whose activations `stage` holds at a time.
    ///
    /// # Panics
    /// If there is no such stage.
    pub fn peak_in_flight(&self, stage: usize) -> usize {
        let (mut held, mut peak) = (0usize, 0);
        for action in &self.stages[stage] {
            match action {
                Action::Forward { .. } => held += 1,
                Action::Backward { .. } => held = held.saturating_sub(1),
                Action::Send(_) | Action::Recv(_) => {}
            }
            peak = peak.max(held);
        }
        peak
    }

    /// Checks that every micro-batch goes through every chunk forward once and then, unless no micro-batch does,
    /// backward once, each on the stage that holds the chunk and with its transfers around it, and that no stage waits
    /// for ever.
    ///
    /// # Errors
    /// [`ScheduleError::Wrong`] or [`ScheduleError::Deadlock`].
    pub fn check(&self) -> Result<(), ScheduleError> {
        let with_backward = self
            .stages
            .iter()
            .flatten()
            .any(|action| matches!(action, Action::Backward { .. }));
        for (stage, actions) in self.stages.iter().enumerate() {
            self.check_stage(stage, actions, with_backward)?;
        }
        Timeline::of(self).map(drop)
    }

    fn check_stage(
        &self,
        stage: usize,
        actions: &[Action],
        with_backward: bool,
    ) -> Result<(), ScheduleError> {
        let wrong = |problem| Err(ScheduleError::Wrong { stage, problem });
        let mut done: HashSet<Action> = HashSet::new();
        for action in actions {
            if !done.insert(*action) {
                return wrong(format!("{action:?} is there twice"));
            }
            let (Action::Forward { chunk, .. } | Action::Backward { chunk, .. }) = *action else {
                if let Action::Send(transfer) = action {
                    let made = self.maker(transfer);
                    if !done.contains(&made) {
                        return wrong(format!("{action:?} comes before {made:?}"));
                    }
                }
                continue;
            };
            if chunk >= self.num_chunks() || self.stage_of_chunk(chunk) != stage {
                return wrong(format!("{action:?} is of a chunk that another stage holds"));
            }
            if let Action::Backward { chunk, micro_batch } = *action
                && !done.contains(&Action::Forward { chunk, micro_batch })
            {
                return wrong(format!("{action:?} comes before its forward pass"));
            }
            if let Some(needed) = self.received(stage, *action)
                && !done.contains(&Action::Recv(needed))
            {
                return wrong(format!("{action:?} comes before {needed:?} is received"));
            }
        }
        for chunk in (stage..self.num_chunks()).step_by(self.pp) {
            for micro_batch in 0..self.micro_batches {
                let forward = Action::Forward { chunk, micro_batch };
                let backward = Action::Backward { chunk, micro_batch };
                let passes = [Some(forward), with_backward.then_some(backward)];
                for pass in passes.into_iter().flatten() {
                    if !done.remove(&pass) {
                        return wrong(format!("{pass:?} is missing"));
                    }
                    for transfer in [
                        self.received(stage, pass).map(Action::Recv),
                        self.sent(stage, pass).map(Action::Send),
                    ]
                    .into_iter()
                    .flatten()
                    {
                        if !done.remove(&transfer) {
                            return wrong(format!("{transfer:?} is missing"));
                        }
                    }
                }
            }
        }
        match done.iter().next() {
            Some(left) => wrong(format!("{left:?} belongs to no pass")),
            None => Ok(()),
        }
    }

    /// The pass that makes what is sent.
    fn maker(&self, sent: &Transfer) -> Action {
        let micro_batch = sent.micro_batch;
        match sent.kind {
            TransferKind::Activation => Action::Forward {
                chunk: sent.to_chunk.wrapping_sub(1),
                micro_batch,
            },
            TransferKind::Gradient => Action::Backward {
                chunk: sent.to_chunk + 1,
                micro_batch,
            },
        }
    }
}

/// Forward passes that `stage` runs before its first backward pass can come.
fn warm_up(pp: usize, vpp: usize, stage: usize) -> usize {
    let behind = pp - stage - 1;
    if vpp == 1 {
        behind
    } else {
        2 * behind + (vpp - 1) * pp
    }
}

/// (chunk of the stage, micro-batch) in the order of forward passes: groups of `pp` micro-batches, each group through
/// all chunks of the stage. `stage` matters not: every stage keeps one order.
fn forward_order(
    pp: usize,
    vpp: usize,
    micro_batches: usize,
    _stage: usize,
) -> Vec<(usize, usize)> {
    let group = if vpp == 1 { micro_batches } else { pp };
    (0..micro_batches)
        .step_by(group)
        .flat_map(|first| {
            let group = first..(first + group).min(micro_batches);
            (0..vpp).flat_map(move |local| group.clone().map(move |micro| (local, micro)))
        })
        .collect()
}

/// `ahead` forward passes, then one forward and one backward in turn, then the backward passes that are left.
fn interleave(forward: Vec<Action>, backward: Vec<Action>, ahead: usize) -> Vec<Action> {
    let mut passes = Vec::with_capacity(forward.len() + backward.len());
    let (mut forward, mut backward) = (forward.into_iter(), backward.into_iter());
    passes.extend(forward.by_ref().take(ahead));
    for pass in forward {
        passes.push(pass);
        passes.extend(backward.next());
    }
    passes.extend(backward);
    passes
}
