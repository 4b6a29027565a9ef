// Softmax attention on the tensor cores: forward and backward for 16-bit inputs and head sizes that fill whole tiles.
//
//   s[i, j] = scale q_i . k_j, or cap tanh(that / cap);  p = softmax over visible j, and a sink;  out_i = sum_j p[i, j] v_j
//   D_i = dout_i . out_i,  ds = p (dout_i . v_j - D_i),  dq_i = scale sum_j ds k_j,  dk_j = scale sum_i ds q_i,
//   dv_j = sum_i p dout_i
//
// Definitions: TYPE (bf16 or f16), D (head size, 64 or 128), SOFTCAP (0 or 1), DOCUMENTS (0 or 1: packed documents).
// q: [batch, s, heads, D], k, v: [batch, t, kv_heads, D], each with its own strides and packed channels, 16-byte aligned;
// out like q, packed; lse: [batch, heads, s] float, natural logarithm. Query heads share key heads in equal groups.
// Row i sees the keys of `visible`. Scores, softmax and sums in float; p and ds are rounded to TYPE for the products.
//
// A warp owns 16 rows of the product's left side, held in registers; the other side passes through shared memory in tiles,
// loaded by cp.async one tile ahead. Products are mma.sync m16n8k16. Rows of shared memory are swizzled by 16-byte pieces,
// so that ldmatrix meets no bank twice. `forward`, `backward_q`: a block owns ROWS queries of one head and walks the keys.
// `backward_kv`: a block owns KEYS keys of one key head and walks the queries of all heads that share it. Both passes
// recompute the scores; in exchange no sum needs atomics and results repeat exactly.
// Source: Dao 2023, "FlashAttention-2". Launcher: src/ops/attention.rs.
#include "tensor_core.cuh"

typedef TYPE T;

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * 16;       // Rows a block owns.
constexpr int TILE = D <= 64 ? 64 : 32;  // Rows of the other side taken at a time in backward: registers decide.
constexpr int KEYS_AHEAD = 64;           // Keys taken at a time in forward.
constexpr int CHUNKS = D / 8;          // 16-byte pieces in a row.
constexpr int STEPS = D / 16;          // Products of depth 16 along the channels.
constexpr float LOG2E = 1.4426950408889634f;

// Mirrors `Problem` in src/ops/attention.rs. Strides in elements.
struct Problem {
    i64 batch, s, t, heads, kv_heads;
    i64 q_batch, q_seq, q_head, k_batch, k_seq, k_head, v_batch, v_seq, v_head, o_batch, o_seq, o_head;
    i64 q_offset, kv_len, window;
    i32 causal, windowed;
    float scale, softcap;
};

// ---- Which keys a query sees: [begin, end). Both ends grow with i, which the tile loops rely on. ----

struct Range { i32 begin, end; };

__device__ __forceinline__ Range visible(const Problem& p, const i32* documents, i64 batch, i64 i) {
    i64 position = p.q_offset + i, begin = 0, end = p.kv_len;
    if (p.causal) end = min(end, position + 1);
    if (p.windowed) {
        begin = max(begin, position + 1 - p.window);
        end = min(end, position + p.window);
    }
    if (DOCUMENTS) {
        const i32* document = documents + (batch * p.s + i) * 2;
        begin = max(begin, (i64)document[0]);
        end = min(end, (i64)document[1]);
    }
    return {(i32)begin, (i32)max(begin, end)};
}

// ---- Tiles in shared memory. ----

// Element offset of a 16-byte piece in a swizzled tile.
__device__ __forceinline__ int place(int row, int chunk) { return row * D + ((chunk ^ (row & 7)) * 8); }

// Starts copying rows [first, first + N) of a matrix to a tile; rows from `limit` on become zero.
template <int N> __device__ __forceinline__ void fetch(T* tile, const T* matrix, i64 stride, i64 first, i64 limit) {
    #pragma unroll
    for (int i = 0; i < N * CHUNKS / THREADS; i++) {
        int piece = i * THREADS + threadIdx.x, row = piece / CHUNKS, chunk = piece % CHUNKS;
        bool inside = first + row < limit;
        const T* from = matrix + (inside ? (first + row) * stride : 0) + chunk * 8;
        copy_async(tile + place(row, chunk), from, inside);
    }
}

