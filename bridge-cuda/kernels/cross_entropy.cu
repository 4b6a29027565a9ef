// Cross-entropy of each row of logits against a target, and its gradient.
//
//   z = logits, or cap tanh(logits / cap);  loss = logsumexp(z) - z[target];  dlogits = (softmax(z) - onehot) dloss
//
// Definitions: TYPE (logits), INDEX (targets), SOFTCAP (0 or 1). logits, dlogits: [rows, n] packed, one block per row, 16-byte
// packs where rows allow (VECTOR). dlogits may be the logits. Targets equal to `ignore` have loss 0 and gradient 0; other
// negative targets lie in another part of the vocabulary: no logit is subtracted, the gradient has no onehot.
// The maximum and the sum are kept together in one pass ("online softmax", Milakov and Gimelshein 2018). `both` does
// forward and backward for a dloss known beforehand: the second read of the row mostly hits the L2 cache.
// Launcher: src/ops/cross_entropy.rs.
#include "common.cuh"

typedef TYPE T;
typedef INDEX I;

// Sum of exponentials, relative to the largest value.
struct Mass { float top, sum; };

__device__ __forceinline__ Mass merge(Mass a, Mass b) {
    float top = fmaxf(a.top, b.top);
    if (top == -infinity()) return {top, 0.0f};
    return {top, a.sum * __expf(a.top - top) + b.sum * __expf(b.top - top)};
}

__device__ __forceinline__ float capped(float x, float cap) { return SOFTCAP ? cap * tanhf(x / cap) : x; }

__device__ __forceinline__ float log_sum_exp(const T* row, i64 n, float cap) {
    Mass mass = {-infinity(), 0.0f};
    #pragma unroll 4
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        float z[VECTOR], top = -infinity(), sum = 0;
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { z[k] = capped(load(p.at[k]), cap); top = fmaxf(top, z[k]); }
        if (top > -infinity()) {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) sum += __expf(z[k] - top);
        }
        mass = merge(mass, {top, sum});
    }
    __shared__ Mass partial[32];
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Mass other = {__shfl_xor_sync(FULL_MASK, mass.top, step), __shfl_xor_sync(FULL_MASK, mass.sum, step)};
        mass = merge(mass, other);
    }
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = mass;
    __syncthreads();
    mass = threadIdx.x % WARP < blockDim.x / WARP ? partial[threadIdx.x % WARP] : Mass{-infinity(), 0.0f};
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Mass other = {__shfl_xor_sync(FULL_MASK, mass.top, step), __shfl_xor_sync(FULL_MASK, mass.sum, step)};
        mass = merge(mass, other);
    }
    return mass.top + logf(mass.sum);
}

__device__ __forceinline__ void gradient(T* out, const T* row, i64 n, i64 target, float lse, float dloss, float cap) {
    #pragma unroll 4
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) {
            float z = capped(load(p.at[k]), cap);
            float d = (__expf(z - lse) - (i + k == target ? 1.0f : 0.0f)) * dloss;
            if (SOFTCAP) d *= 1.0f - (z / cap) * (z / cap);
            p.at[k] = store<T>(dloss == 0.0f ? 0.0f : d);
        }
        store_pack(out + i, p);
    }
}

extern "C" __global__ void forward(float* loss, float* lse, const T* logits, const I* targets, i64 n, i64 ignore, float cap) {
    const T* row = logits + (i64)blockIdx.x * n;
    float total = log_sum_exp(row, n, cap);
    if (threadIdx.x == 0) {
        i64 target = (i64)targets[blockIdx.x];
        lse[blockIdx.x] = total;
        loss[blockIdx.x] = target == ignore ? 0.0f : total - (target < 0 ? 0.0f : capped(load(row[target]), cap));
    }
}

extern "C" __global__ void backward(T* dlogits, const T* logits, const I* targets, const float* lse, const float* dloss, i64 n, i64 ignore, float cap) {
    i64 target = (i64)targets[blockIdx.x];
    float scale = target == ignore ? 0.0f : dloss[blockIdx.x];
    gradient(dlogits + (i64)blockIdx.x * n, logits + (i64)blockIdx.x * n, n, target, lse[blockIdx.x], scale, cap);
}

extern "C" __global__ void both(T* dlogits, float* loss, float* lse, const T* logits, const I* targets, const float* dloss, i64 n, i64 ignore, float cap) {
    const T* row = logits + (i64)blockIdx.x * n;
    i64 target = (i64)targets[blockIdx.x];
    float total = log_sum_exp(row, n, cap);
    if (threadIdx.x == 0) {
        lse[blockIdx.x] = total;
        loss[blockIdx.x] = target == ignore ? 0.0f : total - (target < 0 ? 0.0f : capped(load(row[target]), cap));
    }
    // dlogits may be the logits: the target's logit has to be read before it is overwritten.
    __syncthreads();
    gradient(dlogits + (i64)blockIdx.x * n, row, n, target, total, target == ignore ? 0.0f : dloss[blockIdx.x], cap);
}
