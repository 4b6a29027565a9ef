// Token embedding and its gradient.
//
// Definitions: TYPE (rows of y or dy), WEIGHT (table or its gradient), INDEX (ids), VECTOR (elements a thread moves at once).
// `lookup`: y[i] = w[ids[i]]; one block per token. `gradient`: dw[ids[i]] += dy[i], summed in float in the order of i: the
// block of the first token with an id owns that row and adds every later one, so nothing is added atomically and results
// repeat exactly. A row is read and written once for every LIST tokens or fewer, so a narrow dw is rounded seldom. Looking
// for equal ids costs tokens^2 comparisons, little next to the rest of a step. Launcher: src/ops/embedding.rs.
#include "common.cuh"

typedef TYPE T;
typedef WEIGHT W;
typedef INDEX I;

extern "C" __global__ void lookup(T* y, const I* ids, const W* w, i64 n) {
    const W* row = w + (i64)ids[blockIdx.x] * n;
    T* out = y + (i64)blockIdx.x * n;
    for (i64 i = (i64)threadIdx.x * VECTOR; i < n; i += (i64)blockDim.x * VECTOR) {
        Pack<W, VECTOR> p = load_pack<W, VECTOR>(row + i);
        Pack<T, VECTOR> q;
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) q.at[k] = store<T>(load(p.at[k]));
        store_pack(out + i, q);
    }
}

constexpr int THREADS = 256;
constexpr int LIST = 2048;

extern "C" __global__ void __launch_bounds__(THREADS) gradient(W* dw, const I* ids, const T* dy, i64 tokens, i64 n) {
    i64 first = blockIdx.x;
    I id = ids[first];
    int earlier = 0;
    for (i64 i = threadIdx.x; i < first; i += THREADS) {
        if (ids[i] == id) { earlier = 1; break; }
    }
    if (__syncthreads_or(earlier)) return;

    // Tokens of this id that are still to be added, in order.
    __shared__ i32 found[LIST];
    __shared__ u32 masks[THREADS / WARP];
    W* row = dw + (i64)id * n;
    int count = 0;
    for (i64 start = first; start < tokens; start += THREADS) {
        i64 i = start + threadIdx.x;
        bool match = i < tokens && ids[i] == id;
        u32 mask = __ballot_sync(FULL_MASK, match);
        if (threadIdx.x % WARP == 0) masks[threadIdx.x / WARP] = mask;
        __syncthreads();
        int before = count;
        #pragma unroll
        for (int w = 0; w < THREADS / (int)WARP; w++) {
            if (w < (int)(threadIdx.x / WARP)) before += __popc(masks[w]);
            count += __popc(masks[w]);
        }
        if (match) found[before + __popc(mask & ((1u << (threadIdx.x % WARP)) - 1))] = (i32)i;
        __syncthreads();
        bool last = start + THREADS >= tokens;
        if (count > 0 && (last || count + THREADS > LIST)) {
            for (i64 c = (i64)threadIdx.x * VECTOR; c < n; c += (i64)THREADS * VECTOR) {
                float sum[VECTOR];
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) sum[k] = (float)load(row[c + k]);
                for (int f = 0; f < count; f++) {
                    Pack<T, VECTOR> g = load_pack<T, VECTOR>(dy + found[f] * n + c);
                    #pragma unroll
                    for (int k = 0; k < VECTOR; k++) sum[k] += (float)load(g.at[k]);
                }
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) row[c + k] = store<W>(sum[k]);
            }
            count = 0;
            __syncthreads();
        }
    }
}
