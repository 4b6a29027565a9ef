//! The one place that turns `--backend` into a type, and that knows what each backend's machine tells of itself.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use bridge_cuda::{Cuda, CudaDevice};
use bridge_train::config::Platform;
use burn_flex::{Flex, FlexDevice};

use crate::bench::memory;
use crate::failure::{Failure, Result};
use crate::flags::{BackendFlags, BackendName};
use crate::job;
use crate::transport::ProcessBackend;

/// What a backend tells of itself beside its operations.
pub(crate) trait Machine: ProcessBackend {
    /// What it can train.
    fn platform() -> Platform;

    /// The name of the GPU, where it is one.
    fn gpu_name(device: &Self::Device) -> Option<String>;

    /// Most memory in use since the last [`Self::reset_peak_memory`], in bytes: the GPU's, or on the CPU the process's.
    fn peak_memory(device: &Self::Device) -> Option<u64>;

    /// Starts the count of [`Self::peak_memory`] anew.
    fn reset_peak_memory(device: &Self::Device);
}

impl Machine for Flex {
    fn platform() -> Platform {
        Platform::cpu()
    }

    fn gpu_name(_: &FlexDevice) -> Option<String> {
        None
    }

    fn peak_memory(_: &FlexDevice) -> Option<u64> {
        memory::peak()
    }

    fn reset_peak_memory(_: &FlexDevice) {
        memory::reset_peak();
    }
}

impl Machine for Cuda {
    fn platform() -> Platform {
        Platform {
            backend: BackendName::Cuda.as_str(),
            bf16: true,
            ..Platform::cpu()
        }
    }

    fn gpu_name(device: &CudaDevice) -> Option<String> {
        device.name().ok()
    }

    fn peak_memory(device: &CudaDevice) -> Option<u64> {
        Some(device.memory().ok()?.peak)
    }

    fn reset_peak_memory(device: &CudaDevice) {
        // An error here is one of opening the device, which whatever runs next reports.
        let _ = device.reset_peak_memory();
    }
}

/// Work that is written once for every backend.
pub(crate) trait OnBackend {
    /// What comes out.
    type Output;

    /// Does the work on `device`.
    fn run<B: Machine>(self, device: B::Device) -> Result<Self::Output>;
}

/// Does `work` on the backend that `flags` name.
pub(crate) fn dispatch<W: OnBackend>(flags: BackendFlags, work: W) -> Result<W::Output> {
    match (flags.backend, flags.device) {
        (BackendName::Cpu, 0) => work.run::<Flex>(FlexDevice),
        (BackendName::Cpu, n) => Err(Failure::input(format!(
            "--device {n}: the cpu backend has only device 0"
        ))),
        (BackendName::Cuda, ordinal) => {
            // A rank of a job opens no other GPU than its own: a context alone takes hundreds of MB.
            let ordinal = match job::from_environment()? {
                Some(job) => job.local_rank % CudaDevice::count().max(1),
                None => ordinal,
            };
            let device = CudaDevice::open(ordinal).map_err(|error| {
                Failure::input(format!(
                    "--backend cuda: {error}; `cargo xtask doctor` lists what this machine has"
                ))
            })?;
            catching_panics(|| work.run::<Cuda>(device))
        }
        (BackendName::BurnCuda, _) => Err(Failure::input(
            "this build has no burn-cuda backend; use --backend cuda, or leave the flag out to compute on the CPU",
        )),
    }
}

/// Runs `work`, and turns a panic into an error with its text. Burn's operations return no `Result`, so a GPU that runs
/// out of memory or fails in the middle of one can only panic.
fn catching_panics<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let told = Arc::new(Mutex::new(None));
    let before = std::panic::take_hook();
    let hook = Arc::clone(&told);
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload_as_str().unwrap_or("a panic without a text");
        let place = info
            .location()
            .map_or_else(String::new, |place| format!(" (at {place})"));
        if let Ok(mut told) = hook.lock() {
            // The first one is the cause.
            told.get_or_insert_with(|| format!("{text}{place}"));
        }
    }));
    let outcome = catch_unwind(AssertUnwindSafe(work));
    std::panic::set_hook(before);
    outcome.unwrap_or_else(|_| {
        let told = told.lock().ok().and_then(|mut told| told.take());
        Err(Failure::running(
            told.unwrap_or_else(|| "the GPU's work stopped".to_owned()),
        ))
    })
}
