// The gated delta rule, forward and backward, chunk by chunk. The formulas are those of bridge-ops/src/gated_delta_rule.rs,
// whose names this file uses: T = (I + N)^-1, U = T (beta v), W = T (beta exp(A) k), V = U - W S.
//
// Definitions: those of chunk_tiles.cuh; KEY_DIM, VALUE_DIM, SLICE (columns of the state a block of `states` owns), STAGES
// (chunks held at a time, 1 or 2).
// q, k, dq, dk: [tokens, key_heads, KEY_DIM]; v, o, dv: [tokens, heads, VALUE_DIM], all T and packed; log_decay, beta and their
// gradients: [tokens, heads] float; first_state (or null), last_state: [sequences, heads, KEY_DIM, VALUE_DIM] float. Value heads
// share key heads in equal runs of neighbours. Between kernels, T, with sizes filled up to 16 (KF, VF):
//   u, v_new, dv_new: [chunks, heads, LEN, VF], w: [chunks, heads, LEN, KF], inverse: [chunks, heads, LEN, LEN],
//   entering (S before each chunk), leaving (G after it): [chunks, heads, KF, VF].
//
// `prepare` makes T, U and W of each chunk; `states` walks the chunks of a sequence with a slice of S in registers (float) and
// makes V of U; `output` makes o. Backward: `inside` starts dV, `states_back` walks from the last chunk to the first with G
// and finishes dV, `backward` makes the gradients: a block owns a chunk and the value heads of a key head, one after the other.
// Nothing is added by atomics: results repeat exactly. Operands of products are rounded to T, sums and T's inversion are float.
// Source: Yang, Kautz and Hatamizadeh 2024. Launcher: src/ops/gated_delta_rule.rs.
#include "chunk_tiles.cuh"

constexpr int KD = KEY_DIM;
constexpr int VD = VALUE_DIM;
constexpr int KF = filled(KD);
constexpr int VF = filled(VD);
constexpr int BLOCKS = LEN / 16;

struct Problem {
    Chunks chunks;
    i64 heads, key_heads;
    float scale;
};

__device__ __forceinline__ i64 key_head_of(const Problem& p, i64 head) { return head / (p.heads / p.key_heads); }

// ---- T, U and W. grid: (chunks, heads). ----

