//! A GPU: its context, its one compute stream, memory, and the kernels and libraries loaded on it.

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, OnceLock};

use burn_backend::{Device, DeviceId, DeviceOps};
use cudarc::driver::sys;

use crate::cublaslt::Blas;
use crate::error::{Error, Result, check};
use crate::library::Library;
use crate::nvrtc::{Define, Kernel, Kernels};
use crate::pool::{MemoryStats, Pool};
use crate::staging::Staging;

/// Oldest compute capability the kernels are written for: bf16 matrix instructions and `cp.async`.
pub(crate) const OLDEST: (i32, i32) = (8, 0);

/// A CUDA device, by the driver's ordinal. The default is device 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct CudaDevice {
    /// Position among the visible devices.
    pub ordinal: usize,
}

impl CudaDevice {
    /// The device at `ordinal`, started: driver loaded, context and stream made.
    ///
    /// # Errors
    /// No driver, no such device, or a chip that is too old.
    pub fn open(ordinal: usize) -> Result<Self> {
        Gpu::get(ordinal)?;
        Ok(Self { ordinal })
    }

    /// Number of devices the driver sees, 0 if there is no driver.
    pub fn count() -> usize {
        device_count().unwrap_or(0)
    }

    /// The GPU's marketing name.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn name(self) -> Result<String> {
        Ok(Gpu::get(self.ordinal)?.name.clone())
    }

    /// State of the memory pool.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn memory(self) -> Result<MemoryStats> {
        Ok(Gpu::get(self.ordinal)?.pool().stats())
    }

    /// Makes the current use the new peak.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reset_peak_memory(self) -> Result<()> {
        Gpu::get(self.ordinal)?.pool().reset_peak();
        Ok(())
    }

    /// Waits until all queued work is done.
    ///
    /// # Errors
    /// As [`Self::open`], and whatever error a kernel left behind.
    pub fn synchronize(self) -> Result<()> {
        Gpu::get(self.ordinal)?.synchronize()
    }

    /// The driver's handle of the compute stream, for libraries that queue work of their own, such as NCCL.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn stream(self) -> Result<*mut c_void> {
        let gpu = Gpu::get(self.ordinal)?;
        gpu.bind()?;
        Ok(gpu.stream.cast())
    }

    /// Runs `work` between two events and returns the milliseconds that passed on the device.
    ///
    /// # Errors
    /// As [`Self::open`], and whatever error a kernel left behind.
    pub fn time(self, work: impl FnOnce()) -> Result<f32> {
        let gpu = Gpu::get(self.ordinal)?;
        gpu.bind()?;
        let mut milliseconds = 0.0;
        // SAFETY: events are made, used and destroyed here, on this device's context and stream.
        unsafe {
            let (mut start, mut end) = (std::ptr::null_mut(), std::ptr::null_mut());
            check("cuEventCreate", sys::cuEventCreate(&mut start, 0))?;
            check("cuEventCreate", sys::cuEventCreate(&mut end, 0))?;
            check("cuEventRecord", sys::cuEventRecord(start, gpu.stream))?;
            work();
            check("cuEventRecord", sys::cuEventRecord(end, gpu.stream))?;
            check("cuEventSynchronize", sys::cuEventSynchronize(end))?;
            check(
                "cuEventElapsedTime",
                sys::cuEventElapsedTime_v2(&mut milliseconds, start, end),
            )?;
            sys::cuEventDestroy_v2(start);
            sys::cuEventDestroy_v2(end);
        }
        Ok(milliseconds)
    }
}

impl Device for CudaDevice {
    fn from_id(id: DeviceId) -> Self {
        Self {
            ordinal: usize::from(id.index_id),
        }
    }

    fn to_id(&self) -> DeviceId {
        DeviceId::new(
            0,
            u16::try_from(self.ordinal).expect("fewer than 65536 devices"),
        )
    }
}

impl DeviceOps for CudaDevice {}

/// Everything kept for one device, for the life of the program.
pub(crate) struct Gpu {
    pub(crate) ordinal: usize,
    pub(crate) name: String,
    pub(crate) multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub(crate) shared_per_block: usize,
    /// Compute capability, (major, minor).
    pub(crate) capability: (i32, i32),
    pub(crate) stream: sys::CUstream,
    /// Seed, and how many Philox blocks have been used.
    pub(crate) random: Mutex<(u64, u64)>,
    context: sys::CUcontext,
    pool: Mutex<Pool>,
    staging: Mutex<Staging>,
    kernels: Kernels,
    blas: OnceLock<Result<Blas>>,
}

