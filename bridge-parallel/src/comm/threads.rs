//! Ranks that are threads of one process.
//!
//! The members of a group meet in rounds, one per collective: each puts in what it passes, the last to come computes the
//! results of all in the order of ranks, and each takes its own. Tensors change hands as handles, without copies.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bridge_ops::{DType, Float, Ops, float_zeros};
use burn_backend::TensorMetadata;

use super::blame::RankStates;
use super::combine::{Call, Contribution, Data, combine};
use super::failure::Failure;
use super::{Communicator, Group, Pending, ReduceOp, Transport};
use crate::error::{Error, Result};

/// A job whose ranks are threads: what they share.
pub(crate) struct Threads<B: Ops> {
    device: B::Device,
    timeout: Duration,
    failure: Failure,
    groups: Mutex<HashMap<(String, Vec<usize>), Arc<Meeting<B>>>>,
    ranks: Mutex<RankStates>,
}

impl<B: Ops> Threads<B> {
    pub(crate) fn new(world_size: usize, device: B::Device, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            device,
            timeout,
            failure: Failure::default(),
            groups: Mutex::default(),
            ranks: Mutex::new(RankStates::new(world_size)),
        })
    }

    pub(crate) fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    /// Ends the job, unless it has failed already, and wakes whoever waits.
    pub(crate) fn fail(&self, error: Error) {
        if self.failure.set(error) {
            self.wake();
        }
    }

    /// Notes that `rank` will call nothing any more.
    pub(crate) fn end(&self, rank: usize) {
        lock(&self.ranks).set_ended(rank);
        self.wake();
    }

    fn wake(&self) {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        for group in groups {
            // A waiter looks at the failure under this lock before it sleeps, so it cannot miss the call.
            drop(lock(&group.state));
            group.changed.notify_all();
        }
    }
}

/// Where the members of one group meet.
struct Meeting<B: Ops> {
    state: Mutex<MeetingState<B>>,
    changed: Condvar,
}

struct MeetingState<B: Ops> {
    /// Rounds that wait for members, by number.
    rounds: HashMap<u64, Round<B>>,
    /// Tensors sent and not received, by sender and receiver.
    mail: HashMap<(usize, usize), VecDeque<Float<B>>>,
}

struct Round<B: Ops> {
    joined: Vec<Option<Contribution<B>>>,
    outcome: Outcome<B>,
}

/// The members' results, once the round is complete. Each is taken once.
type Outcome<B> = Arc<OnceLock<Vec<Mutex<Option<Data<B>>>>>>;

/// One rank's end of the transport.
pub(crate) struct ThreadTransport<B: Ops> {
    pub(crate) job: Arc<Threads<B>>,
    pub(crate) rank: usize,
}

impl<B: Ops> Transport<B> for ThreadTransport<B> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        lock(&self.job.ranks).len()
    }

    fn group(&self, name: &str, ranks: &[usize]) -> Result<Group<B>> {
        let Some(rank) = ranks.iter().position(|rank| *rank == self.rank) else {
            return Err(Error::Invalid(format!(
                "rank {} is not a member of group {name} of ranks {ranks:?}",
                self.rank
            )));
        };
        let meeting = lock(&self.job.groups)
            .entry((name.to_owned(), ranks.to_vec()))
            .or_insert_with(|| {
                Arc::new(Meeting {
                    state: Mutex::new(MeetingState {
                        rounds: HashMap::new(),
                        mail: HashMap::new(),
                    }),
                    changed: Condvar::new(),
                })
            })
            .clone();
        Ok(Arc::new(ThreadGroup {
            member: Arc::new(Member {
                job: Arc::clone(&self.job),
                meeting,
                name: name.to_owned(),
                ranks: ranks.to_vec(),
                rank,
            }),
            next_round: AtomicU64::new(0),
        }))
    }

    fn abort(&self, reason: &str) {
        self.job.fail(Error::Aborted {
            rank: self.rank,
            reason: reason.to_owned(),
        });
    }

    fn health(&self) -> Result<()> {
        self.job.failure.health()
    }
}

/// A group as one of its ranks holds it.
struct ThreadGroup<B: Ops> {
    member: Arc<Member<B>>,
    next_round: AtomicU64,
}

struct Member<B: Ops> {
    job: Arc<Threads<B>>,
    meeting: Arc<Meeting<B>>,
    name: String,
    ranks: Vec<usize>,
    rank: usize,
}

impl<B: Ops> Member<B> {
    fn global_rank(&self) -> usize {
        self.ranks[self.rank]
    }

