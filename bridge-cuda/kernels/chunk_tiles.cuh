// What recurrences computed chunk by chunk share: how a batch is cut into chunks, the decays within one, and products of
// small matrices in shared memory by a whole block, on the tensor cores for 16-bit floats and by plain arithmetic for float.
//
// Definitions: TYPE (bf16, f16 or float), LEN (tokens of a chunk: 64, or 32 for float), ALIGNED (1 where rows of the tensors
// start at 16 bytes and are whole 16-byte pieces). Sizes of matrices are multiples of 16; what is smaller is filled with zeros.
#pragma once
#include "tensor_core.cuh"

typedef TYPE T;

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

__device__ constexpr int filled(int n) { return (n + 15) / 16 * 16; }

// ---- Chunks. Mirrors `Chunks` in src/ops/chunks.rs. ----

// Without a table every row of `seq` tokens is a sequence, cut from its start on. The table: start and length of each chunk,
// then for each sequence its first chunk, and their number at the end.
struct Chunks {
    const i32* table;
    i64 count, seq, per_row;
};

struct Span { i64 start; int len; };

__device__ __forceinline__ Span span_of(const Chunks& chunks, i64 chunk) {
    if (chunks.table) return {(i64)chunks.table[2 * chunk], chunks.table[2 * chunk + 1]};
    i64 row = chunk / chunks.per_row, first = (chunk - row * chunks.per_row) * LEN;
    return {row * chunks.seq + first, (int)min((i64)LEN, chunks.seq - first)};
}
// First chunk of a sequence; of the one after the last: the number of chunks.
__device__ __forceinline__ i64 first_chunk(const Chunks& chunks, i64 sequence) {
    return chunks.table ? (i64)chunks.table[2 * chunks.count + sequence] : sequence * chunks.per_row;
}

// ---- Decays within a chunk, in shared memory. A_i is the sum of the logarithms up to token i, n the last token. ----

struct Decays {
    float sums[LEN];        // A_i
    float from_start[LEN];  // exp(A_i)
    float to_end[LEN];      // exp(A_n - A_i)
    float factor[LEN];      // dt or beta
    float whole;            // exp(A_n)
};

// What a lane of one warp reads for a chunk: kept in registers, so that it can be asked for before it is needed. Tokens past
// the chunk's end decay nothing and write nothing.
struct RawDecays {
    float log_decay[LEN / 32], factor[LEN / 32];

    __device__ __forceinline__ void read(const float* log_decays, const float* factors, i64 heads, i64 head, Span span) {
        #pragma unroll
        for (int h = 0; h < LEN / 32; h++) {
            int i = h * 32 + threadIdx.x % 32;
            i64 at = (span.start + i) * heads + head;
            log_decay[h] = i < span.len ? log_decays[at] : 0.0f;
            factor[h] = i < span.len && factors ? factors[at] : 0.0f;
        }
    }
    // By one whole warp.
    __device__ __forceinline__ void write(Decays& to) const {
        int lane = threadIdx.x % 32;
        float sums[LEN / 32], total = 0;
        #pragma unroll
        for (int h = 0; h < LEN / 32; h++) {
            float sum = log_decay[h];
            #pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                float before = __shfl_up_sync(FULL_MASK, sum, step);
                if (lane >= step) sum += before;
            }
            sums[h] = sum + total;
            total = __shfl_sync(FULL_MASK, sums[h], 31);
        }
        #pragma unroll
        for (int h = 0; h < LEN / 32; h++) {
            int i = h * 32 + lane;
            to.sums[i] = sums[h];
            to.from_start[i] = expf(sums[h]);
            to.to_end[i] = expf(total - sums[h]);
            to.factor[i] = factor[h];
        }
        if (lane == 0) to.whole = expf(total);
    }
};

// The decay from token j to token i, 0 where j comes after i.
__device__ __forceinline__ float decay(const Decays& decays, int i, int j) {
    return j <= i ? expf(decays.sums[i] - decays.sums[j]) : 0.0f;
}

