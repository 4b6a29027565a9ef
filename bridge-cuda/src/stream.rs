//! A second stream, for work that runs beside the compute stream: collectives while a layer computes.

use std::ffi::c_void;
use std::time::Duration;

use cudarc::driver::sys;

use crate::device::{CudaDevice, Gpu};
use crate::error::{Result, check};

/// A stream of a device, with what orders it against the compute stream.
///
/// Tensors must outlive the work queued here: the pool hands a freed block out again at once, which is safe only among
/// work on the compute stream. So keep a tensor until [`Self::release`] has been called after its last use.
///
/// ```no_run
/// # use bridge_cuda::{CudaDevice, SideStream};
/// let side = SideStream::new(CudaDevice::default())?;
/// side.acquire()?; // what the compute stream was told before comes first
/// // ... queue work on side.raw() ...
/// side.release()?; // what the compute stream is told from now on comes after
/// # Ok::<(), bridge_cuda::Error>(())
/// ```
#[derive(Debug)]
pub struct SideStream {
    device: CudaDevice,
    stream: sys::CUstream,
    event: sys::CUevent,
}

// SAFETY: streams and events of the driver may be used from any thread.
unsafe impl Send for SideStream {}
// SAFETY: as above; the one event is only ever recorded and waited for, which the driver serialises.
unsafe impl Sync for SideStream {}

impl SideStream {
    /// A new stream of `device`.
    ///
    /// # Errors
    /// The device cannot be opened, or the driver refuses.
    pub fn new(device: CudaDevice) -> Result<Self> {
        Gpu::get(device.ordinal)?.bind()?;
        let (mut stream, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // What runs beside waits for nothing but room: kernels that hold other ranks up go first when both could start.
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: the calls write to locals, in the context that was just made current.
        unsafe {
            check(
                "cuCtxGetStreamPriorityRange",
                sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest),
            )?;
            check(
                "cuStreamCreateWithPriority",
                sys::cuStreamCreateWithPriority(&mut stream, flags, greatest),
            )?;
            check("cuEventCreate", sys::cuEventCreate(&mut event, untimed))?;
        }
        Ok(Self {
            device,
            stream,
            event,
        })
    }

    /// The driver's handle, for libraries that queue work on it. Makes the device the calling thread's current one.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn raw(&self) -> Result<*mut c_void> {
        Gpu::get(self.device.ordinal)?.bind()?;
        Ok(self.stream.cast())
    }

    /// Makes this stream wait for everything queued on the compute stream so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn acquire(&self) -> Result<()> {
        self.order(Gpu::get(self.device.ordinal)?.stream, self.stream)
    }

    /// Makes the compute stream wait for everything queued on this stream so far.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn release(&self) -> Result<()> {
        self.order(self.stream, Gpu::get(self.device.ordinal)?.stream)
    }

    /// Whether everything queued here is done.
    ///
    /// # Errors
    /// What the work left behind.
    pub fn is_idle(&self) -> Result<bool> {
        Gpu::get(self.device.ordinal)?.bind()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuStreamQuery", code).map(|()| true),
        }
    }

    /// Waits on the host until everything queued here is done; `false` if that takes longer than `limit`.
    ///
    /// # Errors
    /// What the work left behind.
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let start = std::time::Instant::now();
        while !self.is_idle()? {
            if start.elapsed() > limit {
                return Ok(false);
            }
            std::thread::yield_now();
        }
        Ok(true)
    }

    fn order(&self, first: sys::CUstream, second: sys::CUstream) -> Result<()> {
        Gpu::get(self.device.ordinal)?.bind()?;
        // SAFETY: both streams and the event are alive; a wait takes the event's state at the time of the call.
        unsafe {
            check("cuEventRecord", sys::cuEventRecord(self.event, first))?;
            check(
                "cuStreamWaitEvent",
                sys::cuStreamWaitEvent(second, self.event, 0),
            )
        }
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: the driver finishes queued work before it frees either. Errors have nobody to go to.
        unsafe {
            sys::cuEventDestroy_v2(self.event);
            sys::cuStreamDestroy_v2(self.stream);
        }
    }
}
