// Rotary position embedding: each pair of channels (a, b) becomes (a cos - b sin, b cos + a sin).
//
// Definitions: TYPE, PAIRS (0: channel i goes with i + half; 1: 2i with 2i + 1). x: [batch, seq, heads, d] with the given
// strides, channels packed; y: packed. cos, sin: [batch or 1, seq, half] float packed, `table_batch` elements between
// batches (0 for one table). Channels from 2 * half on are copied. `sign` is -1 for the gradient. Angles and arithmetic in
// float. One thread per (token, head, channel pair), channels past the pairs go to the threads after them.
// Source: Su et al. 2021. Launcher: src/ops/rotary.rs.
#include "common.cuh"

typedef TYPE T;

extern "C" __global__ void rotary(T* y, const T* x, const float* cosines, const float* sines, i64 total, i64 seq, i64 heads, i64 d,
                                  i64 half, i64 stride_batch, i64 stride_seq, i64 stride_head, i64 table_batch, float sign) {
    i64 step = (i64)gridDim.x * blockDim.x;
    i64 threads = d - half;  // Threads of a head: one per pair, one per channel that is only copied.
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        u32 pair = (u32)(i % threads);
        i64 rest = i / threads;
        i64 head = rest % heads, token = rest / heads;
        i64 position = token % seq, batch = token / seq;
        const T* from = x + batch * stride_batch + position * stride_seq + head * stride_head;
        T* to = y + (token * heads + head) * d;
        if (pair >= half) {
            to[half + pair] = from[half + pair];
            continue;
        }
        i64 at = batch * table_batch + position * half + pair;
        float c = cosines[at], s = sines[at] * sign;
        i64 ia = PAIRS ? 2 * pair : pair, ib = PAIRS ? 2 * pair + 1 : pair + half;
        float a = load(from[ia]), b = load(from[ib]);
        to[ia] = store<T>(a * c - b * s);
        to[ib] = store<T>(b * c + a * s);
    }
}

// As above for halves that are whole packs: a thread moves VECTOR pairs.
extern "C" __global__ void rotary_packs(T* y, const T* x, const float* cosines, const float* sines, i64 total, i64 seq, i64 heads, i64 d,
                                        i64 half, i64 stride_batch, i64 stride_seq, i64 stride_head, i64 table_batch, float sign) {
    constexpr int VECTOR = 16 / sizeof(T);
    i64 step = (i64)gridDim.x * blockDim.x;
    u32 threads = (u32)(half / VECTOR);
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        u32 pair = (u32)(i % threads) * VECTOR;
        i64 rest = i / threads;
        i64 head = rest % heads, token = rest / heads;
        i64 position = token % seq, batch = token / seq;
        const T* from = x + batch * stride_batch + position * stride_seq + head * stride_head;
        T* to = y + (token * heads + head) * d;
        i64 at = batch * table_batch + position * half + pair;
        Pack<T, VECTOR> a = load_pack<T, VECTOR>(from + pair), b = load_pack<T, VECTOR>(from + pair + half);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) {
            float c = cosines[at + k], s = sines[at + k] * sign;
            float u = load(a.at[k]), v = load(b.at[k]);
            a.at[k] = store<T>(u * c - v * s);
            b.at[k] = store<T>(v * c + u * s);
        }
        store_pack(to + pair, a);
        store_pack(to + pair + half, b);
    }
}
