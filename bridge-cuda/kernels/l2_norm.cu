// Vectors of length one:  y = x r,  dx = r (dy - y sum(dy y)),  r = 1 / sqrt(sum(x^2) + eps).
//
// Definitions: TYPE (x, y, dy, dx), VECTOR (channels that move at once), TEAM (threads that own a row: a power of two up to 32,
// or a whole block), PACKS (packs that each of them has: TEAM * PACKS * VECTOR covers a row). x, dy: [rows, n] packed. Computed
// in float. Launcher: src/ops/gated_norm.rs.
#include "common.cuh"

typedef TYPE T;

constexpr int BLOCK = TEAM > 32 ? TEAM : 256;
constexpr int TEAMS = BLOCK / TEAM;

__device__ __forceinline__ float team_sum(float x) {
    if (TEAM > 32) return block_reduce<Add>(x, 0.0f);
    #pragma unroll
    for (int step = TEAM / 2; step > 0 && TEAM <= 32; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
    return x;
}

extern "C" __global__ void __launch_bounds__(BLOCK) forward(T* y, const T* x, i64 rows, i64 n, float eps) {
    i64 row = (i64)blockIdx.x * TEAMS + threadIdx.x / TEAM;
    Pack<T, VECTOR> p[PACKS];
    float sum = 0;
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + threadIdx.x % TEAM) * VECTOR;
        if (row < rows && i < n) {
            p[c] = load_pack<T, VECTOR>(x + row * n + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) { float v = load(p[c].at[k]); sum += v * v; }
        }
    }
    float r = 1.0f / sqrtf(team_sum(sum) + eps);
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + threadIdx.x % TEAM) * VECTOR;
        if (row < rows && i < n) {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) p[c].at[k] = store<T>((float)load(p[c].at[k]) * r);
            store_pack(y + row * n + i, p[c]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) backward(T* dx, const T* x, const T* dy, i64 rows, i64 n, float eps) {
    i64 row = (i64)blockIdx.x * TEAMS + threadIdx.x / TEAM;
    Pack<T, VECTOR> p[PACKS], g[PACKS];
    float squares = 0, products = 0;
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + threadIdx.x % TEAM) * VECTOR;
        if (row < rows && i < n) {
            p[c] = load_pack<T, VECTOR>(x + row * n + i);
            g[c] = load_pack<T, VECTOR>(dy + row * n + i);
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                float v = load(p[c].at[k]);
                squares += v * v;
                products += v * (float)load(g[c].at[k]);
            }
        }
    }
    float r = 1.0f / sqrtf(team_sum(squares) + eps);
    float along = team_sum(products) * r;
    #pragma unroll
    for (int c = 0; c < PACKS; c++) {
        i64 i = (i64)(c * TEAM + threadIdx.x % TEAM) * VECTOR;
        if (row < rows && i < n) {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) p[c].at[k] = store<T>(r * ((float)load(g[c].at[k]) - (float)load(p[c].at[k]) * r * along));
            store_pack(dx + row * n + i, p[c]);
        }
    }
}
