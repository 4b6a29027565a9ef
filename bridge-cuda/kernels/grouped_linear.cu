// Products of rows that are sorted by expert with their experts' matrices, on the tensor cores (mma.sync).
//
//   rows (RIGHT 0):  c[r] = a[r] b[e]^T + bias[e]       a: [rows, k], b: [E, n, k]          a linear layer
//   rows (RIGHT 1):  c[r] = so_far[r] + a[r] b[e]       a: [rows, k], b: [E, k, n]          the gradient of its input
//   weights:         c[e] = a[rows of e]^T b[rows of e], added to c or in its place; a: [rows, m], b: [rows, n], c: [E, m, n]
//
// Rows of expert e are offsets[e] .. offsets[e + 1]. Definitions: TYPE (bf16 or f16: a, b, bias, so_far and c of `rows`), STAGES,
// OUT (c of `weights`), RIGHT. Columns are packed; rows have a stride; everything is aligned to 16 bytes, and m, n and k (not
// the number of rows) are multiples of 8. Summed in float.
//
// A block of WARPS_M x WARPS_N warps computes tiles of TILE_M x TILE_N, a warp 64 x 64 of it as mma.sync m16n8k16. Both
// operands pass through shared memory in slices of DEPTH along the sum, loaded by cp.async STAGES - 1 slices ahead. A slice
// lies as it does in memory, its 16-byte pieces swizzled so that ldmatrix, plain where the sum runs along a row and
// transposed where it runs across rows, meets no bank twice. Blocks are as many as the GPU holds and take every
// gridDim.x-th tile. Nothing is added atomically. Launcher: src/ops/moe/grouped_linear.rs.
#include "grouped.cuh"
#include "tensor_core.cuh"

typedef TYPE T;

constexpr int WARPS_M = 2, WARPS_N = 2;
constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int TILE_M = WARPS_M * 64, TILE_N = WARPS_N * 64;
constexpr int DEPTH = 64;


// Mirrors `Problem` in src/ops/moe/grouped_linear.rs. Strides between rows, in elements.
struct Problem {
    i64 a_stride, b_stride;
    i32 experts, m, n, k;
    i32 accumulate, unused;
};

