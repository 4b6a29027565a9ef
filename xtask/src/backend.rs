//! The one place that turns `--backend` into a type.

use burn_flex::{Flex, FlexDevice};

use crate::failure::{Failure, Result};
use crate::flags::{BackendFlags, BackendName};
use crate::transport::ProcessBackend;

/// Work that is written once for every backend.
pub(crate) trait OnBackend {
    /// What comes out.
    type Output;

    /// Does the work on `device`.
    fn run<B: ProcessBackend>(self, device: B::Device) -> Result<Self::Output>;
}

/// Does `work` on the backend that `flags` name.
pub(crate) fn dispatch<W: OnBackend>(flags: BackendFlags, work: W) -> Result<W::Output> {
    match (flags.backend, flags.device) {
        (BackendName::Cpu, 0) => work.run::<Flex>(FlexDevice),
        (BackendName::Cpu, n) => Err(Failure::input(format!(
            "--device {n}: the cpu backend has only device 0"
        ))),
        (other, _) => Err(Failure::input(format!(
            "this build has no {} backend; leave out --backend to compute on the CPU",
            other.as_str()
        ))),
    }
}
