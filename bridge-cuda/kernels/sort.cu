// Bitonic sort of rows, with the positions the elements came from.
//
// Definitions: TYPE, DESCENDING (0 or 1). keys: [rows, padded] TYPE, places: [rows, padded] i32, `padded` a power of two of
// at least TILE. Elements past a row's end carry a place of `n` or more and sort last. Equal elements keep their order;
// NaN sorts after every number (before it when descending). Launcher: src/sort.rs.
#include "common.cuh"

typedef TYPE T;

constexpr int TILE = 1024;  // Elements a block sorts in shared memory, two per thread.

// Whether (x, i) belongs before (y, j).
__device__ __forceinline__ bool before(T x, i32 i, T y, i32 j, i32 n) {
    if ((i < n) != (j < n)) return i < n;
    Compute<T> a = load(x), b = load(y);
    bool a_nan = a != a, b_nan = b != b;
    bool less = b_nan ? !a_nan : a < b, greater = a_nan ? !b_nan : a > b;
    if (less || greater) return DESCENDING ? greater : less;
    return i < j;
}

extern "C" __global__ void load_rows(T* keys, i32* places, const T* in, i64 total, i64 n, i64 padded) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        i64 row = i / padded, column = i % padded;
        keys[i] = column < n ? in[row * n + column] : T();
        places[i] = (i32)column;
    }
}

__device__ __forceinline__ void exchange(T* keys, i32* places, i64 a, i64 b, bool ascending, i32 n) {
    if (before(keys[b], places[b], keys[a], places[a], n) == ascending) {
        T key = keys[a]; keys[a] = keys[b]; keys[b] = key;
        i32 place = places[a]; places[a] = places[b]; places[b] = place;
    }
}

// All steps with distance below TILE, for runs of length `first` to `last`.
extern "C" __global__ void tiles(T* keys, i32* places, i64 padded, i64 first, i64 last, i32 n) {
    __shared__ T key[TILE];
    __shared__ i32 place[TILE];
    i64 start = (i64)blockIdx.x * TILE;
    i64 offset = start % padded;
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) { key[i] = keys[start + i]; place[i] = places[start + i]; }
    for (i64 run = first; run <= last; run *= 2) {
        for (i64 distance = run / 2 < TILE / 2 ? run / 2 : TILE / 2; distance > 0; distance /= 2) {
            __syncthreads();
            i64 t = threadIdx.x;
            i64 a = (t / distance) * distance * 2 + t % distance;
            exchange(key, place, a, a + distance, ((offset + a) & run) == 0, n);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE; i += blockDim.x) { keys[start + i] = key[i]; places[start + i] = place[i]; }
}

// One step with distance of TILE or more. One thread per pair.
extern "C" __global__ void far(T* keys, i32* places, i64 pairs, i64 padded, i64 run, i64 distance, i32 n) {
    i64 t = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= pairs) return;
    i64 a = (t / distance) * distance * 2 + t % distance;
    exchange(keys, places, a, a + distance, ((a % padded) & run) == 0, n);
}