    /// Puts in this rank's part of round `number`; the last to do so computes the outcome.
    fn join(&self, number: u64, contribution: Contribution<B>) -> Outcome<B> {
        let mut state = lock(&self.meeting.state);
        let round = state.rounds.entry(number).or_insert_with(|| Round {
            joined: (0..self.ranks.len()).map(|_| None).collect(),
            outcome: Arc::default(),
        });
        let call = contribution.call;
        round.joined[self.rank] = Some(contribution);
        let outcome = Arc::clone(&round.outcome);
        if round.joined.iter().any(Option::is_none) {
            return outcome;
        }
        let round = state.rounds.remove(&number).expect("looked up above");
        drop(state);
        match combine(round.joined.into_iter().flatten().collect(), &self.ranks) {
            Ok(results) => {
                let results = results.into_iter().map(|data| Mutex::new(Some(data)));
                // Nobody else completes this round.
                let _ = outcome.set(results.collect());
                drop(lock(&self.meeting.state));
                self.meeting.changed.notify_all();
            }
            Err(problem) => self.job.fail(Error::Mismatch {
                call: self.describe(call, number),
                problem,
            }),
        }
        outcome
    }

    /// This rank's result of round `number`; `None` when the job has failed.
    fn take(&self, call: Call, number: u64, outcome: &Outcome<B>) -> Option<Data<B>> {
        let ready = |_: &mut MeetingState<B>| {
            let results = outcome.get()?;
            lock(&results[self.rank]).take()
        };
        let missing = |state: &MeetingState<B>| {
            let joined = &state.rounds.get(&number)?.joined;
            let absent =
                |(_, contribution): &(&usize, &Option<Contribution<B>>)| contribution.is_none();
            let absent = self.ranks.iter().zip(joined).filter(absent);
            Some(absent.map(|(rank, _)| *rank).collect())
        };
        self.wait(|| self.describe(call, number), ready, missing)
    }

    /// Sleeps until `ready` gives something or the job fails, which a wait beyond the timeout makes it.
    ///
    /// `missing` names the ranks that have not come; `None` while results are being computed.
    fn wait<T>(
        &self,
        describe: impl Fn() -> String,
        ready: impl Fn(&mut MeetingState<B>) -> Option<T>,
        missing: impl Fn(&MeetingState<B>) -> Option<Vec<usize>>,
    ) -> Option<T> {
        let me = self.global_rank();
        let deadline = Instant::now() + self.job.timeout;
        let mut announced = None;
        let result = loop {
            let mut state = lock(&self.meeting.state);
            if let Some(result) = ready(&mut state) {
                break Some(result);
            }
            if self.job.failure.get().is_some() {
                break None;
            }
            let absent = missing(&state);
            if absent != announced {
                // Others follow this when they look for the rank that holds everybody up.
                let waits = absent.clone().map(|absent| (describe(), absent));
                lock(&self.job.ranks).set_waits(me, waits);
                announced = absent.clone();
            }
            let absent = absent.unwrap_or_default();
            let gone = lock(&self.job.ranks).first_ended(&absent);
            let late = Instant::now() >= deadline && !absent.is_empty();
            if gone.is_some() || late {
                drop(state);
                self.job.fail(match gone {
                    Some(rank) => Error::Ended {
                        rank,
                        call: describe(),
                        waiting: me,
                    },
                    None => lock(&self.job.ranks).clone().blame(
                        me,
                        &describe(),
                        &absent,
                        self.job.timeout,
                    ),
                });
                continue;
            }
            let left = deadline
                .saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1));
            drop(
                self.meeting
                    .changed
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        };
        if announced.is_some() {
            lock(&self.job.ranks).set_waits(me, None);
        }
        result
    }

    fn describe(&self, call: Call, number: u64) -> String {
        format!(
            "{call} number {number} of group {} {:?}",
            self.name, self.ranks
        )
    }

    fn zeros(&self, shape: &[usize], dtype: DType) -> Float<B> {
        float_zeros::<B>(shape, dtype, &self.job.device)
    }
}

impl<B: Ops> ThreadGroup<B> {
    /// Starts a collective whose result here has the given shape.
    fn start(&self, call: Call, x: Float<B>, rows: [&[usize]; 2], shape: Vec<usize>) -> Pending<B> {
        let dtype = x.dtype();
        let number = self.next_round.fetch_add(1, Ordering::Relaxed);
        let outcome = self.member.join(
            number,
            Contribution {
                call,
                data: Data::Tensor(x),
                send_rows: rows[0].to_vec(),
                recv_rows: rows[1].to_vec(),
            },
        );
        let member = Arc::clone(&self.member);
        Pending::new(move || match member.take(call, number, &outcome) {
            Some(Data::Tensor(x)) => x,
            _ => member.zeros(&shape, dtype),
        })
    }
}

impl<B: Ops> Communicator<B> for ThreadGroup<B> {
    fn name(&self) -> &str {
        &self.member.name
    }

    fn ranks(&self) -> &[usize] {
        &self.member.ranks
    }

    fn rank(&self) -> usize {
        self.member.rank
    }

    fn start_all_reduce(&self, x: Float<B>, op: ReduceOp) -> Pending<B> {
        let shape = x.shape().to_vec();
        self.start(Call::AllReduce(op), x, [&[], &[]], shape)
    }