// t = (I + n)^-1 for n below the diagonal, in blocks of doubling size: where t inverts the diagonal blocks of one size, -t n t
// below them inverts those of twice the size. As exact as substitution. `x`: LEN * LEN / 4 values to work with.
constexpr int FS = LEN + 1;
__device__ __forceinline__ void invert(float* t, const float* n, float* x) {
    for (int i = threadIdx.x; i < LEN * LEN; i += THREADS)
        if (i / LEN / 16 != i % LEN / 16) t[i / LEN * FS + i % LEN] = 0;
    int block = threadIdx.x / 32 * 16, column = threadIdx.x % 32;
    if (block < LEN && column < 16) {
        float r[16];
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            r[i] = i == column ? 1.0f : 0.0f;
            #pragma unroll
            for (int k = 0; k < i; k++) r[i] -= n[(block + i) * FS + block + k] * r[k];
            t[(block + i) * FS + block + column] = r[i];
        }
    }
    for (int size = 16; size < LEN; size *= 2) {
        __syncthreads();
        int count = LEN / 2 * size;
        for (int i = threadIdx.x; i < count; i += THREADS) {
            int pair = i / (size * size), row = i / size % size, column = i % size, low = pair * 2 * size, high = low + size;
            float sum = 0;
            for (int k = 0; k < size; k++) sum += n[(high + row) * FS + low + k] * t[(low + k) * FS + low + column];
            x[i] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += THREADS) {
            int pair = i / (size * size), row = i / size % size, column = i % size, low = pair * 2 * size, high = low + size;
            float sum = 0;
            for (int k = 0; k < size; k++) sum += t[(high + row) * FS + high + k] * x[(pair * size + k) * size + column];
            t[(high + row) * FS + low + column] = -sum;
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS) prepare(T* u, T* w, T* inverse, const T* k, const T* v, const float* log_decay, const float* beta, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<KF> ks = arena.tile<LEN, KF>();
    Tile<VF> vs = arena.tile<LEN, VF>();
    Tile<LEN> for_v = arena.tile<LEN, LEN>(), for_k = arena.tile<LEN, LEN>();
    float* n = arena.take<float>(LEN * FS);
    float* t = arena.take<float>(LEN * FS);
    float* x = arena.take<float>(LEN * LEN / 2);
    Decays& now = *arena.take<Decays>(1);

    i64 chunk = blockIdx.x, head = blockIdx.y, at = chunk * p.heads + head;
    Span span = span_of(p.chunks, chunk);
    fetch<LEN, KF>(ks, k + (span.start * p.key_heads + key_head_of(p, head)) * KD, p.key_heads * KD, span.len, KD);
    fetch<LEN, VF>(vs, v + (span.start * p.heads + head) * VD, p.heads * VD, span.len, VD);
    commit();
    if (threadIdx.x < WARP) {
        RawDecays raw;
        raw.read(log_decay, beta, p.heads, head, span);
        raw.write(now);
    }
    wait<0>();
    __syncthreads();
    {
        Accumulator<LEN, LEN> kk;
        kk.clear();
        kk.add<KF, PLAIN, TRANSPOSED, LOWER>(ks, ks);
        kk.each([&](int i, int j, float value) { n[i * FS + j] = j < i ? now.factor[i] * value * decay(now, i, j) : 0.0f; });
    }
    __syncthreads();
    invert(t, n, x);
    for (int i = threadIdx.x; i < LEN * LEN; i += THREADS) {
        int row = i / LEN, column = i % LEN;
        float value = t[row * FS + column], weighted = value * now.factor[column];
        for_v(row, column) = store<T>(weighted);
        for_k(row, column) = store<T>(weighted * now.from_start[column]);
        if (inverse) inverse[at * LEN * LEN + i] = store<T>(value);
    }
    __syncthreads();
    {
        Accumulator<LEN, VF> out;
        out.clear();
        out.add<LEN, PLAIN, PLAIN>(for_v, vs);
        out.put_packed(u + at * LEN * VF);
    }
    Accumulator<LEN, KF> out;
    out.clear();
    out.add<LEN, PLAIN, PLAIN>(for_k, ks);
    out.put_packed(w + at * LEN * KF);
}

// ---- The states between chunks, and V from U, whose place it may take. grid: (sequences, heads, VF / SLICE). ----

extern "C" __global__ void __launch_bounds__(THREADS) states(T* entering, float* last_state, T* v_new, const T* u, const T* w, const T* k, const float* log_decay, const float* first_state, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<KF> w_stages = arena.tile<STAGES * LEN, KF>(), k_stages = arena.tile<STAGES * LEN, KF>();
    Tile<SLICE> u_stages = arena.tile<STAGES * LEN, SLICE>(), weighted = arena.tile<LEN, SLICE>(), s = arena.tile<KF, SLICE>();
    Decays* decays = arena.take<Decays>(2);

    i64 sequence = blockIdx.x, head = blockIdx.y;
    int slice = blockIdx.z * SLICE;
    i64 begin = first_chunk(p.chunks, sequence), end = first_chunk(p.chunks, sequence + 1);
    i64 state_at = (sequence * p.heads + head) * KD * VD;
    auto request = [&](i64 chunk, int stage) {
        Span span = span_of(p.chunks, chunk);
        i64 at = chunk * p.heads + head;
        fetch_packed<LEN, KF>(w_stages.below(stage * LEN), w + at * LEN * KF);
        fetch<LEN, KF>(k_stages.below(stage * LEN), k + (span.start * p.key_heads + key_head_of(p, head)) * KD, p.key_heads * KD, span.len, KD);
        fetch<LEN, SLICE, true>(u_stages.below(stage * LEN), u + at * LEN * VF + slice, VF, LEN, SLICE);
        commit();
    };
    Accumulator<KF, SLICE> state;
    state.clear();
    if (first_state) state.each([&](int row, int column, float& value) { if (row < KD && slice + column < VD) value = first_state[state_at + row * VD + slice + column]; });
    state.put(s);
    bool scalars = threadIdx.x < WARP;
    RawDecays raw;
    if (begin < end) {
        if (STAGES == 2) request(begin, 0);
        if (scalars) {
            raw.read(log_decay, nullptr, p.heads, head, span_of(p.chunks, begin));
            raw.write(decays[0]);
        }
    }
    for (i64 chunk = begin; chunk < end; chunk++) {
        int turn = (int)(chunk - begin) & 1, stage = STAGES == 2 ? turn : 0;
        bool more = chunk + 1 < end;
        if (STAGES == 1) request(chunk, 0);
        if (scalars && more) raw.read(log_decay, nullptr, p.heads, head, span_of(p.chunks, chunk + 1));
        i64 at = chunk * p.heads + head;
        state.pairs([&](int row, int column, float low, float high) { write_pair<true>(entering + (at * KF + row) * VF + slice, column, SLICE, low, high); });
        wait<0>();
        __syncthreads();
        // Only now have all warps left the stage that the next chunk takes.
        if (STAGES == 2 && more) request(chunk + 1, stage ^ 1);
        const Decays& now = decays[turn];
        Tile<SLICE> us = u_stages.below(stage * LEN);
        {
            Accumulator<LEN, SLICE> read;
            read.clear();
            read.add<KF, PLAIN, PLAIN>(w_stages.below(stage * LEN), s);
            read.pairs([&](int row, int column, float low, float high) {
                low = (float)load(us(row, column)) - low;
                high = (float)load(us(row, column + 1)) - high;
                write_pair<true>(v_new + (at * LEN + row) * VF + slice, column, SLICE, low, high);
                write_pair<true>(&weighted(row, 0), column, SLICE, low * now.to_end[row], high * now.to_end[row]);
            });
        }
        if (scalars && more) raw.write(decays[turn ^ 1]);
        __syncthreads();
        state.scale(now.whole);
        state.add<LEN, TRANSPOSED, PLAIN>(k_stages.below(stage * LEN), weighted);
        state.put(s);
        // With one stage, the next copies go where this product reads.
        if (STAGES == 1) __syncthreads();
    }
    state.each([&](int row, int column, float value) { if (row < KD && slice + column < VD) last_state[state_at + row * VD + slice + column] = value; });
}

// ---- Output. grid: (chunks, heads). ----

// P, rounded: scale (q_i . k_j) D_ij. By all threads; a barrier must follow.
__device__ __forceinline__ void scores(Tile<LEN> to, Tile<KF> qs, Tile<KF> ks, const Decays& now, float scale) {
    Accumulator<LEN, LEN> qk;
    qk.clear();
    qk.add<KF, PLAIN, TRANSPOSED, LOWER>(qs, ks);
    qk.each([&](int i, int j, float& value) { value *= scale * decay(now, i, j); });
    qk.put(to);
}

extern "C" __global__ void __launch_bounds__(THREADS) output(T* o, const T* q, const T* k, const T* v_new, const T* entering, const float* log_decay, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<KF> qs = arena.tile<LEN, KF>(), ks = arena.tile<LEN, KF>();
    Tile<VF> vs = arena.tile<LEN, VF>(), s = arena.tile<KF, VF>();
    Tile<LEN> ps = arena.tile<LEN, LEN>();
    Decays& now = *arena.take<Decays>(1);

    i64 chunk = blockIdx.x, head = blockIdx.y, at = chunk * p.heads + head;
    Span span = span_of(p.chunks, chunk);
    i64 key_at = (span.start * p.key_heads + key_head_of(p, head)) * KD;
    fetch<LEN, KF>(qs, q + key_at, p.key_heads * KD, span.len, KD);
    fetch<LEN, KF>(ks, k + key_at, p.key_heads * KD, span.len, KD);
    fetch_packed<LEN, VF>(vs, v_new + at * LEN * VF);
    fetch_packed<KF, VF>(s, entering + at * KF * VF);
    commit();
    if (threadIdx.x < WARP) {
        RawDecays raw;
        raw.read(log_decay, nullptr, p.heads, head, span);
        raw.write(now);
    }
    wait<0>();
    __syncthreads();
    scores(ps, qs, ks, now, p.scale);
    Accumulator<LEN, VF> out;
    out.clear();
    out.add<KF, PLAIN, PLAIN>(qs, s);
    out.each([&](int row, int, float& value) { value *= p.scale * now.from_start[row]; });
    __syncthreads();
    out.add<LEN, PLAIN, PLAIN>(ps, vs);
    out.pairs([&](int row, int column, float low, float high) {
        if (row < span.len) write_pair(o + ((span.start + row) * p.heads + head) * VD, column, VD, low, high);
    });
}

// ---- dV as far as it comes from the same chunk: P^T do. grid: (chunks, heads). ----

extern "C" __global__ void __launch_bounds__(THREADS) inside(T* dv_new, const T* q, const T* k, const T* dout, const float* log_decay, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<KF> qs = arena.tile<LEN, KF>(), ks = arena.tile<LEN, KF>();
    Tile<VF> ds = arena.tile<LEN, VF>();
    Tile<LEN> ps = arena.tile<LEN, LEN>();
    Decays& now = *arena.take<Decays>(1);

    i64 chunk = blockIdx.x, head = blockIdx.y, at = chunk * p.heads + head;
    Span span = span_of(p.chunks, chunk);
    i64 key_at = (span.start * p.key_heads + key_head_of(p, head)) * KD;
    fetch<LEN, KF>(qs, q + key_at, p.key_heads * KD, span.len, KD);
    fetch<LEN, KF>(ks, k + key_at, p.key_heads * KD, span.len, KD);
    fetch<LEN, VF>(ds, dout + (span.start * p.heads + head) * VD, p.heads * VD, span.len, VD);
    commit();
    if (threadIdx.x < WARP) {
        RawDecays raw;
        raw.read(log_decay, nullptr, p.heads, head, span);
        raw.write(now);
    }
    wait<0>();
    __syncthreads();
    scores(ps, qs, ks, now, p.scale);
    __syncthreads();
    Accumulator<LEN, VF> out;
    out.clear();
    out.add<LEN, TRANSPOSED, PLAIN>(ps, ds);
    out.put_packed(dv_new + at * LEN * VF);
}

// ---- G from the last chunk to the first, and the rest of dV. grid: (sequences, heads, VF / SLICE). ----

extern "C" __global__ void __launch_bounds__(THREADS) states_back(T* leaving, T* dv_new, const T* w, const T* q, const T* k, const T* dout, const float* log_decay, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<KF> w_stages = arena.tile<STAGES * LEN, KF>(), q_stages = arena.tile<STAGES * LEN, KF>(), k_stages = arena.tile<STAGES * LEN, KF>();
    Tile<SLICE> o_stages = arena.tile<STAGES * LEN, SLICE>(), v_stages = arena.tile<STAGES * LEN, SLICE>();
    Tile<SLICE> weighted = arena.tile<LEN, SLICE>(), minus = arena.tile<LEN, SLICE>(), g = arena.tile<KF, SLICE>();
    Decays* decays = arena.take<Decays>(2);

    i64 sequence = blockIdx.x, head = blockIdx.y;
    int slice = blockIdx.z * SLICE;
    i64 begin = first_chunk(p.chunks, sequence), last = first_chunk(p.chunks, sequence + 1) - 1;
    auto request = [&](i64 chunk, int stage) {
        Span span = span_of(p.chunks, chunk);
        i64 at = chunk * p.heads + head, key_at = (span.start * p.key_heads + key_head_of(p, head)) * KD;
        fetch_packed<LEN, KF>(w_stages.below(stage * LEN), w + at * LEN * KF);
        fetch<LEN, KF>(q_stages.below(stage * LEN), q + key_at, p.key_heads * KD, span.len, KD);
        fetch<LEN, KF>(k_stages.below(stage * LEN), k + key_at, p.key_heads * KD, span.len, KD);
        fetch<LEN, SLICE>(o_stages.below(stage * LEN), dout + (span.start * p.heads + head) * VD + slice, p.heads * VD, span.len, VD - slice);
        fetch<LEN, SLICE, true>(v_stages.below(stage * LEN), dv_new + at * LEN * VF + slice, VF, LEN, SLICE);
        commit();
    };
    Accumulator<KF, SLICE> grad;
    grad.clear();
    grad.put(g);
    bool scalars = threadIdx.x < WARP;
    RawDecays raw;
    if (begin <= last) {
        if (STAGES == 2) request(last, 0);
        if (scalars) {
            raw.read(log_decay, nullptr, p.heads, head, span_of(p.chunks, last));
            raw.write(decays[0]);
        }
    }
    for (i64 chunk = last; chunk >= begin; chunk--) {
        int turn = (int)(last - chunk) & 1, stage = STAGES == 2 ? turn : 0;
        bool more = chunk > begin;
        if (STAGES == 1) request(chunk, 0);
        if (scalars && more) raw.read(log_decay, nullptr, p.heads, head, span_of(p.chunks, chunk - 1));
        i64 at = chunk * p.heads + head;
        grad.pairs([&](int row, int column, float low, float high) { write_pair<true>(leaving + (at * KF + row) * VF + slice, column, SLICE, low, high); });
        wait<0>();
        __syncthreads();
        // Only now have all warps left the stage that the next chunk takes.
        if (STAGES == 2 && more) request(chunk - 1, stage ^ 1);
        const Decays& now = decays[turn];
        scale_rows<LEN>(weighted, o_stages.below(stage * LEN), [&](int row) { return p.scale * now.from_start[row]; });
        {
            Tile<SLICE> inner = v_stages.below(stage * LEN);
            Accumulator<LEN, SLICE> dv;
            dv.clear();
            dv.add<KF, PLAIN, PLAIN>(k_stages.below(stage * LEN), g);
            dv.pairs([&](int row, int column, float low, float high) {
                low = low * now.to_end[row] + (float)load(inner(row, column));
                high = high * now.to_end[row] + (float)load(inner(row, column + 1));
                write_pair<true>(dv_new + (at * LEN + row) * VF + slice, column, SLICE, low, high);
                write_pair<true>(&minus(row, 0), column, SLICE, -low, -high);
            });
        }
        if (scalars && more) raw.write(decays[turn ^ 1]);
        __syncthreads();
        grad.scale(now.whole);
        grad.add<LEN, TRANSPOSED, PLAIN>(q_stages.below(stage * LEN), weighted);
        grad.add<LEN, TRANSPOSED, PLAIN>(w_stages.below(stage * LEN), minus);
        grad.put(g);
        if (STAGES == 1) __syncthreads();
    }
}

// ---- Gradients. grid: (chunks, key_heads). ----

extern "C" __global__ void __launch_bounds__(THREADS) backward(T* dq, T* dk, T* dv, float* dlog_decay, float* dbeta, const T* q, const T* k, const T* v, const float* log_decay, const float* beta, const T* dout, const T* u, const T* w, const T* inverse, const T* v_new, const T* dv_new, const T* entering, const T* leaving, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<KF> qs = arena.tile<LEN, KF>(), ks = arena.tile<LEN, KF>();
    Tile<VF> state = arena.tile<KF, VF>();                // S, then G.
    // do, then dV, then U; V; what dX_v becomes; dW, then dX_k; and W where V was.
    Tile<VF> first = arena.tile<LEN, VF>(), dx_v = arena.tile<LEN, VF>();
    Tile<KF> dx_k = arena.tile<LEN, KF>();
    constexpr int WIDER = KF > VF ? KF : VF;
    T* second = arena.tile<LEN, WIDER>().at;
    Tile<VF> vs = {second};
    Tile<KF> ws = {second};
    Tile<LEN> ts = arena.tile<LEN, LEN>(), dqk = arena.tile<LEN, LEN>(), dkk = arena.tile<LEN, LEN>();
    Decays& now = *arena.take<Decays>(1);
    float* pair_rows = arena.take<float>(2 * BLOCKS * LEN);
    float* pair_columns = arena.take<float>(2 * BLOCKS * LEN);
    float* erased = arena.take<float>(BLOCKS * LEN);
    float* values = arena.take<float>(VF / 16 * LEN);
    float* keys = arena.take<float>(KF / 16 * LEN);
    float* reads = arena.take<float>(KF / 16 * LEN);
    float* writes = arena.take<float>(KF / 16 * LEN);
    float* overlap = arena.take<float>(WARPS);

    i64 chunk = blockIdx.x, key_head = blockIdx.y, share = p.heads / p.key_heads;
    Span span = span_of(p.chunks, chunk);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 key_at = (span.start * p.key_heads + key_head) * KD;
    fetch<LEN, KF>(qs, q + key_at, p.key_heads * KD, span.len, KD);
    fetch<LEN, KF>(ks, k + key_at, p.key_heads * KD, span.len, KD);
    Accumulator<LEN, KF> dq_sum, dk_sum;
    dq_sum.clear();
    dk_sum.clear();

    for (i64 head = key_head * share; head < (key_head + 1) * share; head++) {
        i64 at = chunk * p.heads + head, value_at = (span.start * p.heads + head) * VD;
        fetch<LEN, VF>(first, dout + value_at, p.heads * VD, span.len, VD);
        fetch_packed<LEN, VF>(vs, v_new + at * LEN * VF);
        fetch_packed<KF, VF>(state, entering + at * KF * VF);
        fetch_packed<LEN, LEN>(ts, inverse + at * LEN * LEN);
        commit();
        if (warp == 0) {
            RawDecays raw;
            raw.read(log_decay, beta, p.heads, head, span);
            raw.write(now);
        }
        wait<0>();
        __syncthreads();

        // dP, and from it the gradient of q . k.
        {
            Accumulator<LEN, LEN> qk, dp;
            qk.clear();
            qk.add<KF, PLAIN, TRANSPOSED, LOWER>(qs, ks);
            dp.clear();
            dp.add<VF, PLAIN, TRANSPOSED, LOWER>(first, vs);
            dp.each_with(qk, [&](int i, int j, float& value, float product) {
                float grad = value * p.scale * decay(now, i, j);
                dqk(i, j) = store<T>(grad);
                value = j <= i ? grad * product : 0.0f;
            });
            dp.row_sums(pair_rows, [](int, int, float value) { return value; });
            dp.column_sums(pair_columns);
        }
        {
            Accumulator<LEN, KF> through;
            through.clear();
            through.add<VF, PLAIN, TRANSPOSED>(first, state);
            through.each([&](int row, int, float& value) { value *= p.scale * now.from_start[row]; });
            through.row_sums(reads, [&](int row, int column, float value) { return value * (float)load(qs(row, column)); });
            dq_sum.each_with(through, [](int, int, float& value, float added) { value += added; });
        }
        __syncthreads();

        // dV through T, and dW.
        fetch_packed<LEN, VF>(first, dv_new + at * LEN * VF);
        commit();
        wait<0>();
        __syncthreads();
        {
            Accumulator<LEN, KF> dw;
            dw.clear();
            dw.add<VF, PLAIN, TRANSPOSED>(first, state);
            dw.scale(-1.0f);
            dw.put(dx_k);
        }
        {
            Accumulator<LEN, VF> dx;
            dx.clear();
            dx.add<LEN, TRANSPOSED, PLAIN>(ts, first);
            dx.put(dx_v);
            dx.row_sums(values, [&](int row, int column, float value) {
                return row < span.len && column < VD ? value * (float)load(v[value_at + row * p.heads * VD + column]) : 0.0f;
            });
            dx.pairs([&](int row, int column, float low, float high) {
                if (row < span.len) write_pair(dv + value_at + row * p.heads * VD, column, VD, low * now.factor[row], high * now.factor[row]);
            });
        }
        __syncthreads();
        // U and G arrive while dX_k is made. G takes the place of S, which each thread meets with the same values of G.
        fetch_packed<LEN, VF>(first, u + at * LEN * VF);
        commit();
        float sum = 0;
        constexpr int PIECE = 16 / (int)sizeof(T);
        for (int i = threadIdx.x * PIECE; i < KF * VF; i += THREADS * PIECE) {
            Pack<T, PIECE> grad = load_pack<T, PIECE>(leaving + at * KF * VF + i);
            T* to = &state(i / VF, i % VF);
            Pack<T, PIECE> own = load_pack<T, PIECE>(to);
            #pragma unroll
            for (int c = 0; c < PIECE; c++) sum += (float)load(grad.at[c]) * (float)load(own.at[c]);
            store_pack(to, grad);
        }
        sum = warp_reduce<Add>(sum);
        if (lane == 0) overlap[warp] = sum;
        Accumulator<LEN, KF> dx;
        dx.clear();
        dx.add<LEN, TRANSPOSED, PLAIN>(ts, dx_k);
        __syncthreads();
        dx.put(dx_k);
        dx.row_sums(keys, [&](int row, int column, float value) { return value * (float)load(ks(row, column)); });
        dk_sum.each_with(dx, [&](int row, int, float& value, float grad) { value += now.factor[row] * now.from_start[row] * grad; });
        // What the chunk writes to the state.
        dx.clear();
        dx.add<VF, PLAIN, TRANSPOSED>(vs, state);
        dx.each([&](int row, int, float& value) { value *= now.to_end[row]; });
        dx.row_sums(writes, [&](int row, int column, float value) { return value * (float)load(ks(row, column)); });
        dk_sum.each_with(dx, [](int, int, float& value, float added) { value += added; });
        __syncthreads();
        fetch_packed<LEN, KF>(ws, w + at * LEN * KF);
        commit();
        wait<0>();
        __syncthreads();

        // dN, and from it the gradient of k . k.
        {
            Accumulator<LEN, LEN> kk, dn;
            kk.clear();
            kk.add<KF, PLAIN, TRANSPOSED, LOWER>(ks, ks);
            dn.clear();
            dn.add<VF, PLAIN, TRANSPOSED, LOWER>(dx_v, first);
            dn.add<KF, PLAIN, TRANSPOSED, LOWER>(dx_k, ws);
            dn.each_with(kk, [&](int i, int j, float& value, float product) {
                float grad = j < i ? -value * decay(now, i, j) : 0.0f;
                dkk(i, j) = store<T>(grad * now.factor[i]);
                value = grad * product;
            });
            dn.row_sums(erased, [](int, int, float value) { return value; });
            dn.each([&](int row, int, float& value) { value *= now.factor[row]; });
            dn.row_sums(pair_rows + BLOCKS * LEN, [](int, int, float value) { return value; });
            dn.column_sums(pair_columns + BLOCKS * LEN);
        }
        __syncthreads();
        dq_sum.template add<LEN, PLAIN, PLAIN>(dqk, ks);
        dk_sum.template add<LEN, TRANSPOSED, PLAIN>(dqk, qs);
        dk_sum.template add<LEN, PLAIN, PLAIN>(dkk, ks);
        dk_sum.template add<LEN, TRANSPOSED, PLAIN>(dkk, ks);

        if (warp == 0) {
            float dsums[LEN / 32], written = 0;
            #pragma unroll
            for (int h = 0; h < LEN / 32; h++) {
                int i = h * 32 + lane;
                float e = sum_parts<KF / 16, LEN>(writes, i), key = sum_parts<KF / 16, LEN>(keys, i);
                written += e;
                dsums[h] = sum_parts<2 * BLOCKS, LEN>(pair_rows, i) - sum_parts<2 * BLOCKS, LEN>(pair_columns, i)
                    + now.factor[i] * now.from_start[i] * key + sum_parts<KF / 16, LEN>(reads, i) - e;
                if (i < span.len) dbeta[(span.start + i) * p.heads + head] = sum_parts<BLOCKS, LEN>(erased, i) + sum_parts<VF / 16, LEN>(values, i) + now.from_start[i] * key;
            }
            sum_to_end(dsums);
            float at_last = warp_reduce<Add>(written) + now.whole * sum_parts<WARPS, 1>(overlap, 0);
            #pragma unroll
            for (int h = 0; h < LEN / 32; h++) {
                int i = h * 32 + lane;
                if (i < span.len) dlog_decay[(span.start + i) * p.heads + head] = dsums[h] + at_last;
            }
        }
        __syncthreads();
    }
    auto write = [&](T* to, Accumulator<LEN, KF>& from) {
        from.pairs([&](int row, int column, float low, float high) {
            if (row < span.len) write_pair(to + key_at + row * p.key_heads * KD, column, KD, low, high);
        });
    };
    write(dq, dq_sum);
    write(dk, dk_sum);
}
