//! A caching pool of device memory.
//!
//! All work of a device runs on one stream, so a block that is freed while kernels that use it are still queued may be
//! handed out at once: whatever the new owner queues runs after them. Nothing waits.
//!
//! The pool reserves one range of addresses as large as the GPU's memory and maps physical memory to its end as it
//! grows. Free neighbours always merge, so there is no fragmentation between segments, only inside the one range.
//! Where the driver has no virtual memory management, each growth is a `cuMemAlloc` of its own.

use std::collections::{BTreeMap, BTreeSet};

use cudarc::driver::sys;

use crate::error::{Error, Result, check};

/// Blocks start at multiples of this, which is what matrix products like best.
const ALIGNMENT: u64 = 512;
/// Physical memory is mapped in multiples of this.
const CHUNK: u64 = 32 << 20;

/// State of a device's memory pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// In live tensors now.
    pub current: u64,
    /// Largest `current` since the start or the last reset.
    pub peak: u64,
    /// Taken from the GPU, in use or cached.
    pub reserved: u64,
    /// Number of blocks handed out since the start.
    pub allocations: u64,
}

/// Where the pool's addresses come from.
enum Backing {
    /// One range of addresses, mapped up to `mapped`.
    Virtual {
        base: u64,
        mapped: u64,
        limit: u64,
        properties: sys::CUmemAllocationProp,
    },
    /// Separate allocations.
    Separate,
}

/// The pool of one device. Not synchronised: the device keeps it behind a lock.
pub(crate) struct Pool {
    ordinal: usize,
    backing: Backing,
    /// Free blocks by address.
    free: BTreeMap<u64, u64>,
    /// The same blocks by (size, address), for best fit.
    by_size: BTreeSet<(u64, u64)>,
    /// Addresses across which blocks must not merge: starts of separate allocations.
    barriers: BTreeSet<u64>,
    stats: MemoryStats,
}

// SAFETY: the raw pointer inside the allocation properties is null and never followed.
unsafe impl Send for Pool {}

impl Pool {
    /// A pool on the device whose context is current.
    pub(crate) fn new(ordinal: usize, device: sys::CUdevice) -> Result<Self> {
        let mut supported = 0;
        let attribute =
            sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED;
        // SAFETY: plain queries that write to locals.
        unsafe {
            check(
                "cuDeviceGetAttribute",
                sys::cuDeviceGetAttribute(&mut supported, attribute, device),
            )?
        };
        let backing = if supported == 1 {
            Self::reserve(device)?
        } else {
            Backing::Separate
        };
        Ok(Self {
            ordinal,
            backing,
            free: BTreeMap::new(),
            by_size: BTreeSet::new(),
            barriers: BTreeSet::new(),
            stats: MemoryStats::default(),
        })
    }

    fn reserve(device: sys::CUdevice) -> Result<Backing> {
        let (mut total, mut base) = (0, 0);
        // SAFETY: the structure is plain data for which zero means "not set"; the calls write to locals.
        unsafe {
            check(
                "cuDeviceTotalMem",
                sys::cuDeviceTotalMem_v2(&mut total, device),
            )?;
            let limit = (total as u64).next_multiple_of(CHUNK);
            check(
                "cuMemAddressReserve",
                sys::cuMemAddressReserve(&mut base, limit as usize, CHUNK as usize, 0, 0),
            )?;
            let mut properties: sys::CUmemAllocationProp = std::mem::zeroed();
            properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
            properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
            properties.location.id = device;
            Ok(Backing::Virtual {
                base,
                mapped: 0,
                limit,
                properties,
            })
        }
    }

