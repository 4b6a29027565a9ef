//! fp32 matrix products on the CPU, on a par with vendor libraries.
//!
//! The scheme is that of Goto and van de Geijn (2008, "Anatomy of High-Performance Matrix Multiplication"): a block of
//! the right operand is packed once and shared by all threads; each thread packs a block of rows of the left operand
//! that stays in its L2 cache, and multiplies panels of both, tile by tile, with the sums in registers.
//!
//! ```text
//! c: [m, n] = a: [m, k] b: [k, n]     or c += a b
//! ```
//!
//! Operands may have any strides, so transposes cost nothing extra; the right one may be half precision and is widened
//! while it is packed. An element of `c` is the sum over pieces of `k`, each summed in order in one register; where
//! these pieces end depends on `k` alone. So it does not depend on the number of threads, nor on the other rows and
//! columns that are computed along.

mod kernel;
mod pack;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::ops::Range;

pub(crate) use kernel::{Isa, Output};
use kernel::{MR, NR};

pub(crate) use super::simd::Element;
use super::threads::{SharedMut, num_threads, part, run_jobs_on};

/// Greatest depth of a panel. A panel of the right operand (512 x 16 fp32) is as large as a usual L1 cache, and comes
/// from L2 without slowing the multiplication down; a longer one would save nothing, a shorter one would write the
/// output more often.
const MAX_DEPTH: usize = 512;
/// Size in values of the block of the left operand that a thread works on: 256 KiB, half of a usual L2 cache.
const LEFT_BLOCK: usize = 64 << 10;
/// Size in values of the block of the right operand that all threads share: 8 MiB of L3 cache.
const RIGHT_BLOCK: usize = 2 << 20;
/// Products of fewer multiplications than this are not worth waking a second thread for.
const MIN_PARALLEL: usize = 1 << 18;

/// A matrix in memory: element (row, col) is at `offset + row * row_stride + col * col_stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a, T: Copy> Matrix<'a, T> {
    /// A row-major matrix.
    pub(crate) fn row_major(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::new(data, 0, (rows, cols), (cols, 1))
    }

    /// A matrix with rows that are contiguous and `row_stride` apart.
    pub(crate) fn with_row_stride(
        data: &'a [T],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        Self::new(data, 0, (rows, cols), (row_stride, 1))
    }

    #[track_caller]
    pub(crate) fn new(
        data: &'a [T],
        offset: usize,
        (rows, cols): (usize, usize),
        (row_stride, col_stride): (usize, usize),
    ) -> Self {
        let matrix = Self {
            data,
            offset,
            rows,
            cols,
            row_stride,
            col_stride,
        };
        assert!(
            rows == 0 || cols == 0 || matrix.index(rows - 1, cols - 1) < data.len(),
            "a matrix of {rows} x {cols} with strides {row_stride}, {col_stride} from {offset} exceeds {} elements",
            data.len()
        );
        matrix
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn index(&self, row: usize, col: usize) -> usize {
        self.offset + row * self.row_stride + col * self.col_stride
    }

    fn get(&self, row: usize, col: usize) -> T {
        self.data[self.index(row, col)]
    }
}

/// `c = a b` or `c += a b`, c: [m, n] with contiguous rows that are `ldc` apart; uses all threads when it is worth it.
///
/// # Panics
/// When the sizes do not fit.
pub(crate) fn gemm<T: Element>(
    a: Matrix<'_, f32>,
    b: Matrix<'_, T>,
    c: &mut [f32],
    ldc: usize,
    output: Output,
) {
    let threads = if a.rows * a.cols * b.cols < MIN_PARALLEL {
        1
    } else {
        num_threads()
    };
    gemm_on(threads, a, b, c, ldc, output);
}

