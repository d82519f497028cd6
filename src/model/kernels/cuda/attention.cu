// Attention for packed short rows over a shared prefix. Computes the same as ../attention.rs and uses the same names.
//
// There are two kernels. In `attention_f32`, each warp computes one head of one query. It is exact and used for checks
// and for float weights. Its grid is (queries, heads) and its block 32 threads, without dynamic shared memory.
//
// In `attention_bf16`, each block computes 64 (query, head) pairs that share a key/value head. The pairs are ordered by
// query and taken from the packed queries one after another, whatever rows they belong to. So several short rows share
// a block, and the block loads the keys and values of the prefix and of each row once for all its pairs. Each warp
// computes 16 pairs on the tensor cores. Scores, softmax and sums are float. The softmax is accumulated over blocks of
// 16 keys (Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018) in base 2. While a block is
// computed, the next two are copied to shared memory in the background.
//
// The result of a pair does not depend on the other rows of the pass, bit for bit. The blocks of a row begin at fixed
// positions, and a block that a pair does not see changes nothing. Values of other rows are multiplied by zero, though:
// one that is not finite can spread to the neighbouring row.
//
// Launch of attention_bf16_<D>: the grid is (ceil(queries * heads / kv_heads / PAIRS), kv_heads), the block THREADS.
//
//   D    PAIRS  THREADS  bytes of dynamic shared memory
//   32   64     128      10,240
//   64   64     128      20,480
//   128  64     128      40,960
//   256  64     128      81,920 (more than 48 KiB, so the host must raise the kernel's limit)

#include "common.cuh"
#include "mma.cuh"

// One row, with the fields of `Span` in ../spans.rs as `uint32_t`.
struct Span {
    uint32_t query_start, queries, key_start, keys, shared;
};

// Strides are the numbers of elements between two tokens. `attention_bf16` reads 16 bytes at a time: its pointers must
// be aligned to 16 bytes and its strides multiples of 8.
struct Shape {
    uint32_t queries, heads, kv_heads, head_dim;
    // The strides of the queries, of the keys and values, and of those of the prefix. The output has no gaps.
    uint32_t q_stride, kv_stride, prefix_stride;
    // A query attends to itself and the `window - 1` positions before it, or to all of them if this is 0.
    uint32_t window;
    float scale;
    // Scores become cap * tanh(score / cap), or stay the same if this is 0.
    float softcap;
};

// The positions [first, last] that a query attends to, counted over the shared prefix and then the row's own tokens.
struct Visible {
    uint32_t first, last;
};

// `query` counts from the first query of the row.
__device__ __forceinline__ Visible visible(const Span &span, uint32_t query, uint32_t window) {
    const uint32_t last = span.shared + span.keys - span.queries + query;
    return {window != 0 && last + 1 > window ? last + 1 - window : 0, last};
}

__device__ __forceinline__ float scaled_and_capped(float score, const Shape &shape) {
    score *= shape.scale;
    return shape.softcap > 0.0f ? shape.softcap * tanhf(score / shape.softcap) : score;
}

// A score below that of every key, and finite, so that the difference to another score is a number.
constexpr float NEGATIVE = -1e30f;

// Supports heads of up to 32 * 8 elements. Each block is one warp, and the grid is (query, head).
extern "C" __global__ void attention_f32(const float *q, const float *k, const float *v, const float *prefix_k,
                                         const float *prefix_v, const Span *spans, const uint32_t *span_of,
                                         float *out, Shape shape) {
    constexpr int ELEMENTS_PER_LANE = 8;
    const uint32_t lane = threadIdx.x, query = blockIdx.x, head = blockIdx.y;
    const Span span = spans[span_of[query]];
    const uint32_t column = head / (shape.heads / shape.kv_heads) * shape.head_dim;
    const float *row = q + (size_t)query * shape.q_stride + head * shape.head_dim;
    float *to = out + ((size_t)query * shape.heads + head) * shape.head_dim;
    float own[ELEMENTS_PER_LANE], sum[ELEMENTS_PER_LANE];
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
        own[n] = lane + 32 * n < shape.head_dim ? row[lane + 32 * n] : 0.0f;
        sum[n] = 0.0f;
    }
    float highest = NEGATIVE, total = 0.0f;
    const Visible range = visible(span, query - span.query_start, shape.window);
    for (uint32_t at = range.first; at <= range.last; at++) {
        const bool is_shared = at < span.shared;
        const size_t key = is_shared ? at : span.key_start + at - span.shared;
        const size_t at_key = key * (is_shared ? shape.prefix_stride : shape.kv_stride) + column;
        const float *keys = (is_shared ? prefix_k : k) + at_key, *values = (is_shared ? prefix_v : v) + at_key;
        float dot = 0.0f;
#pragma unroll
        for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
            if (lane + 32 * n < shape.head_dim) dot += own[n] * keys[lane + 32 * n];
        }
        const float score = scaled_and_capped(warp_sum(dot), shape);
        const float next = fmaxf(highest, score);
        const float shrink = expf(highest - next), weight = expf(score - next);
        total = total * shrink + weight;
        highest = next;