// Left operand: rows [row, row + 16) of a tile, channels [16 step, 16 step + 16).
__device__ __forceinline__ void load_left(u32 (&a)[4], const T* tile, int row, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix(a, tile + place(row + lane % 16, step * 2 + lane / 16));
}
// Right operand, transposed tile: for rows [row, row + 16) of the tile as columns of the product; (r0, r1), (r2, r3).
__device__ __forceinline__ void load_right(u32 (&b)[4], const T* tile, int row, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix(b, tile + place(row + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
}
// Right operand, tile as it is: rows [row, row + 16) are the depth, channels [16 step, 16 step + 16) the columns.
__device__ __forceinline__ void load_right_plain(u32 (&b)[4], const T* tile, int row, int step) {
    int lane = threadIdx.x % 32;
    ldmatrix_transposed(b, tile + place(row + lane / 8 % 2 * 8 + lane % 8, step * 2 + lane / 16));
}

// c (16 x N) = rows [row, row + 16) of `left` times the transpose of `right` (N rows).
template <int N> __device__ __forceinline__ void scores(float (&c)[N / 8][4], const u32 (&left)[STEPS][4], const T* right) {
    #pragma unroll
    for (int n = 0; n < N / 8; n++)
        #pragma unroll
        for (int k = 0; k < 4; k++) c[n][k] = 0;
    #pragma unroll
    for (int step = 0; step < STEPS; step++)
        #pragma unroll
        for (int n = 0; n < N / 16; n++) {
            u32 b[4];
            load_right(b, right, n * 16, step);
            Mma<T>::run(c[n * 2], left[step], b[0], b[1]);
            Mma<T>::run(c[n * 2 + 1], left[step], b[2], b[3]);
        }
}

// c (16 x D) += the 16 x N matrix `p`, rounded to T, times `right` (N x D).
template <int N> __device__ __forceinline__ void weighted_sum(float (&c)[D / 8][4], const float (&p)[N / 8][4], const T* right) {
    #pragma unroll
    for (int k = 0; k < N / 16; k++) {
        u32 a[4] = {Pair<T>::pack(p[k * 2][0], p[k * 2][1]), Pair<T>::pack(p[k * 2][2], p[k * 2][3]),
                    Pair<T>::pack(p[k * 2 + 1][0], p[k * 2 + 1][1]), Pair<T>::pack(p[k * 2 + 1][2], p[k * 2 + 1][3])};
        #pragma unroll
        for (int step = 0; step < STEPS; step++) {
            u32 b[4];
            load_right_plain(b, right, k * 16, step);
            Mma<T>::run(c[step * 2], a, b[0], b[1]);
            Mma<T>::run(c[step * 2 + 1], a, b[2], b[3]);
        }
    }
}

// Sum or maximum over the four lanes that share a row of a product.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_MASK, x, 1);
    return x + __shfl_xor_sync(FULL_MASK, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}

// Writes rows of a 16 x D product to global memory, where the row is below `limit`.
__device__ __forceinline__ void write(T* matrix, i64 stride, i64 first, i64 limit, const float (&c)[D / 8][4], float top_scale, float bottom_scale) {
    int lane = threadIdx.x % 32;
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        i64 row = first + lane / 4 + half * 8;
        float scale = half ? bottom_scale : top_scale;
        if (row < limit) {
            #pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<u32*>(matrix + row * stride + n * 8 + lane % 4 * 2) = Pair<T>::pack(c[n][half * 2] * scale, c[n][half * 2 + 1] * scale);
        }
    }
}

// ---- Forward. grid: (ceil(s / ROWS), heads, batch). ----

extern "C" __global__ void __launch_bounds__(THREADS) forward(T* out, float* lse, const T* q, const T* k, const T* v, const T* sinks, const i32* documents, Problem p) {
    extern __shared__ __align__(128) char memory[];
    T* keys = reinterpret_cast<T*>(memory);          // Two tiles.
    T* values = keys + 2 * KEYS_AHEAD * D;           // Two tiles.
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 head = blockIdx.y, batch = blockIdx.z, kv_head = head / (p.heads / p.kv_heads);
    // Blocks with the most keys start first.
    i64 first = (i64)(gridDim.x - 1 - blockIdx.x) * ROWS;
    const T* k_matrix = k + batch * p.k_batch + kv_head * p.k_head;
    const T* v_matrix = v + batch * p.v_batch + kv_head * p.v_head;

    // The queries pass through the first key tile into registers.
    u32 left[STEPS][4];
    fetch<ROWS>(keys, q + batch * p.q_batch + head * p.q_head, p.q_seq, first, p.s);
    commit();
    wait<0>();
    __syncthreads();
    #pragma unroll
    for (int step = 0; step < STEPS; step++) load_left(left[step], keys, warp * 16, step);
    __syncthreads();

    i64 last = min(first + ROWS, p.s) - 1;
    i32 begin = visible(p, documents, batch, first).begin, end = visible(p, documents, batch, last).end;
    i64 row[2] = {min(first + warp * 16 + lane / 4, p.s - 1), min(first + warp * 16 + lane / 4 + 8, p.s - 1)};
    Range seen[2] = {visible(p, documents, batch, row[0]), visible(p, documents, batch, row[1])};
    i32 all_begin = visible(p, documents, batch, last).begin, all_end = visible(p, documents, batch, first).end;
    begin = begin / KEYS_AHEAD * KEYS_AHEAD;

    float sum[2] = {0, 0}, top[2] = {-infinity(), -infinity()}, o[D / 8][4];
    if (sinks) {
        top[0] = top[1] = (float)load(sinks[head]) * LOG2E;
        if (lane % 4 == 0) sum[0] = sum[1] = 1.0f;
    }
    #pragma unroll
    for (int n = 0; n < D / 8; n++)
        #pragma unroll
        for (int c = 0; c < 4; c++) o[n][c] = 0;

    if (begin < end) {
        fetch<KEYS_AHEAD>(keys, k_matrix, p.k_seq, begin, p.kv_len);
        fetch<KEYS_AHEAD>(values, v_matrix, p.v_seq, begin, p.kv_len);
    }
    commit();
    int stage = 0;
    float factor = SOFTCAP ? p.scale / p.softcap : p.scale * LOG2E;
    for (i32 start = begin; start < end; start += KEYS_AHEAD, stage ^= 1) {
        if (start + KEYS_AHEAD < end) {
            fetch<KEYS_AHEAD>(keys + (stage ^ 1) * KEYS_AHEAD * D, k_matrix, p.k_seq, start + KEYS_AHEAD, p.kv_len);
            fetch<KEYS_AHEAD>(values + (stage ^ 1) * KEYS_AHEAD * D, v_matrix, p.v_seq, start + KEYS_AHEAD, p.kv_len);
        }
        commit();
        wait<1>();
        __syncthreads();
        float s[KEYS_AHEAD / 8][4];
        scores<KEYS_AHEAD>(s, left, keys + stage * KEYS_AHEAD * D);
        // Scores to base 2: softmax(s) = 2^(s log2 e) up to a factor.
        #pragma unroll
        for (int n = 0; n < KEYS_AHEAD / 8; n++)
            #pragma unroll
            for (int c = 0; c < 4; c++) s[n][c] = SOFTCAP ? p.softcap * LOG2E * tanhf(s[n][c] * factor) : s[n][c] * factor;
        if (start < all_begin || start + KEYS_AHEAD > all_end) {
            #pragma unroll
            for (int n = 0; n < KEYS_AHEAD / 8; n++)
                #pragma unroll
                for (int c = 0; c < 4; c++) {
                    i32 key = start + n * 8 + lane % 4 * 2 + c % 2;
                    if (key < seen[c / 2].begin || key >= seen[c / 2].end) s[n][c] = -infinity();
                }
        }
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = top[half];
            #pragma unroll
            for (int n = 0; n < KEYS_AHEAD / 8; n++) now = fmaxf(now, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
            now = quad_max(now);
            float base = now == -infinity() ? 0.0f : now;
            float shrink = exp2f(top[half] - base);
            top[half] = now;
            sum[half] *= shrink;
            #pragma unroll
            for (int n = 0; n < KEYS_AHEAD / 8; n++)
                #pragma unroll
                for (int c = half * 2; c < half * 2 + 2; c++) {
                    s[n][c] = exp2f(s[n][c] - base);
                    sum[half] += s[n][c];
                }
            #pragma unroll
            for (int n = 0; n < D / 8; n++) { o[n][half * 2] *= shrink; o[n][half * 2 + 1] *= shrink; }
        }
        weighted_sum<KEYS_AHEAD>(o, s, values + stage * KEYS_AHEAD * D);
        __syncthreads();
    }
    float scale[2];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = quad_sum(sum[half]);
        scale[half] = total > 0.0f ? 1.0f / total : 0.0f;
        i64 i = first + warp * 16 + lane / 4 + half * 8;
        if (lane % 4 == 0 && i < p.s) lse[(batch * p.heads + head) * p.s + i] = (top[half] + log2f(total)) / LOG2E;
    }
    write(out + batch * p.o_batch + head * p.o_head, p.o_seq, first + warp * 16, p.s, o, scale[0], scale[1]);
}

