// Integer matrix products, which no library offers for all types: out[b, m, n] = sum over k of x[b, m, k] * y[b, k, n].
// Packed operands, one thread per output, wrapping arithmetic. Definitions: TYPE. Launcher: src/matmul.rs.
#include "common.cuh"

typedef TYPE T;

extern "C" __global__ void matmul(T* out, const T* x, const T* y, i64 total, i64 m, i64 n, i64 k) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        i64 column = i % n, row = i / n;
        const T* a = x + row * k;
        const T* b = y + row / m * k * n + column;
        i64 sum = 0;
        for (i64 j = 0; j < k; j++) sum += (i64)a[j] * (i64)b[j * n];
        out[i] = (T)sum;
    }
}