#pragma unroll
        for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
            if (lane + 32 * n < shape.head_dim) sum[n] = sum[n] * shrink + weight * values[lane + 32 * n];
        }
    }
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
        if (lane + 32 * n < shape.head_dim) to[lane + 32 * n] = sum[n] / total;
    }
}

constexpr uint32_t PAIRS = 64, THREADS = 128, PAIRS_OF_WARP = 16;
constexpr uint32_t KEYS = 16;
// The number of blocks of keys and values that shared memory holds.
constexpr uint32_t STAGES = 3;
// The number of bytes of dynamic shared memory that `attention_bf16` needs for heads of `dim` elements.
constexpr uint32_t shared_bytes(uint32_t dim) { return (PAIRS + STAGES * 2 * KEYS) * dim * 2; }
static_assert(shared_bytes(256) <= 99 * 1024, "compute capability 8.6 offers no more to a block");

constexpr uint32_t ALL_LANES = 0xffffffffu;
// The sums stay relative to the same score until a score exceeds it by more than this, in powers of two. The weights
// then reach 2^8, which costs no precision and saves most multiplications of the sums.
constexpr float TOLERATED_GROWTH = 8.0f;

// A range of indices [begin, end).
struct Range {
    uint32_t begin, end;
};

// Up to 16 consecutive keys of the prefix or of one row. Without any keys it marks the end.
struct KeyBlock {
    uint32_t start, count;
    bool is_prefix;
};

// Goes through the blocks of keys that the queries [first_query, last_query] of a block of threads see: first those of
// the prefix, then those of each row.
struct KeyBlocks {
    const Span *spans;
    uint32_t first_query, last_query, window;
    // The next row, and the last one.
    uint32_t row, last_row;
    // The keys that are left of the current part.
    uint32_t at, end;
    bool is_prefix;

    __device__ __forceinline__ void begin_row(const Span &span) {
        const uint32_t first = first_query > span.query_start ? first_query - span.query_start : 0;
        const uint32_t own = last_query - span.query_start;
        const uint32_t from = visible(span, first, window).first;
        at = span.key_start + (from > span.shared ? from - span.shared : 0) / KEYS * KEYS;
        end = span.key_start + span.keys - span.queries + (own < span.queries ? own + 1 : span.queries);
    }

    __device__ __forceinline__ KeyBlock next() {
        while (at >= end) {
            if (row > last_row) return {0, 0, false};
            const Span span = spans[row++];
            is_prefix = false;
            // A row without queries leaves the loop's condition as it is.
            if (span.queries != 0) begin_row(span);
        }
        const KeyBlock block = {at, end - at < KEYS ? end - at : KEYS, is_prefix};
        at += KEYS;
        return block;
    }
};

// Returns the offset in bytes of 8 elements in a tile of rows of DIM elements. The order of these chunks differs from
// row to row, so that the same chunk of 8 consecutive rows lies on different banks.
template <int DIM>
__device__ __forceinline__ uint32_t chunk_offset(uint32_t row, uint32_t chunk) {
    return row * DIM * 2 + (chunk ^ (DIM >= 64 ? row % 8 : row / 2 % 4)) * 16;
}

// Given the address of chunk 0 or 1 of a row, returns that of the chunk 2 * step further.
__device__ __forceinline__ uint32_t at_step(uint32_t address, int step) {
    return (address ^ (step % 4 * 32)) + step / 4 * 128;
}

