// Products of rows that are sorted by expert with their experts' matrices, as grouped_linear.cu has them, for Hopper: wgmma
// on operands that the tensor memory accelerator brings to shared memory.
//
//   rows (RIGHT 0):  c[r] = a[r] b[e]^T + bias[e]       a: [rows, k], b: [E, n, k]
//   rows (RIGHT 1):  c[r] = so_far[r] + a[r] b[e]       a: [rows, k], b: [E, k, n], and with two pairs + a2[r] b2[e]
//   weights:         c[e] = a[rows of e]^T b[rows of e], added to c or in its place; a: [rows, m], b: [rows, n], c: [E, m, n]
//
// Definitions: TYPE (bf16 or f16: a, b, bias, so_far and c of `rows`), OUT (c of `weights`), RIGHT. Rows of expert e are
// offsets[e] .. offsets[e + 1]. Sizes and strides as in grouped_linear.cu. Summed in float.
//
// One block on each multiprocessor takes every gridDim.x-th tile of 128 x 256. Its first warpgroup keeps the accelerator busy:
// slices of 64 along the sum, STAGES of them in shared memory, 48 KiB each. The other two compute 64 x 256 each. A slice of an
// operand lies in rows of 128 bytes: along the sum, [rows of c, 64]; across it, blocks of [64 of the sum, 64 rows or columns].
// Where the sum runs over the rows of an expert, its last slice may reach into the next expert's rows, which are cleared in
// shared memory. Rows of c past an expert's last are computed from whatever is there and not written.
// Launcher: src/ops/moe/grouped_linear.rs.
#include "grouped.cuh"
#include "hopper.cuh"

typedef TYPE T;

constexpr int TILE_M = 128, TILE_N = 256;
constexpr int DEPTH = 64;
constexpr int STAGES = 4;
constexpr int CONSUMERS = 2;  // Warpgroups that compute.
constexpr int THREADS = (CONSUMERS + 1) * 128;
constexpr int BLOCK = 64 * 128;             // Bytes of 64 rows of a slice.
constexpr int A_BYTES = TILE_M / 64 * BLOCK;
constexpr int STAGE_BYTES = A_BYTES + TILE_N / 64 * BLOCK;

// Mirrors `HopperProblem` in src/ops/moe/grouped_linear.rs.
struct Problem {
    i32 experts, m, n, k;
    i32 accumulate, pairs;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

typedef float Sums[TILE_N / 8][4];

// The slices in shared memory: filled in turn by one thread, emptied by the warps that compute.
struct Ring {
    char* memory;
    u64* full;
    u64* empty;
    int stage;
    u32 parity;

    __device__ __forceinline__ Ring(char* dynamic, u64 (&filled)[STAGES], u64 (&emptied)[STAGES]) {
        u32 past = shared_address(dynamic) % 1024;
        memory = dynamic + (past ? 1024 - past : 0);
        full = filled, empty = emptied;
        stage = 0, parity = 0;
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; s++) {
                barrier_init(full + s, 1);
                barrier_init(empty + s, CONSUMERS * 4);
            }
            barriers_ready();
        }
        __syncthreads();
    }
    __device__ __forceinline__ char* slice() const { return memory + stage * STAGE_BYTES; }
    __device__ __forceinline__ void next() {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        parity ^= stage == 0;
    }
    // For the thread that fills: the place of the next slice, once it is free.
    __device__ __forceinline__ char* fill() const {
        barrier_wait(empty + stage, parity ^ 1);
        barrier_expect(full + stage, STAGE_BYTES);
        return slice();
    }
};

// sums = a b over the slices of a tile. ACROSS: rows of the slices run across the sum. `depth`: extent of the sum, of which the
// last slice has what is left over; with CLEAR what follows it is not zero.
template <int A_ACROSS, int B_ACROSS, bool CLEAR> __device__ __forceinline__ void multiply(Sums& sums, Ring& ring, i32 depth) {
    #pragma unroll
    for (int j = 0; j < TILE_N / 8; j++)
        #pragma unroll
        for (int k = 0; k < 4; k++) sums[j][k] = 0;
    int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    int slices = (depth + DEPTH - 1) / DEPTH, before = 0;
    for (int s = 0; s < slices; s++) {
        barrier_wait(ring.full + ring.stage, ring.parity);
        char* slice = ring.slice();
        if (CLEAR && (s + 1) * DEPTH > depth) {
            // Whole rows, so the swizzle does not matter.
            int row = depth - s * DEPTH, pieces = (DEPTH - row) * 8;
            for (int i = threadIdx.x - 128; i < pieces * (STAGE_BYTES / BLOCK); i += CONSUMERS * 128)
                store_pack<u32, 4>(reinterpret_cast<u32*>(slice + i / pieces * BLOCK + row * 128 + i % pieces * 16), {0, 0, 0, 0});
            shared_written();
            threads_sync(1, CONSUMERS * 128);
        }
        u64 a = operand(slice + group * BLOCK, BLOCK, 1024), b = operand(slice + A_BYTES, BLOCK, 1024);
        products_begin();
        #pragma unroll
        for (int step = 0; step < DEPTH / 16; step++)
            WarpgroupMma<T, A_ACROSS, B_ACROSS>::run(sums, a + step * (A_ACROSS ? 2048 : 32) / 16, b + step * (B_ACROSS ? 2048 : 32) / 16);
        products_commit();
        // The slice before this one has been read.
        products_wait<1>();
        if (s > 0 && lane == 0) barrier_arrive(ring.empty + before);
        before = ring.stage;
        ring.next();
    }
    products_wait<0>();
    if (slices > 0 && lane == 0) barrier_arrive(ring.empty + before);
}

