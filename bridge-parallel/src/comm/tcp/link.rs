//! A rank's connection to the hub: its inbox, its signs of life, and what it has heard of the job's end.

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::hub::{Hub, spawn};
use super::wire::{Content, Head, MEMBER, Tag, encode, read};
use super::{BEAT, JobOptions, auth};
use crate::comm::failure::Failure;
use crate::error::{Error, Result};

/// How long a wait lasts before the hub is told of it.
const ANNOUNCE: Duration = Duration::from_millis(200);
/// How long the hub may take to say who is to blame.
const VERDICT: Duration = Duration::from_secs(3);
/// Pause between attempts to reach rank 0.
const RETRY: Duration = Duration::from_millis(50);
/// How long a leaving rank waits for its last words to be written.
const FLUSH: Duration = Duration::from_secs(5);

/// A message from another rank.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) content: Content,
    pub(crate) payload: Vec<u8>,
}

/// A rank's connection to its job. Dropping it says goodbye in good order; a rank that fails calls
/// [`fail`](Self::fail) first.
pub(crate) struct Link {
    options: JobOptions,
    shared: Arc<Shared>,
    outbox: Mutex<Option<Sender<Vec<u8>>>>,
    stream: TcpStream,
    hub: Option<Hub>,
}

struct Shared {
    failure: Failure,
    /// Set once goodbye has been said, after which the end of the connection is no failure.
    leaving: AtomicBool,
    written: AtomicBool,
    inbox: Mutex<Inbox>,
    changed: Condvar,
}

struct Inbox {
    messages: HashMap<(Tag, usize), VecDeque<Message>>,
    ended: Vec<bool>,
    started: bool,
    last_heard: Instant,
}

impl Link {
    /// Joins the job; on rank 0, hosts it. Returns once every rank has joined.
    pub(crate) fn connect(options: JobOptions) -> Result<Arc<Self>> {
        options.check()?;
        let hub = (options.rank == 0)
            .then(|| Hub::start(options.clone()))
            .transpose()?;
        let mut stream = reach(&options)?;
        let failed = |error: std::io::Error| {
            Error::Rendezvous(format!(
                "rank {} cannot join at {}: {error}",
                options.rank, options.rendezvous
            ))
        };
        stream.set_nodelay(true).map_err(failed)?;
        stream
            .set_read_timeout(Some(options.join_timeout))
            .map_err(failed)?;
        auth::join(
            &mut stream,
            &options.secret,
            options.rank,
            options.world_size,
        )
        .map_err(failed)?;
        stream.set_read_timeout(None).map_err(failed)?;

        let shared = Arc::new(Shared {
            failure: Failure::default(),
            leaving: AtomicBool::new(false),
            written: AtomicBool::new(false),
            inbox: Mutex::new(Inbox {
                messages: HashMap::new(),
                ended: vec![false; options.world_size],
                started: false,
                last_heard: Instant::now(),
            }),
            changed: Condvar::new(),
        });
        let (outbox, frames) = channel::<Vec<u8>>();
        let (own, mut writer) = (Arc::clone(&shared), stream.try_clone().map_err(failed)?);
        spawn("link writer", move || {
            for frame in frames {
                if writer.write_all(&frame).is_err() {
                    break; // the reader sees the end of the connection
                }
            }
            own.written.store(true, Ordering::Release);
        })?;
        let (own, mut reader) = (Arc::clone(&shared), stream.try_clone().map_err(failed)?);
        spawn("link reader", move || own.read_all(&mut reader))?;
        let (own, beats, limit) = (Arc::clone(&shared), outbox.clone(), options.heartbeat_limit);
        spawn("link heartbeat", move || own.beat(&beats, limit))?;

        let link = Arc::new(Self {
            outbox: Mutex::new(Some(outbox)),
            shared,
            stream,
            hub,
            options,
        });
        link.wait_for_start()?;
        Ok(link)
    }

    pub(crate) fn options(&self) -> &JobOptions {
        &self.options
    }

    pub(crate) fn failure(&self) -> &Failure {
        &self.shared.failure
    }

    /// Ends the job on every rank, unless it has failed already.
    pub(crate) fn fail(&self, error: Error) {
        if self.shared.fail(error.clone()) {
            self.post(&Head::Fail(error), &[]);
        }
    }

