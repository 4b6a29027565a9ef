//! Watches over the communicators of a process: a failed job must not leave kernels that wait for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bridge_cuda::{CudaDevice, Span};

use super::channel::{Channel, Comm, GOODBYE};
use super::ffi::Api;
use crate::comm::tcp::{Link, spawn};
use crate::error::{Error, Result};

/// How often the watchdog looks.
const LOOK: Duration = Duration::from_millis(50);
/// How often the hub is told how far this rank is.
const REPORT: Duration = Duration::from_secs(1);

/// A process's part of a job.
pub(super) struct Job {
    pub(super) link: Arc<Link>,
    pub(super) device: CudaDevice,
    channels: Mutex<Vec<Weak<Channel>>>,
    closed: Arc<AtomicBool>,
    /// When the watchdog last got an answer from the driver and from NCCL.
    looked: Mutex<Instant>,
    /// Where the compute stream was held up by other ranks; `None` while nobody asks.
    waits: Mutex<Option<Vec<Span>>>,
    /// Communicators that are finalized and to be freed.
    parting: Mutex<Vec<Comm>>,
}

impl Job {
    pub(super) fn new(link: Arc<Link>, device: CudaDevice) -> Result<Arc<Self>> {
        let job = Arc::new(Self {
            link,
            device,
            channels: Mutex::default(),
            closed: Arc::default(),
            looked: Mutex::new(Instant::now()),
            waits: Mutex::default(),
            parting: Mutex::default(),
        });
        let (weak, closed) = (Arc::downgrade(&job), Arc::clone(&job.closed));
        spawn("nccl watchdog", move || {
            let mut reported = Instant::now();
            let mut complained = false;
            while !closed.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let Some(job) = weak.upgrade() else { return };
                if job.link.failure().get().is_some() {
                    job.live().iter().for_each(|channel| channel.abort());
                    // New channels are refused by now, but one may have been in the making.
                    continue;
                }
                let report = reported.elapsed() > REPORT;
                if report {
                    reported = Instant::now();
                }
                job.look(report, &mut complained);
                *job.looked() = Instant::now();
            }
        })?;
        let (weak, closed) = (Arc::downgrade(&job), Arc::clone(&job.closed));
        // The watchdog itself stands still where a call into the driver does.
        spawn("nccl watchdog's watchdog", move || {
            while !closed.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let Some(job) = weak.upgrade() else { return };
                if job.link.failure().get().is_some() {
                    return;
                }
                let (silence, limit) = (job.looked().elapsed(), job.link.options().timeout);
                if silence > limit {
                    job.link.fail(Error::Device {
                        rank: job.link.options().rank,
                        call: "asking how far the GPU is".into(),
                        reason: format!(
                            "no answer for {} s: a call into the driver or NCCL does not return",
                            limit.as_secs()
                        ),
                    });
                }
            }
        })?;
        Ok(job)
    }

    fn looked(&self) -> MutexGuard<'_, Instant> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `work`, which queues something on the compute stream that depends on other ranks.
    pub(super) fn timed<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.waits().is_none() {
            return work();
        }
        let mut work = Some(work);
        let mut once = || work.take().map(|work| work());
        match Span::around(self.device, &mut once) {
            Ok((Some(result), span)) => {
                if let Some(waits) = &mut *self.waits() {
                    waits.push(span);
                }
                result
            }
            // A driver that refuses has failed, which the work itself says.
            _ => once().expect("the work runs once"),
        }
    }

    /// Starts the count of [`waited`](Self::waited).
    pub(super) fn measure_waits(&self) {
        *self.waits() = Some(Vec::new());
    }

    /// How long the compute stream was held up by what is over since the last call; `None` if nobody measures.
    pub(super) fn waited(&self) -> Option<Duration> {
        let mut waits = self.waits();
        let spans = waits.as_mut()?;
        let mut total = Duration::ZERO;
        spans.retain(|span| match span.elapsed() {
            Ok(None) => true,
            Ok(Some(time)) => {
                total += time;
                false
            }
            // Whatever uses the device next says what is wrong.
            Err(_) => false,
        });
        Some(total)
    }

    fn waits(&self) -> MutexGuard<'_, Option<Vec<Span>>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a finalized communicator, to be freed with the others at the end of the job.
    pub(super) fn part_with(&self, comm: Comm) {
        let mut parting = self.parting.lock().unwrap_or_else(PoisonError::into_inner);
        parting.push(comm);
    }

    /// Frees the communicators, all at once: NCCL waits in each for the other members to free theirs, so that ranks that
    /// went one by one in orders of their own would wait for each other for ever. What is not free after a while is left
    /// to the end of the process.
    fn say_goodbye(&mut self) {
        let comms = std::mem::take(
            self.parting
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let Ok(api) = Api::get() else { return };
        let (done, ended) = std::sync::mpsc::channel();
        for comm in comms {
            let done = done.clone();
            // Without a thread the communicator stays, which the end of the process puts right as well.
            let _ = spawn("nccl goodbye", move || {
                comm.destroy(api);
                // Nobody listens when the time is over.
                let _ = done.send(());
            });
        }
        drop(done);
        let until = Instant::now() + GOODBYE;
        // Ends with an error when the last thread has dropped its sender, or when the time is over.
        while ended
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .is_ok()
        {}
    }

    pub(super) fn watch(&self, channel: &Arc<Channel>) {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.strong_count() > 0);
        channels.push(Arc::downgrade(channel));
    }

    fn live(&self) -> Vec<Arc<Channel>> {
        let channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.iter().filter_map(Weak::upgrade).collect()
    }

    fn look(&self, report: bool, complained: &mut bool) {
        let channels = self.live();
        if report {
            let progress = channels
                .iter()
                .map(|channel| (channel.id, channel.issued()))
                .collect();
            self.link.report_progress(progress);
        }
        for channel in channels {
            if let Some(error) = channel.error() {
                self.link.fail(error);
                return;
            }
            if *complained {
                continue;
            }
            if let Some(late) = channel.late(self.link.options().timeout) {
                *complained = true;
                let call = format!(
                    "{} number {} of group {} {:?}",
                    late.call, late.number, channel.name, channel.ranks
                );
                // The hub compares with the others' progress, so it must know this rank's first.
                self.link
                    .report_progress(vec![(channel.id, channel.issued())]);
                self.link
                    .report_stuck(call, channel.id, late.number, channel.ranks.clone());
            }
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        self.say_goodbye();
    }
}
