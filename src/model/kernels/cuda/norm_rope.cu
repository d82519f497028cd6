// RMSNorm of each head, if there is a weight, and rotary position embedding, by the formulas of ../norm_rope.rs.
//
// Each row of `x` holds `heads` query heads and then `kv_heads` key heads of 2 * half elements. Query heads take the
// weight `q_norm`, key heads `k_norm`. What follows in the row stays as it is. `out` may be `x`. The cosines and sines
// are tables (positions, half), from which each token reads the row of its position. Launches:
//
// | kernel               | block | grid                                                        | half               |
// |----------------------|-------|-------------------------------------------------------------|--------------------|
// | norm_rope_f32        | 128   | ceil(rows * (heads + kv_heads) / 4)                         | up to 128          |
// | norm_rope_bf16       | 256   | ceil(rows * (heads + kv_heads) / (256 / lanes)), where      | multiples of 16 up |
// |                      |       | lanes = half / 8, rounded up to a power of two              | to 128             |
// | norm_rope_delta_bf16 | 128   | (ceil(rows / 32), heads + kv_heads), and kv_heads more in y | multiples of 16 up |
// |                      |       | if there is a `v`                                           | to 128             |

#include "delta.cuh"

// Returns 1 / sqrt(mean square + eps) of a head.
__device__ __forceinline__ float inverse_of(float squares, uint32_t half, float eps) {
    return rsqrtf(__fdividef(squares, 2.0f * (float)half) + eps);
}

constexpr int F32_WARPS = 4;
// Supports heads of up to 2 * 32 * 4 elements.
constexpr int PAIRS_PER_LANE = 4;

// Each warp computes one head of one token, and its lanes keep the pairs (i, i + half) in registers.
extern "C" __global__ void __launch_bounds__(F32_WARPS * 32)
norm_rope_f32(const float *x, uint32_t x_stride, float *out, uint32_t out_stride, uint32_t heads, uint32_t kv_heads,
              const float *q_norm, const float *k_norm, float eps, const float *cos, const float *sin,
              const uint32_t *positions, uint32_t half, uint32_t rows) {
    const uint32_t lane = threadIdx.x % 32, all = heads + kv_heads;
    const uint32_t index = blockIdx.x * F32_WARPS + threadIdx.x / 32, row = index / all, head = index % all;
    if (row >= rows) return;
    const float *from = x + (size_t)row * x_stride + head * 2 * half;
    float *to = out + (size_t)row * out_stride + head * 2 * half;
    const float *weight = head < heads ? q_norm : k_norm;
    const size_t angle = (size_t)positions[row] * half;
    float a[PAIRS_PER_LANE], b[PAIRS_PER_LANE];
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        a[n] = i < half ? from[i] : 0.0f;
        b[n] = i < half ? from[half + i] : 0.0f;
        squares += a[n] * a[n] + b[n] * b[n];
    }
    const float inverse = weight != nullptr ? inverse_of(warp_sum(squares), half, eps) : 1.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        if (i >= half) continue;
        if (weight != nullptr) {
            a[n] *= inverse * weight[i];
            b[n] *= inverse * weight[half + i];
        }
        const float c = cos[angle + i], s = sin[angle + i];
        to[i] = a[n] * c - b[n] * s;
        to[half + i] = b[n] * c + a[n] * s;
    }
}

// Multiplies the pairs by inverse * weight, if there is a weight, and rotates them by the angle with the given cosine
// and sine. `i` is their index in the head.
__device__ __forceinline__ void rotate(float4 &a, float4 &b, float inverse, const float *weight, float4 c, float4 s,
                                       uint32_t i, uint32_t half) {
    if (weight != nullptr) {
        const float4 wa = load4(weight + i), wb = load4(weight + half + i);
        a = {a.x * inverse * wa.x, a.y * inverse * wa.y, a.z * inverse * wa.z, a.w * inverse * wa.w};
        b = {b.x * inverse * wb.x, b.y * inverse * wb.y, b.z * inverse * wb.z, b.w * inverse * wb.w};
    }
    const float4 first = {a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y, a.z * c.z - b.z * s.z, a.w * c.w - b.w * s.w};
    b = {b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y, b.z * c.z + a.z * s.z, b.w * c.w + a.w * s.w};
    a = first;
}

