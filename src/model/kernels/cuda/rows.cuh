// A row of the residual stream in the registers of one or a few warps, for kernels that normalise it.
//
// Each lane holds up to 5 groups of four columns, which is close to the true width of every Gemma: 640, 1152 (2 warps,
// 90 % of their registers), 2048 (4, 80 %), 2304 (4, 90 %), 2560 (4), 3072 (5, 96 %), 3840 (6), 5376 (9, 93 %). Launch
// with
//
//     warps  = ceil(width / 640)                       for each row
//     blocks = ceil(rows / rows_per_block),            where rows_per_block = max(1, 4 / warps), rounded down
//     block  = 32 * warps * rows_per_block

#pragma once

#include "common.cuh"

// The groups of four columns in each lane.
constexpr int VECTORS = 5;
// Supports rows of up to 13 * 640 elements.
constexpr int MAX_ROW_WARPS = 13;

struct RowPart {
    // The first element of the row.
    size_t start;
    // The groups of the row, 0 for a row beyond the end, and those that this lane holds: every `step`-th from `first`.
    uint32_t groups, first, step;
    uint32_t warps;

    __device__ bool has(int n) const { return first + n * step < groups; }
    __device__ uint32_t column(int n) const { return (first + n * step) * 4; }
    __device__ size_t at(int n) const { return start + column(n); }
};

__device__ __forceinline__ RowPart row_part(uint32_t rows, uint32_t width) {
    const uint32_t warps = (width + 32 * VECTORS * 4 - 1) / (32 * VECTORS * 4);
    const uint32_t warp = threadIdx.x / 32, rows_per_block = warps < 4 ? 4 / warps : 1;
    const uint32_t row = blockIdx.x * rows_per_block + warp / warps;
    return {(size_t)row * width, row < rows ? width / 4 : 0, warp % warps * 32 + threadIdx.x % 32, warps * 32, warps};
}

// Returns the sum over a row in each of its lanes. No other sum of the block may use the same `shared`.
__device__ __forceinline__ float row_sum(float x, float *shared, const RowPart &part) {
    x = warp_sum(x);
    if (part.warps == 1) return x;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < part.warps ? shared[warp / part.warps * part.warps + lane] : 0.0f);
}

__device__ __forceinline__ float sum_of_squares(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }
__device__ __forceinline__ float4 added(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Returns 1 / sqrt(mean square + eps).
__device__ __forceinline__ float inverse_of(float squares, uint32_t width, float eps) {
    return rsqrtf(__fdividef(squares, (float)width) + eps);
}

// Returns x * inverse * weight.
__device__ __forceinline__ float4 scaled(float4 x, float inverse, float4 weight) {
    return {x.x * inverse * weight.x, x.y * inverse * weight.y, x.z * inverse * weight.z, x.w * inverse * weight.w};
}

template <typename T>
__device__ __forceinline__ void store_normed(const float4 own[VECTORS], float inverse, const float *weight, T *out,
                                             const RowPart &part) {
    float4 weights[VECTORS] = {};
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) weights[n] = load4(weight + part.column(n));
    }
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) store4(out + part.at(n), scaled(own[n], inverse, weights[n]));
    }
}
