// Reductions over one dimension of a strided view, and arg-reductions.
//
// Definitions: TYPE (input), TYPE_O (output), OP (Sum, Product, Maximum, Minimum, MaxAbs; Maximum or Minimum for arg_*).
// The view's dimensions without the reduced one form the outputs, in row-major order; the reduced dimension has `n`
// elements, `stride` apart. Accumulated in float (16-bit and 32-bit floats), double (f64) or i64 (integers, bool).
// gridDim.y splits the reduced dimension; with several splits the output is [splits, outputs] and a second launch
// finishes. The order of additions is fixed by the launch shape, so results repeat exactly.
//
// `rows`: one block per output. `warps`: one warp per output, for short rows. `columns`: one thread per output, for
// reductions over a dimension that is not the innermost. Launcher: src/reduce.rs.
#include "common.cuh"

typedef TYPE T;
typedef TYPE_O O;

template <typename T> struct AccumulatorOf { typedef i64 type; };
template <> struct AccumulatorOf<u64> { typedef u64 type; };
template <> struct AccumulatorOf<float> { typedef float type; };
template <> struct AccumulatorOf<f16> { typedef float type; };
template <> struct AccumulatorOf<bf16> { typedef float type; };
template <> struct AccumulatorOf<double> { typedef double type; };
typedef AccumulatorOf<T>::type Acc;

template <typename X> __device__ __forceinline__ X lowest() { return (X)((u64)1 << 63); }
template <> __device__ __forceinline__ u64 lowest() { return 0; }
template <> __device__ __forceinline__ float lowest() { return -infinity(); }
template <> __device__ __forceinline__ double lowest() { return -(double)infinity(); }
template <typename X> __device__ __forceinline__ X highest() { return (X)(~((u64)1 << 63)); }
template <> __device__ __forceinline__ u64 highest() { return ~(u64)0; }
template <> __device__ __forceinline__ float highest() { return infinity(); }
template <> __device__ __forceinline__ double highest() { return infinity(); }

// A NaN wins every maximum and minimum.
struct Sum {
    static __device__ Acc empty() { return 0; }
    static __device__ Acc take(Acc x) { return x; }
    template <typename X> static __device__ X of(X a, X b) { return a + b; }
};
struct Product {
    static __device__ Acc empty() { return 1; }
    static __device__ Acc take(Acc x) { return x; }
    template <typename X> static __device__ X of(X a, X b) { return a * b; }
};
struct Maximum {
    static __device__ Acc empty() { return lowest<Acc>(); }
    static __device__ Acc take(Acc x) { return x; }
    template <typename X> static __device__ X of(X a, X b) { return a > b || a != a ? a : b; }
    static __device__ bool better(Acc a, Acc b) { return a > b || (a != a && b == b); }
};
struct Minimum {
    static __device__ Acc empty() { return highest<Acc>(); }
    static __device__ Acc take(Acc x) { return x; }
    template <typename X> static __device__ X of(X a, X b) { return a < b || a != a ? a : b; }
    static __device__ bool better(Acc a, Acc b) { return a < b || (a != a && b == b); }
};
struct MaxAbs {
    static __device__ Acc empty() { return 0; }
    static __device__ Acc take(Acc x) { return x > (Acc)0 ? x : (Acc)0 - x; }
    template <typename X> static __device__ X of(X a, X b) { return a > b || a != a ? a : b; }
};

__device__ __forceinline__ i64 base_of(const Views& views, i64 output) {
    i64 at[1];
    offsets<1, u64>(views, (u64)output, at);
    return at[0];
}

__device__ __forceinline__ void split(i64 n, i64& begin, i64& end) {
    i64 part = (n + gridDim.y - 1) / gridDim.y;
    begin = part * blockIdx.y;
    end = begin + part < n ? begin + part : n;
}

#ifndef ARG

extern "C" __global__ void rows(O* out, const T* in, Views views, i64 outputs, i64 n, i64 stride, double scale) {
    i64 output = blockIdx.x, begin, end;
    split(n, begin, end);
    const T* row = in + base_of(views, output);
    Acc sum = OP::empty();
    for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x) sum = OP::of(sum, OP::take((Acc)load(row[i * stride])));
    sum = block_reduce<OP>(sum, OP::empty());
    if (threadIdx.x == 0) out[blockIdx.y * outputs + output] = store<O>(scale == 1.0 ? sum : (Acc)(sum * scale));
}

extern "C" __global__ void warps(O* out, const T* in, Views views, i64 outputs, i64 n, i64 stride, double scale) {
    i64 output = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP, begin, end;
    if (output >= outputs) return;
    split(n, begin, end);
    const T* row = in + base_of(views, output);
    Acc sum = OP::empty();
    for (i64 i = begin + threadIdx.x % WARP; i < end; i += WARP) sum = OP::of(sum, OP::take((Acc)load(row[i * stride])));
    sum = warp_reduce<OP>(sum);
    if (threadIdx.x % WARP == 0) out[blockIdx.y * outputs + output] = store<O>(scale == 1.0 ? sum : (Acc)(sum * scale));
}

extern "C" __global__ void columns(O* out, const T* in, Views views, i64 outputs, i64 n, i64 stride, double scale) {
    i64 output = (i64)blockIdx.x * blockDim.x + threadIdx.x, begin, end;
    if (output >= outputs) return;
    split(n, begin, end);
    const T* column = in + base_of(views, output);
    Acc sum = OP::empty();
    for (i64 i = begin; i < end; i++) sum = OP::of(sum, OP::take((Acc)load(column[i * stride])));
    out[blockIdx.y * outputs + output] = store<O>(scale == 1.0 ? sum : (Acc)(sum * scale));
}

#else

// Position of the best element, the first of equals. One warp per output.
extern "C" __global__ void arg_warps(O* out, const T* in, Views views, i64 outputs, i64 n, i64 stride) {
    i64 output = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (output >= outputs) return;
    const T* row = in + base_of(views, output);
    u32 lane = threadIdx.x % WARP;
    Acc best = OP::empty();
    i64 place = n;
    for (i64 i = lane; i < n; i += WARP) {
        Acc x = (Acc)load(row[i * stride]);
        if (place == n || OP::better(x, best)) { best = x; place = i; }
    }
    #pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        Acc other = __shfl_xor_sync(FULL_MASK, best, step);
        i64 other_place = __shfl_xor_sync(FULL_MASK, place, step);
        bool tie = !OP::better(other, best) && !OP::better(best, other);
        if (other_place < n && (place == n || OP::better(other, best) || (tie && other_place < place))) {
            best = other;
            place = other_place;
        }
    }
    if (lane == 0) out[output] = store<O>(place);
}

#endif