// One operand's part of a tile: N rows of c (or columns) by DEPTH of the sum.
// ALONG: the sum runs along the operand's rows, so that a slice is [N, DEPTH]; else across them, [DEPTH, N].
template <bool ALONG, int N> struct Operand {
    static constexpr int CHUNKS = (ALONG ? DEPTH : N) / 8;   // 16-byte pieces in a row of a slice.
    static constexpr int ROWS = THREADS / CHUNKS;            // Rows that the block copies at once, a multiple of 8.
    static constexpr int COPIES = N * DEPTH / 8 / THREADS;
    static constexpr int ELEMENTS = N * DEPTH;
    static_assert(ROWS % 8 == 0 && COPIES * ROWS == (ALONG ? N : DEPTH), "a thread keeps its place in the swizzle");

    const T* from;
    i64 stride;
    i32 room;    // ALONG: rows this thread may read, counted from its first. Else the same along the sum.
    i32 depth;   // ALONG: extent of the sum from this thread's piece on. Else whether its columns exist.
    int to;

    // `matrix`: its first element that the tile reads. `outer`: rows (or columns) from there to the end, `inner`: extent of
    // the sum.
    __device__ __forceinline__ Operand(const T* matrix, i64 step, i32 outer, i32 inner) {
        int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        stride = step;
        from = matrix + row * step + chunk * 8;
        to = (row * CHUNKS + (chunk ^ (row & 7))) * 8;
        room = (ALONG ? outer : inner) - row;
        depth = (ALONG ? inner : outer) - chunk * 8;
    }

    __device__ __forceinline__ void fetch(T* slice, int start) const {
        #pragma unroll
        for (int i = 0; i < COPIES; i++) {
            bool inside = ALONG ? i * ROWS < room && start < depth : start + i * ROWS < room && depth > 0;
            const T* piece = ALONG ? from + i * ROWS * stride + start : from + (start + i * ROWS) * stride;
            copy_async(slice + to + i * ROWS * CHUNKS * 8, piece, inside);
        }
    }

    static __device__ __forceinline__ const T* place(const T* slice, int row, int chunk) { return slice + (row * CHUNKS + (chunk ^ (row & 7))) * 8; }

    // As the left operand: rows [at, at + 16) of c, 16 of the sum.
    static __device__ __forceinline__ void left(u32 (&r)[4], const T* slice, int at, int step) {
        int lane = threadIdx.x % 32;
        if (ALONG) ldmatrix(r, place(slice, at + lane % 16, step * 2 + lane / 16));
        else ldmatrix_transposed(r, place(slice, step * 16 + lane / 16 * 8 + lane % 8, at / 8 + lane / 8 % 2));
    }
    // As the right operand: columns [at, at + 16) of c as (r0, r1) and (r2, r3), 16 of the sum.
    static __device__ __forceinline__ void right(u32 (&r)[4], const T* slice, int at, int step) {
        int lane = threadIdx.x % 32;
        if (ALONG) ldmatrix(r, place(slice, at + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        else ldmatrix_transposed(r, place(slice, step * 16 + lane / 8 % 2 * 8 + lane % 8, at / 8 + lane / 16));
    }
};

typedef float Sums[4][8][4];

// sums (a warp's 64 x 64) = a b over `depth`. Leaves shared memory free to be filled again.
template <typename A, typename B> __device__ __forceinline__ void multiply(Sums& sums, T* memory, const A& a, const B& b, i32 depth) {
    #pragma unroll
    for (int i = 0; i < 4; i++)
        #pragma unroll
        for (int j = 0; j < 8; j++)
            #pragma unroll
            for (int k = 0; k < 4; k++) sums[i][j][k] = 0;
    constexpr int STAGE = A::ELEMENTS + B::ELEMENTS;
    int slices = (depth + DEPTH - 1) / DEPTH;
    #pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < slices) {
            a.fetch(memory + s * STAGE, s * DEPTH);
            b.fetch(memory + s * STAGE + A::ELEMENTS, s * DEPTH);
        }
        commit();
    }
    int warp = threadIdx.x / 32, row = warp / WARPS_N * 64, column = warp % WARPS_N * 64;
    int stage = 0, ahead = STAGES - 1;
    for (int s = 0; s < slices; s++) {
        wait<STAGES - 2>();
        __syncthreads();
        if (s + STAGES - 1 < slices) {
            a.fetch(memory + ahead * STAGE, (s + STAGES - 1) * DEPTH);
            b.fetch(memory + ahead * STAGE + A::ELEMENTS, (s + STAGES - 1) * DEPTH);
        }
        commit();
        const T* left = memory + stage * STAGE;
        const T* right = left + A::ELEMENTS;
        #pragma unroll
        for (int step = 0; step < DEPTH / 16; step++) {
            u32 fa[4][4], fb[4][4];
            #pragma unroll
            for (int i = 0; i < 4; i++) A::left(fa[i], left, row + i * 16, step);
            #pragma unroll
            for (int j = 0; j < 4; j++) B::right(fb[j], right, column + j * 16, step);
            #pragma unroll
            for (int i = 0; i < 4; i++)
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    Mma<T>::run(sums[i][j * 2], fa[i], fb[j][0], fb[j][1]);
                    Mma<T>::run(sums[i][j * 2 + 1], fa[i], fb[j][2], fb[j][3]);
                }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        ahead = ahead + 1 == STAGES ? 0 : ahead + 1;
    }
    wait<0>();
    __syncthreads();
}