__device__ __forceinline__ float sum_of_squares(float4 a, float4 b) {
    return a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
}

// Each lane computes 8 pairs of a head, and a warp one or several heads.
constexpr int THREADS = 256;
constexpr int PAIRS = 8;

extern "C" __global__ void __launch_bounds__(THREADS, 5)
norm_rope_bf16(const __nv_bfloat16 *x, uint32_t x_stride, __nv_bfloat16 *out, uint32_t out_stride, uint32_t heads,
               uint32_t kv_heads, const float *q_norm, const float *k_norm, float eps, const float *cos,
               const float *sin, const uint32_t *positions, uint32_t half, uint32_t rows) {
    uint32_t lanes = 1;
    while (lanes * PAIRS < half) lanes *= 2;
    const uint32_t all = heads + kv_heads, i = threadIdx.x % lanes * PAIRS;
    const uint32_t index = blockIdx.x * (THREADS / lanes) + threadIdx.x / lanes, row = index / all, head = index % all;
    const bool has_pairs = row < rows && i < half;
    const __nv_bfloat16 *from = x + (size_t)row * x_stride + head * 2 * half + i;
    uint4 raw_a = {}, raw_b = {};
    size_t angle = 0;
    if (has_pairs) {
        raw_a = __ldcs((const uint4 *)from);
        raw_b = __ldcs((const uint4 *)(from + half));
        angle = (size_t)positions[row] * half;
    }
    float4 a[2] = {widened(uint2{raw_a.x, raw_a.y}), widened(uint2{raw_a.z, raw_a.w})};
    float4 b[2] = {widened(uint2{raw_b.x, raw_b.y}), widened(uint2{raw_b.z, raw_b.w})};
    const float *weight = head < heads ? q_norm : k_norm;
    float inverse = 1.0f;
    if (q_norm != nullptr || k_norm != nullptr) {
        float squares = sum_of_squares(a[0], b[0]) + sum_of_squares(a[1], b[1]);
        for (uint32_t other = lanes / 2; other > 0; other /= 2) {
            squares += __shfl_xor_sync(0xffffffffu, squares, other);
        }
        inverse = inverse_of(squares, half, eps);
    }
    if (!has_pairs) return;
    const float *c = cos + angle + i, *s = sin + angle + i;
    rotate(a[0], b[0], inverse, weight, load4(c), load4(s), i, half);
    rotate(a[1], b[1], inverse, weight, load4(c + 4), load4(s + 4), i + 4, half);
    __nv_bfloat16 *to = out + (size_t)row * out_stride + head * 2 * half + i;
    *(uint4 *)to = {packed(a[0].x, a[0].y), packed(a[0].z, a[0].w), packed(a[1].x, a[1].y), packed(a[1].z, a[1].w)};
    *(uint4 *)(to + half) = {packed(b[0].x, b[0].y), packed(b[0].z, b[0].w), packed(b[1].x, b[1].y),
                             packed(b[1].z, b[1].w)};
}

__device__ __forceinline__ void add(float own[8], float4 low, float4 high) {
    own[0] += low.x, own[1] += low.y, own[2] += low.z, own[3] += low.w;
    own[4] += high.x, own[5] += high.y, own[6] += high.z, own[7] += high.w;
}

constexpr int DELTA_WARPS = 4;
// Supports heads of up to 8 * 32 elements.
constexpr int MAX_CHUNKS = 8;

