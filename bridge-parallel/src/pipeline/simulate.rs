//! A schedule in time: when each pass runs if a backward pass takes twice as long as a forward pass and messages take
//! none. What never ends is a deadlock.

use std::collections::{HashMap, VecDeque};

use super::schedule::{Action, Schedule, ScheduleError, Transfer};

/// A pass, and when it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// The pass.
    pub action: Action,
    /// When it starts, in forward passes of one chunk.
    pub start: usize,
    /// How long it takes: 1 forward, 2 backward.
    pub length: usize,
}

/// When each stage runs its passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeline {
    stages: Vec<Vec<Slot>>,
}

impl Timeline {
    /// Runs a schedule.
    ///
    /// # Errors
    /// [`ScheduleError::Deadlock`] with what each stage waits for.
    pub fn of(schedule: &Schedule) -> Result<Self, ScheduleError> {
        let stages = schedule.num_stages();
        let mut slots: Vec<Vec<Slot>> = vec![Vec::new(); stages];
        let (mut next, mut time) = (vec![0; stages], vec![0; stages]);
        // Messages under way from one stage to another, as the receiver names them, and when they were sent.
        let mut under_way: HashMap<(usize, usize), VecDeque<(Transfer, usize)>> = HashMap::new();
        let mut moved = true;
        while moved {
            moved = false;
            for stage in 0..stages {
                while let Some(action) = schedule.stage(stage).get(next[stage]) {
                    match *action {
                        Action::Forward { .. } | Action::Backward { .. } => {
                            let length = match action {
                                Action::Forward { .. } => 1,
                                _ => 2,
                            };
                            slots[stage].push(Slot {
                                action: *action,
                                start: time[stage],
                                length,
                            });
                            time[stage] += length;
                        }
                        Action::Send(transfer) => {
                            let as_received = Transfer {
                                peer: stage,
                                ..transfer
                            };
                            let queue = under_way.entry((stage, transfer.peer)).or_default();
                            queue.push_back((as_received, time[stage]));
                        }
                        Action::Recv(transfer) => {
                            let queue = under_way.entry((transfer.peer, stage)).or_default();
                            let Some((_, sent)) =
                                queue.pop_front_if(|(front, _)| *front == transfer)
                            else {
                                break;
                            };
                            // A message that is only received to reach the next one costs no time.
                            time[stage] = time[stage].max(sent);
                        }
                    }
                    next[stage] += 1;
                    moved = true;
                }
            }
        }
        let waiting: Vec<String> = (0..stages)
            .filter_map(|stage| {
                let action = schedule.stage(stage).get(next[stage])?;
                Some(format!("stage {stage} waits at {action:?}"))
            })
            .collect();
        if waiting.is_empty() {
            Ok(Self { stages: slots })
        } else {
            Err(ScheduleError::Deadlock(waiting.join("; ")))
        }
    }

    /// The passes of a stage, in order.
    ///
    /// # Panics
    /// If there is no such stage.
    pub fn stage(&self, stage: usize) -> &[Slot] {
        &self.stages[stage]
    }

    /// When the last pass ends.
    pub fn length(&self) -> usize {
        self.stages
            .iter()
            .filter_map(|slots| slots.last())
            .map(|slot| slot.start + slot.length)
            .max()
            .unwrap_or(0)
    }

    /// The share of the time in which a stage has nothing to do, mean over the stages.
    pub fn bubble(&self) -> f64 {
        let all = (self.length() * self.stages.len()).max(1);
        let busy: usize = self.stages.iter().flatten().map(|slot| slot.length).sum();
        1.0 - busy as f64 / all as f64
    }
}
