// Gather, select, and their scatter-add counterparts along one dimension.
//
// Definitions: TYPE (element), INDEX (integer type of the indices), OP for scatters (Plus, Or).
// All tensors are packed. A tensor is seen as [outer, size, inner] around the indexed dimension. A negative index counts
// from the end, as in Python. Scatters give one thread each line (outer, inner) and add in the order of the indices, so
// results repeat exactly. Launcher: src/index.rs.
#include "common.cuh"

typedef TYPE T;
typedef INDEX I;

__device__ __forceinline__ i64 position(I index, i64 size) {
    i64 i = (i64)index;
    return i < 0 ? i + size : i;
}

// indices: [outer, count, inner] -> out: [outer, count, inner]
extern "C" __global__ void gather(T* out, const T* in, const I* indices, i64 total, i64 size, i64 count, i64 inner) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        i64 column = i % inner, outer = i / inner / count;
        out[i] = in[(outer * size + position(indices[i], size)) * inner + column];
    }
}

// indices: [count] -> out: [outer, count, inner]
extern "C" __global__ void select(T* out, const T* in, const I* indices, i64 total, i64 size, i64 count, i64 inner) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        i64 column = i % inner, row = i / inner;
        out[i] = in[(row / count * size + position(indices[row % count], size)) * inner + column];
    }
}

#ifdef OP
struct Plus { template <typename X> static __device__ X of(X a, X b) { return a + b; } };
struct Or { template <typename X> static __device__ X of(X a, X b) { return a | b; } };

// out: [outer, size, inner] += values: [outer, count, inner] at indices: [outer, count, inner]
extern "C" __global__ void scatter(T* out, const I* indices, const T* values, i64 lines, i64 size, i64 count, i64 inner) {
    i64 line = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= lines) return;
    i64 column = line % inner, outer = line / inner;
    for (i64 k = 0; k < count; k++) {
        i64 from = (outer * count + k) * inner + column;
        T* to = out + (outer * size + position(indices[from], size)) * inner + column;
        *to = store<T>(OP::of(load(*to), load(values[from])));
    }
}

// out: [outer, size, inner] += values: [outer, count, inner] at indices: [count]
extern "C" __global__ void select_add(T* out, const I* indices, const T* values, i64 lines, i64 size, i64 count, i64 inner) {
    i64 line = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (line >= lines) return;
    i64 column = line % inner, outer = line / inner;
    for (i64 k = 0; k < count; k++) {
        T* to = out + (outer * size + position(indices[k], size)) * inner + column;
        *to = store<T>(OP::of(load(*to), load(values[(outer * count + k) * inner + column])));
    }
}
#endif
