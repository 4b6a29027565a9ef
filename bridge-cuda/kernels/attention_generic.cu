// Softmax attention for every dtype, head size and rule: the simple kernels that the fast ones fall back to, and are
// tested against. Formulas in attention.cu.
//
// Definitions: TYPE. q: [batch, s, heads, d], k: [batch, t, kv_heads, d], v: [batch, t, kv_heads, dv], out, dout like q with
// dv channels, all packed; lse, dots: [batch, heads, s] float. Sums in float (double for f64). A block of THREADS threads
// owns one query (`forward`, `backward_q`) or one key (`backward_kv`) and takes the other side THREADS at a time: first a
// thread per score, then a thread per channel. Dynamic shared memory: see each kernel. Launcher: src/ops/attention.rs.
#include "common.cuh"

typedef TYPE T;
typedef Compute<T> X;

constexpr int THREADS = 128;

// Mirrors `Rule` in src/ops/attention.rs.
struct Rule {
    i64 batch, s, t, heads, kv_heads, d, dv;
    i64 q_offset, kv_len, window;
    i32 causal, windowed;
    float scale, softcap;
};

__device__ __forceinline__ bool sees(const Rule& r, const i32* documents, i64 batch, i64 i, i64 j) {
    i64 position = r.q_offset + i;
    if (j >= r.kv_len || (r.causal && j > position)) return false;
    if (r.windowed && (j + r.window <= position || j >= position + r.window)) return false;
    if (documents) {
        const i32* document = documents + (batch * r.s + i) * 2;
        if (j < document[0] || j >= document[1]) return false;
    }
    return true;
}

__device__ __forceinline__ X dot(const X* a, const T* b, i64 n) {
    X sum = 0;
    for (i64 c = 0; c < n; c++) sum += a[c] * load(b[c]);
    return sum;
}

// The score and its slope with respect to the uncapped one.
__device__ __forceinline__ X score(const Rule& r, X product, X& slope) {
    X x = product * (X)r.scale;
    slope = 1;
    if (r.softcap > 0) {
        X t = tanh(x / (X)r.softcap);
        slope = (X)1 - t * t;
        x = (X)r.softcap * t;
    }
    return x;
}

// grid: batch * heads * s blocks. Shared: query [d], out [dv], THREADS weights.
extern "C" __global__ void __launch_bounds__(THREADS) forward(T* out, float* lse, const T* q, const T* k, const T* v, const T* sinks, const i32* documents, Rule r) {
    extern __shared__ __align__(16) char memory[];
    X* query = reinterpret_cast<X*>(memory);
    X* sum = query + r.d;
    X* weights = sum + r.dv;
    i64 row = blockIdx.x, i = row % r.s, head = row / r.s % r.heads, batch = row / r.s / r.heads;
    i64 kv_head = head / (r.heads / r.kv_heads), token = (batch * r.s + i) * r.heads + head;
    for (i64 c = threadIdx.x; c < r.d; c += THREADS) query[c] = load(q[token * r.d + c]);
    for (i64 c = threadIdx.x; c < r.dv; c += THREADS) sum[c] = 0;
    X top = -(X)infinity(), total = 0;
    if (sinks) { top = load(sinks[head]); total = 1; }
    __syncthreads();
    for (i64 start = 0; start < r.kv_len; start += THREADS) {
        i64 j = start + threadIdx.x;
        X x = -(X)infinity(), slope;
        if (j < r.kv_len && sees(r, documents, batch, i, j)) x = score(r, dot(query, k + ((batch * r.t + j) * r.kv_heads + kv_head) * r.d, r.d), slope);
        X now = Max::of(top, block_reduce<Max>(x, -(X)infinity()));
        if (now == -(X)infinity()) continue;
        X w = exp(x - now), shrink = exp(top - now);
        weights[threadIdx.x] = w;
        total = total * shrink + block_reduce<Add>(w, (X)0);  // The barriers inside also publish the weights.
        top = now;
        i64 count = r.kv_len - start < THREADS ? r.kv_len - start : THREADS;
        for (i64 c = threadIdx.x; c < r.dv; c += THREADS) {
            X o = sum[c] * shrink;
            for (i64 w = 0; w < count; w++) o += weights[w] * load(v[((batch * r.t + start + w) * r.kv_heads + kv_head) * r.dv + c]);
            sum[c] = o;
        }
        __syncthreads();
    }
    for (i64 c = threadIdx.x; c < r.dv; c += THREADS) out[token * r.dv + c] = store<T>(total > 0 ? sum[c] / total : (X)0);
    if (threadIdx.x == 0) lse[row] = (float)(top + log(total));
}

// grid: batch * heads * s blocks, one warp's worth of work each.
extern "C" __global__ void __launch_bounds__(THREADS) row_dots(float* dots, const T* out, const T* dout, Rule r) {
    i64 row = blockIdx.x, i = row % r.s, head = row / r.s % r.heads, batch = row / r.s / r.heads;
    i64 at = ((batch * r.s + i) * r.heads + head) * r.dv;
    X sum = 0;
    for (i64 c = threadIdx.x; c < r.dv; c += THREADS) sum += load(out[at + c]) * load(dout[at + c]);
    sum = block_reduce<Add>(sum, (X)0);
    if (threadIdx.x == 0) dots[row] = (float)sum;
}