// `row_max` and `row_sum` return the maximum and the sum over the four lanes that hold one row of a fragment.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Returns the smallest range that contains the given ranges of all lanes. Empty ranges do not count.
__device__ __forceinline__ Range union_of_lanes(Range range) {
    const bool is_empty = range.begin >= range.end;
    return {__reduce_min_sync(ALL_LANES, is_empty ? 0xffffffffu : range.begin),
            __reduce_max_sync(ALL_LANES, is_empty ? 0u : range.end)};
}

// The keys that the 16 pairs of a warp see in the current part, the prefix or the rows' own keys.
struct Seen {
    // The union over the warp, and the ranges of rows g and g + 8 of this lane's fragments.
    Range warp, pair[2];

    // Lanes i and i + 16 give the range of pair i.
    __device__ __forceinline__ void set(Range range, uint32_t g) {
        warp = union_of_lanes(range);
        for (int half = 0; half < 2; half++) {
            pair[half] = {__shfl_sync(ALL_LANES, range.begin, g + 8 * half),
                          __shfl_sync(ALL_LANES, range.end, g + 8 * half)};
        }
    }
};

// Turns products of queries and keys into scores whose weights are powers of two:
// weight = e^(cap * tanh(product * scale / cap)) = 2^score. With tanh(x) = 1 - 2 / (1 + e^(2 x)), its absolute error is
// about 1e-7 for every x.
struct Scores {
    float factor, cap;

    __device__ __forceinline__ Scores(const Shape &shape) {
        constexpr float LOG2_E = 1.4426950408889634f;
        cap = shape.softcap * LOG2_E;
        factor = shape.scale * LOG2_E * (shape.softcap > 0.0f ? 2.0f / shape.softcap : 1.0f);
    }

    __device__ __forceinline__ float operator()(float product) const {
        product *= factor;
        return cap > 0.0f ? cap - __fdividef(2.0f * cap, 1.0f + fast_exp2(product)) : product;
    }
};

