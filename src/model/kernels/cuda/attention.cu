// Attention for packed short rows over a shared prefix. Computes the same as ../attention.rs and uses the same names.
//
// There are two kernels. In `attention_f32`, each warp computes one head of one query. It is exact and used for checks
// and for float weights. In `attention_bf16`, each block computes up to 48 (query, head) pairs of one row that share a
// key/value head, so that with grouped heads even a single query fills a tile of the tensor cores. Scores, softmax and
// sums are float, and the softmax is accumulated over tiles of 16 keys (Milakov & Gimelshein, "Online normalizer
// calculation for softmax", 2018). The fragments have the layout that the PTX manual documents for mma.m16n8k16.

#include "common.cuh"

// One row, with the fields of `Span` in ../spans.rs as `uint32_t`.
struct Span {
    uint32_t query_start, queries, key_start, keys, shared;
};

// The work of one block: a row and the first (query, head) pair of it that the block computes.
struct Tile {
    uint32_t span, first;
};

struct Shape {
    uint32_t heads, kv_heads, head_dim;
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

__device__ __forceinline__ Visible visible(const Span &span, uint32_t query, uint32_t window) {
    const uint32_t last = span.shared + span.keys - span.queries + query;
    return {window != 0 && last + 1 > window ? last + 1 - window : 0, last};
}

__device__ __forceinline__ float scaled_and_capped(float score, const Shape &shape) {
    score *= shape.scale;
    return shape.softcap > 0.0f ? shape.softcap * tanhf(score / shape.softcap) : score;
}

constexpr float NEGATIVE = -1e30f;

// Supports heads of up to 32 * 8 elements. Each block is one warp, and the grid is (query, head).
extern "C" __global__ void attention_f32(const float *q, const float *k, const float *v, const float *prefix_k,
                                         const float *prefix_v, const Span *spans, const uint32_t *span_of,
                                         float *out, Shape shape) {
    constexpr int ELEMENTS_PER_LANE = 8;
    const uint32_t lane = threadIdx.x, query = blockIdx.x, head = blockIdx.y;
    const Span span = spans[span_of[query]];
    const uint32_t kv_width = shape.kv_heads * shape.head_dim;
    const uint32_t column = head / (shape.heads / shape.kv_heads) * shape.head_dim;
    const size_t row = (size_t)query * shape.heads * shape.head_dim + head * shape.head_dim;
    float own[ELEMENTS_PER_LANE], sum[ELEMENTS_PER_LANE];
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
        own[n] = lane + 32 * n < shape.head_dim ? q[row + lane + 32 * n] : 0.0f;
        sum[n] = 0.0f;
    }
    float highest = NEGATIVE, total = 0.0f;
    const Visible range = visible(span, query - span.query_start, shape.window);
    for (uint32_t at = range.first; at <= range.last; at++) {
        const bool is_shared = at < span.shared;
        const size_t key = is_shared ? at : span.key_start + at - span.shared;
        const float *keys = (is_shared ? prefix_k : k) + key * kv_width + column;
        const float *values = (is_shared ? prefix_v : v) + key * kv_width + column;
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
        if (lane + 32 * n < shape.head_dim) out[row + lane + 32 * n] = sum[n] / total;
    }
}

// Computes c (16 x 8) += a (16 x 16) b (16 x 8) with one warp.
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef __CUDA_ARCH__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulated_mma(c, a, b);
#endif
}

__device__ __forceinline__ uint32_t pair(__nv_bfloat16 low, __nv_bfloat16 high) {
    return (uint32_t)__bfloat16_as_ushort(low) | (uint32_t)__bfloat16_as_ushort(high) << 16;
}

__device__ __forceinline__ uint32_t pair(float low, float high) {
    return pair(__float2bfloat16(low), __float2bfloat16(high));
}

// `row_max` and `row_sum` return the maximum and the sum over the four lanes that hold one row of a fragment.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// 48 pairs per block. With heads of 256 elements, more would not fit into the shared memory that every GPU has.
constexpr int WARPS = 3;
constexpr int KEYS = 16;
// The padding, in elements, that puts rows of shared memory on different banks.
constexpr int SKEW = 8;

