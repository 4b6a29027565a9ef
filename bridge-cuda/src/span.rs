//! How long the compute stream takes from one point to another.

use std::time::Duration;

use cudarc::driver::sys;

use crate::device::{CudaDevice, Gpu};
use crate::error::{Result, check};

/// A stretch of the work queued on the compute stream of a device, timed by the device. Waits for other streams that lie
/// in it count.
#[derive(Debug)]
pub struct Span {
    device: CudaDevice,
    start: sys::CUevent,
    end: sys::CUevent,
}

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for Span {}
// SAFETY: as above; each event is recorded once, before the span is handed out.
unsafe impl Sync for Span {}

impl Span {
    /// From what is queued so far to behind what `work` queues; and what `work` gives.
    ///
    /// # Errors
    /// The driver refuses; `work` has not run then, or its result is lost.
    pub fn around<T>(device: CudaDevice, work: impl FnOnce() -> T) -> Result<(T, Self)> {
        let stream = Gpu::get(device.ordinal)?.stream;
        let event = || -> Result<sys::CUevent> {
            Gpu::get(device.ordinal)?.bind()?;
            let mut event = std::ptr::null_mut();
            // SAFETY: the call writes to a local, in the context that was just made current.
            unsafe { check("cuEventCreate", sys::cuEventCreate(&mut event, 0))? };
            Ok(event)
        };
        let mut span = Self {
            device,
            start: event()?,
            end: std::ptr::null_mut(),
        };
        span.end = event()?;
        // SAFETY: stream and event are alive.
        unsafe { check("cuEventRecord", sys::cuEventRecord(span.start, stream))? };
        let result = work();
        Gpu::get(device.ordinal)?.bind()?;
        // SAFETY: as above.
        unsafe { check("cuEventRecord", sys::cuEventRecord(span.end, stream))? };
        Ok((result, span))
    }

    /// How long it took; `None` while the device has not come to its end.
    ///
    /// # Errors
    /// What the work before it left behind.
    pub fn elapsed(&self) -> Result<Option<Duration>> {
        Gpu::get(self.device.ordinal)?.bind()?;
        let mut ms = 0.0;
        // SAFETY: both events are alive; the call writes to a local.
        match unsafe { sys::cuEventElapsedTime_v2(&mut ms, self.start, self.end) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(None),
            code => {
                check("cuEventElapsedTime", code)?;
                Ok(Some(Duration::from_secs_f64(f64::from(ms) / 1e3)))
            }
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        for event in [self.start, self.end] {
            if !event.is_null() {
                // SAFETY: the driver keeps the event until recorded work is done. An error has nobody to go to.
                unsafe { sys::cuEventDestroy_v2(event) };
            }
        }
    }
}
