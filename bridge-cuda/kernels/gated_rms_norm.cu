// RMS norm over groups of neighbouring channels with SiLU of a gate as a factor, before the norm (Mamba-2) or after it.
//
//   gate first:  y = norm(x silu(z)) w        norm first:  y = norm(x) w silu(z)        norm(u) = u / sqrt(mean(u^2) + eps)
//
// Definitions: TYPE (x, z, y and their gradients), WEIGHT (w), GATE_FIRST (0 or 1), VECTOR (channels that move at once), TEAM
// (threads that own a group of a row: a power of two up to 32, or a whole block), PACKS (packs that each of them has:
// TEAM * PACKS * VECTOR covers a group). x, z, dy: [rows, h] packed, w: [h], h a multiple of the group. Computed in float.
// Backward: blocks walk the rows and leave their sums of dw in parts: [gridDim.x, h], for a sum over the blocks, so that results
// repeat exactly. grid: (blocks, groups). Source: Zhang and Sennrich 2019; Gu and Dao 2024. Launcher: src/ops/gated_norm.rs.
#include "common.cuh"

typedef TYPE T;
typedef WEIGHT W;

constexpr int BLOCK = TEAM > 32 ? TEAM : 256;
constexpr int TEAMS = BLOCK / TEAM;

__device__ __forceinline__ float team_sum(float x) {
    if (TEAM > 32) return block_reduce<Add>(x, 0.0f);
    #pragma unroll
    for (int step = TEAM / 2; step > 0 && TEAM <= 32; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
    return x;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

extern "C" __global__ void __launch_bounds__(BLOCK) forward(T* y, const T* x, const T* z, const W* w, i64 rows, i64 h, i64 size, float eps) {
    int lane = threadIdx.x % TEAM;
    i64 row = (i64)blockIdx.x * TEAMS + threadIdx.x / TEAM, at = row * h + blockIdx.y * size;
    float u[PACKS][VECTOR], factor[PACKS][VECTOR], sum = 0;
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + lane) * VECTOR;
        if (row < rows && i < size) {
            Pack<T, VECTOR> px = load_pack<T, VECTOR>(x + at + i), pz = load_pack<T, VECTOR>(z + at + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                float gate = load(pz.at[k]);
                factor[c][k] = gate * sigmoid(gate);
                u[c][k] = (float)load(px.at[k]) * (GATE_FIRST ? factor[c][k] : 1.0f);
                sum += u[c][k] * u[c][k];
            }
        }
    }
    float r = 1.0f / sqrtf(team_sum(sum) / (float)size + eps);
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + lane) * VECTOR;
        if (row < rows && i < size) {
            Pack<W, VECTOR> pw = load_pack<W, VECTOR>(w + blockIdx.y * size + i);
            Pack<T, VECTOR> out;
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) out.at[k] = store<T>(u[c][k] * r * (float)load(pw.at[k]) * (GATE_FIRST ? 1.0f : factor[c][k]));
            store_pack(y + at + i, out);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) backward(T* dx, T* dz, float* parts, const T* x, const T* z, const W* w, const T* dy, i64 rows, i64 h, i64 size, float eps) {
    int lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM;
    float dw[PACKS][VECTOR], scale[PACKS][VECTOR];
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + lane) * VECTOR;
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) { dw[c][k] = 0; scale[c][k] = 0; }
        if (i < size) {
            Pack<W, VECTOR> pw = load_pack<W, VECTOR>(w + blockIdx.y * size + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) scale[c][k] = load(pw.at[k]);
        }
    }
    // All threads stay in the loop as long as one has a row, for the sums.
    for (i64 first = (i64)blockIdx.x * TEAMS; first < rows; first += (i64)gridDim.x * TEAMS) {
        i64 row = first + team, at = row * h + blockIdx.y * size;
        Pack<T, VECTOR> px[PACKS], pz[PACKS], pg[PACKS];
        float squares = 0, products = 0;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = (i64)(c * TEAM + lane) * VECTOR;
            if (row < rows && i < size) {
                px[c] = load_pack<T, VECTOR>(x + at + i);
                pz[c] = load_pack<T, VECTOR>(z + at + i);
                pg[c] = load_pack<T, VECTOR>(dy + at + i);
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    float gate = load(pz[c].at[k]), factor = gate * sigmoid(gate);
                    float u = (float)load(px[c].at[k]) * (GATE_FIRST ? factor : 1.0f);
                    float g = (float)load(pg[c].at[k]) * scale[c][k] * (GATE_FIRST ? 1.0f : factor);
                    squares += u * u;
                    products += u * g;
                }
            }
        }
        float r = 1.0f / sqrtf(team_sum(squares) / (float)size + eps);
        float mean = team_sum(products) * r / (float)size;
        #pragma unroll
        for (int c = 0; c < PACKS; c++) {
            i64 i = (i64)(c * TEAM + lane) * VECTOR;
            if (row < rows && i < size) {
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    float v = load(px[c].at[k]), gate = load(pz[c].at[k]), g = load(pg[c].at[k]), s = sigmoid(gate), factor = gate * s;
                    float normed = v * (GATE_FIRST ? factor : 1.0f) * r, gated = g * (GATE_FIRST ? 1.0f : factor);
                    float du = r * (gated * scale[c][k] - normed * mean);
                    float dfactor = GATE_FIRST ? du * v : g * normed * scale[c][k];
                    dw[c][k] += gated * normed;
                    px[c].at[k] = store<T>(GATE_FIRST ? du * factor : du);
                    pz[c].at[k] = store<T>(dfactor * (s + factor * (1.0f - s)));
                }
                store_pack(dx + at + i, px[c]);
                store_pack(dz + at + i, pz[c]);
            }
        }
    }
    // The teams add their sums one after the other.
    __shared__ float sums[TEAM <= 32 ? TEAM * PACKS * VECTOR : 1];
    float* part = parts + blockIdx.x * h + blockIdx.y * size;
    for (int turn = 0; turn < TEAMS; turn++) {
        if (team == turn) {
            #pragma unroll
            for (int c = 0; c < PACKS; c++)
                #pragma unroll
                for (int k = 0; k < VECTOR; k++) {
                    int i = (c * TEAM + lane) * VECTOR + k;
                    if (TEAM > 32) {
                        if (i < size) part[i] = dw[c][k];
                    } else {
                        sums[i] = turn == 0 ? dw[c][k] : sums[i] + dw[c][k];
                    }
                }
        }
        __syncthreads();
    }
    if (TEAM <= 32)
        for (int i = threadIdx.x; i < size; i += BLOCK) part[i] = sums[i];
}
