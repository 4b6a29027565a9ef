//! The meeting point, on rank 0: lets the ranks in, passes their messages on, and tells everybody when one is gone.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::wire::{Head, MEMBER, encode, read};
use super::{BEAT, JobOptions, auth};
use crate::comm::blame::RankStates;
use crate::comm::failure::Failure;
use crate::error::{Error, Result, name_ranks};

/// How long a stranger has to show the secret.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How many may try at once.
const MAX_STRANGERS: usize = 256;
/// How long the hub collects complaints about calls that do not end, and news of how far ranks are, before it judges.
const HEARING: Duration = Duration::from_secs(3);
/// How often the hub looks around.
const LOOK: Duration = Duration::from_millis(20);

/// The hub of a job. Ends its threads when dropped.
pub(crate) struct Hub {
    shared: Arc<Shared>,
}

struct Shared {
    options: JobOptions,
    failure: Failure,
    closed: AtomicBool,
    strangers: AtomicUsize,
    state: Mutex<State>,
}

struct State {
    members: Vec<Option<Member>>,
    ranks: RankStates,
    started: bool,
    /// Calls queued on device communicators, by communicator and rank.
    progress: HashMap<(u64, usize), u64>,
    stuck: Vec<Stuck>,
}

/// A call on a device that does not end.
struct Stuck {
    rank: usize,
    call: String,
    group: u64,
    number: u64,
    ranks: Vec<usize>,
    since: Instant,
}

struct Member {
    /// Frames to be written.
    queue: Sender<Arc<Vec<u8>>>,
    last_seen: Instant,
    ended: bool,
}

