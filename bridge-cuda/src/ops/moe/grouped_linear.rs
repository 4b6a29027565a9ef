//! The products of rows with their experts' matrices. Kernels: `kernels/grouped_linear_hopper.cu`,
//! `kernels/grouped_linear.cu` for other chips, `kernels/grouped_linear_generic.cu` for fp32 and for sizes that those do not
//! take.

use std::sync::atomic::{AtomicU8, Ordering};

use bridge_ops::{ExpertOffsets, GradSlot, portable};
use burn_backend::{DType, TensorMetadata};

use super::super::linear::rows as as_rows;
use super::super::open_slot;
use crate::backend::Cuda;
use crate::device::{Argument, Gpu, Launch, launch};
use crate::elementwise::{cast, type_name};
use crate::error::{OrPanic, Result};
use crate::tensor::CudaTensor;
use crate::tensor_map::TensorMap;

/// Most experts the kernels count tiles of; `MAX_EXPERTS` of `kernels/grouped.cuh`.
const MOST_EXPERTS: usize = 1024;
/// Side of a tile and slices of it in shared memory, 32 KiB each; as in `kernels/grouped_linear.cu`.
const TILE: usize = 128;
const STAGE: usize = 2 * TILE * 64 * 2;
/// Threads, and shared memory with room to begin on a multiple of 1024, of `kernels/grouped_linear_hopper.cu`.
const HOPPER_THREADS: u32 = 384;
const HOPPER_SHARED: usize = 4 * (48 << 10) + 1024;

/// Which kernels compute the products of rows with their experts' matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum GroupedPath {
    /// wgmma, on Hopper: bf16 or f16, sizes that are multiples of 8.
    Hopper = 1,
    /// mma.sync: the same on any chip.
    TensorCores = 2,
    /// One thread per 16 results: any dtype and size.
    Generic = 3,
}

static FORCED: AtomicU8 = AtomicU8::new(0);

/// Makes the experts' products of the program take one path wherever it serves them, for tests and comparisons; `None`
/// takes the fastest again.
pub fn force_grouped_path(path: Option<GroupedPath>) {
    FORCED.store(path.map_or(0, |path| path as u8), Ordering::Relaxed);
}

impl GroupedPath {
    /// For `rows` rows of `dtype` and matrices of these sizes.
    fn of(gpu: &Gpu, dtype: DType, rows: usize, sizes: [usize; 2]) -> Self {
        let forced = FORCED.load(Ordering::Relaxed);
        let half = matches!(dtype, DType::BF16 | DType::F16);
        if !half || !sizes.iter().all(|n| n.is_multiple_of(8)) || forced == Self::Generic as u8 {
            return Self::Generic;
        }
        // Nothing describes a tensor without rows.
        if gpu.capability == (9, 0) && rows > 0 && forced != Self::TensorCores as u8 {
            return Self::Hopper;
        }
        Self::TensorCores
    }
}

/// Mirrors `Problem` in `kernels/grouped_linear.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Problem {
    a_stride: i64,
    b_stride: i64,
    experts: i32,
    m: i32,
    n: i32,
    k: i32,
    accumulate: i32,
    unused: i32,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Problem {}

/// Mirrors `Strided` in `kernels/grouped_linear_generic.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Strided {
    a_outer: i64,
    a_inner: i64,
    b_outer: i64,
    b_inner: i64,
    b_expert: i64,
    experts: i32,
    m: i32,
    n: i32,
    k: i32,
    accumulate: i32,
    unused: i32,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for Strided {}

/// Mirrors `Problem` in `kernels/grouped_linear_hopper.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct HopperProblem {
    experts: i32,
    m: i32,
    n: i32,
    k: i32,
    accumulate: i32,
    pairs: i32,
}

// SAFETY: the same fields in the same order as the kernels' structure.
unsafe impl Argument for HopperProblem {}

