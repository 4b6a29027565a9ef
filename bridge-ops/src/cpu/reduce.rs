//! Sums over many values, in an order that does not depend on the number of threads.

use std::ops::Range;

use burn_flex::FlexTensor;

use super::simd::{fma, lane_sum, vectorized};
use super::storage::{contiguous_f32, values};
use super::threads::{SharedMut, run_jobs};
use super::{fast_path, pool};

/// Rows cut into blocks whose size depends on nothing but the shape.
pub(super) struct RowBlocks {
    rows: usize,
    block: usize,
}

impl RowBlocks {
    /// `width`: elements per row.
    pub(super) fn new(rows: usize, width: usize) -> Self {
        // At least 16,384 elements, and no more blocks than needed: each costs a vector of partial sums.
        let block = (16_usize << 10)
            .div_ceil(width.max(1))
            .max(rows.div_ceil(64))
            .max(1);
        Self { rows, block }
    }

    /// Sums of `len` values over all rows: `kernel` adds those of a block of rows to a vector of zeros, and the blocks'
    /// vectors are added up in order.
    pub(super) fn sums(
        &self,
        len: usize,
        kernel: impl Fn(Range<usize>, &mut [f32]) + Send + Sync,
    ) -> Vec<f32> {
        let blocks = self.rows.div_ceil(self.block).max(1);
        let mut partial = vec![0.0; blocks * len];
        let shared = SharedMut::new(&mut partial);
        run_jobs(blocks, |block| {
            let rows = block * self.block..((block + 1) * self.block).min(self.rows);
            // SAFETY: each block has its own vector.
            kernel(rows, unsafe {
                shared.slice(block * len..(block + 1) * len)
            });
        });
        let (sums, others) = partial.split_at_mut(len);
        for other in others.chunks_exact(len.max(1)) {
            sums.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
        }
        partial.truncate(len);
        partial
    }
}

/// Adds to `sums` the sum of the rows of `x`: [rows, sums.len()].
pub(super) fn add_column_sums(x: &[f32], sums: &mut [f32]) {
    let width = sums.len();
    if width == 0 {
        return;
    }
    let total = RowBlocks::new(x.len() / width, width).sums(width, |rows, sums| {
        for row in x[rows.start * width..rows.end * width].chunks_exact(width) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
    });
    sums.iter_mut().zip(total).for_each(|(sum, x)| *sum += x);
}

/// `None` when the dtype is not covered.
pub(super) fn sum_squares(x: &FlexTensor) -> Option<FlexTensor> {
    const BLOCK: usize = 64 << 10;
    let x = contiguous_f32(x)?;
    fast_path::took("sum_squares");
    let x = values(&x);
    let mut partial = vec![0.0_f64; x.len().div_ceil(BLOCK)];
    let shared = SharedMut::new(&mut partial);
    run_jobs(x.len().div_ceil(BLOCK), |block| {
        let range = block * BLOCK..((block + 1) * BLOCK).min(x.len());
        // SAFETY: each block has its own sum.
        unsafe { shared.slice(block..block + 1)[0] = squares(&x[range]) };
    });
    let total: f64 = partial.iter().sum();
    Some(pool::new_f32(&[1], |out| out[0] = total as f32))
}

vectorized! {
    fn squares(x: &[f32]) -> f64 {
        // fp32 within short runs, f64 across them.
        x.chunks(1024).map(|x| f64::from(lane_sum([x], |[x], sum| fma::<FMA>(x, x, sum)))).sum()
    }
}
