//! Memory for kernel outputs that is used again instead of going back to the operating system.
//!
//! A training step makes and drops the same large tensors as the step before it. Handing them back costs a page fault
//! per 4 KiB at the next step, which for hundreds of megabytes takes as long as much of the arithmetic. Buffers of
//! 64 KiB and more are therefore kept when dropped, by size class, as long as what lies idle is not more than the most
//! that was ever in use at once. Large ones ask for huge pages.

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use burn_backend::{AllocationProperty, Bytes, DType, Shape};
use burn_flex::FlexTensor;
use burn_std::AllocationController;

/// Smaller buffers are left to the general allocator, which keeps those itself.
const MIN_POOLED: usize = 64 << 10;
/// Buffers from this size on are aligned to huge pages and ask for them.
const HUGE_PAGE: usize = 2 << 20;
const ALIGN: usize = 64;

/// A new contiguous fp32 tensor whose elements `fill` writes. What it finds in the slice is unspecified.
pub(crate) fn new_f32(shape: &[usize], fill: impl FnOnce(&mut [f32])) -> FlexTensor {
    let len = shape.iter().product::<usize>();
    let mut buffer = Buffer::new(len * size_of::<f32>());
    fill(&mut buffer.as_f32_mut()[..len]);
    let layout = burn_flex::Layout::contiguous(Shape::from(shape.to_vec()));
    // SAFETY: a buffer is initialized throughout.
    let bytes = unsafe { Bytes::from_controller(Box::new(buffer), len * size_of::<f32>()) };
    FlexTensor::new(bytes, layout, DType::F32)
}

/// Initialized memory that returns to the pool when dropped.
pub(crate) struct Buffer {
    ptr: NonNull<u8>,
    capacity: usize,
}

// SAFETY: the buffer owns its memory, like a box.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of at least `bytes` bytes, initialized to anything.
    pub(crate) fn new(bytes: usize) -> Self {
        let capacity = size_class(bytes);
        let reused = if capacity >= MIN_POOLED {
            pool(|pool| pool.take(capacity))
        } else {
            None
        };
        reused.unwrap_or_else(|| Self::allocate(capacity))
    }

    fn allocate(capacity: usize) -> Self {
        let layout = Self::layout(capacity);
        // SAFETY: the size is not zero.
        let ptr = unsafe { std::alloc::alloc(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            std::alloc::handle_alloc_error(layout)
        };
        #[cfg(target_os = "linux")]
        if capacity >= HUGE_PAGE {
            // Only advice: a kernel that does not know it returns an error, and the memory is as good as before.
            // SAFETY: the range was just allocated, and starts at a page.
            unsafe { libc::madvise(ptr.as_ptr().cast(), capacity, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the allocation is this large.
        unsafe { ptr.write_bytes(0, capacity) };
        Self { ptr, capacity }
    }

    fn layout(capacity: usize) -> Layout {
        let align = if capacity >= HUGE_PAGE {
            HUGE_PAGE
        } else {
            ALIGN
        };
        Layout::from_size_align(capacity, align).expect("a buffer's size fits the address space")
    }

    pub(crate) fn as_f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: initialized, aligned, and any bits are an f32.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.ptr.as_ptr().cast(),
                self.capacity / size_of::<f32>(),
            )
        }
    }

    fn free(self) {
        let buffer = std::mem::ManuallyDrop::new(self);
        // SAFETY: allocated with this layout, and not used any more.
        unsafe { std::alloc::dealloc(buffer.ptr.as_ptr(), Self::layout(buffer.capacity)) };
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = Self {
            ptr: self.ptr,
            capacity: self.capacity,
        };
        if self.capacity < MIN_POOLED {
            buffer.free();
        } else {
            // Memory goes back to the system after the lock is released.
            let surplus = pool(|pool| pool.give(buffer));
            surplus.into_iter().for_each(Self::free);
        }
    }
}

impl AllocationController for Buffer {
    fn alloc_align(&self) -> usize {
        // Burn supports no more; the true alignment is a multiple.
        align_of::<u128>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: the buffer's own memory.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.capacity) }
    }

    fn memory(&self) -> &[MaybeUninit<u8>] {
        // SAFETY: the buffer's own memory.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.capacity) }
    }
}

/// Rounds up to one of eight sizes per power of two, so that buffers of like size can stand in for each other.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.max(1).next_power_of_two() / 16).max(ALIGN);
    bytes.max(1).next_multiple_of(step)
}

#[derive(Default)]
struct Pool {
    /// Idle buffers by capacity; the last ones in are the first ones out, being the likeliest to be in a cache.
    idle: BTreeMap<usize, Vec<Buffer>>,
    idle_bytes: usize,
    used_bytes: usize,
    most_used_bytes: usize,
}

impl Pool {
    fn take(&mut self, capacity: usize) -> Option<Buffer> {
        self.used_bytes += capacity;
        self.most_used_bytes = self.most_used_bytes.max(self.used_bytes);
        let buffer = self.idle.get_mut(&capacity)?.pop()?;
        self.idle_bytes -= capacity;
        Some(buffer)
    }

    /// Keeps a buffer; returns those there is no room for.
    fn give(&mut self, buffer: Buffer) -> Vec<Buffer> {
        self.used_bytes -= buffer.capacity;
        self.idle_bytes += buffer.capacity;
        self.idle.entry(buffer.capacity).or_default().push(buffer);

        let mut surplus = Vec::new();
        while self.idle_bytes + self.used_bytes > self.most_used_bytes.max(MIN_POOLED) {
            // Larger ones go first: they are the fewest.
            let Some(buffer) = self.idle.values_mut().rev().find_map(Vec::pop) else {
                break;
            };
            self.idle_bytes -= buffer.capacity;
            surplus.push(buffer);
        }
        surplus
    }
}

fn pool<R>(f: impl FnOnce(&mut Pool) -> R) -> R {
    static POOL: Mutex<Option<Pool>> = Mutex::new(None);
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    f(pool.get_or_insert_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again() {
        // A pool of its own: in the one of the process, what other tests drop can push it out.
        let mut pool = Pool::default();
        let bytes = 77 * HUGE_PAGE / 16;
        assert!(pool.take(size_class(bytes)).is_none());
        let buffer = Buffer::allocate(size_class(bytes));
        let address = buffer.ptr;
        assert!(pool.give(buffer).is_empty());
        let again = pool.take(size_class(bytes - 100)).expect("it was kept");
        assert_eq!(again.ptr, address);
        again.free();
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for bytes in (1..2000).map(|i| i * 997) {
            let class = size_class(bytes);
            assert!(
                class >= bytes && class <= bytes + (bytes / 8).max(ALIGN),
                "{bytes} -> {class}"
            );
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn tensors_in_pooled_memory_behave_like_others() {
        let tensor = new_f32(&[3, 5], |out| {
            out.iter_mut()
                .enumerate()
                .for_each(|(i, out)| *out = i as f32);
        });
        let expected: Vec<f32> = (0..15).map(|i| i as f32).collect();
        assert_eq!(
            tensor.clone().into_data().into_vec::<f32>().unwrap(),
            expected
        );
        let mut copy = tensor.clone();
        copy.storage_mut::<f32>()[0] = 7.0;
        assert_eq!(tensor.as_slice::<f32>().unwrap(), expected);
        assert_eq!(copy.as_slice::<f32>().unwrap()[0], 7.0);
        assert_eq!(tensor.into_data().into_vec::<f32>().unwrap(), expected);
    }
}