/// Rows of `x`, [rows, columns], for the accelerator, in boxes of 64 columns.
fn map_of_rows(x: &CudaTensor, box_rows: u32) -> Result<TensorMap> {
    let stride = usize::try_from(x.strides()[0])
        .unwrap_or(0)
        .max(x.dims()[1]);
    let dims = [x.dims()[1], x.dims()[0]];
    TensorMap::new(x.dtype(), x.address(), dims, &[stride], [64, box_rows])
}

/// Matrices one after the other, [experts, rows, columns], in boxes of 64 columns of one of them.
fn map_of_stack(x: &CudaTensor, box_rows: u32) -> Result<TensorMap> {
    let &[experts, rows, columns] = x.dims() else {
        panic!("the experts' matrices are [experts, out, in], found {x:?}")
    };
    let dims = [columns, rows, experts];
    TensorMap::new(
        x.dtype(),
        x.address(),
        dims,
        &[columns, rows * columns],
        [64, box_rows, 1],
    )
}

/// Rows whose every beginning lies on 16 bytes and whose elements are neighbours, one row after the other: as they are, or a
/// copy.
fn aligned(x: CudaTensor) -> CudaTensor {
    let (columns, step) = (x.dims()[1] as i64, x.strides()[0]);
    let per_piece = 16 / x.dtype().size() as i64;
    let apart = x.dims()[0] <= 1 || (step % per_piece == 0 && step >= columns);
    let packed = columns == 1 || x.strides()[1] == 1;
    if packed && apart && x.address().is_multiple_of(16) {
        x
    } else {
        x.copied()
    }
}

/// Matrices one after the other, on a boundary of 16 bytes.
fn stack(weight: CudaTensor, dtype: DType) -> CudaTensor {
    let weight = cast(weight, dtype).into_packed();
    if weight.address().is_multiple_of(16) {
        weight
    } else {
        weight.copied()
    }
}

/// Offsets as the kernels read them.
fn starts(offsets: &ExpertOffsets<Cuda>) -> CudaTensor {
    cast(offsets.device().clone(), DType::I32).into_packed()
}

/// Whether the kernels count that many rows and experts; else the portable bodies take over, which read offsets back.
fn covers(offsets: &ExpertOffsets<Cuda>, rows: usize) -> bool {
    offsets.num_experts() <= MOST_EXPERTS && i32::try_from(rows).is_ok()
}

/// Blocks for at most `tiles` tiles, `resident` of them on a multiprocessor at once.
fn blocks(gpu: &Gpu, tiles: usize, resident: usize) -> usize {
    tiles.clamp(1, gpu.multiprocessors * resident)
}

/// Slices ahead that fit the chip's shared memory twice (or once, on the chips with the least).
fn stages(gpu: &Gpu) -> usize {
    if matches!(gpu.capability, (8, 0) | (9.., _)) {
        3
    } else {
        2
    }
}

/// A product of rows with one side of the experts' matrices.
struct Rows<'a> {
    a: CudaTensor,
    weight: CudaTensor,
    /// Other rows and matrices of the same sizes, whose product is added.
    second: Option<(CudaTensor, CudaTensor)>,
    bias: Option<CudaTensor>,
    so_far: Option<CudaTensor>,
    offsets: &'a ExpertOffsets<Cuda>,
    /// Whether the matrices stand as they are on the right: `a W`, not `a W^T`.
    plain: bool,
}

