// RMS norm and layer norm share their shape: this file is RMS norm, layer_norm.cu the other.
//
//   r = 1 / sqrt(mean(x^2) + eps),  y = x r w,  dx = r (g - x r mean(g x r)) with g = dy w,  dw = sum over rows of dy x r
//
// Definitions: TYPE (x, y, dy, dx), WEIGHT (w), VECTOR (elements a thread moves at once), PACKS (packs of a row a thread
// owns, for backward), OFFSET (0, or 1 when the weight is stored as its difference from one). x, dy: [rows, n] packed.
// Computed in float. Forward: one block per row. Backward: a fixed grid of blocks walks the rows; each keeps its sum of dw
// in registers and writes it to partial: [gridDim.x, n], which a column sum finishes, so results repeat exactly. Where
// `so_far` is not null, it is added to dx, and may be dx.
// Short rows (heads): GROUP lanes of a warp own a row, so that a block has many; `short_forward`, `short_backward`.
// Source: Zhang and Sennrich 2019. Launcher: src/ops/norm.rs.
#include "common.cuh"

typedef TYPE T;
typedef WEIGHT W;

extern "C" __global__ void forward(T* y, const T* x, const W* w, i64 n, float eps) {
    const T* row = x + (i64)blockIdx.x * n;
    float sum = 0;
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { float v = load(p.at[k]); sum += v * v; }
    }
    sum = block_reduce<Add>(sum, 0.0f);
    float r = 1.0f / sqrtf(sum / (float)n + eps);
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<T, VECTOR> p = load_pack<T, VECTOR>(row + i);
        Pack<W, VECTOR> q = load_pack<W, VECTOR>(w + i);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) p.at[k] = store<T>((float)load(p.at[k]) * r * ((float)load(q.at[k]) + OFFSET));
        store_pack(y + (i64)blockIdx.x * n + i, p);
    }
}

extern "C" __global__ void __launch_bounds__(512) backward(T* dx, float* partial, const T* x, const W* w, const T* dy, const T* so_far, i64 rows, i64 n, float eps) {
    float dw[PACKS][VECTOR], scale[PACKS][VECTOR];
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { dw[c][k] = 0; scale[c][k] = 0; }
        if (i < n) {
            Pack<W, VECTOR> q = load_pack<W, VECTOR>(w + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) scale[c][k] = (float)load(q.at[k]) + OFFSET;
        }
    }
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
        Pack<T, VECTOR> px[PACKS], pg[PACKS], ps[PACKS];
        float squares = 0, products = 0;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
            if (i < n) {
                px[c] = load_pack<T, VECTOR>(x + row * n + i);
                pg[c] = load_pack<T, VECTOR>(dy + row * n + i);
                if (so_far) ps[c] = load_pack<T, VECTOR>(so_far + row * n + i);
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    float v = load(px[c].at[k]);
                    squares += v * v;
                    products += v * (float)load(pg[c].at[k]) * scale[c][k];
                }
            }
        }
        squares = block_reduce<Add>(squares, 0.0f);
        products = block_reduce<Add>(products, 0.0f);
        float r = 1.0f / sqrtf(squares / (float)n + eps);
        float mean = products * r / (float)n;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
            if (i < n) {
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    float normed = (float)load(px[c].at[k]) * r, g = load(pg[c].at[k]);
                    dw[c][k] += g * normed;
                    float d = r * (g * scale[c][k] - normed * mean);
                    px[c].at[k] = store<T>(so_far ? (float)load(ps[c].at[k]) + d : d);
                }
                store_pack(dx + row * n + i, px[c]);
            }
        }
    }
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = ((i64)c * blockDim.x + threadIdx.x) * VECTOR;
        if (i < n) {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) partial[(i64)blockIdx.x * n + i + k] = dw[c][k];
        }
    }
}

// ---- Short rows. GROUP: a power of two up to 32; PACKS * GROUP * VECTOR covers a row. ----