/// [`gemm`] on at most `threads` threads.
///
/// # Panics
/// When the sizes do not fit.
pub(crate) fn gemm_on<T: Element>(
    threads: usize,
    a: Matrix<'_, f32>,
    b: Matrix<'_, T>,
    c: &mut [f32],
    ldc: usize,
    output: Output,
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "a product of {m} x {k} and {} x {n}", b.rows);
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        ldc >= n && (m - 1) * ldc + n <= c.len(),
        "an output of {m} x {n}, rows {ldc} apart, in {}",
        c.len()
    );
    if k == 0 {
        if output == Output::Overwrite {
            c.chunks_mut(ldc).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let isa = Isa::detect();
    let depth = panel_depth(k);
    let (block_depth, block_cols) = right_block(k, n, depth);
    let c = SharedMut::new(c);

    with_buffer(&RIGHT, |right| {
        for cols in ranges(n, block_cols) {
            for block in ranges(k, block_depth) {
                let panels = cols.len().div_ceil(NR);
                let right = reserve(right, panels * NR * block.len());
                pack::pack_right(threads, isa, &b, block.clone(), cols.clone(), right);
                let output = if block.start == 0 {
                    output
                } else {
                    Output::Add
                };
                let product = BlockProduct {
                    isa,
                    a,
                    right,
                    block: block.clone(),
                    cols: cols.clone(),
                    depth,
                    output,
                };
                product.run(threads, c, ldc);
            }
        }
    });
}

/// Operands packed once and multiplied several times, for kernels that work on blocks which fit in a cache. The sum
/// over the depth is not cut into pieces, so the depth should not exceed a few hundred.
pub(crate) mod block {
    use super::kernel::{self, MR, NR};
    use super::pack;
    use super::{Element, Isa, Matrix, Output};

    /// Values that a packed left operand of `rows x depth` takes.
    pub(crate) fn left_len(rows: usize, depth: usize) -> usize {
        rows.next_multiple_of(MR) * depth
    }

    /// Values that a packed right operand of `depth x cols` takes.
    pub(crate) fn right_len(depth: usize, cols: usize) -> usize {
        depth * cols.next_multiple_of(NR)
    }

    /// Packs a left operand into the first values of `packed`.
    pub(crate) fn pack_left(isa: Isa, a: &Matrix<'_, f32>, packed: &mut [f32]) {
        pack::pack_left(
            isa,
            a,
            0..a.rows,
            0..a.cols,
            &mut packed[..left_len(a.rows, a.cols)],
        );
    }

    /// Packs a right operand into the first values of `packed`.
    pub(crate) fn pack_right<T: Element>(isa: Isa, b: &Matrix<'_, T>, packed: &mut [f32]) {
        pack::pack_right(
            1,
            isa,
            b,
            0..b.rows,
            0..b.cols,
            &mut packed[..right_len(b.rows, b.cols)],
        );
    }

    /// `c = a b` or `c += a b` of packed operands; c: [rows, cols] with rows `ldc` apart.
    ///
    /// The right operand may be packed deeper and wider than it is used: `packed_depth >= depth`.
    pub(crate) fn multiply(
        isa: Isa,
        left: &[f32],
        (right, packed_depth): (&[f32], usize),
        (rows, depth, cols): (usize, usize, usize),
        (c, ldc): (&mut [f32], usize),
        output: Output,
    ) {
        if rows == 0 || cols == 0 || depth == 0 {
            return;
        }
        let left = &left[..left_len(rows, depth)];
        let right = &right[..right_len(packed_depth, cols)];
        assert!(
            depth <= packed_depth && ldc >= cols && (rows - 1) * ldc + cols <= c.len(),
            "a product of {rows} x {depth} and {depth} (of {packed_depth}) x {cols} in {}",
            c.len()
        );
        for (right, col) in right
            .chunks_exact(packed_depth * NR)
            .zip((0..cols).step_by(NR))
        {
            for (left, row) in left.chunks_exact(depth * MR).zip((0..rows).step_by(MR)) {
                let size = (MR.min(rows - row), NR.min(cols - col));
                // SAFETY: the panels are whole, the tile is within c, the processor was asked for `isa`.
                unsafe {
                    let c = c.as_mut_ptr().add(row * ldc + col);
                    let (left, right) = (left.as_ptr(), right.as_ptr());
                    kernel::tile(isa, depth, left, right, c, ldc, size, output);
                }
            }
        }
    }
}

/// Depth of the pieces that `k` is summed in: equal, at most [`MAX_DEPTH`].
fn panel_depth(k: usize) -> usize {
    k.div_ceil(k.div_ceil(MAX_DEPTH))
        .next_multiple_of(8)
        .min(k.max(1))
}

/// Depth (a multiple of `depth`, or all) and number of columns of the block of the right operand packed at once.
fn right_block(k: usize, n: usize, depth: usize) -> (usize, usize) {
    if k * n <= RIGHT_BLOCK {
        return (k, n);
    }
    // A deep block is better: the output is written once. A narrow one must still have columns for every thread.
    let cols = (RIGHT_BLOCK / k / NR * NR).max(1024).min(n);
    let block_depth = (RIGHT_BLOCK / cols / depth).max(1) * depth;
    (block_depth.min(k), cols)
}

fn ranges(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(step)
        .map(move |start| start..(start + step).min(len))
}

/// The product of the left operand with one packed block of the right one.
struct BlockProduct<'a> {
    isa: Isa,
    a: Matrix<'a, f32>,
    /// Panels of `block.len()` times [`NR`].
    right: &'a [f32],
    block: Range<usize>,
    cols: Range<usize>,
    depth: usize,
    output: Output,
}