// grid: batch * heads * s blocks. Shared: query [d], dout [dv], THREADS of ds.
extern "C" __global__ void __launch_bounds__(THREADS) backward_q(T* dq, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* dots, const i32* documents, Rule r) {
    extern __shared__ __align__(16) char memory[];
    X* query = reinterpret_cast<X*>(memory);
    X* grad = query + r.d;
    X* weights = grad + r.dv;
    i64 row = blockIdx.x, i = row % r.s, head = row / r.s % r.heads, batch = row / r.s / r.heads;
    i64 kv_head = head / (r.heads / r.kv_heads), token = (batch * r.s + i) * r.heads + head;
    for (i64 c = threadIdx.x; c < r.d; c += THREADS) query[c] = load(q[token * r.d + c]);
    for (i64 c = threadIdx.x; c < r.dv; c += THREADS) grad[c] = load(dout[token * r.dv + c]);
    __syncthreads();
    // A thread owns channels threadIdx.x, threadIdx.x + THREADS, ...: up to 4, head sizes up to 512.
    X sum[4] = {0, 0, 0, 0};
    for (i64 start = 0; start < r.kv_len; start += THREADS) {
        i64 j = start + threadIdx.x;
        X ds = 0;
        if (j < r.kv_len && sees(r, documents, batch, i, j)) {
            i64 key = (batch * r.t + j) * r.kv_heads + kv_head;
            X slope, x = score(r, dot(query, k + key * r.d, r.d), slope);
            ds = exp(x - (X)lse[row]) * (dot(grad, v + key * r.dv, r.dv) - (X)dots[row]) * slope * (X)r.scale;
        }
        weights[threadIdx.x] = ds;
        __syncthreads();
        i64 count = r.kv_len - start < THREADS ? r.kv_len - start : THREADS;
        #pragma unroll
        for (int part = 0; part < 4; part++) {
            i64 c = threadIdx.x + part * THREADS;
            if (c < r.d) for (i64 w = 0; w < count; w++) sum[part] += weights[w] * load(k[((batch * r.t + start + w) * r.kv_heads + kv_head) * r.d + c]);
        }
        __syncthreads();
    }
    #pragma unroll
    for (int part = 0; part < 4; part++) {
        i64 c = threadIdx.x + part * THREADS;
        if (c < r.d) dq[token * r.d + c] = store<T>(sum[part]);
    }
}

// grid: batch * kv_heads * t blocks. Shared: key [d], value [dv], THREADS of p, THREADS of ds.
extern "C" __global__ void __launch_bounds__(THREADS) backward_kv(T* dk, T* dv, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* dots, const i32* documents, Rule r) {
    extern __shared__ __align__(16) char memory[];
    X* own_key = reinterpret_cast<X*>(memory);
    X* own_value = own_key + r.d;
    X* p = own_value + r.dv;
    X* ds = p + THREADS;
    i64 j = blockIdx.x % r.t, kv_head = blockIdx.x / r.t % r.kv_heads, batch = blockIdx.x / r.t / r.kv_heads;
    i64 group = r.heads / r.kv_heads, key = (batch * r.t + j) * r.kv_heads + kv_head;
    for (i64 c = threadIdx.x; c < r.d; c += THREADS) own_key[c] = load(k[key * r.d + c]);
    for (i64 c = threadIdx.x; c < r.dv; c += THREADS) own_value[c] = load(v[key * r.dv + c]);
    __syncthreads();
    X sum_k[4] = {0, 0, 0, 0}, sum_v[4] = {0, 0, 0, 0};
    for (i64 head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (i64 start = 0; start < r.s; start += THREADS) {
            i64 i = start + threadIdx.x;
            p[threadIdx.x] = 0;
            ds[threadIdx.x] = 0;
            if (i < r.s && sees(r, documents, batch, i, j)) {
                i64 token = (batch * r.s + i) * r.heads + head, row = (batch * r.heads + head) * r.s + i;
                X slope, x = score(r, dot(own_key, q + token * r.d, r.d), slope);
                X prob = exp(x - (X)lse[row]);
                p[threadIdx.x] = prob;
                ds[threadIdx.x] = prob * (dot(own_value, dout + token * r.dv, r.dv) - (X)dots[row]) * slope * (X)r.scale;
            }
            __syncthreads();
            i64 count = r.s - start < THREADS ? r.s - start : THREADS;
            #pragma unroll
            for (int part = 0; part < 4; part++) {
                i64 c = threadIdx.x + part * THREADS;
                for (i64 w = 0; w < count; w++) {
                    i64 token = (batch * r.s + start + w) * r.heads + head;
                    if (c < r.d) sum_k[part] += ds[w] * load(q[token * r.d + c]);
                    if (c < r.dv) sum_v[part] += p[w] * load(dout[token * r.dv + c]);
                }
            }
            __syncthreads();
        }
    #pragma unroll
    for (int part = 0; part < 4; part++) {
        i64 c = threadIdx.x + part * THREADS;
        if (c < r.d) dk[key * r.d + c] = store<T>(sum_k[part]);
        if (c < r.dv) dv[key * r.dv + c] = store<T>(sum_v[part]);
    }
}
