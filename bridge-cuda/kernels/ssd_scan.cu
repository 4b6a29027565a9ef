// The scan of Mamba-2, forward and backward, chunk by chunk. The formulas are those of bridge-ops/src/ssd_scan.rs, whose names
// this file uses: h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t.
//
// Definitions: those of chunk_tiles.cuh; HEAD_DIM (P), STATE (N), STAGES (chunks held at a time, 1 or 2).
// x, y, dy, dx: [tokens, heads, P]; b, c, db, dc: [tokens, groups, N], all T and packed; dt, log_decay and their gradients:
// [tokens, heads] float; skip: [heads] float or null; first_state (or null), last_state: [sequences, heads, P, N] float.
// Heads share groups in equal runs of neighbours.
//
// `forward`: a block owns a head of a sequence and walks its chunks with the state in registers (float).
// `states`: walks them the same way for the state alone, forward for H and backward for G, and leaves the state that each chunk
// starts from (ends with, for G) in states: [2, chunks, heads, P, N], both sizes filled up to 16.
// `backward`: a block owns a chunk and the heads of a group, one after the other, so that dB and dC are summed in registers;
// dskip_parts: [chunks, heads] float is left for a sum over chunks. Nothing is added by atomics: results repeat exactly.
// Operands of products are rounded to T, sums are float. Source: Dao and Gu 2024. Launcher: src/ops/ssd_scan.rs.
#include "chunk_tiles.cuh"

constexpr int P = HEAD_DIM;
constexpr int N = STATE;
constexpr int PF = filled(P);
constexpr int NF = filled(N);

struct Problem {
    Chunks chunks;
    i64 heads, groups;
};

// ---- Forward. grid: (sequences, heads). ----

extern "C" __global__ void __launch_bounds__(THREADS) forward(T* y, float* last_state, const T* x, const float* dt, const float* log_decay, const T* b, const T* c, const float* skip, const float* first_state, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<PF> x_stages = arena.tile<STAGES * LEN, PF>();
    Tile<NF> b_stages = arena.tile<STAGES * LEN, NF>(), c_stages = arena.tile<STAGES * LEN, NF>();
    Tile<PF> weighted = arena.tile<LEN, PF>();
    Tile<NF> state = arena.tile<PF, NF>();
    Tile<LEN> m = arena.tile<LEN, LEN>();
    Decays* decays = arena.take<Decays>(2);

    i64 sequence = blockIdx.x, head = blockIdx.y, group = head / (p.heads / p.groups);
    i64 begin = first_chunk(p.chunks, sequence), end = first_chunk(p.chunks, sequence + 1);
    i64 state_at = (sequence * p.heads + head) * P * N;
    auto request = [&](i64 chunk, int stage) {
        Span span = span_of(p.chunks, chunk);
        fetch<LEN, PF>(x_stages.below(stage * LEN), x + (span.start * p.heads + head) * P, p.heads * P, span.len, P);
        fetch<LEN, NF>(b_stages.below(stage * LEN), b + (span.start * p.groups + group) * N, p.groups * N, span.len, N);
        fetch<LEN, NF>(c_stages.below(stage * LEN), c + (span.start * p.groups + group) * N, p.groups * N, span.len, N);
        commit();
    };

    Accumulator<PF, NF> h;
    h.clear();
    if (first_state) h.each([&](int row, int column, float& value) { if (row < P && column < N) value = first_state[state_at + row * N + column]; });
    h.put(state);
    bool scalars = threadIdx.x < WARP;
    RawDecays raw;
    if (begin < end) {
        if (STAGES == 2) request(begin, 0);
        if (scalars) {
            raw.read(log_decay, dt, p.heads, head, span_of(p.chunks, begin));
            raw.write(decays[0]);
        }
    }
    float d = skip ? skip[head] : 0.0f;

    for (i64 chunk = begin; chunk < end; chunk++) {
        int turn = (int)(chunk - begin) & 1, stage = STAGES == 2 ? turn : 0;
        bool more = chunk + 1 < end;
        Span span = span_of(p.chunks, chunk);
        if (STAGES == 1) request(chunk, 0);
        else if (more) request(chunk + 1, stage ^ 1);
        else commit();
        if (scalars && more) raw.read(log_decay, dt, p.heads, head, span_of(p.chunks, chunk + 1));
        wait<STAGES - 1>();
        __syncthreads();
        const Decays& now = decays[turn];
        Tile<PF> xs = x_stages.below(stage * LEN);
        Tile<NF> bs = b_stages.below(stage * LEN), cs = c_stages.below(stage * LEN);

        scale_rows<LEN>(weighted, xs, [&](int row) { return now.to_end[row] * now.factor[row]; });
        Accumulator<LEN, LEN> pairs;
        pairs.clear();
        pairs.add<NF, PLAIN, TRANSPOSED, LOWER>(cs, bs);
        pairs.each([&](int i, int j, float& value) { value *= decay(now, i, j) * now.factor[j]; });
        pairs.put(m);
        Accumulator<LEN, PF> out;
        out.clear();
        out.add<NF, PLAIN, TRANSPOSED>(cs, state);
        out.each([&](int row, int, float& value) { value *= now.from_start[row]; });
        __syncthreads();

        out.add<LEN, PLAIN, PLAIN>(m, xs);
        out.pairs([&](int row, int column, float& low, float& high) {
            if (row >= span.len) return;
            low += d * (float)load(xs(row, column));
            high += d * (float)load(xs(row, column + 1));
            write_pair(y + ((span.start + row) * p.heads + head) * P, column, P, low, high);
        });
        h.scale(now.whole);
        h.add<LEN, TRANSPOSED, PLAIN>(weighted, bs);
        // All have read the state before the last barrier.
        h.put(state);
        if (scalars && more) raw.write(decays[turn ^ 1]);
        __syncthreads();
    }
    h.each([&](int row, int column, float& value) { if (row < P && column < N) last_state[state_at + row * N + column] = value; });
}

