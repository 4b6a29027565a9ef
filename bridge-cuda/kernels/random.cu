// Random numbers from Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011).
//
// Definitions: TYPE. out: [count] packed. Four numbers come from each counter value; element i uses counter
// offset + i / 4, so results depend on (seed, offset) alone, not on the launch. kind: 0 uniform in [a, b), 1 normal with
// mean a and deviation b (Box-Muller), 2 Bernoulli with probability a. Launcher: src/random.rs.
#include "common.cuh"

typedef TYPE T;

__device__ __forceinline__ void philox(u64 seed, u64 counter, u32 (&out)[4]) {
    u32 c0 = (u32)counter, c1 = (u32)(counter >> 32), c2 = 0, c3 = 0;
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
    #pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 p0 = (u64)0xD2511F53u * c0, p1 = (u64)0xCD9E8D57u * c2;
        u32 n0 = (u32)(p1 >> 32) ^ c1 ^ k0, n2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c1 = (u32)p1; c3 = (u32)p0; c0 = n0; c2 = n2;
        k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

// In [0, 1), 24 bits.
__device__ __forceinline__ float unit(u32 x) { return (float)(x >> 8) * (1.0f / 16777216.0f); }

extern "C" __global__ void fill(T* out, u64 seed, u64 offset, i32 kind, double a, double b, i64 count) {
    i64 groups = (count + 3) / 4;
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 g = (i64)blockIdx.x * blockDim.x + threadIdx.x; g < groups; g += step) {
        u32 bits[4];
        philox(seed, offset + (u64)g, bits);
        double value[4];
        #pragma unroll
        for (int k = 0; k < 4; k += 2) {
            if (kind == 1) {
                float radius = sqrtf(-2.0f * logf(1.0f - unit(bits[k])));
                float s, c;
                sincospif(2.0f * unit(bits[k + 1]), &s, &c);
                value[k] = a + b * radius * c;
                value[k + 1] = a + b * radius * s;
            } else {
                #pragma unroll
                for (int j = k; j < k + 2; j++) {
                    float u = unit(bits[j]);
                    value[j] = kind == 0 ? a + (b - a) * u : (u < a ? 1.0 : 0.0);
                }
            }
        }
        #pragma unroll
        for (int k = 0; k < 4; k++) if (g * 4 + k < count) {
            T rounded = store<T>(value[k]);
            // Rounding to a narrow type may reach the excluded end of the range.
            if (kind == 0 && (double)load(rounded) >= b && b > a) rounded = store<T>(a);
            out[g * 4 + k] = rounded;
        }
    }
}