impl BlockProduct<'_> {
    fn run(&self, threads: usize, c: SharedMut<'_, f32>, ldc: usize) {
        let panels = self.cols.len().div_ceil(NR);
        let row_blocks = {
            let largest = (LEFT_BLOCK / self.depth.min(self.block.len()) / MR).max(1) * MR;
            let wanted = self.a.rows.div_ceil(largest);
            // A multiple of the number of threads, if there are rows enough.
            let even = wanted.next_multiple_of(threads);
            if self.a.rows >= even * 4 * MR {
                even
            } else {
                wanted
            }
        };
        // Few rows: cut the columns as well.
        let col_blocks = if row_blocks >= threads {
            1
        } else {
            (2 * threads).div_ceil(row_blocks).min(panels)
        };
        run_jobs_on(threads, row_blocks * col_blocks, |job| {
            let rows = part(self.a.rows, row_blocks, MR, job / col_blocks);
            let panels = part(panels, col_blocks, 1, job % col_blocks);
            // SAFETY: jobs write different tiles of c, which is at least as large as the product.
            unsafe { self.part(rows, panels, c, ldc) };
        });
    }

    /// Computes `rows` by the columns of `panels`.
    ///
    /// # Safety
    /// Nobody else may access these elements of `c`, which has room for all of the product.
    unsafe fn part(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        c: SharedMut<'_, f32>,
        ldc: usize,
    ) {
        with_buffer(&LEFT, |left| {
            for piece in ranges(self.block.len(), self.depth) {
                let left = reserve(left, rows.len().div_ceil(MR) * MR * piece.len());
                let depth = self.block.start + piece.start..self.block.start + piece.end;
                pack::pack_left(self.isa, &self.a, rows.clone(), depth, left);
                let output = if piece.start == 0 {
                    self.output
                } else {
                    Output::Add
                };
                for panel in panels.clone() {
                    let col = panel * NR;
                    let width = NR.min(self.cols.len() - col);
                    let right = &self.right[(panel * self.block.len() + piece.start) * NR..]
                        [..piece.len() * NR];
                    for (left, row) in left
                        .chunks_exact(piece.len() * MR)
                        .zip(rows.clone().step_by(MR))
                    {
                        let height = MR.min(rows.end - row);
                        // SAFETY: the panels are whole, the tile is within c, the processor was asked.
                        unsafe {
                            let c = c.at(row * ldc + self.cols.start + col);
                            let size = (height, width);
                            kernel::tile(
                                self.isa,
                                piece.len(),
                                left.as_ptr(),
                                right.as_ptr(),
                                c,
                                ldc,
                                size,
                                output,
                            );
                        }
                    }
                }
            }
        });
    }
}

thread_local! {
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    static RIGHT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends the thread's packing buffer. A thread that waits for others may start on another product meanwhile; that one
/// then gets a buffer of its own.
fn with_buffer<R>(
    key: &'static std::thread::LocalKey<RefCell<Vec<f32>>>,
    f: impl FnOnce(&mut Vec<f32>) -> R,
) -> R {
    let mut buffer = key.take();
    let result = f(&mut buffer);
    key.set(buffer);
    result
}

/// The first `len` values of `buffer`, which keeps its size: packing overwrites them.
fn reserve(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}