// Adds the deltas before the norm. If there is a `v`, (rows, kv_heads * 2 * half) in float, also writes v + delta to
// the columns from `v_offset` on. Each warp computes one head of 8 tokens. The deltas of q and k are in head order, the
// one of v in plain order.
extern "C" __global__ void __launch_bounds__(DELTA_WARPS * 32, 4)
norm_rope_delta_bf16(const __nv_bfloat16 *x, uint32_t x_stride, __nv_bfloat16 *out, uint32_t out_stride,
                     uint32_t heads, uint32_t kv_heads, const float *q_norm, const float *k_norm, float eps,
                     const float *cos, const float *sin, const uint32_t *positions, uint32_t half, uint32_t rows,
                     Delta q, Delta k, Delta v_delta, const float *v, uint32_t v_offset) {
    const Place place = place_of(threadIdx.x % 32);
    const uint32_t first = (blockIdx.x * DELTA_WARPS + threadIdx.x / 32) * TILE_TOKENS, row = first + place.token;
    if (first >= rows) return;
    const bool has_row = row < rows;
    const uint32_t head = blockIdx.y;
    const int chunks = half / 16;
    float sums[1][MAX_CHUNKS][2][4] = {};

    if (head >= heads + kv_heads) {
        const uint32_t kv_head = head - heads - kv_heads, column = kv_head * 2 * half + place.group * 8;
        const float *from = v + (size_t)row * kv_heads * 2 * half + column;
        __nv_bfloat16 *to = out + (size_t)row * out_stride + v_offset + column;
        const uint32_t begin = kv_head * 2 * half;
        prefetch_tile(v, kv_heads * 2 * half, first, rows, begin, begin + 2 * half);
        add_delta<1, MAX_CHUNKS>(sums, v_delta, kv_head * chunks, chunks, first, rows);
#pragma unroll
        for (int j = 0; j < MAX_CHUNKS; j += 4) {
            float4 raw[4][2] = {};
#pragma unroll
            for (int n = 0; n < 4; n++) {
                if (!has_row || j + n >= chunks) continue;
                raw[n][0] = load4(from + (j + n) * CHUNK_OUTPUTS);
                raw[n][1] = load4(from + (j + n) * CHUNK_OUTPUTS + 4);
            }
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float own[8];
                consecutive(sums[0][j + n], own);
                if (!has_row || j + n >= chunks) continue;
                add(own, raw[n][0], raw[n][1]);
                *(uint4 *)(to + (j + n) * CHUNK_OUTPUTS) = pack(own);
            }
        }
        return;
    }

    const bool is_query = head < heads;
    const uint32_t column = head * 2 * half + place.group * 4;
    const __nv_bfloat16 *from = x + (size_t)row * x_stride + column;
    const size_t position = has_row ? positions[row] : 0;
    prefetch_tile(x, x_stride, first, rows, head * 2 * half, (head + 1) * 2 * half);
    const Delta delta = is_query ? q : k;
    add_delta<1, MAX_CHUNKS>(sums, delta, (is_query ? head : head - heads) * chunks, chunks, first, rows);
    uint2 raw[MAX_CHUNKS][2] = {};
#pragma unroll
    for (int j = 0; j < MAX_CHUNKS; j++) {
        if (!has_row || j >= chunks) continue;
        raw[j][0] = stream4(from + j * 16);
        raw[j][1] = stream4(from + half + j * 16);
    }
    float own[MAX_CHUNKS][8];
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < MAX_CHUNKS; j++) {
        consecutive(sums[0][j], own[j]);
        add(own[j], widened(raw[j][0]), widened(raw[j][1]));
#pragma unroll
        for (int i = 0; i < 8; i++) squares += own[j][i] * own[j][i];
    }
    const float *weight = is_query ? q_norm : k_norm;
    float inverse = 1.0f;
    if (weight != nullptr) {
        squares += __shfl_xor_sync(0xffffffffu, squares, 8);
        squares += __shfl_xor_sync(0xffffffffu, squares, 16);
        inverse = inverse_of(squares, half, eps);
    }
    if (!has_row) return;
    const float *c_row = cos + position * half + place.group * 4, *s_row = sin + position * half + place.group * 4;
    __nv_bfloat16 *to = out + (size_t)row * out_stride + column;
#pragma unroll
    for (int j = 0; j < MAX_CHUNKS; j += 2) {
        float4 c[2] = {}, s[2] = {};
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (j + n >= chunks) continue;
            c[n] = load4(c_row + (j + n) * 16);
            s[n] = load4(s_row + (j + n) * 16);
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (j + n >= chunks) continue;
            float *x = own[j + n];
            float4 a = {x[0], x[1], x[2], x[3]}, b = {x[4], x[5], x[6], x[7]};
            rotate(a, b, inverse, weight, c[n], s[n], (j + n) * 16 + place.group * 4, half);
            store4(to + (j + n) * 16, a);
            store4(to + half + (j + n) * 16, b);
        }
    }
}