template <int DIM>
__device__ __forceinline__ void attention(const __nv_bfloat16 *q, const __nv_bfloat16 *k, const __nv_bfloat16 *v,
                                          const __nv_bfloat16 *prefix_k, const __nv_bfloat16 *prefix_v,
                                          const Span *spans, const uint32_t *span_of, __nv_bfloat16 *out,
                                          const Shape &shape) {
    // A row of a tile is copied in chunks of 16 bytes. All threads together copy `LINES` rows at a time.
    constexpr uint32_t CHUNKS = DIM / 8, LINES = THREADS / CHUNKS;
    constexpr int STEPS = DIM / 16;
    constexpr uint32_t TILE_BYTES = KEYS * DIM * 2;
    // Separate sums that the products of one score are distributed to, because each product waits for the previous one
    // of its sum.
    constexpr int CHAINS = DIM >= 128 ? 2 : 1;
    __shared__ Range prefix_of_warp[THREADS / 32];
    DYNAMIC_SHARED(shared);
    const uint32_t shared_q = shared_address(shared), shared_kv = shared_q + PAIRS * DIM * 2;
    const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const uint32_t g = lane / 4, t = lane % 4;
    const uint32_t line = thread / CHUNKS % LINES, chunk = thread % CHUNKS;

    const uint32_t kv_head = blockIdx.y, group = shape.heads / shape.kv_heads;
    const uint32_t first_pair = blockIdx.x * PAIRS, left = shape.queries * group - first_pair;
    const uint32_t pairs = left < PAIRS ? left : PAIRS;
    const uint32_t first_query = first_pair / group, skipped = first_pair % group;
    // Multiplying by the rounded reciprocal divides numbers below PAIRS + group exactly, for any group up to 1024.
    const uint32_t reciprocal = ((1u << 20) + group - 1) / group;
    // Returns the query of a pair, counted from the first query of the block.
    const auto query_of = [&](uint32_t pair) { return (pair + skipped) * reciprocal >> 20; };
    const auto head_of = [&](uint32_t pair) {
        return kv_head * group + pair + skipped - query_of(pair) * group;
    };

#pragma unroll
    for (uint32_t from = 0; from < PAIRS; from += LINES) {
        const uint32_t pair = from + line;
        const size_t row = first_query + query_of(pair);
        copy_async(shared_q + chunk_offset<DIM>(pair, chunk),
                   q + row * shape.q_stride + head_of(pair) * DIM + chunk * 8, pair < pairs);
    }
    end_copy_group();

    // Lanes i and i + 16 compute what pair i of their warp sees. Pairs beyond the end see nothing.
    Range own = {0, 0}, prefix = {0, 0};
    const uint32_t lane_pair = warp * PAIRS_OF_WARP + lane % PAIRS_OF_WARP;
    if (lane_pair < pairs) {
        const uint32_t query = first_query + query_of(lane_pair);
        const Span span = spans[span_of[query]];
        const Visible range = visible(span, query - span.query_start, shape.window);
        prefix = {range.first, span.shared};
        own = {span.key_start + (range.first > span.shared ? range.first - span.shared : 0),
               span.key_start + range.last - span.shared + 1};
    }
    Seen seen;
    seen.set(prefix, g);
    if (lane == 0) prefix_of_warp[warp] = seen.warp;
    __syncthreads();
    prefix = prefix_of_warp[0];
    for (uint32_t i = 1; i < THREADS / 32; i++) {
        const Range other = prefix_of_warp[i];
        prefix.begin = other.begin < prefix.begin ? other.begin : prefix.begin;
        prefix.end = other.end > prefix.end ? other.end : prefix.end;
    }
    const uint32_t last_query = first_query + query_of(pairs - 1);
    KeyBlocks blocks = {spans, first_query, last_query, shape.window, span_of[first_query], span_of[last_query],
                        prefix.begin / KEYS * KEYS, prefix.end, true};

    // Starts to load the keys and values of a block into a stage.
    const auto load = [&](const KeyBlock &block, uint32_t stage) {
        if (block.count != 0) {
            const size_t stride = block.is_prefix ? shape.prefix_stride : shape.kv_stride;
            const size_t offset = block.start * stride + kv_head * DIM + chunk * 8;
            const __nv_bfloat16 *keys = (block.is_prefix ? prefix_k : k) + offset;
            const __nv_bfloat16 *values = (block.is_prefix ? prefix_v : v) + offset;
            const uint32_t to = shared_kv + stage * 2 * TILE_BYTES;
            // The keys and then the values. Some threads copy only keys and others only values if the rows are short.
#pragma unroll
            for (uint32_t from = 0; from < 2 * KEYS; from += LINES) {
                const bool is_value = LINES <= KEYS ? from >= KEYS : line >= KEYS;
                const uint32_t row = LINES <= KEYS ? from % KEYS + line : line % KEYS;
                copy_async(to + is_value * TILE_BYTES + chunk_offset<DIM>(row, chunk),
                           (is_value ? values : keys) + row * stride, row < block.count);
            }
        }
        end_copy_group();
    };
    KeyBlock queue[STAGES - 1];
    for (uint32_t stage = 0; stage < STAGES - 1; stage++) {
        queue[stage] = blocks.next();
        load(queue[stage], stage);
    }

    // The addresses of this lane's rows of the first matrices that `ldmatrix` loads.
    const uint32_t q_row = shared_q + chunk_offset<DIM>(warp * PAIRS_OF_WARP + lane % 16, lane / 16);
    const uint32_t k_row = shared_kv + chunk_offset<DIM>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t v_row = shared_kv + TILE_BYTES + chunk_offset<DIM>(lane % 16, lane / 16);

    wait_for_copies<STAGES - 1>();
    __syncthreads();
    uint32_t queries[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step++) ldmatrix(queries[step], at_step(q_row, step));

    const Scores score_of(shape);
    float sum[DIM / 8][4];
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
        for (int i = 0; i < 4; i++) sum[n][i] = 0.0f;
    }
    // The weights of both rows are relative to 2^reference. Each lane adds up those of its own columns.
    float reference[2] = {NEGATIVE, NEGATIVE}, total[2] = {0.0f, 0.0f};

    bool is_prefix = true;
