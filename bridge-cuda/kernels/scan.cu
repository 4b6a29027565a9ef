// Cumulative sums, products, minima and maxima along one dimension.
//
// Definitions: TYPE, OP (Plus, Times, Smaller, Larger). in, out: packed [outer, n, inner]. Accumulated in float, double or
// the integer type itself. `lines`: one thread per (outer, inner). `rows`: inner is 1, one warp per row, 32 elements a
// step. Launcher: src/scan.rs.
#include "common.cuh"

typedef TYPE T;
typedef Compute<T> Acc;

struct Plus { static __device__ Acc of(Acc a, Acc b) { return a + b; } };
struct Times { static __device__ Acc of(Acc a, Acc b) { return a * b; } };
struct Smaller { static __device__ Acc of(Acc a, Acc b) { return a < b || a != a ? a : b; } };
struct Larger { static __device__ Acc of(Acc a, Acc b) { return a > b || a != a ? a : b; } };

extern "C" __global__ void lines(T* out, const T* in, i64 count, i64 n, i64 inner) {
    i64 line = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= count) return;
    i64 at = line / inner * n * inner + line % inner;
    Acc sum = Acc();
    for (i64 i = 0; i < n; i++, at += inner) {
        Acc x = load(in[at]);
        sum = i == 0 ? x : OP::of(sum, x);
        out[at] = store<T>(sum);
    }
}

extern "C" __global__ void rows(T* out, const T* in, i64 count, i64 n, i64 inner) {
    i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= count) return;
    int lane = threadIdx.x % WARP;
    Acc carry = Acc();
    for (i64 start = 0; start < n; start += WARP) {
        i64 i = start + lane;
        Acc x = i < n ? load(in[row * n + i]) : Acc();
        #pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            Acc left = __shfl_up_sync(FULL_MASK, x, step);
            if (lane >= step) x = OP::of(left, x);
        }
        if (start > 0) x = OP::of(carry, x);
        if (i < n) out[row * n + i] = store<T>(x);
        carry = __shfl_sync(FULL_MASK, x, 31);
    }
}