impl Rows<'_> {
    fn run(self) -> CudaTensor {
        let Self {
            a,
            weight,
            second,
            bias,
            so_far,
            offsets,
            plain,
        } = self;
        let (gpu, dtype) = (a.gpu(), a.dtype());
        let (rows, experts) = (a.dims()[0], weight.dims()[0]);
        let (k, n) = if plain {
            (weight.dims()[1], weight.dims()[2])
        } else {
            (weight.dims()[2], weight.dims()[1])
        };
        // A thread reads the gradient so far before it writes there.
        let out = match &so_far {
            Some(so_far) if so_far.is_unique() => so_far.clone(),
            _ => CudaTensor::empty(gpu, &[rows, n], dtype),
        };
        if out.count() == 0 {
            return out;
        }
        let starts = starts(offsets);
        let address = |x: &Option<CudaTensor>| x.as_ref().map_or(0, CudaTensor::address);
        let (bias_at, so_far_at) = (address(&bias), address(&so_far));
        let tiles = |side: usize| (rows.div_ceil(side) + experts) * n.div_ceil(side);
        let path = GroupedPath::of(gpu, dtype, rows, [k, n]);
        let right = if plain { "1" } else { "0" };
        match path {
            GroupedPath::Hopper => {
                let a = aligned(a);
                let second = second.map(|(a, weight)| (aligned(a), weight));
                let defines = [("TYPE", type_name(dtype)), ("RIGHT", right)];
                let kernel = gpu
                    .kernel("grouped_linear_hopper", &defines, "rows")
                    .or_panic();
                let maps = |a: &CudaTensor, b: &CudaTensor| {
                    let box_rows = if plain { 64 } else { 256 };
                    (
                        map_of_rows(a, 128).or_panic(),
                        map_of_stack(b, box_rows).or_panic(),
                    )
                };
                let (a_map, b_map) = maps(&a, &weight);
                let (a2_map, b2_map) =
                    (second.as_ref()).map_or((a_map, b_map), |(a, b)| maps(a, b));
                let problem = HopperProblem {
                    experts: experts as i32,
                    m: 0,
                    n: n as i32,
                    k: k as i32,
                    accumulate: 0,
                    pairs: 1 + i32::from(second.is_some()),
                };
                let launch =
                    Launch::linear(gpu.multiprocessors, HOPPER_THREADS).shared(HOPPER_SHARED);
                // SAFETY: the maps describe rows and matrices; the others are packed, and on boundaries of 16 bytes.
                unsafe {
                    launch!(gpu, kernel, launch; a_map, b_map, a2_map, b2_map, out.address(), bias_at, so_far_at,
                        starts.address(), problem)
                    .or_panic();
                }
            }
            GroupedPath::TensorCores => {
                let a = aligned(a);
                let stages = stages(gpu);
                let stages_text = stages.to_string();
                let defines = [
                    ("TYPE", type_name(dtype)),
                    ("RIGHT", right),
                    ("STAGES", stages_text.as_str()),
                ];
                let kernel = gpu.kernel("grouped_linear", &defines, "rows").or_panic();
                let problem = Problem {
                    a_stride: a.strides()[0],
                    b_stride: if plain { n } else { k } as i64,
                    experts: experts as i32,
                    m: 0,
                    n: n as i32,
                    k: k as i32,
                    accumulate: 0,
                    unused: 0,
                };
                let launch =
                    Launch::linear(blocks(gpu, tiles(TILE), 2), 128).shared(stages * STAGE);
                // SAFETY: rows and matrices of the sizes and strides given; everything is on boundaries of 16 bytes.
                unsafe {
                    launch!(gpu, kernel, launch; out.address(), a.address(), weight.address(), bias_at, so_far_at,
                        starts.address(), problem)
                    .or_panic();
                }
            }
            GroupedPath::Generic => {
                let defines = [("TYPE", type_name(dtype))];
                let kernel = gpu
                    .kernel("grouped_linear_generic", &defines, "rows")
                    .or_panic();
                let problem = Strided {
                    a_outer: a.strides()[0],
                    a_inner: a.strides()[1],
                    b_outer: if plain { 1 } else { k as i64 },
                    b_inner: if plain { n as i64 } else { 1 },
                    b_expert: (n * k) as i64,
                    experts: experts as i32,
                    m: 0,
                    n: n as i32,
                    k: k as i32,
                    accumulate: 0,
                    unused: 0,
                };
                let launch = Launch::linear(blocks(gpu, tiles(64), 4), 256);
                // SAFETY: rows and matrices of the sizes and strides given; the others are packed.
                unsafe {
                    launch!(gpu, kernel, launch; out.address(), a.address(), weight.address(), bias_at, so_far_at,
                        starts.address(), problem)
                    .or_panic();
                }
            }
        }
        out
    }
}

