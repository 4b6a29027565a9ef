//! Points in a stream's work.

use std::ffi::c_void;

use cudarc::driver::sys;

use crate::device::{CudaDevice, Gpu};
use crate::error::{Result, check};

/// A point in the work queued on a stream: what was queued before it is done once the mark is.
#[derive(Debug)]
pub struct Mark {
    device: CudaDevice,
    event: sys::CUevent,
}

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for Mark {}
// SAFETY: as above; the event is recorded once, when the mark is made.
unsafe impl Sync for Mark {}

impl Mark {
    /// Behind everything queued so far on the compute stream of `device`.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn of_compute(device: CudaDevice) -> Result<Self> {
        // SAFETY: the compute stream lives as long as the program.
        unsafe { Self::of_stream(device, Gpu::get(device.ordinal)?.stream.cast()) }
    }

    /// Behind everything queued so far on a stream of `device`.
    ///
    /// # Errors
    /// The driver refuses.
    ///
    /// # Safety
    /// `stream` must be a stream of that device, such as [`SideStream::raw`](crate::SideStream::raw) gives, and alive.
    pub unsafe fn of_stream(device: CudaDevice, stream: *mut c_void) -> Result<Self> {
        Gpu::get(device.ordinal)?.bind()?;
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut event = std::ptr::null_mut();
        // SAFETY: the call writes to a local, in the context that was just made current.
        unsafe { check("cuEventCreate", sys::cuEventCreate(&mut event, untimed))? };
        let mark = Self { device, event };
        // SAFETY: the event was just made, the stream is alive as the caller promises.
        unsafe {
            check(
                "cuEventRecord",
                sys::cuEventRecord(mark.event, stream.cast()),
            )?
        };
        Ok(mark)
    }

    /// Makes the compute stream wait for the mark.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn release(&self) -> Result<()> {
        let gpu = Gpu::get(self.device.ordinal)?;
        gpu.bind()?;
        // SAFETY: stream and event are alive.
        let code = unsafe { sys::cuStreamWaitEvent(gpu.stream, self.event, 0) };
        check("cuStreamWaitEvent", code)
    }

    /// Whether the device has come past the mark.
    ///
    /// # Errors
    /// What the work before it left behind.
    pub fn is_done(&self) -> Result<bool> {
        Gpu::get(self.device.ordinal)?.bind()?;
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.event) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuEventQuery", code).map(|()| true),
        }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: the driver keeps the event until recorded work is done. An error has nobody to go to.
        unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}
