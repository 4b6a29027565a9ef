// Layer norm.
//
//   n = (x - mean) r, r = 1 / sqrt(mean((x - mean)^2) + eps),  y = n w + b
//   dx = r (g - mean(g) - n mean(g n)) with g = dy w,  dw = sum over rows of dy n,  db = sum over rows of dy
//
// Definitions, shapes and ownership as in rms_norm.cu; BIAS (0 or 1) says whether there is a b. The variance is computed
// in a second pass over the row. partial: [gridDim.x, 2, n], dw then db. Source: Ba, Kiros and Hinton 2016.
// Launcher: src/ops/norm.rs.
#include "common.cuh"

typedef TYPE T;
typedef WEIGHT W;

extern "C" __global__ void forward(T* y, const T* x, const W* w, const W* b, i64 n, float eps) {
    const T* row = x + (i64)blockIdx.x * n;
    float sum = 0;
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) sum += (float)load(p.at[k]);
    }
    float mean = block_reduce<Add>(sum, 0.0f) / (float)n;
    sum = 0;
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { float v = (float)load(p.at[k]) - mean; sum += v * v; }
    }
    float r = 1.0f / sqrtf(block_reduce<Add>(sum, 0.0f) / (float)n + eps);
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        Pack<W, VECTOR> q = load_pack<W, VECTOR>(w + i);
        Pack<W, VECTOR> s = {};
        if (BIAS) s = load_pack<W, VECTOR>(b + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) {
            float v = ((float)load(p.at[k]) - mean) * r * ((float)load(q.at[k]) + OFFSET);
            p.at[k] = store<T>(BIAS ? v + (float)load(s.at[k]) : v);
        }
        store_pack(y + (i64)blockIdx.x * n + i, p);
    }
}

extern "C" __global__ void __launch_bounds__(512) backward(T* dx, float* partial, const T* x, const W* w, const T* dy, i64 rows, i64 n, float eps) {
    float dw[PACKS][VECTOR], db[PACKS][VECTOR];
    #pragma unroll
    for (int c = 0; c < PACKS; c++)
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { dw[c][k] = 0; db[c][k] = 0; }
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        float v[PACKS][VECTOR], g[PACKS][VECTOR];
        float sum = 0;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
            if (i < n) {
                Pack<T, VECTOR> p = load_pack<T, VECTOR>(x + row * n + i), q = load_pack<T, VECTOR>(dy + row * n + i);
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) { v[c][k] = load(p.at[k]); g[c][k] = load(q.at[k]); sum += v[c][k]; }
            }
        }
        float mean = block_reduce<Add>(sum, 0.0f) / (float)n;
        sum = 0;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
            if (i < n) {
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) { v[c][k] -= mean; sum += v[c][k] * v[c][k]; }
            }
        }
        float r = 1.0f / sqrtf(block_reduce<Add>(sum, 0.0f) / (float)n + eps);
        float sum_g = 0, sum_gn = 0;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
            if (i < n) {
                Pack<W, VECTOR> q = load_pack<W, VECTOR>(w + i);
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    v[c][k] *= r;
                    dw[c][k] += g[c][k] * v[c][k];
                    db[c][k] += g[c][k];
                    g[c][k] *= (float)load(q.at[k]) + OFFSET;
                    sum_g += g[c][k];
                    sum_gn += g[c][k] * v[c][k];
                }
            }
        }
        float mean_g = block_reduce<Add>(sum_g, 0.0f) / (float)n;
        float mean_gn = block_reduce<Add>(sum_gn, 0.0f) / (float)n;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
            if (i < n) {
                Pack<T, VECTOR> p;
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) p.at[k] = store<T>(r * (g[c][k] - mean_g - v[c][k] * mean_gn));
                store_pack(dx + row * n + i, p);
            }
        }
    }
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
        if (i < n) {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                partial[((i64)blockIdx.x * 2) * n + i + k] = dw[c][k];
                partial[((i64)blockIdx.x * 2 + 1) * n + i + k] = db[c][k];
            }
        }
    }
}