#ifdef RIGHT
// bias: [E, n] or null. so_far: like c, or null; may be c itself.
extern "C" __global__ void __launch_bounds__(THREADS, 2) rows(T* c, const T* a, const T* b, const T* bias, const T* so_far, const i32* offsets, Problem p) {
    extern __shared__ __align__(128) char memory[];
    __shared__ i32 before[MAX_EXPERTS + 1];
    count_tiles(before, offsets, p.experts, TILE_M);
    i64 columns = (p.n + TILE_N - 1) / TILE_N, tiles = before[p.experts] * columns;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        RowTile tile = find_tile(before, offsets, p.experts, TILE_M, columns, t);
        i32 column = tile.column * TILE_N;
        Operand<true, TILE_M> left(a + tile.row * p.a_stride, p.a_stride, tile.end - tile.row, p.k);
        const T* matrix = b + (i64)tile.expert * p.n * p.k + (RIGHT ? column : column * p.b_stride);
        Operand<!RIGHT, TILE_N> right(matrix, p.b_stride, p.n - column, p.k);
        Sums sums;
        multiply(sums, reinterpret_cast<T*>(memory), left, right, p.k);

        i32 own = column + warp % WARPS_N * 64;
        #pragma unroll
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                i32 row = tile.row + warp / WARPS_N * 64 + i * 16 + half * 8 + lane / 4;
                bool exists = row < tile.end;
                T* line = c + (i64)row * p.n;
                #pragma unroll
                for (int group = 0; group < 2; group++) {
                    u32 packed[4];
                    #pragma unroll
                    for (int j = 0; j < 4; j++) {
                        i32 at = own + (group * 4 + j) * 8 + lane % 4 * 2;
                        float low = sums[i][group * 4 + j][half * 2], high = sums[i][group * 4 + j][half * 2 + 1];
                        if (bias != nullptr && at < p.n) {
                            Pack<T, 2> add = load_pack<T, 2>(bias + (i64)tile.expert * p.n + at);
                            low += load(add.at[0]), high += load(add.at[1]);
                        }
                        if (so_far != nullptr && exists && at < p.n) {
                            Pack<T, 2> add = load_pack<T, 2>(so_far + (i64)row * p.n + at);
                            low += load(add.at[0]), high += load(add.at[1]);
                        }
                        packed[j] = Pair<T>::pack(low, high);
                    }
                    transpose_quad(packed);
                    i32 at = own + (group * 4 + lane % 4) * 8;
                    if (exists && at < p.n) store_pack<u32, 4>(reinterpret_cast<u32*>(line + at), {packed[0], packed[1], packed[2], packed[3]});
                }
            }
    }
}
#endif

#ifdef OUT
extern "C" __global__ void __launch_bounds__(THREADS, 2) weights(OUT* c, const T* a, const T* b, const i32* offsets, Problem p) {
    extern __shared__ __align__(128) char memory[];
    i64 across = (p.m + TILE_M - 1) / TILE_M, each = across * ((p.n + TILE_N - 1) / TILE_N);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (i64 t = blockIdx.x; t < each * p.experts; t += gridDim.x) {
        i64 expert = t / each;
        i32 top = (i32)(t % each % across) * TILE_M, column = (i32)(t % each / across) * TILE_N;
        i32 first = offsets[expert], count = offsets[expert + 1] - first;
        if (count == 0 && p.accumulate) continue;
        Operand<false, TILE_M> left(a + first * p.a_stride + top, p.a_stride, p.m - top, count);
        Operand<false, TILE_N> right(b + first * p.b_stride + column, p.b_stride, p.n - column, count);
        Sums sums;
        multiply(sums, reinterpret_cast<T*>(memory), left, right, count);

        #pragma unroll
        for (int i = 0; i < 4; i++)
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                i32 row = top + warp / WARPS_N * 64 + i * 16 + half * 8 + lane / 4;
                OUT* line = c + (expert * p.m + row) * p.n;
                #pragma unroll
                for (int j = 0; j < 8; j++) {
                    i32 at = column + warp % WARPS_N * 64 + j * 8 + lane % 4 * 2;
                    if (row < p.m && at < p.n) {
                        float low = sums[i][j][half * 2], high = sums[i][j][half * 2 + 1];
                        if (p.accumulate) {
                            Pack<OUT, 2> sum = load_pack<OUT, 2>(line + at);
                            low += load(sum.at[0]), high += load(sum.at[1]);
                        }
                        store_pack<OUT, 2>(line + at, {store<OUT>(low), store<OUT>(high)});
                    }
                }
            }
    }
}
#endif
