// Softmax and log-softmax of rows. Definitions: TYPE, LOG (0 or 1). in, out: [rows, n] packed. One block per row; the row is
// read three times, from cache after the first. A row of -infinity gives NaN, as the formula does. Launcher:
// src/backend/activation.rs.
#include "common.cuh"

typedef TYPE T;
typedef Compute<T> Acc;

extern "C" __global__ void softmax(T* out, const T* in, i64 n) {
    const T* row = in + (i64)blockIdx.x * n;
    T* result = out + (i64)blockIdx.x * n;
    Acc top = -(Acc)infinity();
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) top = Max::of(top, (Acc)load(row[i]));
    top = block_reduce<Max>(top, -(Acc)infinity());
    Acc sum = 0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += exp((Acc)load(row[i]) - top);
    sum = block_reduce<Add>(sum, (Acc)0);
    Acc log_sum = log(sum);
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
        Acc x = (Acc)load(row[i]) - top;
        result[i] = store<T>(LOG ? x - log_sum : exp(x) / sum);
    }
}