// ---- D: one warp per (batch, head, i). out, dout: [batch, s, heads, D] packed. ----

extern "C" __global__ void row_dots(float* dots, const T* out, const T* dout, i64 rows, i64 s, i64 heads) {
    i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= rows) return;
    i64 i = row % s, head = row / s % heads, batch = row / s / heads;
    i64 at = ((batch * s + i) * heads + head) * D;
    float sum = 0;
    #pragma unroll
    for (int c = threadIdx.x % WARP * 2; c < D; c += 64) {
        Pack<T, 2> a = load_pack<T, 2>(out + at + c), b = load_pack<T, 2>(dout + at + c);
        sum += (float)load(a.at[0]) * (float)load(b.at[0]) + (float)load(a.at[1]) * (float)load(b.at[1]);
    }
    sum = warp_reduce<Add>(sum);
    if (threadIdx.x % WARP == 0) dots[row] = sum;
}

// p and ds from raw products: x becomes p, y (dout . v) becomes ds.
__device__ __forceinline__ void derive(float& x, float& y, bool masked, float lse2, float dot, float factor, float softcap) {
    float slope = 1.0f, z;
    if (SOFTCAP) {
        float t = tanhf(x * factor);
        slope = 1.0f - t * t;
        z = softcap * LOG2E * t;
    } else {
        z = x * factor;
    }
    float prob = masked ? 0.0f : exp2f(z - lse2);
    x = prob;
    y = prob * (y - dot) * slope;
}

