// RMSNorm of each head, if there is a weight, and rotary position embedding, by the formulas of ../norm_rope.rs.
//
// Each warp computes one head of one token, and its lanes keep the pairs (i, i + half) in registers. The cosines and
// sines are tables by position, from which each token reads the row of its position.

#include "common.cuh"

constexpr int WARPS = 4;
// Supports heads of up to 2 * 32 * 4 elements.
constexpr int PAIRS_PER_LANE = 4;

template <typename T>
__device__ void norm_rope(const T *x, const float *cos, const float *sin, const uint32_t *positions,
                          const float *weight, float eps, T *out, uint32_t tokens, uint32_t heads, uint32_t half) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t head = blockIdx.x * WARPS + threadIdx.x / 32;
    if (head >= tokens * heads) return;
    const size_t start = (size_t)head * 2 * half;
    const size_t angle = (size_t)positions[head / heads] * half;
    float a[PAIRS_PER_LANE], b[PAIRS_PER_LANE];
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        a[n] = i < half ? load(x + start + i) : 0.0f;
        b[n] = i < half ? load(x + start + half + i) : 0.0f;
        squares += a[n] * a[n] + b[n] * b[n];
    }
    const float inverse = weight != nullptr ? rsqrtf(warp_sum(squares) / (2 * half) + eps) : 1.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        if (i >= half) continue;
        if (weight != nullptr) {
            a[n] *= inverse * weight[i];
            b[n] *= inverse * weight[half + i];
        }
        const float c = cos[angle + i], s = sin[angle + i];
        store(out + start + i, a[n] * c - b[n] * s);
        store(out + start + half + i, b[n] * c + a[n] * s);
    }
}

extern "C" __global__ void norm_rope_f32(const float *x, const float *cos, const float *sin, const uint32_t *positions,
                                         const float *weight, float eps, float *out, uint32_t tokens, uint32_t heads,
                                         uint32_t half) {
    norm_rope(x, cos, sin, positions, weight, eps, out, tokens, heads, half);
}

extern "C" __global__ void norm_rope_bf16(const __nv_bfloat16 *x, const float *cos, const float *sin,
                                          const uint32_t *positions, const float *weight, float eps,
                                          __nv_bfloat16 *out, uint32_t tokens, uint32_t heads, uint32_t half) {
    norm_rope(x, cos, sin, positions, weight, eps, out, tokens, heads, half);
}
