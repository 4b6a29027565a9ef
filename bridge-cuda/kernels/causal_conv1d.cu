// The short causal convolution of recurrent layers, one filter per channel, with SiLU after it or not.
//
//   u_t = bias + sum over j of w_{TAPS-1-j} x_{t-j},  y = u or silu(u),  du = dy or dy silu'(u)
//   dx_t = sum over j of w_{TAPS-1-j} du_{t+j},  dw_{TAPS-1-j} = sum over t of x_{t-j} du_t,  dbias = sum over t of du_t
//
// Definitions: TYPE (x, y, dy, dx), WEIGHT (w, bias), TAPS, SILU (0 or 1), VECTOR (channels of a thread).
// x: [batch, seq, channels], w: [channels, TAPS], bias (or null): [channels], history (or null: zeros): [batch, TAPS - 1,
// channels], all packed; reach (or null): [batch, seq], how far each token is from the start of its document, past which
// nothing is seen. A thread walks RUN tokens of its channels with what it has seen in registers. In the backward pass each run
// leaves its sums in parts: [runs, TAPS + 1, channels] float, which `finish` adds up in order. Computed in float.
// Source: Gu and Dao 2023. Launcher: src/ops/causal_conv1d.rs.
#include "common.cuh"

typedef TYPE T;
typedef WEIGHT W;

constexpr int RUN = 64;
constexpr int AHEAD = 8;  // Tokens whose loads are under way at a time; divides RUN.

// Token t of a row; before the row comes its history.
__device__ __forceinline__ void token(float (&to)[VECTOR], const T* x, const T* history, i64 row, i64 seq, i64 channels, i64 channel, i64 t) {
    Pack<T, VECTOR> p;
    bool inside = t >= 0 && t < seq;
    if (inside) p = load_pack<T, VECTOR>(x + (row * seq + t) * channels + channel);
    else if (t < 0 && history) p = load_pack<T, VECTOR>(history + (row * (TAPS - 1) + t + TAPS - 1) * channels + channel);
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) to[v] = inside || (t < 0 && history) ? (float)load(p.at[v]) : 0.0f;
}

// The filters of the channels, by how far back each tap looks.
__device__ __forceinline__ void filters(float (&taps)[TAPS][VECTOR], const W* w, i64 channel) {
    #pragma unroll
    for (int back = 0; back < TAPS; back++)
        #pragma unroll
        for (int v = 0; v < VECTOR; v++) taps[back][v] = load(w[(channel + v) * TAPS + TAPS - 1 - back]);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// grid: (channels / (VECTOR * threads), runs of a row, batch).
extern "C" __global__ void __launch_bounds__(128) forward(T* y, const T* x, const W* w, const W* bias, const T* history, const i32* reach, i64 seq, i64 channels) {
    i64 channel = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, row = blockIdx.z, first = (i64)blockIdx.y * RUN;
    if (channel >= channels) return;
    float taps[TAPS][VECTOR], seen[TAPS][VECTOR];
    filters(taps, w, channel);
    #pragma unroll
    for (int back = 1; back < TAPS; back++) token(seen[back - 1], x, history, row, seq, channels, channel, first - back);
    for (i64 start = first; start < min(first + RUN, seq); start += AHEAD) {
        float ahead[AHEAD][VECTOR];
        i32 far[AHEAD];
        #pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            token(ahead[k], x, history, row, seq, channels, channel, start + k);
            far[k] = reach && start + k < seq ? reach[row * seq + start + k] : TAPS;
        }
        #pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            Pack<T, VECTOR> out;
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                #pragma unroll
                for (int back = TAPS - 1; back > 0; back--) seen[back][v] = seen[back - 1][v];
                seen[0][v] = ahead[k][v];
                float u = bias ? (float)load(bias[channel + v]) : 0.0f;
                #pragma unroll
                for (int back = 0; back < TAPS; back++) u += back <= far[k] ? taps[back][v] * seen[back][v] : 0.0f;
                out.at[v] = store<T>(SILU ? u * sigmoid(u) : u);
            }
            if (start + k < seq) store_pack(y + (row * seq + start + k) * channels + channel, out);
        }
    }
}