// ---- Gradient of the queries. grid: (ceil(s / ROWS), heads, batch). dout, dq: [batch, s, heads, D] packed. ----

extern "C" __global__ void __launch_bounds__(THREADS) backward_q(T* dq, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* dots, const i32* documents, Problem p) {
    extern __shared__ __align__(128) char memory[];
    T* keys = reinterpret_cast<T*>(memory);
    T* values = keys + 2 * TILE * D;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 head = blockIdx.y, batch = blockIdx.z, kv_head = head / (p.heads / p.kv_heads);
    i64 first = (i64)(gridDim.x - 1 - blockIdx.x) * ROWS;
    const T* k_matrix = k + batch * p.k_batch + kv_head * p.k_head;
    const T* v_matrix = v + batch * p.v_batch + kv_head * p.v_head;

    // Queries and output gradients pass through shared memory into registers, one after the other: the tiles hold
    // 4 * TILE rows, at least ROWS.
    u32 left[STEPS][4], dleft[STEPS][4];
    fetch<ROWS>(keys, q + batch * p.q_batch + head * p.q_head, p.q_seq, first, p.s);
    commit();
    wait<0>();
    __syncthreads();
    #pragma unroll
    for (int step = 0; step < STEPS; step++) load_left(left[step], keys, warp * 16, step);
    __syncthreads();
    fetch<ROWS>(keys, dout + (batch * p.s * p.heads + head) * D, p.heads * D, first, p.s);
    commit();
    wait<0>();
    __syncthreads();
    #pragma unroll
    for (int step = 0; step < STEPS; step++) load_left(dleft[step], keys, warp * 16, step);
    __syncthreads();

    i64 last = min(first + ROWS, p.s) - 1;
    i32 begin = visible(p, documents, batch, first).begin, end = visible(p, documents, batch, last).end;
    i32 all_begin = visible(p, documents, batch, last).begin, all_end = visible(p, documents, batch, first).end;
    begin = begin / TILE * TILE;
    Range seen[2];
    float lse2[2], dot[2];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        i64 i = min(first + warp * 16 + lane / 4 + half * 8, p.s - 1);
        seen[half] = visible(p, documents, batch, i);
        lse2[half] = lse[(batch * p.heads + head) * p.s + i] * LOG2E;
        dot[half] = dots[(batch * p.heads + head) * p.s + i];
    }
    float result[D / 8][4];
    #pragma unroll
    for (int n = 0; n < D / 8; n++)
        #pragma unroll
        for (int c = 0; c < 4; c++) result[n][c] = 0;

    if (begin < end) {
        fetch<TILE>(keys, k_matrix, p.k_seq, begin, p.kv_len);
        fetch<TILE>(values, v_matrix, p.v_seq, begin, p.kv_len);
    }
    commit();
    int stage = 0;
    float factor = SOFTCAP ? p.scale / p.softcap : p.scale * LOG2E;
    for (i32 start = begin; start < end; start += TILE, stage ^= 1) {
        if (start + TILE < end) {
            fetch<TILE>(keys + (stage ^ 1) * TILE * D, k_matrix, p.k_seq, start + TILE, p.kv_len);
            fetch<TILE>(values + (stage ^ 1) * TILE * D, v_matrix, p.v_seq, start + TILE, p.kv_len);
        }
        commit();
        wait<1>();
        __syncthreads();
        float x[TILE / 8][4], y[TILE / 8][4];
        scores<TILE>(x, left, keys + stage * TILE * D);
        scores<TILE>(y, dleft, values + stage * TILE * D);
        bool border = start < all_begin || start + TILE > all_end;
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            #pragma unroll
            for (int c = 0; c < 4; c++) {
                i32 key = start + n * 8 + lane % 4 * 2 + c % 2;
                bool masked = border && (key < seen[c / 2].begin || key >= seen[c / 2].end);
                derive(x[n][c], y[n][c], masked, lse2[c / 2], dot[c / 2], factor, p.softcap);
            }
        weighted_sum<TILE>(result, y, keys + stage * TILE * D);
        __syncthreads();
    }
    write(dq + (batch * p.s * p.heads + head) * D, p.heads * D, first + warp * 16, p.s, result, p.scale, p.scale);
}

