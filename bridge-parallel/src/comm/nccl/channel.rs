//! One NCCL communicator with a side stream, and a record of what is under way on it.

use std::collections::VecDeque;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bridge_cuda::{CudaDevice, CudaTensor, Mark, SideStream};

use super::ffi::{Api, CommPtr, Config, IN_PROGRESS, SUCCESS, Status, Stream, UniqueId};
use super::watchdog::Job;
use crate::comm::tcp::HostGroup;
use crate::error::{Error, Result};

/// How long a communicator may take to end in good order.
pub(super) const GOODBYE: Duration = Duration::from_secs(5);

/// On which stream a call is queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum On {
    /// The compute stream: the call comes after what was queued before it, and before what is queued after.
    Compute,
    /// The channel's own stream: it comes after what the compute stream was told before, and runs beside the rest.
    Side,
}

/// A communicator of some ranks.
pub(super) struct Channel {
    job: Arc<Job>,
    api: &'static Api,
    /// Null once aborted. NCCL allows one call at a time.
    comm: Mutex<Comm>,
    side: SideStream,
    /// What the hub calls this channel, and the members' global ranks.
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) ranks: Vec<usize>,
    issued: AtomicU64,
    under_way: Mutex<VecDeque<UnderWay>>,
}

pub(super) struct Comm(CommPtr);

// SAFETY: a communicator may be used from any thread, one at a time, which the lock sees to.
unsafe impl Send for Comm {}

impl Comm {
    /// Frees the communicator, which has been finalized and is not used any more. Returns once the other members have
    /// done so as well.
    pub(super) fn destroy(self, api: &Api) {
        // SAFETY: this was the only handle.
        unsafe { (api.destroy)(self.0) };
    }
}

struct UnderWay {
    number: u64,
    call: &'static str,
    since: Instant,
    mark: Arc<Mark>,
    /// What must live until the call is done, where nobody else keeps it.
    _kept: Option<CudaTensor>,
}

/// A call that has been under way for too long.
pub(super) struct Late {
    pub(super) number: u64,
    pub(super) call: &'static str,
}

impl Channel {
    /// Makes the communicator of a group, together with its other members.
    pub(super) fn new(job: Arc<Job>, group: &HostGroup) -> Result<Arc<Self>> {
        let rank = group.global_rank();
        let failed = |call: &str, reason: String| Error::Device {
            rank,
            call: call.to_owned(),
            reason,
        };
        let api = Api::get().map_err(|reason| failed("loading NCCL", reason))?;
        let mut id = UniqueId([0; 128]);
        if group.rank == 0 {
            // SAFETY: writes to a local.
            let status = unsafe { (api.get_unique_id)(&mut id) };
            if status != SUCCESS {
                return Err(failed("ncclGetUniqueId", api.explain(status)));
            }
        }
        let ids = group.all_gather_bytes(if group.rank == 0 { &id.0 } else { &[] })?;
        id.0 = ids[0].as_slice().try_into().map_err(|_| {
            Error::Rendezvous(format!(
                "rank {} sent an NCCL id of {} bytes, expected 128",
                group.ranks[0],
                ids[0].len()
            ))
        })?;
        let device = job.device;
        let gpu = |error: bridge_cuda::Error| failed("making a stream", error.to_string());
        let side = SideStream::new(device).map_err(gpu)?;
        side.raw().map_err(gpu)?; // makes the device current for NCCL
        let mut comm: CommPtr = std::ptr::null_mut();
        let mut config = Config::non_blocking();
        // SAFETY: the pointers are to locals; the device is current.
        let status = unsafe {
            (api.init_rank)(
                &mut comm,
                group.ranks.len() as c_int,
                id,
                group.rank as c_int,
                &mut config,
            )
        };
        let channel = Arc::new(Self {
            api,
            comm: Mutex::new(Comm(comm)),
            side,
            id: group.id,
            name: group.name.clone(),
            ranks: group.ranks.clone(),
            issued: AtomicU64::new(0),
            under_way: Mutex::default(),
            job: Arc::clone(&job),
        });
        job.watch(&channel);
        let limit = job.link.options().join_timeout;
        channel.settle(status, "ncclCommInitRankConfig", limit)?;
        Ok(channel)
    }

    fn device(&self) -> CudaDevice {
        self.job.device
    }