pub(in super::super) fn forward(
    x: CudaTensor,
    weight: CudaTensor,
    bias: Option<CudaTensor>,
    offsets: &ExpertOffsets<Cuda>,
) -> CudaTensor {
    if !covers(offsets, x.dims()[0]) {
        return portable::grouped_linear_forward::<Cuda>(x, weight, bias, offsets);
    }
    let dtype = x.dtype();
    let product = Rows {
        a: x,
        weight: stack(weight, dtype),
        second: None,
        bias: bias.map(|bias| stack(bias, dtype)),
        so_far: None,
        offsets,
        plain: false,
    };
    product.run()
}

/// `dy W`, added by the product to what the gradient is so far: in place where nobody else has that.
pub(in super::super) fn backward_input(
    dy: CudaTensor,
    weight: CudaTensor,
    offsets: &ExpertOffsets<Cuda>,
    so_far: Option<CudaTensor>,
) -> CudaTensor {
    let dtype = dy.dtype();
    if !covers(offsets, dy.dims()[0]) {
        let dx = portable::grouped_linear_backward_input::<Cuda>(dy, weight, offsets);
        return match so_far {
            Some(so_far) => crate::elementwise::binary("AddTensor", so_far, dx, None),
            None => dx,
        };
    }
    let product = Rows {
        a: dy,
        weight: stack(weight, dtype),
        second: None,
        bias: None,
        so_far: so_far.map(|so_far| cast(so_far, dtype).into_packed()),
        offsets,
        plain: true,
    };
    product.run()
}

/// `dy[0] W[0] + dy[1] W[1]`, added to what the gradient is so far.
pub(in super::super) fn backward_input_pair(
    dy: [CudaTensor; 2],
    weight: [CudaTensor; 2],
    offsets: &ExpertOffsets<Cuda>,
    so_far: Option<CudaTensor>,
) -> CudaTensor {
    let ([first, second], [weight, other]) = (dy, weight);
    let dtype = first.dtype();
    let (rows, sizes) = (first.dims()[0], [weight.dims()[1], weight.dims()[2]]);
    let alike = first.dims() == second.dims() && weight.dims() == other.dims();
    let at_once = alike
        && second.dtype() == dtype
        && covers(offsets, rows)
        && GroupedPath::of(first.gpu(), dtype, rows, sizes) == GroupedPath::Hopper;
    if !at_once {
        let dx = backward_input(first, weight, offsets, so_far);
        return backward_input(second, other, offsets, Some(dx));
    }
    let product = Rows {
        a: first,
        weight: stack(weight, dtype),
        second: Some((second, stack(other, dtype))),
        bias: None,
        so_far: so_far.map(|so_far| cast(so_far, dtype).into_packed()),
        offsets,
        plain: true,
    };
    product.run()
}

