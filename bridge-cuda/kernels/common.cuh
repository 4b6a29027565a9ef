// Types and reductions shared by the kernels. No toolkit header is needed: the 16-bit float types are defined here, and
// their conversions are single instructions on every chip we support (compute capability 8.0 and newer).
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

constexpr u32 WARP = 32;
constexpr u32 FULL_MASK = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- Conversions. Arithmetic is done in Compute<T>: float for the 16-bit types, the type itself otherwise. ----

template <typename T> struct ComputeOf { typedef T type; };
template <> struct ComputeOf<bf16> { typedef float type; };
template <> struct ComputeOf<f16> { typedef float type; };
template <typename T> using Compute = typename ComputeOf<T>::type;

template <typename T> __device__ __forceinline__ T load(T x) { return x; }
__device__ __forceinline__ float load(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float load(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Round a computed value to T. Floats become integers by truncation, as Rust's `as` does.
template <typename T> struct Store {
    template <typename X> static __device__ __forceinline__ T from(X x) { return (T)x; }
};
template <> struct Store<bf16> {
    template <typename X> static __device__ __forceinline__ bf16 from(X x) {
        bf16 y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"((float)x));
        return y;
    }
};
template <> struct Store<f16> {
    template <typename X> static __device__ __forceinline__ f16 from(X x) {
        f16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"((float)x));
        return y;
    }
};
template <typename T, typename X> __device__ __forceinline__ T store(X x) { return Store<T>::from(x); }

// Two floats to a register of two 16-bit floats, `low` in the lower half.
template <typename T> struct Pair;
template <> struct Pair<bf16> {
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
    }
};
template <> struct Pair<f16> {
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 y;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
    }
};

// ---- N values that move in one instruction. ----

template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

template <typename T, int N> __device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <typename T, int N> __device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& value) {
    *reinterpret_cast<Pack<T, N>*>(to) = value;
}

// ---- Reductions over a warp and over a block. All threads must take part; all get the result of a warp reduction. ----

struct Add { template <typename T> static __device__ __forceinline__ T of(T a, T b) { return a + b; } };
struct Max { template <typename T> static __device__ __forceinline__ T of(T a, T b) { return a > b ? a : b; } };

template <typename Op, typename T> __device__ __forceinline__ T warp_reduce(T x) {
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) x = Op::of(x, __shfl_xor_sync(FULL_MASK, x, step));
    return x;
}

// Result for every thread of a one-dimensional block of whole warps. `empty` is the neutral element. May be called
// repeatedly: the barrier at the start keeps one call's reads from the next call's writes.
template <typename Op, typename T> __device__ __forceinline__ T block_reduce(T x, T empty) {
    __shared__ T partial[32];
    x = warp_reduce<Op>(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    T y = threadIdx.x % WARP < blockDim.x / WARP ? partial[threadIdx.x % WARP] : empty;
    return warp_reduce<Op>(y);
}

// ---- Strided views. Mirrors `Views` in src/view.rs. ----

constexpr int MAX_RANK = 8;
constexpr int MAX_VIEWS = 4;

struct Views {
    i32 rank;
    i32 unused;
    i64 shape[MAX_RANK];
    i64 strides[MAX_VIEWS][MAX_RANK];
};

// Offsets of element `index` (row-major over the shape) in the first N views.
template <int N, typename I> __device__ __forceinline__ void offsets(const Views& views, I index, i64 (&out)[N]) {
    #pragma unroll
    for (int v = 0; v < N; v++) out[v] = 0;
    for (int d = views.rank - 1; d >= 0; d--) {
        I size = (I)views.shape[d];
        I quotient = index / size;
        i64 position = (i64)(index - quotient * size);
        index = quotient;
        #pragma unroll
        for (int v = 0; v < N; v++) out[v] += position * views.strides[v][d];
    }
}
