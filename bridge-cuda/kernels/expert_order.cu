// A stable counting sort of assignments by expert. Maths: bridge-ops/src/moe/permute.rs.
//
// Definitions: INDEX (experts). experts: [n]; a value outside 0 .. buckets - 2 goes to the last bucket, which is no expert's.
// order: [n], order[i] = the assignment in place i; inverse: [n], its inverse; offsets: [buckets]. A warp owns WARP_SHARE
// neighbouring assignments and takes them in order, so that equal experts keep theirs: nothing depends on who comes first.
// `count`: how many of each expert each warp has; `starts`: from that, where each warp puts its first of each; `place`.
// counts: [warps, buckets]. Launcher: src/ops/moe/permute.rs.
#include "common.cuh"

typedef INDEX I;

constexpr int WARPS = 8;
constexpr int WARP_SHARE = 512;

__device__ __forceinline__ int bucket_of(I expert, i32 buckets) { return expert >= 0 && expert < buckets - 1 ? (int)expert : buckets - 1; }

// Dynamic shared memory: [WARPS, buckets] counters.
__device__ __forceinline__ i32* counters() {
    extern __shared__ __align__(16) char memory[];
    return reinterpret_cast<i32*>(memory);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) count(i32* counts, const I* experts, i64 n, i32 buckets) {
    i32* all = counters();
    i64 warp = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    i32* own = all + threadIdx.x / 32 * buckets;
    for (int b = lane; b < buckets; b += 32) own[b] = 0;
    __syncwarp();
    for (int i = lane; i < WARP_SHARE; i += 32) {
        i64 at = warp * WARP_SHARE + i;
        if (at < n) atomicAdd(own + bucket_of(experts[at], buckets), 1);
    }
    __syncwarp();
    if (warp * WARP_SHARE < n)
        for (int b = lane; b < buckets; b += 32) counts[warp * buckets + b] = own[b];
}

// One block. Turns counts into starts, in place.
extern "C" __global__ void __launch_bounds__(1024) starts(i32* counts, i32* offsets, i64 warps, i32 buckets) {
    __shared__ i32 totals[32];
    i32 before = 0;
    for (int first = 0; first < buckets; first += 1024) {
        int b = first + threadIdx.x, lane = threadIdx.x % 32;
        i32 own = 0;
        if (b < buckets) {
            #pragma unroll 8
            for (i64 w = 0; w < warps; w++) own += counts[w * buckets + b];
        }
        // Sums of the buckets up to this one.
        i32 sum = own;
        #pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            i32 left = __shfl_up_sync(FULL_MASK, sum, step);
            if (lane >= step) sum += left;
        }
        __syncthreads();
        if (lane == 31) totals[threadIdx.x / 32] = sum;
        __syncthreads();
        i32 all = 0;
        for (int w = 0; w < 32; w++) {
            if (w == (int)(threadIdx.x / 32)) sum += all;
            all += totals[w];
        }
        if (b < buckets) {
            i32 at = before + sum - own;
            offsets[b] = at;
            #pragma unroll 8
            for (i64 w = 0; w < warps; w++) {
                i32 here = counts[w * buckets + b];
                counts[w * buckets + b] = at;
                at += here;
            }
        }
        before += all;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) place(i32* order, i32* inverse, const i32* starts, const I* experts, i64 n, i32 buckets) {
    i32* all = counters();
    i64 warp = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (warp * WARP_SHARE >= n) return;
    i32* own = all + threadIdx.x / 32 * buckets;
    for (int b = lane; b < buckets; b += 32) own[b] = starts[warp * buckets + b];
    __syncwarp();
    for (int i = lane; i < WARP_SHARE; i += 32) {
        i64 at = warp * WARP_SHARE + i;
        int bucket = at < n ? bucket_of(experts[at], buckets) : -1;
        u32 alike = __match_any_sync(FULL_MASK, bucket);
        int earlier = __popc(alike & ((1u << lane) - 1));
        i32 to = at < n ? own[bucket] + earlier : 0;
        __syncwarp();
        if (at < n) {
            if (earlier == 0) own[bucket] += __popc(alike);
            order[to] = (i32)at;
            inverse[at] = to;
        }
        __syncwarp();
    }
}