// The sum of the values from each lane's token to the chunk's end, by one whole warp.
__device__ __forceinline__ void sum_to_end(float (&x)[LEN / 32]) {
    float total = 0;
    #pragma unroll
    for (int h = LEN / 32 - 1; h >= 0; h--) {
        #pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            float after = __shfl_down_sync(FULL_MASK, x[h], step);
            if (threadIdx.x % 32 + step < 32) x[h] += after;
        }
        x[h] += total;
        total = __shfl_sync(FULL_MASK, x[h], 0);
    }
}

// ---- Tiles: row-major matrices in shared memory. ----

// Rows end with 16 bytes of padding: an odd number of 16-byte pieces, so that ldmatrix meets no bank twice.
template <int COLUMNS> struct Tile {
    static constexpr int STRIDE = COLUMNS + 16 / (int)sizeof(T);
    T* at;
    __device__ __forceinline__ T& operator()(int row, int column) const { return at[row * STRIDE + column]; }
    // The tile that starts `row` rows further down.
    __device__ __forceinline__ Tile below(int row) const { return {at + row * STRIDE}; }
};

// Takes shared memory piece by piece.
struct Arena {
    char* at;
    template <int ROWS, int COLUMNS> __device__ __forceinline__ Tile<COLUMNS> tile() {
        Tile<COLUMNS> tile = {reinterpret_cast<T*>(at)};
        at += ROWS * Tile<COLUMNS>::STRIDE * sizeof(T);
        return tile;
    }
    template <typename X> __device__ __forceinline__ X* take(int count) {
        X* taken = reinterpret_cast<X*>(at);
        at += (count * sizeof(X) + 15) / 16 * 16;
        return taken;
    }
};

// Starts copying `rows` rows of `columns` values, `stride` apart, to a tile; zeros around them. Arrives as `copy_async` says.
template <int ROWS, int COLUMNS, bool WHOLE_PIECES = ALIGNED> __device__ __forceinline__ void fetch(Tile<COLUMNS> tile, const T* from, i64 stride, int rows, int columns) {
    constexpr int PIECE = 16 / (int)sizeof(T), PIECES = COLUMNS / PIECE;
    if (WHOLE_PIECES) {
        for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
            int row = i / PIECES, column = i % PIECES * PIECE;
            bool inside = row < rows && column < columns;
            copy_async(&tile(row, column), from + (inside ? row * stride + column : 0), inside);
        }
    } else {
        for (int i = threadIdx.x; i < ROWS * COLUMNS; i += THREADS) {
            int row = i / COLUMNS, column = i % COLUMNS;
            tile(row, column) = row < rows && column < columns ? from[row * stride + column] : store<T>(0.0f);
        }
    }
}

// A tile whose values lie one after the other in global memory.
template <int ROWS, int COLUMNS> __device__ __forceinline__ void fetch_packed(Tile<COLUMNS> tile, const T* from) {
    fetch<ROWS, COLUMNS, true>(tile, from, COLUMNS, ROWS, COLUMNS);
}

// to(row, c) = from(row, c) factor(row).
template <int ROWS, int COLUMNS, typename F> __device__ __forceinline__ void scale_rows(Tile<COLUMNS> to, Tile<COLUMNS> from, F factor) {
    constexpr int PIECE = 16 / (int)sizeof(T), PIECES = COLUMNS / PIECE;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
        int row = i / PIECES, column = i % PIECES * PIECE;
        float f = factor(row);
        Pack<T, PIECE> p = load_pack<T, PIECE>(&from(row, column));
        #pragma unroll
        for (int k = 0; k < PIECE; k++) p.at[k] = store<T>((float)load(p.at[k]) * f);
        store_pack(&to(row, column), p);
    }
}

// Two neighbours, `column` even; those at `columns` and beyond are left out.
template <bool WHOLE = ALIGNED> __device__ __forceinline__ void write_pair(T* row, int column, int columns, float low, float high) {
    if (WHOLE) {
        if (column < columns) store_pack(row + column, Pack<T, 2>{{store<T>(low), store<T>(high)}});
    } else {
        if (column < columns) row[column] = store<T>(low);
        if (column + 1 < columns) row[column + 1] = store<T>(high);
    }
}