// SAFETY: contexts and streams of the driver may be used from any thread.
unsafe impl Send for Gpu {}
// SAFETY: as above; everything else that changes is behind a lock.
unsafe impl Sync for Gpu {}

/// Loads the driver, once, and counts the devices.
pub(crate) fn device_count() -> Result<usize> {
    static COUNT: OnceLock<Result<usize>> = OnceLock::new();
    COUNT
        .get_or_init(|| {
            Library::Driver.load()?;
            let mut count = 0;
            // SAFETY: the library is open; the call writes to a local.
            unsafe {
                match sys::cuInit(0) {
                    sys::CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
                    code => check("cuInit", code)?,
                }
                check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            }
            Ok(usize::try_from(count).unwrap_or(0))
        })
        .clone()
}

/// Name, compute capability and memory in bytes of a device.
pub(crate) fn describe(ordinal: usize) -> Result<(sys::CUdevice, String, (i32, i32), u64)> {
    let found = device_count()?;
    if ordinal >= found {
        return Err(Error::NoDevice { ordinal, found });
    }
    let mut device = 0;
    let mut name = [0u8; 256];
    let mut bytes = 0;
    // SAFETY: the calls write to locals of the sizes given.
    unsafe {
        check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as i32))?;
        check(
            "cuDeviceGetName",
            sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device),
        )?;
        check(
            "cuDeviceTotalMem",
            sys::cuDeviceTotalMem_v2(&mut bytes, device),
        )?;
    }
    let length = name
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(name.len());
    let name = String::from_utf8_lossy(&name[..length]).into_owned();
    use sys::CUdevice_attribute as Attribute;
    let major = attribute(
        device,
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    )?;
    let minor = attribute(
        device,
        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )?;
    Ok((device, name, (major, minor), bytes as u64))
}

fn attribute(device: sys::CUdevice, attribute: sys::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: writes to a local.
    unsafe {
        check(
            "cuDeviceGetAttribute",
            sys::cuDeviceGetAttribute(&mut value, attribute, device),
        )?
    };
    Ok(value)
}

