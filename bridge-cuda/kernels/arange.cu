// out[i] = start + i * step. Definitions: TYPE (an integer). Launcher: src/backend/int.rs.
#include "common.cuh"

extern "C" __global__ void arange(TYPE* out, i64 start, i64 step, i64 count) {
    i64 stride = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += stride) out[i] = (TYPE)(start + i * step);
}
