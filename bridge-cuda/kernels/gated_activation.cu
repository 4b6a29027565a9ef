// Activations, alone and as the gate of a gated MLP, with their gradients.
//
//   y = act(x), dx = act'(x) dy;  y = act(gate) up, dgate = act'(gate) up dy, dup = act(gate) dy
//
// Definitions: TYPE, ACT (a structure below). All operands packed, `count` elements; computed in float. A thread moves
// 16-byte packs, the last elements one by one. Launcher: src/ops/activation.rs.
#include "common.cuh"

typedef TYPE T;
constexpr int VECTOR = 16 / sizeof(T);

struct Curve { float value, slope; };

__device__ __forceinline__ float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Silu {
    static __device__ Curve at(float x) { float s = logistic(x); return {x * s, s * (1.0f + x * (1.0f - s))}; }
};
struct QuickGelu {
    static __device__ Curve at(float x) { float s = logistic(1.702f * x); return {x * s, s * (1.0f + 1.702f * x * (1.0f - s))}; }
};
struct Gelu {
    static __device__ Curve at(float x) {
        float p = 0.5f * (1.0f + erff(x * 0.70710678f));
        return {x * p, p + x * 0.39894228f * expf(-0.5f * x * x)};
    }
};
struct GeluTanh {
    static __device__ Curve at(float x) {
        float t = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
        return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x)};
    }
};
struct Relu { static __device__ Curve at(float x) { return {x > 0 ? x : 0.0f, x > 0 ? 1.0f : 0.0f}; } };
struct Relu2 { static __device__ Curve at(float x) { return {x > 0 ? x * x : 0.0f, x > 0 ? 2.0f * x : 0.0f}; } };
struct Sigmoid { static __device__ Curve at(float x) { float s = logistic(x); return {s, s * (1.0f - s)}; } };
struct Tanh { static __device__ Curve at(float x) { float t = tanhf(x); return {t, 1.0f - t * t}; } };

// Runs the statements for packs of N elements from i, then for single elements.
#define FOR_ALL(N, ...)                                                                             \
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x, step = (i64)gridDim.x * blockDim.x;     \
    i64 packs = count / VECTOR;                                                                      \
    for (i64 p = thread; p < packs; p += step) { constexpr int N = VECTOR; i64 i = p * VECTOR; __VA_ARGS__ }   \
    for (i64 i = packs * VECTOR + thread; i < count; i += step) { constexpr int N = 1; __VA_ARGS__ }

extern "C" __global__ void forward(T* y, const T* x, i64 count) {
    FOR_ALL(N, {
        Pack<T, N> a = load_pack<T, N>(x + i);
        _Pragma("unroll") for (int k = 0; k < N; k++) a.at[k] = store<T>(ACT::at(load(a.at[k])).value);
        store_pack(y + i, a);
    })
}

extern "C" __global__ void backward(T* dx, const T* x, const T* dy, i64 count) {
    FOR_ALL(N, {
        Pack<T, N> a = load_pack<T, N>(x + i);
        Pack<T, N> g = load_pack<T, N>(dy + i);
        _Pragma("unroll") for (int k = 0; k < N; k++) a.at[k] = store<T>(ACT::at(load(a.at[k])).slope * (float)load(g.at[k]));
        store_pack(dx + i, a);
    })
}

extern "C" __global__ void gated_forward(T* y, const T* gate, const T* up, i64 count) {
    FOR_ALL(N, {
        Pack<T, N> a = load_pack<T, N>(gate + i);
        Pack<T, N> u = load_pack<T, N>(up + i);
        _Pragma("unroll") for (int k = 0; k < N; k++) a.at[k] = store<T>(ACT::at(load(a.at[k])).value * (float)load(u.at[k]));
        store_pack(y + i, a);
    })
}

// `y` may be null; where it is not, it gets the forward pass's result and may take the place of dy.
extern "C" __global__ void gated_backward(T* dgate, T* dup, T* y, const T* gate, const T* up, const T* dy, i64 count) {
    FOR_ALL(N, {
        Pack<T, N> a = load_pack<T, N>(gate + i);
        Pack<T, N> u = load_pack<T, N>(up + i);
        Pack<T, N> g = load_pack<T, N>(dy + i);
        _Pragma("unroll") for (int k = 0; k < N; k++) {
            Curve c = ACT::at(load(a.at[k]));
            float d = load(g.at[k]);
            if (y) g.at[k] = store<T>(c.value * (float)load(u.at[k]));
            a.at[k] = store<T>(c.slope * (float)load(u.at[k]) * d);
            u.at[k] = store<T>(c.value * d);
        }
        store_pack(dgate + i, a);
        store_pack(dup + i, u);
        if (y) store_pack(y + i, g);
    })
}

// gpt-oss: g = min(gate, limit), u = clamp(up, -limit, limit), y = g logistic(alpha g) (u + 1). Nothing passes a clamp.
// Maths: bridge-ops/src/clamped_swiglu.rs.
extern "C" __global__ void clamped_forward(T* y, const T* gate, const T* up, i64 count, float alpha, float limit) {
    FOR_ALL(N, {
        Pack<T, N> a = load_pack<T, N>(gate + i);
        Pack<T, N> u = load_pack<T, N>(up + i);
        _Pragma("unroll") for (int k = 0; k < N; k++) {
            float g = fminf(load(a.at[k]), limit), v = fminf(fmaxf(load(u.at[k]), -limit), limit);
            a.at[k] = store<T>(g * logistic(alpha * g) * (v + 1.0f));
        }
        store_pack(y + i, a);
    })
}

extern "C" __global__ void clamped_backward(T* dgate, T* dup, const T* gate, const T* up, const T* dy, i64 count, float alpha, float limit) {
    FOR_ALL(N, {
        Pack<T, N> a = load_pack<T, N>(gate + i);
        Pack<T, N> u = load_pack<T, N>(up + i);
        Pack<T, N> d = load_pack<T, N>(dy + i);
        _Pragma("unroll") for (int k = 0; k < N; k++) {
            float x = load(a.at[k]), z = load(u.at[k]), dk = load(d.at[k]);
            float g = fminf(x, limit), v = fminf(fmaxf(z, -limit), limit), s = logistic(alpha * g);
            a.at[k] = store<T>(x <= limit ? s * (1.0f + alpha * g * (1.0f - s)) * (v + 1.0f) * dk : 0.0f);
            u.at[k] = store<T>(fabsf(z) <= limit ? s * g * dk : 0.0f);
        }
        store_pack(dgate + i, a);
        store_pack(dup + i, u);
    })
}