// The same grid. A run needs du of the TAPS - 1 tokens after it as well.
extern "C" __global__ void __launch_bounds__(128) backward(T* dx, float* parts, const T* x, const W* w, const W* bias, const T* dy, const i32* reach, i64 seq, i64 channels) {
    i64 channel = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * VECTOR, row = blockIdx.z, first = (i64)blockIdx.y * RUN;
    if (channel >= channels) return;
    i64 last = min(first + RUN, seq);
    float taps[TAPS][VECTOR], seen[TAPS][VECTOR], grads[TAPS][VECTOR], dw[TAPS][VECTOR], db[VECTOR], offset[VECTOR];
    i32 far[TAPS];  // Reach of the tokens that `grads` belong to.
    filters(taps, w, channel);
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        db[v] = 0;
        offset[v] = bias ? (float)load(bias[channel + v]) : 0.0f;
        #pragma unroll
        for (int back = 0; back < TAPS; back++) { dw[back][v] = 0; grads[back][v] = 0; }
    }
    #pragma unroll
    for (int back = 0; back < TAPS; back++) far[back] = 0;
    #pragma unroll
    for (int back = 1; back < TAPS; back++) token(seen[back - 1], x, nullptr, row, seq, channels, channel, first - back);
    for (i64 start = first; start < last + TAPS - 1; start += AHEAD) {
        float ahead[AHEAD][VECTOR], dahead[AHEAD][VECTOR];
        i32 reaches[AHEAD];
        #pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            token(ahead[k], x, nullptr, row, seq, channels, channel, start + k);
            token(dahead[k], dy, nullptr, row, seq, channels, channel, start + k);
            reaches[k] = reach && start + k < seq ? reach[row * seq + start + k] : TAPS;
        }
        #pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            i64 t = start + k, target = t - (TAPS - 1);
            Pack<T, VECTOR> out;
            #pragma unroll
            for (int back = TAPS - 1; back > 0; back--) far[back] = far[back - 1];
            far[0] = reaches[k];
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                #pragma unroll
                for (int back = TAPS - 1; back > 0; back--) { seen[back][v] = seen[back - 1][v]; grads[back][v] = grads[back - 1][v]; }
                seen[0][v] = ahead[k][v];
                float du = dahead[k][v];
                if (SILU) {
                    float u = offset[v];
                    #pragma unroll
                    for (int back = 0; back < TAPS; back++) u += back <= far[0] ? taps[back][v] * seen[back][v] : 0.0f;
                    float s = sigmoid(u);
                    du *= s + u * s * (1.0f - s);
                }
                grads[0][v] = du;
                if (t < last) {
                    db[v] += du;
                    #pragma unroll
                    for (int back = 0; back < TAPS; back++) dw[back][v] += back <= far[0] ? seen[back][v] * du : 0.0f;
                }
                // Token `target` is `back` before the token whose gradient is grads[TAPS - 1 - back].
                float sum = 0;
                #pragma unroll
                for (int back = 0; back < TAPS; back++) sum += back <= far[TAPS - 1 - back] ? taps[back][v] * grads[TAPS - 1 - back][v] : 0.0f;
                out.at[v] = store<T>(sum);
            }
            if (target >= first && target < last) store_pack(dx + (row * seq + target) * channels + channel, out);
        }
    }
    i64 run = (i64)blockIdx.z * gridDim.y + blockIdx.y;
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        #pragma unroll
        for (int back = 0; back < TAPS; back++) parts[(run * (TAPS + 1) + TAPS - 1 - back) * channels + channel + v] = dw[back][v];
        parts[(run * (TAPS + 1) + TAPS) * channels + channel + v] = db[v];
    }
}

// dw: [channels, TAPS], dbias: [channels], both float. grid: (channels / threads, TAPS + 1).
extern "C" __global__ void finish(float* dw, float* dbias, const float* parts, i64 runs, i64 channels) {
    i64 channel = (i64)blockIdx.x * blockDim.x + threadIdx.x, tap = blockIdx.y;
    if (channel >= channels) return;
    float sum = 0;
    #pragma unroll 8
    for (i64 run = 0; run < runs; run++) sum += parts[(run * (TAPS + 1) + tap) * channels + channel];
    if (tap < TAPS) dw[channel * TAPS + tap] = sum;
    else dbias[channel] = sum;
}