    /// A block of at least `bytes`, which must not be 0. Returns its address and its size.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Result<(u64, u64)> {
        let size = bytes.next_multiple_of(ALIGNMENT);
        let found = self.by_size.range((size, 0)..).next().copied();
        let (block, address) = match found {
            Some(block) => block,
            None => self.grow(size)?,
        };
        self.remove_free(address, block);
        if block > size {
            self.insert_free(address + size, block - size);
        }
        self.stats.current += size;
        self.stats.peak = self.stats.peak.max(self.stats.current);
        self.stats.allocations += 1;
        Ok((address, size))
    }

    /// Takes back a block that [`Self::allocate`] gave.
    pub(crate) fn release(&mut self, address: u64, size: u64) {
        self.stats.current -= size;
        self.free_merged(address, size);
    }

    fn free_merged(&mut self, mut address: u64, mut size: u64) {
        if !self.barriers.contains(&address)
            && let Some((&before, &before_size)) = self.free.range(..address).next_back()
            && before + before_size == address
        {
            self.remove_free(before, before_size);
            address = before;
            size += before_size;
        }
        let end = address + size;
        if !self.barriers.contains(&end)
            && let Some(&after_size) = self.free.get(&end)
        {
            self.remove_free(end, after_size);
            size += after_size;
        }
        self.insert_free(address, size);
    }

    fn insert_free(&mut self, address: u64, size: u64) {
        self.free.insert(address, size);
        self.by_size.insert((size, address));
    }

    fn remove_free(&mut self, address: u64, size: u64) {
        self.free.remove(&address);
        self.by_size.remove(&(size, address));
    }

    /// Takes more memory from the GPU; returns (size, address) of a free block that fits `size`.
    fn grow(&mut self, size: u64) -> Result<(u64, u64)> {
        let (address, added) = match &mut self.backing {
            Backing::Virtual {
                base,
                mapped,
                limit,
                properties,
            } => {
                let end = *base + *mapped;
                // A free block at the end counts, since what is added joins it.
                let tail = match self.free.last_key_value() {
                    Some((&address, &free)) if address + free == end => free,
                    _ => 0,
                };
                let wanted = (size - tail).next_multiple_of(CHUNK);
                let fits = *mapped + wanted <= *limit;
                // SAFETY: [end, end + wanted) lies inside the reserved range and is not mapped yet.
                if !fits || unsafe { map(end, wanted, properties) }.is_err() {
                    return Err(self.out_of_memory(size));
                }
                *mapped += wanted;
                (end, wanted)
            }
            Backing::Separate => {
                let wanted = size.next_multiple_of(CHUNK);
                let mut address = 0;
                // SAFETY: a plain allocation, written to a local.
                let code = unsafe { sys::cuMemAlloc_v2(&mut address, wanted as usize) };
                if check("cuMemAlloc", code).is_err() {
                    return Err(self.out_of_memory(size));
                }
                self.barriers.insert(address);
                (address, wanted)
            }
        };
        self.stats.reserved += added;
        self.free_merged(address, added);
        let block = self.by_size.range((size, 0)..).next().copied();
        Ok(block.expect("the block that was just added fits"))
    }

    /// Gives free memory at the end of the range back to the GPU. The stream must be idle.
    pub(crate) fn trim(&mut self) -> Result<()> {
        let Backing::Virtual { base, mapped, .. } = &mut self.backing else {
            return Ok(());
        };
        let end = *base + *mapped;
        let Some((&address, &size)) = self.free.last_key_value() else {
            return Ok(());
        };
        let keep = (address - *base).next_multiple_of(CHUNK);
        if address + size != end || keep >= *mapped {
            return Ok(());
        }
        let removed = *mapped - keep;
        let first = *base + keep;
        // SAFETY: the range is mapped, free and, by the caller's promise, unused by queued work.
        unsafe { check("cuMemUnmap", sys::cuMemUnmap(first, removed as usize))? };
        *mapped = keep;
        self.stats.reserved -= removed;
        self.remove_free(address, size);
        if first > address {
            self.insert_free(address, first - address);
        }
        Ok(())
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        self.stats
    }

    pub(crate) fn reset_peak(&mut self) {
        self.stats.peak = self.stats.current;
    }

    fn out_of_memory(&self, requested: u64) -> Error {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes to locals; if it fails they stay 0.
        unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        let largest = self.by_size.last().map_or(0, |block| block.0);
        let MemoryStats {
            current,
            peak,
            reserved,
            ..
        } = self.stats;
        Error::OutOfMemory {
            ordinal: self.ordinal,
            requested: requested as usize,
            report: format!(
                "{current} in use (peak {peak}), {reserved} reserved with {largest} in the largest free block, {free} of \
                 {total} free on the GPU"
            ),
        }
    }
}

/// Creates physical memory and maps it readable and writable at `address`, in chunks, so that it can be trimmed.
///
/// # Safety
/// The range must be reserved and unmapped, both ends multiples of [`CHUNK`].
unsafe fn map(address: u64, size: u64, properties: &sys::CUmemAllocationProp) -> Result<()> {
    let mut done = 0;
    while done < size {
        let mut handle = 0;
        // SAFETY: as the caller promises; a handle may be released once mapped, the mapping keeps the memory.
        let mapped = unsafe {
            check(
                "cuMemCreate",
                sys::cuMemCreate(&mut handle, CHUNK as usize, properties, 0),
            )
            .and_then(|()| {
                let result = check(
                    "cuMemMap",
                    sys::cuMemMap(address + done, CHUNK as usize, 0, handle, 0),
                );
                sys::cuMemRelease(handle);
                result
            })
        };
        if let Err(error) = mapped {
            if done > 0 {
                // SAFETY: exactly the chunks mapped above.
                unsafe { sys::cuMemUnmap(address, done as usize) };
            }
            return Err(error);
        }
        done += CHUNK;
    }
    let access = sys::CUmemAccessDesc {
        location: properties.location,
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: the whole range is mapped now.
    unsafe {
        check(
            "cuMemSetAccess",
            sys::cuMemSetAccess(address, size as usize, &access, 1),
        )
    }
}
