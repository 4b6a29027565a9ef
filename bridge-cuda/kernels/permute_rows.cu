// Rows to the order of their experts and back. Maths: bridge-ops/src/moe/permute.rs.
//
// Definitions: TYPE (rows), VECTOR (elements a thread moves at once). order: [tokens * k], the assignment in each place; inverse:
// [tokens, k], the place of each assignment's row; weights: [tokens, k] float, or null; x, y, dy: [tokens, h], rows:
// [tokens * k, h], all packed; used: rows in places from *used on belong to no expert. A block owns what it writes and reads rows
// wherever they are: on an H100 rows scattered by writes ran at a sixth of the speed of rows gathered by reads. Sums in float, in
// the order of the slots. Launcher: src/ops/moe/permute.rs.
#include "common.cuh"

typedef TYPE T;

// rows[i] = x[order[i] / k], times weights[order[i]]. One block per row.
extern "C" __global__ void spread(T* rows, const T* x, const i32* order, const float* weights, i32 k, i64 h) {
    i32 assignment = order[blockIdx.x];
    const T* from = x + (i64)(assignment / k) * h;
    T* to = rows + (i64)blockIdx.x * h;
    Compute<T> weight = weights == nullptr ? 1.0f : weights[assignment];
    for (i64 i = (i64)threadIdx.x * VECTOR; i < h; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> value = load_pack<T, VECTOR>(from + i);
        if (weights != nullptr) {
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) value.at[v] = store<T>(load(value.at[v]) * weight);
        }
        store_pack(to + i, value);
    }
}

// y[t] = sum over s of rows[inverse[t, s]], times weights[t, s].
extern "C" __global__ void gather(T* y, const T* rows, const i32* inverse, const float* weights, const i32* used, i32 k, i64 h) {
    i64 token = blockIdx.x;
    i32 end = *used;
    for (i64 i = (i64)threadIdx.x * VECTOR; i < h; i += (i64)blockDim.x * VECTOR) {
        Compute<T> sum[VECTOR];
        #pragma unroll
        for (int v = 0; v < VECTOR; v++) sum[v] = 0;
        #pragma unroll 4
        for (i32 s = 0; s < k; s++) {
            i64 row = inverse[token * k + s];
            if (row >= end) continue;
            Pack<T, VECTOR> value = load_pack<T, VECTOR>(rows + row * h + i);
            Compute<T> weight = weights == nullptr ? 1.0f : weights[token * k + s];
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) sum[v] += load(value.at[v]) * weight;
        }
        Pack<T, VECTOR> out;
        #pragma unroll
        for (int v = 0; v < VECTOR; v++) out.at[v] = store<T>(sum[v]);
        store_pack(y + token * h + i, out);
    }
}

// dweights[t, s] = rows[inverse[t, s]] . dy[t], 0 where no expert's. One warp per assignment; neighbouring warps share dy.
extern "C" __global__ void __launch_bounds__(256) dots(float* dweights, const T* rows, const T* dy, const i32* inverse, const i32* used, i64 count, i32 k, i64 h) {
    i64 assignment = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (assignment >= count) return;
    int lane = threadIdx.x % WARP;
    i64 row = inverse[assignment], token = assignment / k;
    Compute<T> sum = 0;
    if (row < *used) {
        #pragma unroll 4
        for (i64 i = (i64)lane * VECTOR; i < h; i += WARP * VECTOR) {
            Pack<T, VECTOR> a = load_pack<T, VECTOR>(rows + row * h + i), b = load_pack<T, VECTOR>(dy + token * h + i);
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) sum += load(a.at[v]) * load(b.at[v]);
        }
    }
    sum = warp_reduce<Add>(sum);
    if (lane == 0) dweights[assignment] = (float)sum;
}
