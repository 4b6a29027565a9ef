//! Ranks that are processes, connected through rank 0 by TCP.
//!
//! Rank 0 hosts a hub at the rendezvous address. Every rank, rank 0 included, holds one connection to it, over which go
//! small host data, what NCCL needs to start, signs of life, and the news of a failure. [`TcpTransport`] sends tensors
//! that way too: that makes a job of CPU processes which behaves in every respect like one of GPUs. It is meant for tests
//! and small models; the hub is no fast network.
//!
//! A process that dies is noticed by the end of its connection, one that is stopped or cut off by its silence, and one
//! that hangs by the collective that others wait for. In each case every rank learns the same error.

mod auth;
mod group;
mod hub;
mod link;
mod wire;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bridge_ops::Ops;

pub(crate) use self::group::HostGroup;
use self::group::TcpGroup;
pub(crate) use self::hub::spawn;
pub(crate) use self::link::Link;
use super::{Group, Transport};
use crate::error::{Error, Result};

/// How often ranks and hub give a sign of life.
const BEAT: Duration = Duration::from_secs(1);

/// A rank's place in a job of processes.
#[derive(Clone)]
pub struct JobOptions {
    /// This process's rank.
    pub rank: usize,
    /// Number of processes.
    pub world_size: usize,
    /// `HOST:PORT` at which rank 0 listens and which all ranks can reach.
    pub rendezvous: String,
    /// What every rank of the job knows and nobody else. Must not be empty.
    pub secret: Vec<u8>,
    /// How long all ranks together may take to join.
    pub join_timeout: Duration,
    /// How long a rank waits in a collective before the job fails. Must be above the time of the slowest step.
    pub timeout: Duration,
    /// After how long without a sign of life a process counts as lost.
    pub heartbeat_limit: Duration,
}

impl fmt::Debug for JobOptions {
    /// Everything but the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JobOptions")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("rendezvous", &self.rendezvous)
            .field("join_timeout", &self.join_timeout)
            .field("timeout", &self.timeout)
            .field("heartbeat_limit", &self.heartbeat_limit)
            .finish_non_exhaustive()
    }
}

impl JobOptions {
    /// Options with the usual limits: 120 s to join, 600 s in a collective, 20 s of silence.
    pub fn new(
        rank: usize,
        world_size: usize,
        rendezvous: impl Into<String>,
        secret: &[u8],
    ) -> Self {
        Self {
            rank,
            world_size,
            rendezvous: rendezvous.into(),
            secret: secret.to_vec(),
            join_timeout: Duration::from_secs(120),
            timeout: Duration::from_secs(600),
            heartbeat_limit: Duration::from_secs(20),
        }
    }

    fn check(&self) -> Result<()> {
        if self.rank >= self.world_size {
            return Err(Error::Invalid(format!(
                "rank {} of {} processes; ranks count from 0",
                self.rank, self.world_size
            )));
        }
        if self.secret.is_empty() {
            return Err(Error::Invalid(
                "a job of several processes needs a shared secret".into(),
            ));
        }
        Ok(())
    }
}

/// A process's connection to the other processes of its job, for tensors on the CPU.
pub struct TcpTransport<B: Ops> {
    link: Arc<Link>,
    device: B::Device,
}

impl<B: Ops> TcpTransport<B> {
    /// Joins the job, and returns once all ranks have. Tensors received are made on `device`.
    ///
    /// # Errors
    /// If rank 0 cannot be reached or refuses, or not all ranks join in time; the missing ones are named.
    pub fn connect(options: JobOptions, device: B::Device) -> Result<Self> {
        Ok(Self {
            link: Link::connect(options)?,
            device,
        })
    }
}

impl<B: Ops> Transport<B> for TcpTransport<B> {
    fn rank(&self) -> usize {
        self.link.options().rank
    }

    fn world_size(&self) -> usize {
        self.link.options().world_size
    }

    fn group(&self, name: &str, ranks: &[usize]) -> Result<Group<B>> {
        let host = HostGroup::new(Arc::clone(&self.link), name, ranks)?;
        Ok(Arc::new(TcpGroup::new(host, self.device.clone())))
    }

    fn abort(&self, reason: &str) {
        self.link.fail(Error::Aborted {
            rank: self.link.options().rank,
            reason: reason.to_owned(),
        });
    }

    fn health(&self) -> Result<()> {
        self.link.failure().health()
    }
}