// ---- Products. ----

// How an operand lies in its tile: as it is written in the product, or transposed.
enum Lie { PLAIN, TRANSPOSED };
// Which part of a product is wanted.
enum Part { ALL, LOWER };

// On the tensor cores.
template <typename X> struct Product {
    template <Lie LIE, int S> static __device__ __forceinline__ void left(u32 (&a)[4], Tile<S> tile, int row, int k) {
        int lane = threadIdx.x % 32;
        if (LIE == PLAIN) ldmatrix(a, &tile(row + lane % 16, k + lane / 16 * 8));
        else ldmatrix_transposed(a, &tile(k + lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
    }
    template <Lie LIE, int S> static __device__ __forceinline__ void right(u32 (&b)[4], Tile<S> tile, int column, int k) {
        int lane = threadIdx.x % 32;
        if (LIE == PLAIN) ldmatrix_transposed(b, &tile(k + lane / 8 % 2 * 8 + lane % 8, column + lane / 16 * 8));
        else ldmatrix(b, &tile(column + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
    }
    template <int K, Lie LEFT, Lie RIGHT, Part PART, typename A, int LS, int RS> static __device__ __forceinline__ void add(A& c, Tile<LS> l, Tile<RS> r) {
        #pragma unroll
        for (int k = 0; k < K; k += 16) {
            u32 a[4], b[4];
            #pragma unroll
            for (int i = 0; i < A::OWN; i++) {
                int row = A::piece(i) % A::ROWS * 16, column = A::piece(i) / A::ROWS * 16;
                if (!A::has(i) || (PART == LOWER && column > row)) continue;
                if (i == 0 || !A::SAME_ROWS) left<LEFT>(a, l, row, k);
                right<RIGHT>(b, r, column, k);
                Mma<X>::run(c.at[i][0], a, b[0], b[1]);
                Mma<X>::run(c.at[i][1], a, b[2], b[3]);
            }
        }
    }
};

// One multiplication after the other, for results in full precision.
template <> struct Product<float> {
    template <int K, Lie LEFT, Lie RIGHT, Part PART, typename A, int LS, int RS> static __device__ __forceinline__ void add(A& c, Tile<LS> l, Tile<RS> r) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < A::OWN; i++) {
            int row = A::piece(i) % A::ROWS * 16, column = A::piece(i) / A::ROWS * 16;
            if (!A::has(i) || (PART == LOWER && column > row)) continue;
            row += lane / 4;
            column += lane % 4 * 2;
            #pragma unroll 4
            for (int k = 0; k < K; k++) {
                float a[2], b[4];
                #pragma unroll
                for (int h = 0; h < 2; h++) a[h] = LEFT == PLAIN ? l(row + h * 8, k) : l(k, row + h * 8);
                #pragma unroll
                for (int h = 0; h < 4; h++) {
                    int at = column + h / 2 * 8 + h % 2;
                    b[h] = RIGHT == PLAIN ? r(k, at) : r(at, k);
                }
                #pragma unroll
                for (int h = 0; h < 8; h++) c.at[i][h / 4][h % 4] += a[h % 4 / 2] * b[h / 4 * 2 + h % 2];
            }
        }
    }
};

// An M x N matrix in the registers of a block, in pieces of 16 x 16 that the warps take in turn.
template <int M, int N> struct Accumulator {
    static constexpr int ROWS = M / 16, COLUMNS = N / 16, COUNT = ROWS * COLUMNS, OWN = (COUNT + WARPS - 1) / WARPS;
    // Whether all pieces of a warp lie in the same rows.
    static constexpr bool SAME_ROWS = WARPS % ROWS == 0;
    float at[OWN][2][4];

    __device__ __forceinline__ void clear() {
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            #pragma unroll
            for (int k = 0; k < 8; k++) at[i][k / 4][k % 4] = 0;
    }
    static __device__ __forceinline__ int piece(int i) { return (int)threadIdx.x / 32 + i * WARPS; }
    static __device__ __forceinline__ bool has(int i) { return COUNT % WARPS == 0 || piece(i) < COUNT; }

    // += left (M x K) right (K x N).
    template <int K, Lie LEFT, Lie RIGHT, Part PART = ALL, int LS, int RS> __device__ __forceinline__ void add(Tile<LS> left, Tile<RS> right) {
        Product<T>::template add<K, LEFT, RIGHT, PART>(*this, left, right);
    }
    // f(row, column, value, next value): pairs of neighbours, the first in an even column.
    template <typename F> __device__ __forceinline__ void pairs(F f) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            if (has(i)) {
                int row = piece(i) % ROWS * 16 + lane / 4, column = piece(i) / ROWS * 16 + lane % 4 * 2;
                #pragma unroll
                for (int n = 0; n < 2; n++) {
                    f(row, column + n * 8, at[i][n][0], at[i][n][1]);
                    f(row + 8, column + n * 8, at[i][n][2], at[i][n][3]);
                }
            }
    }
    // f(row, column, value).
    template <typename F> __device__ __forceinline__ void each(F f) {
        pairs([&](int row, int column, float& low, float& high) { f(row, column, low); f(row, column + 1, high); });
    }
    // f(row, column, value, the other's value).
    template <typename F> __device__ __forceinline__ void each_with(Accumulator& other, F f) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            if (has(i)) {
                int row = piece(i) % ROWS * 16 + lane / 4, column = piece(i) / ROWS * 16 + lane % 4 * 2;
                #pragma unroll
                for (int n = 0; n < 2; n++)
                    #pragma unroll
                    for (int k = 0; k < 4; k++) f(row + k / 2 * 8, column + n * 8 + k % 2, at[i][n][k], other.at[i][n][k]);
            }
    }
    __device__ __forceinline__ void scale(float factor) {
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            #pragma unroll
            for (int k = 0; k < 8; k++) at[i][k / 4][k % 4] *= factor;
    }
    // Rounded into a tile.
    template <int S> __device__ __forceinline__ void put(Tile<S> tile) {
        pairs([&](int row, int column, float low, float high) { store_pack(&tile(row, column), Pack<T, 2>{{store<T>(low), store<T>(high)}}); });
    }
    // Rounded to packed global memory of N columns.
    __device__ __forceinline__ void put_packed(T* to) {
        pairs([&](int row, int column, float low, float high) { write_pair<true>(to + row * N, column, N, low, high); });
    }
    // Sums of f(row, column, value) over the columns of each row: COLUMNS parts of M sums each, to be added up after a
    // barrier with `sum_parts`. In an order that does not change, so that results repeat.
    template <typename F> __device__ __forceinline__ void row_sums(float* parts, F f) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            if (has(i)) {
                int row = piece(i) % ROWS * 16 + lane / 4, column = piece(i) / ROWS * 16 + lane % 4 * 2;
                float sum[2] = {0, 0};
                #pragma unroll
                for (int n = 0; n < 2; n++)
                    #pragma unroll
                    for (int k = 0; k < 4; k++) sum[k / 2] += f(row + k / 2 * 8, column + n * 8 + k % 2, at[i][n][k]);
                #pragma unroll
                for (int half = 0; half < 2; half++) {
                    sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 1);
                    sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 2);
                    if (lane % 4 == 0) parts[piece(i) / ROWS * M + row + half * 8] = sum[half];
                }
            }
    }
    // The same over the rows of each column: ROWS parts of N sums.
    __device__ __forceinline__ void column_sums(float* parts) {
        int lane = threadIdx.x % 32;
        #pragma unroll
        for (int i = 0; i < OWN; i++)
            if (has(i)) {
                int column = piece(i) / ROWS * 16 + lane % 4 * 2;
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    float sum = at[i][k / 2][k % 2] + at[i][k / 2][k % 2 + 2];
                    #pragma unroll
                    for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, step);
                    if (lane < 4) parts[piece(i) % ROWS * N + column + k / 2 * 8 + k % 2] = sum;
                }
            }
    }
};

template <int PARTS, int SIZE> __device__ __forceinline__ float sum_parts(const float* parts, int at) {
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < PARTS; i++) sum += parts[i * SIZE + at];
    return sum;
}
