//! Sorting along a dimension. Kernels: `kernels/sort.cu`.

use burn_backend::{DType, TensorMetadata};

use crate::device::{Launch, launch};
use crate::elementwise::{blocks, cast, type_name};
use crate::error::OrPanic;
use crate::tensor::CudaTensor;

/// Elements that a block sorts in shared memory; `TILE` of the kernel file.
const TILE: usize = 1024;

/// Values sorted along dimension `d`, and the positions they came from as i32. Equal elements keep their order.
#[track_caller]
pub(crate) fn sort(x: CudaTensor, d: usize, descending: bool) -> (CudaTensor, CudaTensor) {
    let last = x.dims().len() - 1;
    let moved = x.swap_dims(d, last).packed();
    let shape = moved.dims().to_vec();
    let n = shape[last];
    let gpu = moved.gpu();
    if moved.count() == 0 {
        let places = CudaTensor::empty(gpu, &shape, DType::I32);
        return (moved.swap_dims(d, last), places.swap_dims(d, last));
    }
    let rows = moved.count() / n;
    let padded = n.next_power_of_two().max(TILE);
    let total = rows * padded;
    let keys = CudaTensor::empty(gpu, &[rows, padded], moved.dtype());
    let places = CudaTensor::empty(gpu, &[rows, padded], DType::I32);
    let defines = [
        ("TYPE", type_name(moved.dtype())),
        ("DESCENDING", if descending { "1" } else { "0" }),
    ];
    let kernel = |entry| gpu.kernel("sort", &defines, entry).or_panic();
    let n_places = i32::try_from(n).expect("rows of fewer than 2^31 elements");
    let tiles = |first: usize, last: usize| {
        // SAFETY: whole tiles of `keys` and `places`, which hold `total` elements each.
        unsafe {
            launch!(gpu, kernel("tiles"), Launch::linear(total / TILE, TILE as u32 / 2);
                keys.address(), places.address(), padded as i64, first as i64, last as i64, n_places)
            .or_panic();
        }
    };
    // SAFETY: packed operands of the sizes given.
    unsafe {
        launch!(gpu, kernel("load_rows"), Launch::linear(blocks(gpu, total, 4), 256);
            keys.address(), places.address(), moved.address(), total as i64, n as i64, padded as i64)
        .or_panic();
    }
    tiles(2, TILE);
    let mut run = TILE * 2;
    while run <= padded {
        let mut distance = run / 2;
        while distance >= TILE {
            let pairs = total / 2;
            // SAFETY: as above; each thread owns one pair.
            unsafe {
                launch!(gpu, kernel("far"), Launch::linear(pairs.div_ceil(256), 256);
                    keys.address(), places.address(), pairs as i64, padded as i64, run as i64, distance as i64, n_places)
                .or_panic();
            }
            distance /= 2;
        }
        tiles(run, run);
        run *= 2;
    }
    let take = |sorted: CudaTensor| {
        sorted
            .narrow(1, 0, n)
            .packed()
            .reshape(&shape)
            .swap_dims(d, last)
    };
    (take(keys), take(places))
}

/// Positions of the `k` largest elements along dimension `d`, the largest first.
#[track_caller]
pub(crate) fn arg_top(x: CudaTensor, d: usize, k: usize, dtype: DType) -> CudaTensor {
    let (_, places) = sort(x, d, true);
    cast(places.narrow(d, 0, k), dtype)
}