#pragma unroll 1
    for (uint32_t stage = 0; queue[0].count != 0; stage = stage == STAGES - 1 ? 0 : stage + 1) {
        const KeyBlock block = queue[0];
        for (uint32_t i = 0; i + 1 < STAGES - 1; i++) queue[i] = queue[i + 1];
        queue[STAGES - 2] = blocks.next();
        wait_for_copies<STAGES - 2>();
        // All threads have loaded this block, and none computes the previous one any more, whose stage is loaded next.
        __syncthreads();
        load(queue[STAGES - 2], stage == 0 ? STAGES - 1 : stage - 1);
        if (is_prefix && !block.is_prefix) {
            is_prefix = false;
            seen.set(own, g);
        }
        if (block.start + block.count <= seen.warp.begin || block.start >= seen.warp.end) continue;

        // The scores of 16 pairs and 16 keys, as two fragments of 8 keys.
        float score[CHAINS][2][4] = {};
        const uint32_t tile = stage * 2 * TILE_BYTES;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t b[4];
            ldmatrix(b, at_step(k_row + tile, step));
            mma(score[step % CHAINS][0], queries[step], b);
            mma(score[step % CHAINS][1], queries[step], b + 2);
        }

        float shrink[2];
        for (int half = 0; half < 2; half++) {
            const Range range = seen.pair[half];
            const uint32_t begin = range.begin > block.start ? range.begin - block.start : 0;
            const uint32_t end = range.end > block.start ? range.end - block.start : 0;
            float best = NEGATIVE;
            for (int part = 0; part < 2; part++) {
                for (int i = 0; i < 2; i++) {
                    const uint32_t at = part * 8 + 2 * t + i;
                    float &x = score[0][part][half * 2 + i];
                    for (int chain = 1; chain < CHAINS; chain++) x += score[chain][part][half * 2 + i];
                    x = at >= begin && at < end && at < block.count ? score_of(x) : -INFINITY;
                    best = fmaxf(best, x);
                }
            }
            best = row_max(best);
            const float next = best > reference[half] + TOLERATED_GROWTH ? best : reference[half];
            shrink[half] = fast_exp2(reference[half] - next);
            reference[half] = next;
            total[half] *= shrink[half];
            for (int part = 0; part < 2; part++) {
                for (int i = 0; i < 2; i++) {
                    float &x = score[0][part][half * 2 + i];
                    x = fast_exp2(x - next);
                    total[half] += x;
                }
            }
        }
        if (__any_sync(ALL_LANES, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                for (int i = 0; i < 4; i++) sum[n][i] *= shrink[i / 2];
            }
        }

        // A fragment of scores already has the layout of the left factor of the next product.
        const auto &weight = score[0];
        const uint32_t a[4] = {pack(weight[0][0], weight[0][1]), pack(weight[0][2], weight[0][3]),
                               pack(weight[1][0], weight[1][1]), pack(weight[1][2], weight[1][3])};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t b[4];
            ldmatrix_transposed(b, at_step(v_row + tile, step));
            mma(sum[2 * step], a, b);
            mma(sum[2 * step + 1], a, b + 2);
        }
    }

    // The results replace the queries of this warp, so that they can be written 16 bytes at a time.
    char *const results = shared + warp * PAIRS_OF_WARP * DIM * 2;
    __syncwarp();
    for (int half = 0; half < 2; half++) {
        const float inverse = __fdividef(1.0f, row_sum(total[half]));
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            *(uint32_t *)(results + chunk_offset<DIM>(g + 8 * half, n) + t * 4) =
                pack(sum[n][half * 2] * inverse, sum[n][half * 2 + 1] * inverse);
        }
    }
    __syncwarp();
#pragma unroll
    for (uint32_t turn = 0; turn < PAIRS_OF_WARP * CHUNKS / 32; turn++) {
        const uint32_t i = turn * 32 + lane, row = i / CHUNKS, chunk = i % CHUNKS, pair = warp * PAIRS_OF_WARP + row;
        if (pair < pairs) {
            const size_t to = (size_t)(first_query + query_of(pair)) * shape.heads + head_of(pair);
            *(uint4 *)(out + to * DIM + chunk * 8) = *(const uint4 *)(results + chunk_offset<DIM>(row, chunk));
        }
    }
}

// `BLOCKS` is how many blocks a multiprocessor must be able to hold, which limits the registers.
#define ATTENTION(DIM, BLOCKS)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_bf16_##DIM(                             \
        const __nv_bfloat16 *q, const __nv_bfloat16 *k, const __nv_bfloat16 *v, const __nv_bfloat16 *prefix_k,      \
        const __nv_bfloat16 *prefix_v, const Span *spans, const uint32_t *span_of, __nv_bfloat16 *out,              \
        Shape shape) {                                                                                              \
        attention<DIM>(q, k, v, prefix_k, prefix_v, spans, span_of, out, shape);                                    \
    }

ATTENTION(32, 5)
ATTENTION(64, 4)
ATTENTION(128, 3)
ATTENTION(256, 2)
