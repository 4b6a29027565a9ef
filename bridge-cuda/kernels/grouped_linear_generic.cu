// Products of rows that are sorted by expert with their experts' matrices, for any float type, size and strides.
//
//   rows:     c[r] = so_far[r] + bias[e] + sum over k of a(r, k) b(e, n, k)     a: [rows, k], c: [rows, n] packed
//   weights:  c[e] = sum over rows r of e of a(r, m) b(r, n), added to c or in its place; c: [E, m, n] packed
//
// Rows of expert e are offsets[e] .. offsets[e + 1]. Definitions: TYPE (a, b, bias, so_far and c of `rows`), OUT (c of
// `weights`). A block of 16 x 16 threads computes tiles of 64 x 64, a thread 4 x 4 of it, through slices of 16 along the sum
// in shared memory. Meant for checks and for sizes that the tensor-core kernels do not take (grouped_linear.cu); the same
// scheme of tiles. Launcher: src/ops/moe/grouped_linear.rs.
#include "grouped.cuh"

typedef TYPE T;
typedef Compute<T> Acc;

constexpr int SIDE = 16;
constexpr int TILE = 64;
constexpr int DEPTH = 16;

// Mirrors `Strided` in src/ops/moe/grouped_linear.rs. Steps in elements: of a and b along the rows (or columns) of c and
// along the sum, and of b from expert to expert.
struct Strided {
    i64 a_outer, a_inner, b_outer, b_inner, b_expert;
    i32 experts, m, n, k;
    i32 accumulate, unused;
};

struct Slices {
    Acc a[DEPTH][TILE + 1];
    Acc b[DEPTH][TILE + 1];
};

// sums = a b over `depth`; `rows` and `columns` of a and b exist.
__device__ __forceinline__ void multiply(Acc (&sums)[4][4], Slices& slices, const T* a, const T* b, const Strided& p, i32 rows, i32 columns, i32 depth) {
    int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] = 0;
    for (i32 start = 0; start < depth; start += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * DEPTH; i += SIDE * SIDE) {
            // Neighbouring threads read along whichever way the operand is packed.
            int outer = p.a_inner == 1 ? i / DEPTH : i % TILE, inner = p.a_inner == 1 ? i % DEPTH : i / TILE;
            bool inside = outer < rows && start + inner < depth;
            slices.a[inner][outer] = inside ? (Acc)load(a[outer * p.a_outer + (start + inner) * p.a_inner]) : (Acc)0;
            outer = p.b_inner == 1 ? i / DEPTH : i % TILE, inner = p.b_inner == 1 ? i % DEPTH : i / TILE;
            inside = outer < columns && start + inner < depth;
            slices.b[inner][outer] = inside ? (Acc)load(b[outer * p.b_outer + (start + inner) * p.b_inner]) : (Acc)0;
        }
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < DEPTH; k++)
            #pragma unroll
            for (int i = 0; i < 4; i++)
                #pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += slices.a[k][y + i * SIDE] * slices.b[k][x + j * SIDE];
    }
}

extern "C" __global__ void __launch_bounds__(SIDE * SIDE) rows(T* c, const T* a, const T* b, const T* bias, const T* so_far, const i32* offsets, Strided p) {
    __shared__ i32 before[MAX_EXPERTS + 1];
    __shared__ Slices slices;
    count_tiles(before, offsets, p.experts, TILE);
    i64 across = (p.n + TILE - 1) / TILE;
    int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    for (i64 t = blockIdx.x; t < before[p.experts] * across; t += gridDim.x) {
        RowTile tile = find_tile(before, offsets, p.experts, TILE, across, t);
        i32 column = tile.column * TILE;
        Acc sums[4][4];
        multiply(sums, slices, a + tile.row * p.a_outer, b + tile.expert * p.b_expert + column * p.b_outer, p, tile.end - tile.row, p.n - column, p.k);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                i64 row = tile.row + y + i * SIDE, at = column + x + j * SIDE;
                if (row < tile.end && at < p.n) {
                    Acc sum = sums[i][j];
                    if (bias != nullptr) sum += (Acc)load(bias[(i64)tile.expert * p.n + at]);
                    if (so_far != nullptr) sum += (Acc)load(so_far[row * p.n + at]);
                    c[row * p.n + at] = store<T>(sum);
                }
            }
    }
}

#ifdef OUT
extern "C" __global__ void __launch_bounds__(SIDE * SIDE) weights(OUT* c, const T* a, const T* b, const i32* offsets, Strided p) {
    __shared__ Slices slices;
    i64 down = (p.m + TILE - 1) / TILE, each = down * ((p.n + TILE - 1) / TILE);
    int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    for (i64 t = blockIdx.x; t < each * p.experts; t += gridDim.x) {
        i64 expert = t / each;
        i32 top = (i32)(t % each % down) * TILE, column = (i32)(t % each / down) * TILE;
        i32 first = offsets[expert], count = offsets[expert + 1] - first;
        Acc sums[4][4];
        multiply(sums, slices, a + first * p.a_inner + top * p.a_outer, b + first * p.b_inner + column * p.b_outer, p, p.m - top, p.n - column, count);
        #pragma unroll
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                i64 row = top + y + i * SIDE, at = column + x + j * SIDE;
                if (row < p.m && at < p.n) {
                    OUT* to = c + (expert * p.m + row) * p.n + at;
                    *to = store<OUT>(p.accumulate ? (Acc)load(*to) + sums[i][j] : sums[i][j]);
                }
            }
    }
}
#endif

// db[e] = the sum of dy over the rows of e, added to db or in its place. grid: (ceil(n / 32), E); block: 32 columns by 8 rows.
// dy: [rows, n], stride between rows in elements; db: [E, n] of OUT.
#ifdef OUT
extern "C" __global__ void __launch_bounds__(256) bias(OUT* db, const T* dy, const i32* offsets, i64 stride, i32 n, i32 accumulate) {
    __shared__ float partial[8][33];
    int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    i64 column = (i64)blockIdx.x * 32 + lane, expert = blockIdx.y;
    float sum = 0;
    if (column < n)
        for (i64 row = offsets[expert] + group; row < offsets[expert + 1]; row += 8) sum += (float)load(dy[row * stride + column]);
    partial[group][lane] = sum;
    __syncthreads();
    if (group == 0 && column < n) {
        #pragma unroll
        for (int i = 1; i < 8; i++) sum += partial[i][lane];
        OUT* to = db + expert * n + column;
        *to = store<OUT>(accumulate ? (float)load(*to) + sum : sum);
    }
}
#endif
