// The delta of a low-rank adapter: low B', added in float to the output of a projection by the kernel that reads it.
//
// A warp computes tiles of 8 tokens and chunks of 32 outputs. The outputs are the rows of the tensor cores' product and
// the tokens its columns, because a tile of 8 tokens leaves room for whole rows in registers. `add_delta` leaves a
// chunk in the layout of the product. `consecutive` moves it to the layout that the kernels use: each lane holds 8
// outputs of one token, as `Place` says.

#pragma once

#include "common.cuh"
#include "mma.cuh"

constexpr int TILE_TOKENS = 8;
constexpr int CHUNK_OUTPUTS = 32;
// The ranks that one step of the product covers.
constexpr int STEP_RANKS = 16;

// The parameters of a delta. There is no delta if `b` is null.
//
// `low` is (rows, low_stride): the inputs times A', a slice of a wider matrix. It is aligned to 16 bytes, and
// `low_stride` is a multiple of 16 elements. `rank` is a multiple of 16.
//
// `b` holds B (outputs, rank), with the adapter's scale, in the order of the registers that the product reads: for each
// chunk of 32 outputs, for each 16 ranks, for m = 0 and 1, for each lane, four words i = 0 to 3 of two bf16 each. With
// g = lane / 4, t = lane % 4 and n = 2m + i % 2, a word holds the ranks 8 (i / 2) + 2t (in its lower half) and
// 8 (i / 2) + 2t + 1 of one output. In plain order this is the output
//
//     32 chunk + 8 (g / 2) + 2n + g % 2.
//
// In head order, in which a lane receives both elements of the pairs that the rotary embedding rotates, heads have
// D = 2H elements and D / 32 chunks each, and the chunk j of a head holds the following element of the head:
//
//     16 j + 4 (g / 2) + 2n + g % 2            for n < 2
//     H + 16 j + 4 (g / 2) + 2 (n - 2) + g % 2 otherwise
//
// Outputs that complete the last chunk are zeros.
struct Delta {
    const __nv_bfloat16 *low;
    const uint4 *b;
    uint32_t low_stride, rank;
};

// What a lane holds of a tile after `consecutive`: 8 outputs of one of the 8 tokens. In plain order these are the
// outputs 8 * group to 8 * group + 7 of the chunk.
struct Place {
    uint32_t token, group;
};

__device__ __forceinline__ Place place_of(uint32_t lane) { return {lane % 4 * 2 + lane / 4 % 2, lane / 8}; }

// Asks for the columns from `begin` to `end` of the rows of a tile, so that there need be no registers for them yet.
// Each row is shared by four lanes.
template <typename T>
__device__ __forceinline__ void prefetch_tile(const T *x, uint32_t stride, uint32_t first, uint32_t rows,
                                              uint32_t begin, uint32_t end) {
    constexpr uint32_t PER_SECTOR = 32 / sizeof(T);
    const uint32_t lane = threadIdx.x % 32, row = first + lane / 4;
    if (row >= rows) return;
    for (uint32_t column = begin + lane % 4 * PER_SECTOR; column < end; column += 4 * PER_SECTOR) {
        prefetch(x + (size_t)row * stride + column);
    }
}

// Adds a delta to `sums`, for TILES tiles of tokens from `first` on and for `count` chunks, at most CHUNKS, from
// `chunk` on. Adds nothing to further chunks, and nothing at all without a delta. Tokens beyond `rows` receive values
// without a meaning.
template <int TILES, int CHUNKS>
__device__ __forceinline__ void add_delta(float sums[TILES][CHUNKS][2][4], const Delta &delta, uint32_t chunk,
                                          int count, uint32_t first, uint32_t rows) {
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t steps = delta.b == nullptr ? 0 : delta.rank / STEP_RANKS;
    const uint4 *words = delta.b + (size_t)chunk * steps * 64 + lane;
    const __nv_bfloat16 *low[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const uint32_t token = first + tile * TILE_TOKENS + g;
        low[tile] = delta.low + (size_t)(token < rows ? token : rows - 1) * delta.low_stride + 2 * t;
    }
    // More than one step at a time would take registers that the rows need.
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step++) {
        uint32_t tokens[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            tokens[tile][0] = *(const uint32_t *)low[tile];
            tokens[tile][1] = *(const uint32_t *)(low[tile] + 8);
            low[tile] += STEP_RANKS;
        }
#pragma unroll
        for (int n = 0; n < CHUNKS; n++) {
            uint4 b[2] = {};
            if (n < count) {
                b[0] = words[n * steps * 64];
                b[1] = words[n * steps * 64 + 32];
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const uint32_t outputs[4] = {b[m].x, b[m].y, b[m].z, b[m].w};
                    mma(sums[tile][n][m], outputs, tokens[tile]);
                }
            }
        }
        words += 64;
    }
}

// Moves a chunk of one tile from the layout of the product to 8 outputs of one token a lane. Before, the lane holds
// every other output of two tokens, and the lane next to it in the tile holds the outputs between.
__device__ __forceinline__ void consecutive(const float sums[2][4], float out[8]) {
    const bool is_odd = threadIdx.x / 4 % 2 == 1;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const float even = sums[n / 2][n % 2 * 2], odd = sums[n / 2][n % 2 * 2 + 1];
        const float other = __shfl_xor_sync(0xffffffffu, is_odd ? even : odd, 4);
        out[2 * n] = is_odd ? other : even;
        out[2 * n + 1] = is_odd ? odd : other;
    }
}
