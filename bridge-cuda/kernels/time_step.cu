// Step sizes and decays of recurrent layers.
//
//   dt = max(softplus(x + bias), min),  dx = sigmoid(x + bias) ddt, 0 where the maximum is min
//   a = -exp(a_log) dt,  ddt = -exp(a_log) da,  da_log = sum over rows of a da
//
// Definitions: TYPE (x, dx; float for decays), WEIGHT (bias, a_log). x: [rows, heads] packed; dt, a and their gradients float.
// Backward: a block owns ROWS rows of 32 heads and leaves its sums in parts: [gridDim.x, heads], for a sum over the blocks, so
// that results repeat exactly. Source: Gu and Dao 2023, section 3.6. Launcher: src/ops/time_step.rs.
#include "common.cuh"

typedef TYPE T;
typedef WEIGHT W;

constexpr int ROWS = 64;

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

extern "C" __global__ void step_forward(float* dt, const T* x, const W* bias, i64 count, i64 heads, float least) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) dt[i] = fmaxf(softplus((float)load(x[i]) + (float)load(bias[i % heads])), least);
}

extern "C" __global__ void decay_forward(float* a, const float* dt, const W* a_log, i64 count, i64 heads) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) a[i] = -expf(load(a_log[i % heads])) * dt[i];
}

// Sums f(row, head) over the block's rows. Blocks of 256 threads: a warp has 32 heads of every eighth row.
template <typename F> __device__ __forceinline__ void sum_rows(float* parts, i64 rows, i64 heads, F f) {
    __shared__ float sums[8][32];
    i64 head = (i64)blockIdx.y * 32 + threadIdx.x % 32, first = (i64)blockIdx.x * ROWS;
    int warp = threadIdx.x / 32;
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < ROWS / 8; i++) {
        i64 row = first + i * 8 + warp;
        if (row < rows && head < heads) sum += f(row, head);
    }
    sums[warp][threadIdx.x % 32] = sum;
    __syncthreads();
    if (warp == 0 && head < heads) {
        #pragma unroll
        for (int i = 1; i < 8; i++) sum += sums[i][threadIdx.x];
        parts[blockIdx.x * heads + head] = sum;
    }
}

// grid: (rows / ROWS, heads / 32).
extern "C" __global__ void __launch_bounds__(256) step_backward(T* dx, float* parts, const T* x, const W* bias, const float* ddt, i64 rows, i64 heads, float least) {
    sum_rows(parts, rows, heads, [&](i64 row, i64 head) {
        i64 i = row * heads + head;
        float v = (float)load(x[i]) + (float)load(bias[head]);
        float grad = softplus(v) < least ? 0.0f : ddt[i] / (1.0f + expf(-v));
        dx[i] = store<T>(grad);
        return grad;
    });
}

extern "C" __global__ void __launch_bounds__(256) decay_backward(float* ddt, float* parts, const float* dt, const W* a_log, const float* da, i64 rows, i64 heads) {
    sum_rows(parts, rows, heads, [&](i64 row, i64 head) {
        i64 i = row * heads + head;
        float rate = -expf(load(a_log[head]));
        ddt[i] = rate * da[i];
        return rate * dt[i] * da[i];
    });
}