    fn start_all_gather(&self, x: Float<B>, dim: usize) -> Pending<B> {
        let shape = gathered_shape::<B>(&x, dim, self.size());
        self.start(Call::AllGather { dim }, x, [&[], &[]], shape)
    }

    fn start_reduce_scatter(&self, x: Float<B>, dim: usize) -> Pending<B> {
        let shape = scattered_shape::<B>(&x, dim, self.size());
        self.start(Call::ReduceScatter { dim }, x, [&[], &[]], shape)
    }

    fn start_all_to_all(
        &self,
        x: Float<B>,
        send_rows: &[usize],
        recv_rows: &[usize],
    ) -> Pending<B> {
        let shape = exchanged_shape::<B>(&x, send_rows, recv_rows, self.size());
        self.start(Call::AllToAll, x, [send_rows, recv_rows], shape)
    }

    fn start_recv(&self, shape: &[usize], dtype: DType, from: usize) -> Pending<B> {
        let member = Arc::clone(&self.member);
        let sender = member.ranks[from];
        let shape = shape.to_vec();
        Pending::new(move || {
            let describe = || format!("recv from rank {sender} in group {}", member.name);
            let received = member.wait(
                describe,
                |state| state.mail.get_mut(&(from, member.rank))?.pop_front(),
                |_| Some(vec![sender]),
            );
            let Some(x) = received else {
                return member.zeros(&shape, dtype);
            };
            let found = (x.shape().to_vec(), x.dtype());
            if found == (shape.clone(), dtype) {
                return x;
            }
            member.job.fail(Error::Mismatch {
                call: describe(),
                problem: format!(
                    "rank {} expects {dtype:?} {shape:?}, rank {sender} sent {:?} {:?}",
                    member.global_rank(),
                    found.1,
                    found.0
                ),
            });
            member.zeros(&shape, dtype)
        })
    }

    fn broadcast(&self, x: Float<B>, root: usize) -> Float<B> {
        assert!(
            root < self.size(),
            "root {root} of a group of {}",
            self.size()
        );
        let shape = x.shape().to_vec();
        self.start(Call::Broadcast { root }, x, [&[], &[]], shape)
            .wait()
    }

    fn send(&self, x: Float<B>, to: usize) {
        assert!(to < self.size(), "rank {to} of a group of {}", self.size());
        let mut state = lock(&self.member.meeting.state);
        state
            .mail
            .entry((self.member.rank, to))
            .or_default()
            .push_back(x);
        drop(state);
        self.member.meeting.changed.notify_all();
    }

    fn all_gather_bytes(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let call = Call::GatherBytes;
        let number = self.next_round.fetch_add(1, Ordering::Relaxed);
        let contribution = Contribution {
            call,
            data: Data::Bytes(Arc::new(vec![bytes.to_vec()])),
            send_rows: Vec::new(),
            recv_rows: Vec::new(),
        };
        let outcome = self.member.join(number, contribution);
        match self.member.take(call, number, &outcome) {
            Some(Data::Bytes(all)) => Ok(Arc::unwrap_or_clone(all)),
            _ => Err(self
                .health()
                .expect_err("a collective gives nothing only after a failure")),
        }
    }

    fn abort(&self, reason: &str) {
        self.member.job.fail(Error::Aborted {
            rank: self.member.global_rank(),
            reason: reason.to_owned(),
        });
    }

    fn health(&self) -> Result<()> {
        self.member.job.failure.health()
    }
}

/// Shape of an all-gather's result.
#[track_caller]
pub(crate) fn gathered_shape<B: Ops>(x: &Float<B>, dim: usize, size: usize) -> Vec<usize> {
    let mut shape = x.shape().to_vec();
    assert!(
        dim < shape.len(),
        "all_gather: dim {dim} of shape {shape:?}"
    );
    shape[dim] *= size;
    shape
}

/// Shape of a reduce-scatter's result.
#[track_caller]
pub(crate) fn scattered_shape<B: Ops>(x: &Float<B>, dim: usize, size: usize) -> Vec<usize> {
    let mut shape = x.shape().to_vec();
    assert!(
        dim < shape.len() && shape[dim].is_multiple_of(size),
        "reduce_scatter: dim {dim} of shape {shape:?} does not divide among {size} ranks"
    );
    shape[dim] /= size;
    shape
}

/// Shape of an all-to-all's result.
#[track_caller]
pub(crate) fn exchanged_shape<B: Ops>(
    x: &Float<B>,
    send_rows: &[usize],
    recv_rows: &[usize],
    size: usize,
) -> Vec<usize> {
    let mut shape = x.shape().to_vec();
    assert!(
        send_rows.len() == size
            && recv_rows.len() == size
            && shape.first() == Some(&send_rows.iter().sum()),
        "all_to_all: send_rows {send_rows:?}, recv_rows {recv_rows:?} and shape {shape:?} do not fit a group of {size}"
    );
    shape[0] = recv_rows.iter().sum();
    shape
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