// ---- The states between chunks. grid: (sequences, heads, 2): H, and G from the end. ----

extern "C" __global__ void __launch_bounds__(THREADS) states(T* states, const T* x, const T* dy, const float* dt, const float* log_decay, const T* b, const T* c, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<PF> left = arena.tile<STAGES * LEN, PF>();
    Tile<NF> right = arena.tile<STAGES * LEN, NF>();
    Tile<PF> weighted = arena.tile<LEN, PF>();
    Decays* decays = arena.take<Decays>(2);

    bool back = blockIdx.z == 1;
    i64 sequence = blockIdx.x, head = blockIdx.y, group = head / (p.heads / p.groups);
    i64 begin = first_chunk(p.chunks, sequence), count = first_chunk(p.chunks, sequence + 1) - begin;
    const T* rows = back ? dy : x;
    const T* columns = back ? c : b;
    auto chunk_at = [&](i64 i) { return begin + (back ? count - 1 - i : i); };
    auto request = [&](i64 i, int stage) {
        Span span = span_of(p.chunks, chunk_at(i));
        fetch<LEN, PF>(left.below(stage * LEN), rows + (span.start * p.heads + head) * P, p.heads * P, span.len, P);
        fetch<LEN, NF>(right.below(stage * LEN), columns + (span.start * p.groups + group) * N, p.groups * N, span.len, N);
        commit();
    };
    Accumulator<PF, NF> state;
    state.clear();
    bool scalars = threadIdx.x < WARP;
    RawDecays raw;
    if (count > 0) {
        if (STAGES == 2) request(0, 0);
        if (scalars) {
            raw.read(log_decay, dt, p.heads, head, span_of(p.chunks, chunk_at(0)));
            raw.write(decays[0]);
        }
    }
    for (i64 i = 0; i < count; i++) {
        int turn = (int)i & 1, stage = STAGES == 2 ? turn : 0;
        bool more = i + 1 < count;
        state.put_packed(states + (((i64)back * p.chunks.count + chunk_at(i)) * p.heads + head) * PF * NF);
        if (!more) break;
        if (STAGES == 1) request(i, 0);
        else request(i + 1, stage ^ 1);
        if (scalars) raw.read(log_decay, dt, p.heads, head, span_of(p.chunks, chunk_at(i + 1)));
        wait<STAGES - 1>();
        __syncthreads();
        const Decays& now = decays[turn];
        scale_rows<LEN>(weighted, left.below(stage * LEN), [&](int row) { return back ? now.from_start[row] : now.to_end[row] * now.factor[row]; });
        if (scalars) raw.write(decays[turn ^ 1]);
        __syncthreads();
        state.scale(now.whole);
        state.add<LEN, TRANSPOSED, PLAIN>(weighted, right.below(stage * LEN));
        // The next turn's copies go where this product reads.
        __syncthreads();
    }
    wait<0>();
}