#ifdef GROUP
template <typename X> __device__ __forceinline__ X group_sum(X x) {
    #pragma unroll
    for (int step = GROUP / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
    return x;
}

extern "C" __global__ void __launch_bounds__(256) short_forward(T* y, const T* x, const W* w, i64 rows, i64 n, float eps) {
    i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / GROUP;
    u32 lane = threadIdx.x % GROUP;
    Pack<T, VECTOR> p[PACKS];
    float sum = 0;
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * GROUP + lane) * VECTOR;
        if (row < rows && i < n) {
            p[c] = load_pack<T, VECTOR>(x + row * n + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) { float v = load(p[c].at[k]); sum += v * v; }
        }
    }
    float r = 1.0f / sqrtf(group_sum(sum) / (float)n + eps);
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * GROUP + lane) * VECTOR;
        if (row < rows && i < n) {
            Pack<W, VECTOR> q = load_pack<W, VECTOR>(w + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) p[c].at[k] = store<T>((float)load(p[c].at[k]) * r * ((float)load(q.at[k]) + OFFSET));
            store_pack(y + row * n + i, p[c]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) short_backward(T* dx, float* partial, const T* x, const W* w, const T* dy, const T* so_far, i64 rows, i64 n, float eps) {
    const u32 lane = threadIdx.x % GROUP, group = threadIdx.x / GROUP, groups = blockDim.x / GROUP;
    float dw[PACKS][VECTOR], scale[PACKS][VECTOR];
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * GROUP + lane) * VECTOR;
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { dw[c][k] = 0; scale[c][k] = 0; }
        if (i < n) {
            Pack<W, VECTOR> q = load_pack<W, VECTOR>(w + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) scale[c][k] = (float)load(q.at[k]) + OFFSET;
        }
    }
    // All lanes of a warp stay in the loop as long as one has a row, for the shuffles.
    for (i64 first = (i64)blockIdx.x * groups; first < rows; first += (i64)gridDim.x * groups) {
        i64 row = first + group;
        Pack<T, VECTOR> px[PACKS], pg[PACKS], ps[PACKS];
        float squares = 0, products = 0;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = (i64)(c * GROUP + lane) * VECTOR;
            if (row < rows && i < n) {
                px[c] = load_pack<T, VECTOR>(x + row * n + i);
                pg[c] = load_pack<T, VECTOR>(dy + row * n + i);
                if (so_far) ps[c] = load_pack<T, VECTOR>(so_far + row * n + i);
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    float v = load(px[c].at[k]);
                    squares += v * v;
                    products += v * (float)load(pg[c].at[k]) * scale[c][k];
                }
            }
        }
        float r = 1.0f / sqrtf(group_sum(squares) / (float)n + eps);
        float mean = group_sum(products) * r / (float)n;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = (i64)(c * GROUP + lane) * VECTOR;
            if (row < rows && i < n) {
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    float normed = (float)load(px[c].at[k]) * r, g = load(pg[c].at[k]);
                    dw[c][k] += g * normed;
                    float d = r * (g * scale[c][k] - normed * mean);
                    px[c].at[k] = store<T>(so_far ? (float)load(ps[c].at[k]) + d : d);
                }
                store_pack(dx + row * n + i, px[c]);
            }
        }
    }
    // The groups add their sums one after the other, so that results repeat exactly.
    __shared__ float sums[GROUP * PACKS * VECTOR];
    for (u32 turn = 0; turn < groups; turn++) {
        if (group == turn) {
            #pragma unroll
            for (int c = 0; c < PACKS; c++) {
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    u32 i = (c * GROUP + lane) * VECTOR + k;
                    sums[i] = turn == 0 ? dw[c][k] : sums[i] + dw[c][k];
                }
            }
        }
        __syncthreads();
    }
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) partial[(i64)blockIdx.x * n + i] = sums[i];
}
#endif
