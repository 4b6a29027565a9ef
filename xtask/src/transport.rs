//! How the processes of a job reach each other, by backend.

use std::sync::Arc;

use bridge_cuda::{Cuda, CudaDevice};
use bridge_ops::Ops;
use bridge_parallel::{NcclTransport, TcpTransport, Transport};
use burn_flex::{Flex, FlexDevice};

use crate::failure::{Failure, Result};
use crate::job::Job;

/// A backend whose ranks may be processes.
pub(crate) trait ProcessBackend: Ops {
    /// The device of this process.
    fn device(job: &Job) -> Result<Self::Device>;

    /// Joins `job`, and returns once every rank has.
    fn connect(job: &Job, device: &Self::Device) -> Result<Arc<dyn Transport<Self>>>;
}

impl ProcessBackend for Flex {
    fn device(_: &Job) -> Result<FlexDevice> {
        Ok(FlexDevice)
    }

    fn connect(job: &Job, device: &FlexDevice) -> Result<Arc<dyn Transport<Self>>> {
        Ok(Arc::new(TcpTransport::<Flex>::connect(
            job.options.clone(),
            *device,
        )?))
    }
}

impl ProcessBackend for Cuda {
    /// The GPU of the local rank. A launcher may show each process its own GPU alone, which then is the first.
    fn device(job: &Job) -> Result<CudaDevice> {
        let count = CudaDevice::count().max(1);
        if count > 1 && job.local_rank >= count {
            return Err(Failure::input(format!(
                "local rank {} has no GPU of its own: this machine shows {count}; start at most as many processes",
                job.local_rank
            )));
        }
        CudaDevice::open(job.local_rank % count).map_err(Failure::input)
    }

    fn connect(job: &Job, device: &CudaDevice) -> Result<Arc<dyn Transport<Self>>> {
        Ok(Arc::new(NcclTransport::connect(
            job.options.clone(),
            *device,
        )?))
    }
}