    /// Queues a call. `queue` gets the communicator and the stream. Returns a mark behind it, or `None` when the job has
    /// failed. `kept` lives until the call is done.
    pub(super) fn run(
        &self,
        call: &'static str,
        on: On,
        kept: Option<CudaTensor>,
        queue: impl FnOnce(&Api, CommPtr, Stream) -> Status,
    ) -> Option<Arc<Mark>> {
        if self.job.link.failure().get().is_some() {
            return None;
        }
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let queued = self.queue(call, on, queue);
        match queued {
            Ok(mark) => {
                let mark = Arc::new(mark);
                let mut under_way = lock(&self.under_way);
                let done = |entry: &UnderWay| entry.mark.is_done().unwrap_or(false);
                while under_way.front().is_some_and(done) {
                    under_way.pop_front();
                }
                under_way.push_back(UnderWay {
                    number,
                    call,
                    since: Instant::now(),
                    mark: Arc::clone(&mark),
                    _kept: kept,
                });
                Some(mark)
            }
            Err(error) => {
                self.job.link.fail(error);
                None
            }
        }
    }

    fn queue(
        &self,
        call: &'static str,
        on: On,
        queue: impl FnOnce(&Api, CommPtr, Stream) -> Status,
    ) -> Result<Mark> {
        let gpu = |error: bridge_cuda::Error| self.failed(call, error.to_string());
        let stream = match on {
            On::Compute => self.device().stream().map_err(gpu)?,
            On::Side => {
                self.side.acquire().map_err(gpu)?;
                self.side.raw().map_err(gpu)?
            }
        };
        let status = {
            let comm = lock(&self.comm);
            if comm.0.is_null() {
                return Err(self.failed(call, "the communicator was aborted".into()));
            }
            queue(self.api, comm.0, stream)
        };
        self.settle(status, call, self.job.link.options().timeout)?;
        match on {
            On::Compute => Mark::of_compute(self.device()).map_err(gpu),
            // SAFETY: the side stream lives as long as this channel.
            On::Side => unsafe { Mark::of_stream(self.device(), stream) }.map_err(gpu),
        }
    }

    /// Waits until NCCL has taken a call in, which may take connections to be made.
    fn settle(&self, mut status: Status, call: &str, limit: Duration) -> Result<()> {
        let start = Instant::now();
        while status == IN_PROGRESS {
            // Most calls are taken in within microseconds, which is no time to sleep: a step makes hundreds of them.
            if start.elapsed() > Duration::from_millis(2) {
                std::thread::sleep(Duration::from_micros(50));
            } else {
                std::thread::yield_now();
            }
            self.job.link.failure().health()?;
            if start.elapsed() > limit {
                return Err(self.failed(
                    call,
                    format!("it did not come about within {} s", limit.as_secs()),
                ));
            }
            status = self.status();
        }
        if status == SUCCESS {
            return Ok(());
        }
        Err(self.failed(call, self.api.explain(status)))
    }

    fn status(&self) -> Status {
        let comm = lock(&self.comm);
        if comm.0.is_null() {
            return IN_PROGRESS; // the job's failure says why
        }
        let mut status = SUCCESS;
        // SAFETY: the communicator is alive; writes to a local.
        let asked = unsafe { (self.api.async_error)(comm.0, &mut status) };
        if asked == SUCCESS { status } else { asked }
    }

    /// An error that NCCL found by itself.
    pub(super) fn error(&self) -> Option<Error> {
        match self.status() {
            SUCCESS | IN_PROGRESS => None,
            status => Some(self.failed("NCCL", self.api.explain(status))),
        }
    }

    /// How many calls this rank has made here.
    pub(super) fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }

    /// The first call that has been under way for longer than `limit`.
    pub(super) fn late(&self, limit: Duration) -> Option<Late> {
        let mut under_way = lock(&self.under_way);
        while let Some(first) = under_way.front() {
            if first.mark.is_done().unwrap_or(false) {
                under_way.pop_front();
                continue;
            }
            let Late { number, call } = Late {
                number: first.number,
                call: first.call,
            };
            return (first.since.elapsed() > limit).then_some(Late { number, call });
        }
        None
    }

    /// Ends the communicator at once; kernels that wait for other ranks stop.
    pub(super) fn abort(&self) {
        let comm = std::mem::replace(&mut lock(&self.comm).0, std::ptr::null_mut());
        if !comm.is_null() {
            // SAFETY: alive until now, and not used after.
            unsafe { (self.api.abort)(comm) };
        }
    }

    fn failed(&self, call: &str, reason: String) -> Error {
        Error::Device {
            rank: self.job.link.options().rank,
            call: format!("{call} of group {} {:?}", self.name, self.ranks),
            reason,
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let comm = lock(&self.comm).0;
        if comm.is_null() {
            return;
        }
        let well = self.job.link.failure().get().is_none();
        if well && self.side.wait(GOODBYE).unwrap_or(false) {
            // SAFETY: alive, and nobody else has this channel any more.
            let status = unsafe { (self.api.finalize)(comm) };
            if self.settle(status, "ncclCommFinalize", GOODBYE).is_ok() {
                self.job.part_with(Comm(comm));
                return;
            }
        }
        self.abort();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
