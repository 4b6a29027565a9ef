// A part of a tensor whose elements are the normal sequence of a key in row-major order: bridge-ops' `random::normal` has
// the definition, and this computes it in double as well. out: [count] packed float. Box and Muller's method gives a pair
// of numbers; a thread computes both and keeps its own, which costs little where doubles are fast and nothing in memory.
// Launcher: src/ops/random.rs.
#include "common.cuh"

// Mirrors `Region` in src/ops/random.rs: which part of each dimension, and the dimension.
struct Region {
    i64 start[MAX_RANK], len[MAX_RANK], shape[MAX_RANK];
    i64 rank;
};

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15ull;

__device__ __forceinline__ u64 mix(u64 state) {
    u64 z = state + GOLDEN;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ double uniform(u64 key, u64 index) {
    return (double)(mix(key + index * GOLDEN) >> 11) / (double)(1ull << 53);
}

extern "C" __global__ void normal_region(float* out, u64 key, double deviation, Region r, i64 count) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        i64 rest = i, at = 0, stride = 1;
        for (i64 d = r.rank - 1; d >= 0; d--) {
            at += (r.start[d] + rest % r.len[d]) * stride;
            rest /= r.len[d];
            stride *= r.shape[d];
        }
        u64 pair = (u64)at / 2;
        double radius = sqrt(-2.0 * log(1.0 - uniform(key, 2 * pair)));
        double s, c;
        sincos(6.28318530717958647692 * uniform(key, 2 * pair + 1), &s, &c);
        out[i] = (float)(radius * (at % 2 ? s : c) * deviation);
    }
}