impl Gpu {
    /// The device at `ordinal`, started on first use and kept.
    pub(crate) fn get(ordinal: usize) -> Result<&'static Gpu> {
        static DEVICES: Mutex<Vec<Option<&'static Gpu>>> = Mutex::new(Vec::new());
        let mut devices = DEVICES
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(Some(gpu)) = devices.get(ordinal) {
            return Ok(gpu);
        }
        let gpu = Box::leak(Box::new(Self::start(ordinal)?));
        if devices.len() <= ordinal {
            devices.resize(ordinal + 1, None);
        }
        devices[ordinal] = Some(gpu);
        Ok(gpu)
    }

    fn start(ordinal: usize) -> Result<Self> {
        let (device, name, capability, _) = describe(ordinal)?;
        if capability < OLDEST {
            return Err(Error::Unsupported {
                ordinal,
                name,
                major: capability.0,
                minor: capability.1,
            });
        }
        let count = attribute(
            device,
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )?;
        let shared = attribute(
            device,
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
        )?;
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the calls write to locals; the primary context is shared with cuBLASLt, cuDNN and NCCL.
        unsafe {
            check(
                "cuDevicePrimaryCtxRetain",
                sys::cuDevicePrimaryCtxRetain(&mut context, device),
            )?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, flags))?;
        }
        Ok(Self {
            ordinal,
            name,
            multiprocessors: usize::try_from(count).unwrap_or(1),
            shared_per_block: usize::try_from(shared).unwrap_or(0),
            capability,
            stream,
            random: Mutex::new((0x5eed, 0)),
            context,
            pool: Mutex::new(Pool::new(ordinal, device)?),
            staging: Mutex::default(),
            kernels: Kernels::new(capability),
            blas: OnceLock::new(),
        })
    }

    /// Makes this device the calling thread's current one. Cheap, so that every entry does it.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: the context lives as long as the program.
        unsafe { check("cuCtxSetCurrent", sys::cuCtxSetCurrent(self.context)) }
    }

    pub(crate) fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A block of device memory: (address, size). The content is whatever was there.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<(u64, u64)> {
        self.bind()?;
        self.pool().allocate(bytes as u64)
    }

    /// Waits for the stream.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream lives as long as the program.
        unsafe { check("cuStreamSynchronize", sys::cuStreamSynchronize(self.stream)) }
    }

    /// Gives cached memory back to the GPU.
    pub(crate) fn trim(&self) -> Result<()> {
        self.synchronize()?;
        self.pool().trim()
    }

    /// Copies host bytes to device memory, through pinned memory. Returns once the bytes are staged.
    ///
    /// # Safety
    /// `[address, address + bytes.len())` must be device memory of this GPU.
    pub(crate) unsafe fn upload(&self, bytes: &[u8], address: u64) -> Result<()> {
        self.bind()?;
        let mut staging = self
            .staging
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: as the caller promises.
        unsafe { staging.upload(self.stream, bytes, address) }
    }

    /// Copies device memory to the host and waits for it.
    ///
    /// # Safety
    /// `[address, address + bytes.len())` must be device memory of this GPU.
    pub(crate) unsafe fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.bind()?;
        let mut staging = self
            .staging
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        // SAFETY: as the caller promises.
        unsafe { staging.download(self.stream, address, bytes) }
    }

    /// Queues a fill with zero bytes.
    ///
    /// # Safety
    /// The range must be device memory of this GPU.
    pub(crate) unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: as the caller promises.
        unsafe {
            check(
                "cuMemsetD8Async",
                sys::cuMemsetD8Async(address, 0, bytes, self.stream),
            )
        }
    }

    /// Queues a copy between two ranges of this GPU.
    ///
    /// # Safety
    /// Both ranges must be device memory of this GPU and must not overlap.
    pub(crate) unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: as the caller promises.
        unsafe {
            check(
                "cuMemcpyDtoDAsync",
                sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream),
            )
        }
    }

    /// The kernel `entry` of `kernels/<file>.cu`, compiled with the given definitions on first use.
    pub(crate) fn kernel(
        &self,
        file: &'static str,
        defines: &[Define],
        entry: &'static str,
    ) -> Result<Kernel> {
        self.bind()?;
        self.kernels.get(file, defines, entry)
    }

    /// Queues a kernel. `arguments` point at the values, in the kernel's order.
    ///
    /// # Safety
    /// The arguments must match the kernel's parameters in number, order and size, and the addresses among them must be
    /// valid for what the kernel does at this launch shape.
    pub(crate) unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Launch,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let [gx, gy, gz] = shape.grid;
        let [bx, by, bz] = shape.block;
        // SAFETY: as the caller promises.
        let code = unsafe {
            // Above 48 KiB in all, static shared memory included, a kernel has to ask.
            if shape.shared > 32 << 10 {
                let attribute =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                check(
                    "cuFuncSetAttribute",
                    sys::cuFuncSetAttribute(kernel.0, attribute, shape.shared as i32),
                )?;
            }
            sys::cuLaunchKernel(
                kernel.0,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                shape.shared,
                self.stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", code)
    }

    /// The matrix-product library, started on first use.
    pub(crate) fn blas(&'static self) -> Result<&'static Blas> {
        self.bind()?;
        self.blas
            .get_or_init(|| Blas::new(self))
            .as_ref()
            .map_err(Clone::clone)
    }
}

/// Launch shape: blocks, threads in a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared: u32,
}

impl Launch {
    /// `blocks` blocks of `threads` threads.
    pub(crate) fn linear(blocks: usize, threads: u32) -> Self {
        let blocks = u32::try_from(blocks).expect("launch grids stay below 2^31 blocks");
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared: 0,
        }
    }

    /// A grid of up to three dimensions.
    pub(crate) fn grid(grid: [usize; 3], threads: u32) -> Self {
        let grid =
            grid.map(|blocks| u32::try_from(blocks).expect("launch grids stay below 2^31 blocks"));
        Self {
            grid,
            block: [threads, 1, 1],
            shared: 0,
        }
    }

    /// With dynamic shared memory.
    pub(crate) fn shared(mut self, bytes: usize) -> Self {
        self.shared = u32::try_from(bytes).expect("shared memory is a few hundred KiB at most");
        self
    }
}

/// Queues a kernel: `launch!(gpu, kernel, shape; argument, ...)`. The arguments are plain values ([`Argument`]).
macro_rules! launch {
    ($gpu:expr, $kernel:expr, $shape:expr; $($argument:expr),* $(,)?) => {
        $gpu.launch($kernel, $shape, &mut [$($crate::device::argument(&$argument)),*])
    };
}
pub(crate) use launch;

/// A value that may be passed to a kernel as it lies in memory.
///
/// # Safety
/// The type must have the layout of its counterpart in the kernels.
pub(crate) unsafe trait Argument: Copy {}

macro_rules! arguments {
    ($($t:ty),*) => { $(
        // SAFETY: the same scalar in Rust and in CUDA C++.
        unsafe impl Argument for $t {}
    )* };
}
arguments!(u64, i64, u32, i32, f32, f64);

/// Pointer to a kernel argument.
pub(crate) fn argument<T: Argument>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}
