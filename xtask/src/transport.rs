//! How the processes of a job reach each other, by backend.

use std::sync::Arc;

use bridge_ops::Ops;
use bridge_parallel::{TcpTransport, Transport};
use burn_flex::Flex;

use crate::failure::Result;
use crate::job::Job;

/// A backend whose ranks may be processes.
pub(crate) trait ProcessBackend: Ops {
    /// Joins `job`, and returns once every rank has.
    fn connect(job: &Job, device: &Self::Device) -> Result<Arc<dyn Transport<Self>>>;
}

impl ProcessBackend for Flex {
    fn connect(job: &Job, device: &Self::Device) -> Result<Arc<dyn Transport<Self>>> {
        Ok(Arc::new(TcpTransport::<Flex>::connect(
            job.options.clone(),
            *device,
        )?))
    }
}
