//! Ranks that are processes with a GPU each, their tensors moved by NCCL.
//!
//! Collectives that are waited for at once are queued on the compute stream itself; started ones run on a side stream
//! that events order against it, beside the work queued meanwhile. Tensors sent from one rank to another go over a
//! communicator of their own for each pair and direction, so that no order of sends and receives can block another.
//!
//! Communicators are made when first used. All are non-blocking: a watchdog aborts them when the job fails, so that no
//! kernel and no host thread waits for a rank that is gone.
//!
//! Sums of bf16 and f16 are NCCL's own: each addition in fp32, the partial sum that travels rounded to the dtype.

mod channel;
mod ffi;
mod group;
mod watchdog;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bridge_cuda::{Cuda, CudaDevice};

use self::group::NcclGroup;
use self::watchdog::Job;
use super::tcp::{HostGroup, JobOptions, Link};
use super::{Group, Transport};
use crate::error::{Error, Result};

/// A process's connection to the other processes of its job, for tensors on GPUs.
pub struct NcclTransport {
    job: Arc<Job>,
    /// Groups by ranks: axes with the same members share one, the world apart.
    groups: Mutex<HashMap<(bool, Vec<usize>), Group<Cuda>>>,
}

impl NcclTransport {
    /// Joins the job, and returns once all ranks have. No two processes may use the same GPU.
    ///
    /// # Errors
    /// If NCCL is missing or cannot be loaded, rank 0 cannot be reached or refuses, or not all ranks join in time.
    pub fn connect(options: JobOptions, device: CudaDevice) -> Result<Self> {
        let rank = options.rank;
        // A missing library should be said before the others wait for this rank.
        ffi::Api::get().map_err(|reason| Error::Device {
            rank,
            call: "loading NCCL".into(),
            reason,
        })?;
        let link = Link::connect(options)?;
        Ok(Self {
            job: Job::new(link, device)?,
            groups: Mutex::default(),
        })
    }

    /// The version of the NCCL library, as 23007 for 2.30.7.
    ///
    /// # Errors
    /// If it is missing or cannot be loaded.
    pub fn nccl_version() -> Result<i32> {
        let api = ffi::Api::get();
        api.map(ffi::Api::version).map_err(|reason| Error::Device {
            rank: 0,
            call: "loading NCCL".into(),
            reason,
        })
    }
}

impl Transport<Cuda> for NcclTransport {
    fn rank(&self) -> usize {
        self.job.link.options().rank
    }

    fn world_size(&self) -> usize {
        self.job.link.options().world_size
    }

    fn group(&self, name: &str, ranks: &[usize]) -> Result<Group<Cuda>> {
        let key = (name == "world", ranks.to_vec());
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(group) = groups.get(&key) {
            return Ok(Arc::clone(group));
        }
        let host = HostGroup::new(Arc::clone(&self.job.link), name, ranks)?;
        let group: Group<Cuda> = Arc::new(NcclGroup::new(Arc::clone(&self.job), host));
        groups.insert(key, Arc::clone(&group));
        Ok(group)
    }

    fn abort(&self, reason: &str) {
        self.job.link.fail(Error::Aborted {
            rank: self.rank(),
            reason: reason.to_owned(),
        });
    }

    fn health(&self) -> Result<()> {
        self.job.link.failure().health()
    }

    fn measure_waits(&self) {
        self.job.measure_waits();
    }

    fn waited(&self) -> Option<Duration> {
        self.job.waited()
    }
}
