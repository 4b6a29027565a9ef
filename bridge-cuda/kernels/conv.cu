// Convolutions as matrix products: im2col, and col2im for transposed ones. Two-dimensional ones have depth 1.
//
// Definitions: TYPE. image: [batch, channels, depth, height, width] packed. columns: [batch, channels * kd * kh * kw,
// od * oh * ow] packed. One thread per element of the result; col2im gathers, so its sums have a fixed order.
// Launcher: src/conv.rs.
#include "common.cuh"

typedef TYPE T;

// Mirrors `Geometry` in src/conv.rs. Each triple is (depth, height, width); `size` is the image, `out` the positions.
struct Geometry {
    i64 channels;
    i64 size[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
};

extern "C" __global__ void im2col(T* columns, const T* image, Geometry g, i64 total) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        i64 rest = i, o[3], k[3];
        for (int d = 2; d >= 0; d--) { o[d] = rest % g.out[d]; rest /= g.out[d]; }
        for (int d = 2; d >= 0; d--) { k[d] = rest % g.kernel[d]; rest /= g.kernel[d]; }
        i64 at = rest;  // batch * channels + channel
        bool inside = true;
        for (int d = 0; d < 3; d++) {
            i64 p = o[d] * g.stride[d] - g.padding[d] + k[d] * g.dilation[d];
            inside = inside && p >= 0 && p < g.size[d];
            at = at * g.size[d] + p;
        }
        columns[i] = inside ? image[at] : T();
    }
}

extern "C" __global__ void col2im(T* image, const T* columns, Geometry g, i64 total) {
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        i64 rest = i, p[3];
        for (int d = 2; d >= 0; d--) { p[d] = rest % g.size[d]; rest /= g.size[d]; }
        Compute<T> sum = 0;
        i64 k[3];
        for (k[0] = 0; k[0] < g.kernel[0]; k[0]++)
            for (k[1] = 0; k[1] < g.kernel[1]; k[1]++)
                for (k[2] = 0; k[2] < g.kernel[2]; k[2]++) {
                    i64 at = rest;
                    for (int d = 0; d < 3; d++) at = at * g.kernel[d] + k[d];
                    bool hit = true;
                    for (int d = 0; d < 3; d++) {
                        i64 o = p[d] + g.padding[d] - k[d] * g.dilation[d];
                        hit = hit && o >= 0 && o % g.stride[d] == 0 && o / g.stride[d] < g.out[d];
                        at = at * g.out[d] + o / g.stride[d];
                    }
                    if (hit) sum += load(columns[at]);
                }
        image[i] = store<T>(sum);
    }
}