#endif

#ifdef RIGHT
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// Starts the copies of one slice of both operands.
__device__ __forceinline__ void fetch(char* slice, const TensorMap& a, const TensorMap& b, const RowTile& tile, i32 k, u64* barrier) {
    i32 column = tile.column * TILE_N;
    copy_box(slice, a, k, tile.row, barrier);
    if (RIGHT) {
        #pragma unroll
        for (int j = 0; j < TILE_N / 64; j++) copy_box(slice + A_BYTES + j * BLOCK, b, column + j * 64, k, tile.expert, barrier);
    } else {
        copy_box(slice + A_BYTES, b, k, column, tile.expert, barrier);
    }
}
#endif

// bias: [E, n] or null. so_far: like c, or null; may be c itself.
extern "C" __global__ void __launch_bounds__(THREADS, 1) rows(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const __grid_constant__ TensorMap a2, const __grid_constant__ TensorMap b2,
                                                                     T* c, const T* bias, const T* so_far, const i32* offsets, Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char memory[];
    __shared__ i32 before[MAX_EXPERTS + 1];
    __shared__ u64 full[STAGES], empty[STAGES];
    Ring ring(memory, full, empty);
    count_tiles(before, offsets, p.experts, TILE_M);
    i64 columns = (p.n + TILE_N - 1) / TILE_N, tiles = before[p.experts] * columns;
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x > 0) return;
        fetch_descriptor(a);
        fetch_descriptor(b);
        for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
            RowTile tile = find_tile(before, offsets, p.experts, TILE_M, columns, t);
            for (i32 pair = 0; pair < p.pairs; pair++) {
                for (i32 k = 0; k < p.k; k += DEPTH) {
                    char* slice = ring.fill();
                    u64* barrier = ring.full + ring.stage;
                    if (pair == 0) fetch(slice, a, b, tile, k, barrier);
                    else fetch(slice, a2, b2, tile, k, barrier);
                    ring.next();
                }
            }
        }
        return;
    }
    more_registers<232>();
    int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        RowTile tile = find_tile(before, offsets, p.experts, TILE_M, columns, t);
        i32 column = tile.column * TILE_N;
        Sums sums;
        multiply<0, RIGHT, false>(sums, ring, p.pairs * ((p.k + DEPTH - 1) / DEPTH * DEPTH));
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            i32 row = tile.row + warp * 16 + half * 8 + lane / 4;
            bool exists = row < tile.end;
            T* line = c + (i64)row * p.n;
            #pragma unroll
            for (int group = 0; group < TILE_N / 32; group++) {
                u32 packed[4];
                #pragma unroll
                for (int j = 0; j < 4; j++) {
                    i32 at = column + (group * 4 + j) * 8 + lane % 4 * 2;
                    float low = sums[group * 4 + j][half * 2], high = sums[group * 4 + j][half * 2 + 1];
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
                i32 at = column + (group * 4 + lane % 4) * 8;
                if (exists && at < p.n) store_pack<u32, 4>(reinterpret_cast<u32*>(line + at), {packed[0], packed[1], packed[2], packed[3]});
            }
        }
    }
#endif
}
#endif

#ifdef OUT
extern "C" __global__ void __launch_bounds__(THREADS, 1) weights(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, OUT* c, const i32* offsets, Problem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ __align__(1024) char memory[];
    __shared__ u64 full[STAGES], empty[STAGES];
    Ring ring(memory, full, empty);
    i64 down = (p.m + TILE_M - 1) / TILE_M, each = down * ((p.n + TILE_N - 1) / TILE_N), tiles = each * p.experts;
    if (threadIdx.x < 128) {
        fewer_registers<40>();
        if (threadIdx.x > 0) return;
        fetch_descriptor(a);
        fetch_descriptor(b);
        for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
            i32 expert = (i32)(t / each), top = (i32)(t % each % down) * TILE_M, column = (i32)(t % each / down) * TILE_N;
            i32 end = offsets[expert + 1];
            for (i32 row = offsets[expert]; row < end; row += DEPTH) {
                char* slice = ring.fill();
                u64* barrier = ring.full + ring.stage;
                #pragma unroll
                for (int j = 0; j < TILE_M / 64; j++) copy_box(slice + j * BLOCK, a, top + j * 64, row, barrier);
                #pragma unroll
                for (int j = 0; j < TILE_N / 64; j++) copy_box(slice + A_BYTES + j * BLOCK, b, column + j * 64, row, barrier);
                ring.next();
            }
        }
        return;
    }
    more_registers<232>();
    int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        i64 expert = t / each;
        i32 top = (i32)(t % each % down) * TILE_M, column = (i32)(t % each / down) * TILE_N;
        i32 count = offsets[expert + 1] - offsets[expert];
        if (count == 0 && p.accumulate) continue;
        Sums sums;
        multiply<1, 1, true>(sums, ring, count);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            i32 row = top + warp * 16 + half * 8 + lane / 4;
            OUT* line = c + (expert * p.m + row) * p.n;
            #pragma unroll
            for (int j = 0; j < TILE_N / 8; j++) {
                i32 at = column + j * 8 + lane % 4 * 2;
                if (row < p.m && at < p.n) {
                    float low = sums[j][half * 2], high = sums[j][half * 2 + 1];
                    if (p.accumulate) {
                        Pack<OUT, 2> sum = load_pack<OUT, 2>(line + at);
                        low += load(sum.at[0]), high += load(sum.at[1]);
                    }
                    store_pack<OUT, 2>(line + at, {store<OUT>(low), store<OUT>(high)});
                }
            }
        }
    }
#endif
}
#endif
