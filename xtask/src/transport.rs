//! How the processes of a job reach each other, by backend.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use bridge_core::LayoutSpec;
use bridge_cuda::{Cuda, CudaDevice};
use bridge_ops::Ops;
use bridge_parallel::{NcclTransport, ParallelContext, TcpTransport, Transport};
use burn_flex::{Flex, FlexDevice};

use crate::failure::{Cause, Failure, Result};
use crate::job::Job;

/// A backend whose ranks may be processes.
pub(crate) trait ProcessBackend: Ops {
    /// The device of this process.
    fn device(job: &Job) -> Result<Self::Device>;

    /// Joins `job`, and returns once every rank has.
    fn connect(job: &Job, device: &Self::Device) -> Result<Arc<dyn Transport<Self>>>;
}

/// Does `work` as this process's rank of `job` at `layout`. The other ranks learn of an error.
pub(crate) fn as_rank<B: ProcessBackend, T, E: Into<Failure>>(
    job: &Job,
    layout: LayoutSpec,
    work: impl FnOnce(&Arc<ParallelContext<B>>) -> Result<T, E>,
) -> Result<T> {
    let (ranks, processes) = (layout.world_size(), job.options.world_size);
    if ranks != processes {
        // Before the ranks meet, so that a mistake that all of them make is not a wait for each other.
        return Err(Failure::input(format!(
            "layout {layout} has {ranks} ranks, the job has {processes} processes; change the layout (its tensor, pipeline, \
             context and data parallel sizes multiplied are its ranks) or start another number of processes"
        )));
    }
    let device = B::device(job)?;
    let transport = B::connect(job, &device)?;
    let parallel = Arc::new(ParallelContext::new(layout, device, transport)?);
    let (working, worked) = channel();
    let watch = {
        let parallel = Arc::clone(&parallel);
        std::thread::spawn(move || end_with_the_job(&parallel, &worked))
    };
    let result = work(&parallel);
    drop(working);
    // It lets go of the job before this returns, so that the rank takes leave of the others in good order.
    let _ = watch.join();
    result.map_err(|error| {
        let failure = error.into();
        // They learn why, where this rank is the cause.
        parallel.abort(&failure.text());
        failure
    })
}

/// How long a rank has to end by itself once the job has failed.
const LAST_CALL: Duration = Duration::from_secs(15);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Ends this process some time after its job has failed, unless its work is over by then: who waits for a GPU whose work
/// never ends does not hear of the failure.
fn end_with_the_job<B: ProcessBackend>(parallel: &ParallelContext<B>, worked: &Receiver<()>) {
    let mut failed: Option<Instant> = None;
    while worked.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
        let Err(error) = parallel.health() else {
            continue;
        };
        if failed.get_or_insert_with(Instant::now).elapsed() > LAST_CALL {
            eprintln!("error: {error}; this rank did not end by itself and is stopped");
            std::process::exit(i32::from(Cause::Running.code()));
        }
    }
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
