// Heads of multi-head latent attention: queries and keys of a part that is rotated and one that is not, and values, without
// copies of the parts. Maths: bridge-ops/src/latent_heads.rs.
//
// Definitions: TYPE, VECTOR (channels a thread moves at once, which divide every part), PAIRS (0: rotated channel i goes with
// i + half; 1: 2i with 2i + 1). Everything is packed unless it says strides; sums and angles in float.
// Launcher: src/ops/latent_heads.rs.
#include "common.cuh"

typedef TYPE T;
typedef Pack<T, VECTOR> Piece;

// y = x with channels from `start` on rotated. x: [batch, seq, heads, start + 2 half] with strides, channels packed; cosines,
// sines: [batch or 1, seq, half], `table_batch` elements between batches (0 for one table); sign: -1 for the gradient.
extern "C" __global__ void rotary_tail(T* y, const T* x, const float* cosines, const float* sines, i64 total, i64 seq, i64 heads, i64 d,
                                       i64 start, i64 half, i64 stride_batch, i64 stride_seq, i64 stride_head, i64 table_batch, float sign) {
    i64 pieces = d / VECTOR;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        i64 channel = i % pieces * VECTOR, rest = i / pieces;
        i64 head = rest % heads, token = rest / heads, position = token % seq, batch = token / seq;
        const T* from = x + batch * stride_batch + position * stride_seq + head * stride_head;
        Piece piece = load_pack<T, VECTOR>(from + channel);
        i64 own = channel - start, row = batch * table_batch + position * half;
        if (own >= 0 && PAIRS) {
            #pragma unroll
            for (int k = 0; k + 1 < VECTOR; k += 2) {
                i64 at = row + (own + k) / 2;
                float c = cosines[at], s = sines[at] * sign, a = load(piece.at[k]), b = load(piece.at[k + 1]);
                piece.at[k] = store<T>(a * c - b * s);
                piece.at[k + 1] = store<T>(b * c + a * s);
            }
        } else if (own >= 0) {
            bool first = own < half;
            Piece other = load_pack<T, VECTOR>(from + (first ? channel + half : channel - half));
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                i64 at = row + (first ? own : own - half) + k;
                float c = cosines[at], s = first ? -sines[at] * sign : sines[at] * sign;
                piece.at[k] = store<T>((float)load(piece.at[k]) * c + (float)load(other.at[k]) * s);
            }
        }
        store_pack(y + i * VECTOR, piece);
    }
}

// k = [kv up to channel nope, rotated]: kv: [tokens, heads, nope + value], rotated: [tokens, r] -> k: [tokens, heads, nope + r].
extern "C" __global__ void keys(T* k, const T* kv, const T* rotated, i64 total, i64 heads, i64 nope, i64 r, i64 value) {
    i64 pieces = (nope + r) / VECTOR;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (i64)gridDim.x * blockDim.x) {
        i64 channel = i % pieces * VECTOR, row = i / pieces;
        const T* from = channel < nope ? kv + row * (nope + value) + channel : rotated + row / heads * r + (channel - nope);
        store_pack(k + i * VECTOR, load_pack<T, VECTOR>(from));
    }
}

// dkv = [dk up to channel nope, dv], drotated = the sum over heads of the rest of dk. One block per token.
extern "C" __global__ void keys_backward(T* dkv, T* drotated, const T* dk, const T* dv, i64 heads, i64 nope, i64 r, i64 value) {
    i64 token = blockIdx.x, pieces = (nope + value) / VECTOR;
    dkv += token * heads * (nope + value), dk += token * heads * (nope + r), dv += token * heads * value;
    for (i64 i = threadIdx.x; i < heads * pieces; i += blockDim.x) {
        i64 channel = i % pieces * VECTOR, head = i / pieces;
        const T* from = channel < nope ? dk + head * (nope + r) + channel : dv + head * value + (channel - nope);
        store_pack(dkv + i * VECTOR, load_pack<T, VECTOR>(from));
    }
    for (i64 channel = threadIdx.x; channel < r; channel += blockDim.x) {
        float sum = 0;
        #pragma unroll 8
        for (i64 head = 0; head < heads; head++) sum += (float)load(dk[head * (nope + r) + nope + channel]);
        drotated[token * r + channel] = store<T>(sum);
    }
}
