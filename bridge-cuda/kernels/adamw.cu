// AdamW, in the order of operations of torch.optim.AdamW, and sums of squares.
//
//   g = grad_scale grad;  p = p (1 - lr wd);  m += (1 - beta1)(g - m);  v = beta2 v + (1 - beta2) g^2
//   p -= lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)
//
// Definitions: PARAM (element of p), GRAD (element of grad), MEAN (element of m); v float. `step` updates one tensor in place. `step_many`
// updates a list of tensors in one launch: tensors: [count] of the structure below, chunks: [blocks] of (tensor, chunk
// number), CHUNK elements a block; where `copy` is set, the new value is also written there in bf16; where `lower` is set,
// the weight is not at p but in two halves, `copy` and `lower`. Elements are touched once: 16-byte accesses, bound by memory. Source: Loshchilov and Hutter 2019. Launcher: src/ops/adamw.rs.
#include "common.cuh"

typedef PARAM P;
typedef GRAD G;
typedef MEAN M;

// Mirrors `Numbers` in src/ops/adamw.rs.
struct Numbers { float decay, beta1_rest, beta2, beta2_rest, step_size, root_bc2, eps, grad_scale; };

__device__ __forceinline__ float update(float p, float g, float& m, float& v, const Numbers& n) {
    g *= n.grad_scale;
    p *= n.decay;
    m += n.beta1_rest * (g - m);
    v = n.beta2 * v + n.beta2_rest * g * g;
    return p - n.step_size * (m / (sqrtf(v) / n.root_bc2 + n.eps));
}

constexpr int VECTOR = 4;

// A weight cut in two: the nearest bf16 number (away from zero where two are equally near), and what its bits lack.
__device__ __forceinline__ float join(bf16 upper, u16 lower) {
    return __uint_as_float(((u32)upper.bits << 16) + (u32)(i32)(i16)lower);
}
__device__ __forceinline__ void split(float x, bf16& upper, u16& lower) {
    u32 bits = __float_as_uint(x);
    upper.bits = (u16)((bits + 0x8000u) >> 16);
    lower = (u16)(bits - ((u32)upper.bits << 16));
}

__device__ __forceinline__ void range(P* p, const G* g, M* m, float* v, bf16* copy, u16* lower, const Numbers& n, i64 begin, i64 end, i64 thread, i64 step) {
    i64 packed_end = begin + (end - begin) / VECTOR * VECTOR;
    for (i64 i = begin + thread * VECTOR; i < packed_end; i += step * VECTOR) {
        Pack<P, VECTOR> pp;
        Pack<bf16, VECTOR> pc;
        Pack<u16, VECTOR> pl;
        if (lower) {
            pc = load_pack<bf16, VECTOR>(copy + i);
            pl = load_pack<u16, VECTOR>(lower + i);
        } else {
            pp = load_pack<P, VECTOR>(p + i);
        }
        Pack<G, VECTOR> pg = load_pack<G, VECTOR>(g + i);
        Pack<M, VECTOR> pm = load_pack<M, VECTOR>(m + i);
        Pack<float, VECTOR> pv = load_pack<float, VECTOR>(v + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) {
            float old = lower ? join(pc.at[k], pl.at[k]) : (float)load(pp.at[k]);
            float mean = load(pm.at[k]);
            float x = update(old, load(pg.at[k]), mean, pv.at[k], n);
            pm.at[k] = store<M>(mean);
            if (lower) {
                split(x, pc.at[k], pl.at[k]);
            } else {
                pp.at[k] = store<P>(x);
                pc.at[k] = store<bf16>(x);
            }
        }
        if (lower) store_pack(lower + i, pl); else store_pack(p + i, pp);
        store_pack(m + i, pm);
        store_pack(v + i, pv);
        if (copy) store_pack(copy + i, pc);
    }
    for (i64 i = packed_end + thread; i < end; i += step) {
        float old = lower ? join(copy[i], lower[i]) : (float)load(p[i]);
        float mean = load(m[i]);
        float x = update(old, load(g[i]), mean, v[i], n);
        m[i] = store<M>(mean);
        if (lower) {
            split(x, copy[i], lower[i]);
        } else {
            p[i] = store<P>(x);
            if (copy) copy[i] = store<bf16>(x);
        }
    }
}

extern "C" __global__ void step(P* p, const G* g, M* m, float* v, Numbers n, i64 count) {
    range(p, g, m, v, nullptr, nullptr, n, 0, count, (i64)blockIdx.x * blockDim.x + threadIdx.x, (i64)gridDim.x * blockDim.x);
}

struct Tensor { P* p; const G* g; M* m; float* v; bf16* copy; u16* lower; i64 count; };
constexpr i64 CHUNK = 1 << 16;

extern "C" __global__ void step_many(const Tensor* tensors, const i32* chunks, Numbers n) {
    Tensor t = tensors[chunks[blockIdx.x * 2]];
    i64 begin = (i64)chunks[blockIdx.x * 2 + 1] * CHUNK;
    i64 end = begin + CHUNK < t.count ? begin + CHUNK : t.count;
    range(t.p, t.g, t.m, t.v, t.copy, t.lower, n, begin, end, threadIdx.x, blockDim.x);
}

// partial[block] = sum of squares of the block's chunk of the gradients in the list.
extern "C" __global__ void sum_squares_many(float* partial, const Tensor* tensors, const i32* chunks) {
    Tensor t = tensors[chunks[blockIdx.x * 2]];
    i64 begin = (i64)chunks[blockIdx.x * 2 + 1] * CHUNK;
    i64 end = begin + CHUNK < t.count ? begin + CHUNK : t.count;
    i64 packed_end = begin + (end - begin) / VECTOR * VECTOR;
    float sum = 0;
    #pragma unroll 4
    for (i64 i = begin + (i64)threadIdx.x * VECTOR; i < packed_end; i += (i64)blockDim.x * VECTOR) {
        Pack<G, VECTOR> g = load_pack<G, VECTOR>(t.g + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { float x = load(g.at[k]); sum += x * x; }
    }
    for (i64 i = packed_end + threadIdx.x; i < end; i += blockDim.x) { float x = load(t.g[i]); sum += x * x; }
    sum = block_reduce<Add>(sum, 0.0f);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// partial[block] = sum of squares of the block's share of g. A second launch of one block with GRAD = float and
// `square` 0 adds the partial sums up; the order is fixed.
extern "C" __global__ void sum_squares(float* partial, const G* g, i64 count, i32 square) {
    float sum = 0;
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        float x = load(g[i]);
        sum += square ? x * x : x;
    }
    sum = block_reduce<Add>(sum, 0.0f);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void split_halves(const float* weight, bf16* upper, u16* lower, i64 count) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) split(weight[i], upper[i], lower[i]);
}

extern "C" __global__ void join_halves(float* weight, const bf16* upper, const u16* lower, i64 count) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) weight[i] = join(upper[i], lower[i]);
}