pub(in super::super) fn accumulate_weight_grad(
    x: CudaTensor,
    dy: CudaTensor,
    offsets: &ExpertOffsets<Cuda>,
    slot: GradSlot<Cuda>,
) -> CudaTensor {
    if !covers(offsets, x.dims()[0]) {
        return portable::grouped_linear_accumulate_weight_grad::<Cuda>(x, dy, offsets, slot);
    }
    let (x, dy) = match (x.dtype(), dy.dtype()) {
        (a, b) if a == b => (x, dy),
        _ => (cast(x, DType::F32), cast(dy, DType::F32)),
    };
    let (gpu, dtype) = (x.gpu(), x.dtype());
    let (m, n, experts) = (dy.dims()[1], x.dims()[1], offsets.num_experts());
    let (sum, accumulate) = open_slot(slot, &x, &[experts, m, n]);
    if sum.count() == 0 {
        return sum;
    }
    let starts = starts(offsets);
    let tiles = |side: usize| experts * m.div_ceil(side) * n.div_ceil(side);
    let path = GroupedPath::of(gpu, dtype, x.dims()[0], [m, n]);
    let [experts, m, n] = [experts, m, n].map(|size| size as i32);
    let (k, unused, accumulate) = (0, 0, i32::from(accumulate));
    let mut defines = vec![("TYPE", type_name(dtype)), ("OUT", type_name(sum.dtype()))];
    match path {
        GroupedPath::Hopper => {
            let (x, dy) = (aligned(x), aligned(dy));
            let kernel = gpu
                .kernel("grouped_linear_hopper", &defines, "weights")
                .or_panic();
            let a_map = map_of_rows(&dy, 64).or_panic();
            let b_map = map_of_rows(&x, 64).or_panic();
            let problem = HopperProblem {
                experts,
                m,
                n,
                k,
                accumulate,
                pairs: 1,
            };
            let launch = Launch::linear(gpu.multiprocessors, HOPPER_THREADS).shared(HOPPER_SHARED);
            // SAFETY: the maps describe the rows; the sum is packed and the caller's to write.
            unsafe {
                launch!(gpu, kernel, launch; a_map, b_map, sum.address(), starts.address(), problem)
                    .or_panic();
            }
        }
        GroupedPath::TensorCores => {
            let (x, dy) = (aligned(x), aligned(dy));
            let stages = stages(gpu);
            let stages_text = stages.to_string();
            defines.push(("STAGES", stages_text.as_str()));
            let kernel = gpu.kernel("grouped_linear", &defines, "weights").or_panic();
            let problem = Problem {
                a_stride: dy.strides()[0],
                b_stride: x.strides()[0],
                experts,
                m,
                n,
                k,
                accumulate,
                unused,
            };
            let launch = Launch::linear(blocks(gpu, tiles(TILE), 2), 128).shared(stages * STAGE);
            // SAFETY: rows of the sizes and strides given, on boundaries of 16 bytes; the sum is packed and the caller's to
            // write.
            unsafe {
                launch!(gpu, kernel, launch; sum.address(), dy.address(), x.address(), starts.address(), problem)
                    .or_panic();
            }
        }
        GroupedPath::Generic => {
            let kernel = gpu
                .kernel("grouped_linear_generic", &defines, "weights")
                .or_panic();
            let problem = Strided {
                a_outer: dy.strides()[1],
                a_inner: dy.strides()[0],
                b_outer: x.strides()[1],
                b_inner: x.strides()[0],
                b_expert: 0,
                experts,
                m,
                n,
                k,
                accumulate,
                unused,
            };
            let launch = Launch::linear(blocks(gpu, tiles(64), 4), 256);
            // SAFETY: rows of the sizes and strides given; the sum is packed and the caller's to write.
            unsafe {
                launch!(gpu, kernel, launch; sum.address(), dy.address(), x.address(), starts.address(), problem)
                    .or_panic();
            }
        }
    }
    sum
}

pub(in super::super) fn accumulate_bias_grad(
    dy: CudaTensor,
    offsets: &ExpertOffsets<Cuda>,
    slot: GradSlot<Cuda>,
) -> CudaTensor {
    let (rows, n, experts) = (dy.dims()[0], dy.dims()[1], offsets.num_experts());
    if i32::try_from(rows).is_err() || experts > usize::from(u16::MAX) {
        return portable::grouped_linear_accumulate_bias_grad::<Cuda>(dy, offsets, slot);
    }
    let dy = aligned(as_rows(dy));
    let gpu = dy.gpu();
    let (sum, accumulate) = open_slot(slot, &dy, &[experts, n]);
    let starts = starts(offsets);
    let defines = [
        ("TYPE", type_name(dy.dtype())),
        ("OUT", type_name(sum.dtype())),
    ];
    let kernel = gpu
        .kernel("grouped_linear_generic", &defines, "bias")
        .or_panic();
    let launch = Launch::grid([n.div_ceil(32), experts, 1], 256);
    // SAFETY: rows of the stride given; the sum is packed and the caller's to write.
    unsafe {
        launch!(gpu, kernel, launch; sum.address(), dy.address(), starts.address(), dy.strides()[0], n as i32,
            i32::from(accumulate))
        .or_panic();
    }
    sum
}