impl Hub {
    /// Listens at the rendezvous address.
    pub(crate) fn start(options: JobOptions) -> Result<Self> {
        let address = options.rendezvous.as_str();
        let listener = TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|error| {
                Error::Rendezvous(format!(
                    "rank 0 cannot listen at {address}: {error}; choose a free port of this host"
                ))
            })?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                members: (0..options.world_size).map(|_| None).collect(),
                ranks: RankStates::new(options.world_size),
                started: false,
                progress: HashMap::new(),
                stuck: Vec::new(),
            }),
            options,
            failure: Failure::default(),
            closed: AtomicBool::new(false),
            strangers: AtomicUsize::new(0),
        });
        let own = Arc::clone(&shared);
        spawn("hub", move || own.run(&listener))?;
        Ok(Self { shared })
    }

    /// Waits until every rank has ended in good order, the job has failed, or `limit` has passed.
    pub(crate) fn wait_for_all(&self, limit: Duration) {
        let start = Instant::now();
        let done = |state: &State| {
            let gone = |member: &Option<Member>| member.as_ref().is_some_and(|member| member.ended);
            state.members.iter().all(gone)
        };
        while self.shared.failure.get().is_none()
            && !done(&self.shared.lock())
            && start.elapsed() < limit
        {
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    /// Accepts ranks and watches over them.
    fn run(self: Arc<Self>, listener: &TcpListener) {
        let start = Instant::now();
        let mut beat = Instant::now();
        while !self.closed.load(Ordering::Relaxed) {
            while let Ok((stream, _)) = listener.accept() {
                if self.strangers.load(Ordering::Relaxed) >= MAX_STRANGERS {
                    continue; // dropping the stream refuses it
                }
                self.strangers.fetch_add(1, Ordering::Relaxed);
                let own = Arc::clone(&self);
                if spawn("hub member", move || own.serve(stream)).is_err() {
                    self.strangers.fetch_sub(1, Ordering::Relaxed);
                }
            }
            self.watch(start);
            if beat.elapsed() > BEAT {
                beat = Instant::now();
                self.tell_all(&Head::Beat);
            }
            std::thread::sleep(LOOK);
        }
    }

    fn watch(&self, start: Instant) {
        let mut state = self.lock();
        let absent: Vec<usize> = (0..state.members.len())
            .filter(|rank| state.members[*rank].is_none())
            .collect();
        let join_limit = self.options.join_timeout;
        if !state.started && absent.is_empty() {
            state.started = true;
            drop(state);
            self.tell_all(&Head::Start);
        } else if !state.started && start.elapsed() > join_limit {
            drop(state);
            self.fail(Error::Rendezvous(format!(
                "{} did not join within {} s; see whether they started, and with the same address, secret and number of \
                 processes",
                name_ranks(&absent),
                join_limit.as_secs()
            )));
        } else {
            let limit = self.options.heartbeat_limit;
            let silent = state.members.iter().position(|member| {
                member
                    .as_ref()
                    .is_some_and(|member| !member.ended && member.last_seen.elapsed() > limit)
            });
            let verdict = state.judge(self.options.timeout);
            drop(state);
            if let Some(error) = verdict {
                self.fail(error);
            }
            if let Some(rank) = silent {
                let reason = format!(
                    "no sign of life for {} s (its process is stopped, or the network is down)",
                    limit.as_secs()
                );
                self.fail(Error::RankLost { rank, reason });
            }
        }
    }

    /// One connection, from the handshake to its end.
    fn serve(&self, mut stream: TcpStream) {
        let (queue, frames) = channel::<Arc<Vec<u8>>>();
        let prepared = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.set_read_timeout(Some(HANDSHAKE)))
            .and_then(|()| stream.set_write_timeout(Some(HANDSHAKE)));
        let world_size = self.options.world_size;
        let admitted = prepared.and_then(|()| {
            auth::admit(&mut stream, &self.options.secret, world_size, |rank| {
                if self.lock().members[rank].is_some() {
                    return Err(format!(
                        "rank {rank} has joined already; two processes have the same rank"
                    ));
                }
                Ok(())
            })
        });
        self.strangers.fetch_sub(1, Ordering::Relaxed);
        let (Ok(rank), Ok(mut writer)) = (admitted, stream.try_clone()) else {
            return;
        };
        // The heartbeat, not the socket, says when a member has been silent for too long.
        if stream.set_read_timeout(None).is_err() {
            return;
        }
        let member = Member {
            queue,
            last_seen: Instant::now(),
            ended: false,
        };
        {
            let mut state = self.lock();
            if state.members[rank].is_some() {
                return; // another process with the same rank was quicker
            }
            state.members[rank] = Some(member);
        }
        let writing = spawn("hub writer", move || {
            use std::io::Write;
            for frame in frames {
                if writer.write_all(&frame).is_err() {
                    return; // the reader sees the end of the connection
                }
            }
        });
        if writing.is_err() {
            self.fail(Error::RankLost {
                rank,
                reason: "the system has no thread for its connection".into(),
            });
        }
        if let Some(error) = self.failure.get() {
            self.tell(rank, &Head::Fail(error.clone()));
        }
        let reason = loop {
            match read::<Head>(&mut stream, MEMBER) {
                Ok((head, payload)) => {
                    if let Some(member) = &mut self.lock().members[rank] {
                        member.last_seen = Instant::now();
                    }
                    self.handle(rank, head, &payload);
                }
                Err(error) => break error,
            }
        };
        let ended = self.lock().members[rank]
            .as_ref()
            .is_some_and(|member| member.ended);
        if !ended {
            let reason =
                format!("its connection closed ({reason}): the process died or was killed");
            self.fail(Error::RankLost { rank, reason });
        }
    }

    fn handle(&self, rank: usize, head: Head, payload: &[u8]) {
        match head {
            Head::Data {
                to, tag, content, ..
            } => {
                let recipients = to.clone();
                let frame = Arc::new(encode(
                    &Head::Data {
                        from: rank,
                        to,
                        tag,
                        content,
                    },
                    payload,
                ));
                let state = self.lock();
                for to in recipients {
                    if let Some(Some(member)) = state.members.get(to) {
                        // A member that has gone is noticed by its reader.
                        let _ = member.queue.send(Arc::clone(&frame));
                    }
                }
            }
            Head::Waits(waits) => self.lock().ranks.set_waits(rank, waits),
            Head::Late { call, missing } => {
                let error = self
                    .lock()
                    .ranks
                    .blame(rank, &call, &missing, self.options.timeout);
                self.fail(error);
            }
            Head::Progress(progress) => {
                let known = progress
                    .into_iter()
                    .map(|(group, issued)| ((group, rank), issued));
                self.lock().progress.extend(known);
            }
            Head::Stuck {
                call,
                group,
                number,
                ranks,
            } => self.lock().stuck.push(Stuck {
                rank,
                call,
                group,
                number,
                ranks,
                since: Instant::now(),
            }),
            Head::Fail(error) => self.fail(error),
            Head::Bye => {
                if let Some(member) = &mut self.lock().members[rank] {
                    member.ended = true;
                }
                self.tell_all(&Head::Ended(rank));
            }
            Head::Start | Head::Beat | Head::Ended(_) => {}
        }
    }

    fn fail(&self, error: Error) {
        if self.failure.set(error.clone()) {
            self.tell_all(&Head::Fail(error));
        }
    }

    fn tell(&self, rank: usize, head: &Head) {
        if let Some(member) = &self.lock().members[rank] {
            let _ = member.queue.send(Arc::new(encode(head, &[])));
        }
    }

    fn tell_all(&self, head: &Head) {
        let frame = Arc::new(encode(head, &[]));
        for member in self.lock().members.iter().flatten() {
            let _ = member.queue.send(Arc::clone(&frame));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Once complaints have been heard: who did not queue what others wait for.
    fn judge(&self, timeout: Duration) -> Option<Error> {
        let first = self.stuck.first()?;
        if first.since.elapsed() < HEARING {
            return None;
        }
        let behind = |stuck: &Stuck, rank: usize| {
            self.progress
                .get(&(stuck.group, rank))
                .copied()
                .unwrap_or(0)
                <= stuck.number
        };
        let mut missing: Vec<usize> = self
            .stuck
            .iter()
            .flat_map(|stuck| {
                stuck
                    .ranks
                    .iter()
                    .copied()
                    .filter(|rank| behind(stuck, *rank))
            })
            .collect();
        missing.sort_unstable();
        missing.dedup();
        if missing.is_empty() {
            return Some(Error::Device {
                rank: first.rank,
                call: first.call.clone(),
                reason: format!(
                    "all ranks called it, but it has not ended after {} s; see the GPUs and the network between them",
                    timeout.as_secs()
                ),
            });
        }
        // A rank that waits in another call itself is held up, not to blame.
        let idle = |rank: &usize| self.stuck.iter().all(|stuck| stuck.rank != *rank);
        if missing.iter().any(idle) {
            missing.retain(idle);
        }
        Some(Error::Timeout {
            ranks: missing,
            call: first.call.clone(),
            waiting: first.rank,
            seconds: timeout.as_secs(),
        })
    }
}

/// Starts a thread.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let started = thread.spawn(body);
    started
        .map(|_| ())
        .map_err(|error| Error::Rendezvous(format!("cannot start a thread: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rank 0's and rank 1's calls 4 of group 7 do not end; how far each rank of that group is varies.
    fn verdict(progress: &[(usize, u64)], complaints: &[(usize, u64, [usize; 2])]) -> Error {
        let since = Instant::now()
            .checked_sub(HEARING * 2)
            .expect("the machine runs for longer");
        let stuck = |(rank, group, ranks): &(usize, u64, [usize; 2])| Stuck {
            rank: *rank,
            call: format!("call 4 of group {group}"),
            group: *group,
            number: 4,
            ranks: ranks.to_vec(),
            since,
        };
        let state = State {
            members: Vec::new(),
            ranks: RankStates::new(3),
            started: true,
            progress: progress
                .iter()
                .map(|(rank, issued)| ((7, *rank), *issued))
                .collect(),
            stuck: complaints.iter().map(stuck).collect(),
        };
        state.judge(Duration::from_secs(60)).expect("a verdict")
    }

    #[test]
    fn who_has_not_queued_a_call_is_to_blame() {
        let error = verdict(&[(0, 5), (1, 4)], &[(0, 7, [0, 1])]);
        assert!(
            matches!(&error, Error::Timeout { ranks, waiting: 0, .. } if *ranks == [1]),
            "{error}"
        );
        // Rank 1 is held up by rank 2 in another group, and says so.
        let error = verdict(&[(0, 5), (1, 4)], &[(0, 7, [0, 1]), (1, 9, [1, 2])]);
        assert!(
            matches!(&error, Error::Timeout { ranks, .. } if *ranks == [2]),
            "{error}"
        );
        // Everybody is there, and still it does not end.
        let error = verdict(&[(0, 5), (1, 5)], &[(0, 7, [0, 1])]);
        assert!(error.to_string().contains("all ranks called it"), "{error}");
    }
}