// ---- Gradients of keys and values. grid: (ceil(t / ROWS), kv_heads, batch). dk, dv: [batch, t, kv_heads, D] packed. ----

extern "C" __global__ void __launch_bounds__(THREADS) backward_kv(T* dk, T* dv, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* dots, const i32* documents, Problem p) {
    extern __shared__ __align__(128) char memory[];
    T* own_keys = reinterpret_cast<T*>(memory);      // ROWS keys and values this block owns.
    T* own_values = own_keys + ROWS * D;
    T* queries = own_values + ROWS * D;              // Two tiles.
    T* douts = queries + 2 * TILE * D;               // Two tiles.
    __shared__ float lses[2][TILE], dot[2][TILE];
    __shared__ Range seen[2][TILE];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    i64 kv_head = blockIdx.y, batch = blockIdx.z, group = p.heads / p.kv_heads;
    i64 first = (i64)blockIdx.x * ROWS;
    fetch<ROWS>(own_keys, k + batch * p.k_batch + kv_head * p.k_head, p.k_seq, first, p.kv_len);
    fetch<ROWS>(own_values, v + batch * p.v_batch + kv_head * p.v_head, p.v_seq, first, p.kv_len);
    commit();

    // Queries that see any of these keys: a run, since both ends of what a query sees grow with it.
    i64 low = 0, high = p.s;
    for (i64 step = p.s; low < high;) {  // First query whose end is past the first key.
        step = (low + high) / 2;
        if (visible(p, documents, batch, step).end > first) high = step; else low = step + 1;
    }
    i64 begin = low / TILE * TILE;
    high = p.s;
    for (i64 step; low < high;) {        // First query whose begin is past the last key.
        step = (low + high) / 2;
        if (visible(p, documents, batch, step).begin >= first + ROWS) high = step; else low = step + 1;
    }
    i64 end = low;
    i64 tiles = end > begin ? (end - begin + TILE - 1) / TILE : 0, total = tiles * group;

    float dk_sum[D / 8][4], dv_sum[D / 8][4];
    #pragma unroll
    for (int n = 0; n < D / 8; n++)
        #pragma unroll
        for (int c = 0; c < 4; c++) { dk_sum[n][c] = 0; dv_sum[n][c] = 0; }

    auto prefetch = [&](i64 number, int stage) {
        i64 head = kv_head * group + number / tiles, start = begin + number % tiles * TILE;
        fetch<TILE>(queries + stage * TILE * D, q + batch * p.q_batch + head * p.q_head, p.q_seq, start, p.s);
        fetch<TILE>(douts + stage * TILE * D, dout + (batch * p.s * p.heads + head) * D, p.heads * D, start, p.s);
        if (threadIdx.x < TILE) {
            i64 i = start + threadIdx.x;
            bool inside = i < p.s;
            i64 at = (batch * p.heads + head) * p.s + (inside ? i : 0);
            lses[stage][threadIdx.x] = lse[at] * LOG2E;
            dot[stage][threadIdx.x] = dots[at];
            seen[stage][threadIdx.x] = inside ? visible(p, documents, batch, i) : Range{0, 0};
        }
    };
    if (total > 0) prefetch(0, 0);
    commit();
    float factor = SOFTCAP ? p.scale / p.softcap : p.scale * LOG2E;
    int stage = 0;
    for (i64 number = 0; number < total; number++, stage ^= 1) {
        if (number + 1 < total) prefetch(number + 1, stage ^ 1);
        commit();
        wait<1>();
        __syncthreads();
        const T* query = queries + stage * TILE * D;
        const T* d = douts + stage * TILE * D;
        float x[TILE / 8][4], y[TILE / 8][4];
        u32 left[STEPS][4];
        #pragma unroll
        for (int step = 0; step < STEPS; step++) load_left(left[step], own_keys, warp * 16, step);
        scores<TILE>(x, left, query);
        #pragma unroll
        for (int step = 0; step < STEPS; step++) load_left(left[step], own_values, warp * 16, step);
        scores<TILE>(y, left, d);
        #pragma unroll
        for (int n = 0; n < TILE / 8; n++)
            #pragma unroll
            for (int c = 0; c < 4; c++) {
                int column = n * 8 + lane % 4 * 2 + c % 2;
                i32 key = (i32)first + warp * 16 + lane / 4 + c / 2 * 8;
                Range range = seen[stage][column];
                bool masked = key < range.begin || key >= range.end;
                derive(x[n][c], y[n][c], masked, lses[stage][column], dot[stage][column], factor, p.softcap);
            }
        weighted_sum<TILE>(dv_sum, x, d);
        weighted_sum<TILE>(dk_sum, y, query);
        __syncthreads();
    }
    i64 at = (batch * p.t * p.kv_heads + kv_head) * D;
    write(dv + at, p.kv_heads * D, first + warp * 16, p.t, dv_sum, 1.0f, 1.0f);
    write(dk + at, p.kv_heads * D, first + warp * 16, p.t, dk_sum, p.scale, p.scale);
}
