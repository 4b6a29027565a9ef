// Tiles of a product over rows that are sorted by expert. How many rows an expert has stands in memory of the device
// alone, so a launch has as many blocks as the GPU holds at once, and each finds out by itself which tiles are its own.
#pragma once
#include "common.cuh"

constexpr int MAX_EXPERTS = 1024;

// before[e] = tiles of `size` rows of the experts before e, for e in 0 .. experts (inclusive). All threads of the block
// take part; barrier included.
__device__ __forceinline__ void count_tiles(i32 (&before)[MAX_EXPERTS + 1], const i32* offsets, int experts, int size) {
    if (threadIdx.x < WARP) {
        int lane = threadIdx.x;
        i32 sum = 0;
        for (int start = 0; start < experts; start += WARP) {
            int e = start + lane;
            i32 tiles = e < experts ? (offsets[e + 1] - offsets[e] + size - 1) / size : 0;
            #pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                i32 left = __shfl_up_sync(FULL_MASK, tiles, step);
                if (lane >= step) tiles += left;
            }
            if (e < experts) before[e + 1] = sum + tiles;
            sum += __shfl_sync(FULL_MASK, tiles, 31);
        }
        if (lane == 0) before[0] = 0;
    }
    __syncthreads();
}

// A tile: which expert's, its first row and the first row after the expert, and its position along the columns.
struct RowTile {
    i32 expert;
    i32 row, end;
    i32 column;
};

// Tile `index` of those that `before` counts times `columns`. Tiles of one expert and column are neighbours, since they
// read the same part of its matrix.
__device__ __forceinline__ RowTile find_tile(const i32* before, const i32* offsets, int experts, int size, i64 columns, i64 index) {
    int low = 0, high = experts;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (before[middle] * columns <= index) low = middle;
        else high = middle;
    }
    i64 own = index - before[low] * columns;
    i32 tiles = before[low + 1] - before[low];
    RowTile tile;
    tile.expert = low;
    tile.column = (i32)(own / tiles);
    tile.row = offsets[low] + (i32)(own % tiles) * size;
    tile.end = offsets[low + 1];
    return tile;
}
