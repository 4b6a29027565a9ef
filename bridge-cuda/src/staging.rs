//! Pinned host memory through which data goes to the GPU and back.

use std::collections::VecDeque;
use std::ffi::c_void;

use cudarc::driver::sys;

use crate::error::{Result, check};

/// Smallest and largest pinned block, in bytes. Larger transfers go in pieces.
const SMALLEST: usize = 64 << 10;
const LARGEST: usize = 32 << 20;

/// A block of pinned memory and the event that marks the end of its last transfer.
struct Block {
    pointer: *mut c_void,
    size: usize,
    event: sys::CUevent,
}

/// Blocks not in use, the longest unused first.
#[derive(Default)]
pub(crate) struct Staging {
    blocks: VecDeque<Block>,
}

// SAFETY: pinned memory and events may be used from any thread.
unsafe impl Send for Staging {}

impl Staging {
    /// A block of at least `bytes` whose last transfer is over.
    fn take(&mut self, bytes: usize) -> Result<Block> {
        let size = bytes.next_power_of_two().clamp(SMALLEST, LARGEST);
        let idle = |block: &Block| {
            // SAFETY: the event is alive; a query has no effect.
            let code = unsafe { sys::cuEventQuery(block.event) };
            block.size == size && code == sys::CUresult::CUDA_SUCCESS
        };
        if let Some(position) = self.blocks.iter().position(idle) {
            return Ok(self
                .blocks
                .remove(position)
                .expect("the position was just found"));
        }
        let same: Vec<usize> = (0..self.blocks.len())
            .filter(|&i| self.blocks[i].size == size)
            .collect();
        if same.len() >= 4 {
            let block = self
                .blocks
                .remove(same[0])
                .expect("the position was just found");
            // SAFETY: the event is alive.
            unsafe { check("cuEventSynchronize", sys::cuEventSynchronize(block.event))? };
            return Ok(block);
        }
        let (mut pointer, mut event) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the calls write to locals.
        unsafe {
            check("cuMemAllocHost", sys::cuMemAllocHost_v2(&mut pointer, size))?;
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
            check("cuEventCreate", sys::cuEventCreate(&mut event, flags))?;
        }
        Ok(Block {
            pointer,
            size,
            event,
        })
    }

    /// # Safety
    /// `[address, address + bytes.len())` must be device memory of the current context.
    pub(crate) unsafe fn upload(
        &mut self,
        stream: sys::CUstream,
        bytes: &[u8],
        address: u64,
    ) -> Result<()> {
        for (index, piece) in bytes.chunks(LARGEST).enumerate() {
            let block = self.take(piece.len())?;
            let to = address + (index * LARGEST) as u64;
            // SAFETY: the block holds at least `piece.len()` bytes and no transfer uses it; the target is as promised.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), block.pointer.cast(), piece.len());
                check(
                    "cuMemcpyHtoDAsync",
                    sys::cuMemcpyHtoDAsync_v2(to, block.pointer, piece.len(), stream),
                )?;
                check("cuEventRecord", sys::cuEventRecord(block.event, stream))?;
            }
            self.blocks.push_back(block);
        }
        Ok(())
    }

    /// # Safety
    /// `[address, address + bytes.len())` must be device memory of the current context.
    pub(crate) unsafe fn download(
        &mut self,
        stream: sys::CUstream,
        address: u64,
        bytes: &mut [u8],
    ) -> Result<()> {
        for (index, piece) in bytes.chunks_mut(LARGEST).enumerate() {
            let block = self.take(piece.len())?;
            let from = address + (index * LARGEST) as u64;
            // SAFETY: as in `upload`; the stream is waited for before the bytes are read.
            unsafe {
                check(
                    "cuMemcpyDtoHAsync",
                    sys::cuMemcpyDtoHAsync_v2(block.pointer, from, piece.len(), stream),
                )?;
                check("cuEventRecord", sys::cuEventRecord(block.event, stream))?;
                check("cuEventSynchronize", sys::cuEventSynchronize(block.event))?;
                std::ptr::copy_nonoverlapping(
                    block.pointer.cast(),
                    piece.as_mut_ptr(),
                    piece.len(),
                );
            }
            self.blocks.push_back(block);
        }
        Ok(())
    }
}