template <int DIM>
__device__ void attention(const __nv_bfloat16 *q, const __nv_bfloat16 *k, const __nv_bfloat16 *v,
                          const __nv_bfloat16 *prefix_k, const __nv_bfloat16 *prefix_v, const Span *spans,
                          const Tile *tiles, __nv_bfloat16 *out, const Shape &shape) {
    __shared__ __align__(16) __nv_bfloat16 shared_q[WARPS * 16][DIM + SKEW];
    __shared__ __align__(16) __nv_bfloat16 shared_k[KEYS][DIM + SKEW];
    __shared__ __align__(16) __nv_bfloat16 shared_v[KEYS][DIM + SKEW];
    const uint32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const uint32_t g = lane / 4, t = lane % 4;
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.span];
    const uint32_t kv_head = blockIdx.y, group = shape.heads / shape.kv_heads;
    const uint32_t pairs = span.queries * group, kv_width = shape.kv_heads * DIM;

    // Loads the (query, head) pairs of the tile, ordered by query. Pairs beyond the end of the row are zeros.
    for (uint32_t i = thread; i < WARPS * 16 * (DIM / 2); i += WARPS * 32) {
        const uint32_t m = i / (DIM / 2), column = i % (DIM / 2) * 2, at = tile.first + m;
        uint32_t both = 0;
        if (at < pairs) {
            const size_t row = span.query_start + at / group;
            const size_t head = kv_head * group + at % group;
            both = *(const uint32_t *)(q + (row * shape.heads + head) * DIM + column);
        }
        *(uint32_t *)&shared_q[m][column] = both;
    }

    // This lane holds rows g and g + 8 of its warp's fragments.
    uint32_t query[2];
    Visible range[2];
    for (int half = 0; half < 2; half++) {
        const uint32_t at = tile.first + warp * 16 + g + 8 * half;
        query[half] = (at < pairs ? at : pairs - 1) / group;
        range[half] = visible(span, query[half], shape.window);
    }
    // The keys that at least one row of the tile attends to.
    const uint32_t last_pair = (tile.first + WARPS * 16 < pairs ? tile.first + WARPS * 16 : pairs) - 1;
    const uint32_t begin = visible(span, tile.first / group, shape.window).first / KEYS * KEYS;
    const uint32_t end = visible(span, last_pair / group, shape.window).last + 1;

    float sum[DIM / 8][4];
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
        for (int i = 0; i < 4; i++) sum[n][i] = 0.0f;
    }
    float highest[2] = {NEGATIVE, NEGATIVE}, total[2] = {0.0f, 0.0f};

    for (uint32_t from = begin; from < end; from += KEYS) {
        __syncthreads();
        for (uint32_t i = thread; i < KEYS * (DIM / 8); i += WARPS * 32) {
            const uint32_t n = i / (DIM / 8), column = i % (DIM / 8) * 8, at = from + n;
            uint4 key = {0, 0, 0, 0}, value = {0, 0, 0, 0};
            if (at < end) {
                const bool is_shared = at < span.shared;
                const size_t row = is_shared ? at : span.key_start + at - span.shared;
                const size_t offset = row * kv_width + kv_head * DIM + column;
                key = *(const uint4 *)((is_shared ? prefix_k : k) + offset);
                value = *(const uint4 *)((is_shared ? prefix_v : v) + offset);
            }
            *(uint4 *)&shared_k[n][column] = key;
            *(uint4 *)&shared_v[n][column] = value;
        }
        __syncthreads();

        // The scores of 16 pairs and 16 keys, as two fragments of 8 keys.
        float score[2][4] = {};
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
            const uint32_t row = warp * 16 + g, column = step * 16 + 2 * t;
            const uint32_t a[4] = {
                *(const uint32_t *)&shared_q[row][column], *(const uint32_t *)&shared_q[row + 8][column],
                *(const uint32_t *)&shared_q[row][column + 8], *(const uint32_t *)&shared_q[row + 8][column + 8]};
            for (int part = 0; part < 2; part++) {
                const uint32_t b[2] = {*(const uint32_t *)&shared_k[part * 8 + g][column],
                                       *(const uint32_t *)&shared_k[part * 8 + g][column + 8]};
                mma(score[part], a, b);
            }
        }

        float weight[2][4];
        for (int half = 0; half < 2; half++) {
            float best = NEGATIVE;
            for (int part = 0; part < 2; part++) {
                for (int i = 0; i < 2; i++) {
                    const uint32_t at = from + part * 8 + 2 * t + i;
                    const bool is_visible = at >= range[half].first && at <= range[half].last;
                    float &x = score[part][half * 2 + i];
                    x = is_visible ? scaled_and_capped(x, shape) : NEGATIVE;
                    best = fmaxf(best, x);
                }
            }
            const float next = fmaxf(highest[half], row_max(best));
            const float shrink = __expf(highest[half] - next);
            highest[half] = next;
            float added = 0.0f;
            for (int part = 0; part < 2; part++) {
                for (int i = 0; i < 2; i++) {
                    const float x = score[part][half * 2 + i];
                    // A tile without any key that is visible to a row must add nothing, even while `next` is NEGATIVE.
                    const float w = x <= NEGATIVE ? 0.0f : __expf(x - next);
                    weight[part][half * 2 + i] = w;
                    added += w;
                }
            }
            total[half] = total[half] * shrink + row_sum(added);
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) {
                sum[n][half * 2] *= shrink;
                sum[n][half * 2 + 1] *= shrink;
            }
        }

        // A fragment of scores already has the layout of the left factor of the next product.
        const uint32_t a[4] = {pair(weight[0][0], weight[0][1]), pair(weight[0][2], weight[0][3]),
                               pair(weight[1][0], weight[1][1]), pair(weight[1][2], weight[1][3])};
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            const uint32_t column = n * 8 + g;
            const uint32_t b[2] = {pair(shared_v[2 * t][column], shared_v[2 * t + 1][column]),
                                   pair(shared_v[2 * t + 8][column], shared_v[2 * t + 9][column])};
            mma(sum[n], a, b);
        }
    }

    for (int half = 0; half < 2; half++) {
        const uint32_t at = tile.first + warp * 16 + g + 8 * half;
        if (at >= pairs) continue;
        const float inverse = 1.0f / total[half];
        const size_t row = span.query_start + at / group;
        const size_t head = kv_head * group + at % group;
        __nv_bfloat16 *to = out + (row * shape.heads + head) * DIM + 2 * t;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            *(uint32_t *)(to + n * 8) = pair(sum[n][half * 2] * inverse, sum[n][half * 2 + 1] * inverse);
        }
    }
}

#define ATTENTION(DIM)                                                                                              \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) attention_bf16_##DIM(                                  \
        const __nv_bfloat16 *q, const __nv_bfloat16 *k, const __nv_bfloat16 *v, const __nv_bfloat16 *prefix_k,      \
        const __nv_bfloat16 *prefix_v, const Span *spans, const Tile *tiles, __nv_bfloat16 *out, Shape shape) {     \
        attention<DIM>(q, k, v, prefix_k, prefix_v, spans, tiles, out, shape);                                      \
    }

ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
ATTENTION(256)