// ---- Gradients. grid: (chunks, groups). ----

extern "C" __global__ void __launch_bounds__(THREADS) backward(T* dx, float* ddt, float* dlog_decay, T* db, T* dc, float* dskip_parts, const T* x, const float* dt, const float* log_decay, const T* b, const T* c, const float* skip, const T* dy, const T* states, Problem p) {
    extern __shared__ __align__(128) char memory[];
    Arena arena = {memory};
    Tile<NF> bs = arena.tile<LEN, NF>(), cs = arena.tile<LEN, NF>();
    Tile<PF> xs = arena.tile<LEN, PF>(), ys = arena.tile<LEN, PF>(), x_weighted = arena.tile<LEN, PF>(), y_weighted = arena.tile<LEN, PF>();
    Tile<NF> hs = arena.tile<PF, NF>(), gs = arena.tile<PF, NF>();
    Tile<LEN> m = arena.tile<LEN, LEN>(), w = arena.tile<LEN, LEN>();
    Decays* decays = arena.take<Decays>(1);
    constexpr int BLOCKS = LEN / 16;
    float* pair_rows = arena.take<float>(BLOCKS * LEN);
    float* pair_columns = arena.take<float>(BLOCKS * LEN);
    float* written = arena.take<float>(PF / 16 * LEN);
    float* steps = arena.take<float>(PF / 16 * LEN);
    float* readings = arena.take<float>(NF / 16 * LEN);
    float* overlap = arena.take<float>(WARPS);
    float* skips = arena.take<float>(WARPS);

    i64 chunk = blockIdx.x, group = blockIdx.y, share = p.heads / p.groups;
    Span span = span_of(p.chunks, chunk);
    i64 group_at = (span.start * p.groups + group) * N;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    fetch<LEN, NF>(bs, b + group_at, p.groups * N, span.len, N);
    fetch<LEN, NF>(cs, c + group_at, p.groups * N, span.len, N);
    commit();
    wait<0>();
    __syncthreads();
    Accumulator<LEN, LEN> cb;
    cb.clear();
    cb.add<NF, PLAIN, TRANSPOSED, LOWER>(cs, bs);
    Accumulator<LEN, NF> db_sum, dc_sum;
    db_sum.clear();
    dc_sum.clear();

    for (i64 head = group * share; head < (group + 1) * share; head++) {
        i64 at = (span.start * p.heads + head) * P;
        fetch<LEN, PF>(xs, x + at, p.heads * P, span.len, P);
        fetch<LEN, PF>(ys, dy + at, p.heads * P, span.len, P);
        fetch_packed<PF, NF>(hs, states + (chunk * p.heads + head) * PF * NF);
        fetch_packed<PF, NF>(gs, states + ((p.chunks.count + chunk) * p.heads + head) * PF * NF);
        commit();
        if (warp == 0) {
            RawDecays raw;
            raw.read(log_decay, dt, p.heads, head, span);
            raw.write(*decays);
        }
        float d = skip ? skip[head] : 0.0f;
        wait<0>();
        __syncthreads();
        const Decays& now = *decays;

        scale_rows<LEN>(x_weighted, xs, [&](int row) { return now.to_end[row] * now.factor[row]; });
        scale_rows<LEN>(y_weighted, ys, [&](int row) { return now.from_start[row]; });
        {
            // M and W, and the sums of their product.
            Accumulator<LEN, LEN> pairs;
            pairs.clear();
            pairs.add<PF, PLAIN, TRANSPOSED, LOWER>(ys, xs);
            pairs.each_with(cb, [&](int i, int j, float& value, float product) {
                float factor = decay(now, i, j), grad = value * now.factor[j] * factor;
                m(i, j) = store<T>(product * factor);
                w(i, j) = store<T>(grad);
                value = j <= i ? grad * product : 0.0f;
            });
            pairs.row_sums(pair_rows, [](int, int, float value) { return value; });
            pairs.column_sums(pair_columns);
        }
        float sum = 0;
        for (int i = threadIdx.x; i < PF * NF; i += THREADS) sum += (float)load(hs(i / NF, i % NF)) * (float)load(gs(i / NF, i % NF));
        sum = warp_reduce<Add>(sum);
        if (lane == 0) overlap[warp] = sum;
        if (skip) {
            sum = 0;
            for (int i = threadIdx.x; i < LEN * PF; i += THREADS) sum += (float)load(xs(i / PF, i % PF)) * (float)load(ys(i / PF, i % PF));
            sum = warp_reduce<Add>(sum);
            if (lane == 0) skips[warp] = sum;
        }
        __syncthreads();

        {
            Accumulator<LEN, PF> du;
            du.clear();
            du.add<NF, PLAIN, TRANSPOSED>(bs, gs);
            du.each([&](int row, int, float& value) { value *= now.to_end[row]; });
            du.row_sums(written, [&](int row, int column, float value) { return value * now.factor[row] * (float)load(xs(row, column)); });
            du.add<LEN, TRANSPOSED, PLAIN>(m, ys);
            du.row_sums(steps, [&](int row, int column, float value) { return value * (float)load(xs(row, column)); });
            du.pairs([&](int row, int column, float low, float high) {
                if (row >= span.len) return;
                float dt = now.factor[row];
                low = dt * low + d * (float)load(ys(row, column));
                high = dt * high + d * (float)load(ys(row, column + 1));
                write_pair(dx + at + row * p.heads * P, column, P, low, high);
            });
        }
        {
            Accumulator<LEN, NF> through;
            through.clear();
            through.add<PF, PLAIN, PLAIN>(y_weighted, hs);
            through.row_sums(readings, [&](int row, int column, float value) { return value * (float)load(cs(row, column)); });
            dc_sum.each_with(through, [](int, int, float& value, float added) { value += added; });
        }
        dc_sum.template add<LEN, PLAIN, PLAIN>(w, bs);
        db_sum.template add<LEN, TRANSPOSED, PLAIN>(w, cs);
        db_sum.template add<PF, PLAIN, PLAIN>(x_weighted, gs);
        __syncthreads();

        // Meanwhile the other warps ask for the next head's operands; these sums they touch only after a barrier.
        if (warp == 0) {
            float dsums[LEN / 32], written_sum = 0;
            #pragma unroll
            for (int h = 0; h < LEN / 32; h++) {
                int i = h * 32 + lane;
                float e = sum_parts<PF / 16, LEN>(written, i);
                written_sum += e;
                dsums[h] = sum_parts<BLOCKS, LEN>(pair_rows, i) - sum_parts<BLOCKS, LEN>(pair_columns, i) + sum_parts<NF / 16, LEN>(readings, i) - e;
                if (i < span.len) ddt[(span.start + i) * p.heads + head] = sum_parts<PF / 16, LEN>(steps, i);
            }
            sum_to_end(dsums);
            float at_last = warp_reduce<Add>(written_sum) + now.whole * sum_parts<WARPS, 1>(overlap, 0);
            #pragma unroll
            for (int h = 0; h < LEN / 32; h++) {
                int i = h * 32 + lane;
                if (i < span.len) dlog_decay[(span.start + i) * p.heads + head] = dsums[h] + at_last;
            }
            if (skip && lane == 0) dskip_parts[chunk * p.heads + head] = sum_parts<WARPS, 1>(skips, 0);
        }
    }
    auto write = [&](T* to, Accumulator<LEN, NF>& from) {
        from.pairs([&](int row, int column, float low, float high) {
            if (row < span.len) write_pair(to + group_at + row * p.groups * N, column, N, low, high);
        });
    };
    write(db, db_sum);
    write(dc, dc_sum);
}