    /// Tells the hub how many calls this rank has queued on its devices' communicators.
    pub(crate) fn report_progress(&self, progress: Vec<(u64, u64)>) {
        if !progress.is_empty() {
            self.post(&Head::Progress(progress), &[]);
        }
    }

    /// Tells the hub of a call on a device that does not end. The hub finds out who is to blame.
    pub(crate) fn report_stuck(&self, call: String, group: u64, number: u64, ranks: Vec<usize>) {
        let head = Head::Stuck {
            call,
            group,
            number,
            ranks,
        };
        self.post(&head, &[]);
    }

    /// Sends a message to other ranks.
    pub(crate) fn send(&self, to: Vec<usize>, tag: Tag, content: Content, payload: &[u8]) {
        let from = self.options.rank;
        self.post(
            &Head::Data {
                from,
                to,
                tag,
                content,
            },
            payload,
        );
    }

    /// The next message of each rank of `from` under `tag`; `None` when the job has failed, which a wait beyond the
    /// timeout makes it.
    pub(crate) fn wait(
        &self,
        tag: Tag,
        from: &[usize],
        describe: impl Fn() -> String,
    ) -> Option<Vec<Message>> {
        let start = Instant::now();
        let mut announced: Option<Vec<usize>> = None;
        let mut complained = false;
        let result = loop {
            let mut inbox = self.shared.lock();
            let arrived = |inbox: &Inbox, rank: usize| {
                inbox
                    .messages
                    .get(&(tag, rank))
                    .is_some_and(|queue| !queue.is_empty())
            };
            let missing: Vec<usize> = from
                .iter()
                .copied()
                .filter(|rank| !arrived(&inbox, *rank))
                .collect();
            if missing.is_empty() {
                break Some(
                    from.iter()
                        .filter_map(|rank| inbox.take(tag, *rank))
                        .collect(),
                );
            }
            if self.shared.failure.get().is_some() {
                break None;
            }
            let gone = missing.iter().copied().find(|rank| inbox.ended[*rank]);
            let waited = start.elapsed();
            if let Some(rank) = gone {
                drop(inbox);
                let waiting = self.options.rank;
                self.fail(Error::Ended {
                    rank,
                    call: describe(),
                    waiting,
                });
                continue;
            }
            if waited > self.options.timeout + VERDICT {
                drop(inbox);
                self.fail(Error::Timeout {
                    ranks: missing,
                    call: describe(),
                    waiting: self.options.rank,
                    seconds: self.options.timeout.as_secs(),
                });
                continue;
            }
            if waited > ANNOUNCE && announced.as_ref() != Some(&missing) {
                self.post(&Head::Waits(Some((describe(), missing.clone()))), &[]);
                announced = Some(missing.clone());
            }
            if waited > self.options.timeout && !complained {
                complained = true;
                self.post(
                    &Head::Late {
                        call: describe(),
                        missing,
                    },
                    &[],
                );
            }
            let next = if waited < ANNOUNCE {
                ANNOUNCE
            } else {
                self.options.timeout.max(waited) - waited
            };
            let pause = next.clamp(Duration::from_millis(1), Duration::from_millis(500));
            drop(
                self.shared
                    .changed
                    .wait_timeout(inbox, pause)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        };
        if announced.is_some() {
            self.post(&Head::Waits(None), &[]);
        }
        result
    }

    /// Cuts the connection, as the death of the process would.
    #[cfg(test)]
    pub(crate) fn sever(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn wait_for_start(&self) -> Result<()> {
        // The hub gives up first and says who is missing.
        let deadline = Instant::now() + self.options.join_timeout + VERDICT;
        loop {
            let inbox = self.shared.lock();
            if inbox.started {
                return Ok(());
            }
            self.shared.failure.health()?;
            if Instant::now() > deadline {
                return Err(Error::Rendezvous(format!(
                    "rank 0 at {} does not start the job",
                    self.options.rendezvous
                )));
            }
            let pause = Duration::from_millis(100);
            drop(
                self.shared
                    .changed
                    .wait_timeout(inbox, pause)
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    fn post(&self, head: &Head, payload: &[u8]) {
        let outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outbox) = &*outbox {
            // Fails only when the connection is gone, which the reader reports.
            let _ = outbox.send(encode(head, payload));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "it panicked; see its own output".to_owned();
            let rank = self.options.rank;
            self.fail(Error::RankFailed { rank, reason });
        }
        self.shared.leaving.store(true, Ordering::Release);
        let well = self.shared.failure.get().is_none();
        if well {
            self.post(&Head::Bye, &[]);
        }
        // The writer ends when the last sender is gone: this one and the heartbeat's.
        self.outbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let start = Instant::now();
        while !self.shared.written.load(Ordering::Acquire) && start.elapsed() < FLUSH {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Some(hub) = &self.hub {
            hub.wait_for_all(self.options.timeout);
            // What the hub has told the others must have been read before this process ends: closing a connection on which
            // they still send may discard it.
            std::thread::sleep(Duration::from_millis(if well { 50 } else { 300 }));
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn read_all(&self, stream: &mut TcpStream) {
        let reason = loop {
            match read::<Head>(stream, MEMBER) {
                Ok((head, payload)) => self.handle(head, payload),
                Err(error) => break error,
            }
        };
        if !self.leaving.load(Ordering::Acquire) {
            let reason =
                format!("the connection to it closed ({reason}): the process died or was killed");
            self.fail(Error::RankLost { rank: 0, reason });
        }
    }

    fn handle(&self, head: Head, payload: Vec<u8>) {
        let mut inbox = self.lock();
        inbox.last_heard = Instant::now();
        match head {
            Head::Start => inbox.started = true,
            Head::Data {
                from, tag, content, ..
            } => {
                let message = Message { content, payload };
                inbox
                    .messages
                    .entry((tag, from))
                    .or_default()
                    .push_back(message);
            }
            Head::Ended(rank) => {
                if let Some(ended) = inbox.ended.get_mut(rank) {
                    *ended = true;
                }
            }
            Head::Fail(error) => {
                self.failure.set(error);
            }
            Head::Beat
            | Head::Waits(_)
            | Head::Late { .. }
            | Head::Progress(_)
            | Head::Stuck { .. }
            | Head::Bye => return,
        }
        drop(inbox);
        self.changed.notify_all();
    }

    /// Says that this process lives, and notices when rank 0's does not.
    fn beat(&self, outbox: &Sender<Vec<u8>>, limit: Duration) {
        let mut last = Instant::now();
        while !self.leaving.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(20));
            if last.elapsed() < BEAT {
                continue;
            }
            last = Instant::now();
            if outbox.send(encode(&Head::Beat, &[])).is_err() {
                return;
            }
            if self.lock().last_heard.elapsed() > limit {
                let reason = format!(
                    "no sign of life for {} s (its process is stopped, or the network is down)",
                    limit.as_secs()
                );
                self.fail(Error::RankLost { rank: 0, reason });
                return;
            }
        }
    }

    fn fail(&self, error: Error) -> bool {
        let first = self.failure.set(error);
        if first {
            drop(self.lock());
            self.changed.notify_all();
        }
        first
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inbox {
    fn take(&mut self, tag: Tag, rank: usize) -> Option<Message> {
        let queue = self.messages.get_mut(&(tag, rank))?;
        let message = queue.pop_front();
        if queue.is_empty() {
            self.messages.remove(&(tag, rank));
        }
        message
    }
}

/// Opens a connection to rank 0, which may start later than this rank.
fn reach(options: &JobOptions) -> Result<TcpStream> {
    let deadline = Instant::now() + options.join_timeout;
    let address = &options.rendezvous;
    loop {
        let attempt = address.to_socket_addrs().and_then(|mut found| {
            let first = found
                .next()
                .ok_or_else(|| std::io::Error::other("the name has no address"))?;
            TcpStream::connect_timeout(&first, Duration::from_secs(5))
        });
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => {
                return Err(Error::Rendezvous(format!(
                    "rank {} cannot reach rank 0 at {address} within {} s: {error}; see whether rank 0 runs and the port \
                     is open",
                    options.rank,
                    options.join_timeout.as_secs()
                )));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}
