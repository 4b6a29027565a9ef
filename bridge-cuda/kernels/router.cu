// From router logits to each token's experts and their weights, and the gradient. Maths: bridge-ops/src/moe/router.rs.
//
// Definitions: TYPE (logits and their gradient), INDEX (experts), VALUES (logits a lane holds: ceil(E / 32)), SIGMOID (scores
// are sigmoids, else a softmax), NORMALIZE (weights divided by their sum), GROUPS (groups of experts, 0 for none), TOP_GROUPS
// (how many are searched), SUM_OF_TWO (groups ranked by their best two, else by their best).
// logits: [tokens, E], packed; bias: [E] float, or null; weights: [tokens, k] float; experts: [tokens, k], k <= 32. A warp owns
// a token, and a lane experts lane, lane + 32, ...; everything is computed in float. Of equal scores the first expert wins.
// Launcher: src/ops/moe/router.rs.
#include "common.cuh"

typedef TYPE T;
typedef INDEX I;

constexpr int WARPS = 4;
constexpr float SUM_FLOOR = 1e-20f;  // As in bridge-ops/src/moe/router.rs.

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The largest of the warp's candidates and the least place among equals. Candidates without a place (negative) lose.
__device__ __forceinline__ void warp_best(float& value, int& place) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        float other = __shfl_xor_sync(FULL_MASK, value, step);
        int other_place = __shfl_xor_sync(FULL_MASK, place, step);
        if (other_place >= 0 && (place < 0 || other > value || (other == value && other_place < place))) {
            value = other;
            place = other_place;
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) forward(float* weights, I* experts, const T* logits, const float* bias, i64 tokens, i32 count, i32 k, float scale) {
    i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (token >= tokens) return;
    const T* row = logits + token * count;

    // What experts compete by.
    float score[VALUES];
    float top = -infinity(), sum = 0;
    #pragma unroll
    for (int i = 0; i < VALUES; i++) {
        int e = i * 32 + lane;
        score[i] = e < count ? (float)load(row[e]) : -infinity();
        top = fmaxf(top, score[i]);
    }
    if (SIGMOID) {
        #pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] = sigmoid(score[i]);
    } else {
        top = warp_reduce<Max>(top);
        #pragma unroll
        for (int i = 0; i < VALUES; i++) {
            score[i] = expf(score[i] - top);
            sum += score[i];
        }
        sum = warp_reduce<Add>(sum);
        #pragma unroll
        for (int i = 0; i < VALUES; i++) score[i] /= sum;
    }
    if (bias != nullptr) {
        #pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (i * 32 + lane < count) score[i] += bias[i * 32 + lane];
    }
    u32 open = 0;  // Bit i: this lane's expert i may still be chosen.
    #pragma unroll
    for (int i = 0; i < VALUES; i++) open |= (i * 32 + lane < count ? 1u : 0u) << i;

#if GROUPS > 0
    // Lane g ranks group g, and the best groups stay open.
    __shared__ float shared[WARPS][VALUES * 32];
    float* scores = shared[threadIdx.x / 32];
    #pragma unroll
    for (int i = 0; i < VALUES; i++) scores[i * 32 + lane] = score[i];
    __syncwarp();
    int size = count / GROUPS;
    float worth = 0;
    if (lane < GROUPS) {
        float first = -infinity(), second = -infinity();
        for (int i = 0; i < size; i++) {
            float x = scores[lane * size + i];
            if (x > first) { second = first; first = x; }
            else if (x > second) second = x;
        }
        worth = SUM_OF_TWO && size > 1 ? first + second : first;
    }
    u32 searched = 0;
    for (int n = 0; n < TOP_GROUPS; n++) {
        float value = worth;
        int place = lane < GROUPS && !(searched >> lane & 1) ? lane : -1;
        warp_best(value, place);
        searched |= 1u << place;
    }
    #pragma unroll
    for (int i = 0; i < VALUES; i++) {
        int e = i * 32 + lane;
        if (e < count && !(searched >> (e / size) & 1)) open &= ~(1u << i);
    }
#endif

    // The k best, one after the other; lane s keeps the s-th.
    int own = 0;
    for (int s = 0; s < k; s++) {
        float value = -infinity();
        int place = -1;
        #pragma unroll
        for (int i = 0; i < VALUES; i++)
            if ((open >> i & 1) && (place < 0 || score[i] > value)) { value = score[i]; place = i * 32 + lane; }
        warp_best(value, place);
        if (place % 32 == lane) open &= ~(1u << (place / 32));
        if (lane == s) own = place;
    }

    bool chosen = lane < k;
    float x = chosen ? (float)load(row[own]) : 0.0f, weight;
    if (SIGMOID) {
        weight = sigmoid(x);
        if (NORMALIZE) weight /= warp_reduce<Add>(chosen ? weight : 0.0f) + SUM_FLOOR;
    } else if (NORMALIZE) {
        weight = expf(x - warp_reduce<Max>(chosen ? x : -infinity()));
        weight /= warp_reduce<Add>(chosen ? weight : 0.0f);
    } else {
        weight = expf(x - top) / sum;
    }
    if (chosen) {
        weights[token * k + lane] = weight * scale;
        experts[token * k + lane] = (I)own;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) backward(T* dlogits, const T* logits, const I* experts, const float* dweights, i64 tokens, i32 count, i32 k, float scale) {
    i64 token = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (token >= tokens) return;
    const T* row = logits + token * count;
    bool chosen = lane < k;
    int own = chosen ? (int)experts[token * k + lane] : 0;
    float x = chosen ? (float)load(row[own]) : 0.0f;
    float dw = chosen ? dweights[token * k + lane] * scale : 0.0f;

    // Of the chosen ones alone: the gradient of their logits; or with a softmax over all, dp.
    float gradient, top = 0, sum = 1, mean = 0;
    if (SIGMOID) {
        float p = sigmoid(x), dp = dw;
        if (NORMALIZE) {
            float total = warp_reduce<Add>(chosen ? p : 0.0f) + SUM_FLOOR;
            dp = (dw - warp_reduce<Add>(chosen ? p * dw : 0.0f) / total) / total;
        }
        gradient = dp * p * (1.0f - p);
    } else if (NORMALIZE) {
        float w = expf(x - warp_reduce<Max>(chosen ? x : -infinity()));
        w /= warp_reduce<Add>(chosen ? w : 0.0f);
        gradient = w * (dw - warp_reduce<Add>(chosen ? w * dw : 0.0f));
    } else {
        top = -infinity();
        for (int e = lane; e < count; e += 32) top = fmaxf(top, (float)load(row[e]));
        top = warp_reduce<Max>(top);
        sum = 0;
        for (int e = lane; e < count; e += 32) sum += expf((float)load(row[e]) - top);
        sum = warp_reduce<Add>(sum);
        mean = warp_reduce<Add>(chosen ? expf(x - top) / sum * dw : 0.0f);
        gradient = dw;
    }

    float grad[VALUES];
    #pragma unroll
    for (int i = 0; i < VALUES; i++) grad[i] = 0;
    for (int s = 0; s < k; s++) {
        int e = __shfl_sync(FULL_MASK, own, s);
        float g = __shfl_sync(FULL_MASK, gradient, s);
        #pragma unroll
        for (int i = 0; i < VALUES; i++)
            if (e == i * 32 + lane) grad[i] += g;
    }
    #pragma unroll
    for (int i = 0; i < VALUES; i++) {
        int e = i * 32 + lane;
        if (e < count) {
            if (!SIGMOID && !NORMALIZE) grad[i] = expf((float)load(row[e]) - top) / sum * (grad[i] - mean);
            dlogits[token * count + e] = store<T>(grad[i]);
        }
    }
}
