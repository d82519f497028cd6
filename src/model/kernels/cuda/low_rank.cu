// The low-rank activations of an adapter, x A', for all projections that read one input.
//
// The product is thin: it has 16 to 64 columns, and its time is that of reading x once. Each block computes 32 tokens.
// Its warps share the inputs among them, each 32 inputs at a time, and add up their sums at the end in a fixed order.
//
// A warp reads its operands from memory in the order in which they lie: lane 4 g + t takes the inputs 8 t to 8 t + 7 of
// a token and of a rank. The product of 16 inputs (mma.m16n8k16) expects the inputs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9
// there. Since a sum does not depend on the order of its terms, any inputs do, if both operands have the same ones.
//
// Launch of low_rank_<R> (R = 16, 32, 48 or 64): the grid is ceil(rows / 32), the block 32 * warps with 1 to
// 16 warps, or 1 to 8 for 64 ranks, which take more registers.
// `x` is (rows, stride), of which the first `width` columns are read, a multiple of 32; `a` is (R, width), `out` is
// (rows, R). All are aligned to 16 bytes, and `stride` is a multiple of 8.

#include "common.cuh"
#include "mma.cuh"

constexpr int LOW_TOKENS = 32;

template <int RANKS>
__device__ __forceinline__ void low_rank(const __nv_bfloat16 *x, uint32_t stride, const __nv_bfloat16 *a,
                                         __nv_bfloat16 *out, uint32_t rows, uint32_t width) {
    constexpr int TILES = RANKS / 8;
    __shared__ float total[LOW_TOKENS][RANKS];
    const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, first = blockIdx.x * LOW_TOKENS;
    const __nv_bfloat16 *tokens[4], *ranks = a + (size_t)g * width + 8 * t;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint32_t token = first + 8 * n + g;
        tokens[n] = x + (size_t)(token < rows ? token : rows - 1) * stride + 8 * t;
    }
    float sum[2][TILES][4] = {};
#pragma unroll 2
    for (uint32_t at = warp * 32; at < width; at += warps * 32) {
        uint4 left[4], right[TILES];
#pragma unroll
        for (int n = 0; n < 4; n++) left[n] = *(const uint4 *)(tokens[n] + at);
#pragma unroll
        for (int n = 0; n < TILES; n++) right[n] = *(const uint4 *)(ranks + (size_t)8 * n * width + at);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint4 low = left[2 * m], high = left[2 * m + 1];
            const uint32_t one[4] = {low.x, high.x, low.y, high.y}, other[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                const uint32_t first_inputs[2] = {right[n].x, right[n].y}, last_inputs[2] = {right[n].z, right[n].w};
                mma(sum[m][n], one, first_inputs);
                mma(sum[m][n], other, last_inputs);
            }
        }
    }
    for (uint32_t turn = 0; turn < warps; turn++) {
        if (turn == warp) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < TILES; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float &to = total[16 * m + g + 8 * (i / 2)][8 * n + 2 * t + i % 2];
                        to = turn == 0 ? sum[m][n][i] : to + sum[m][n][i];
                    }
                }
            }
        }
        __syncthreads();
    }
    for (uint32_t i = threadIdx.x; i < LOW_TOKENS * RANKS; i += blockDim.x) {
        const uint32_t token = first + i / RANKS;
        if (token < rows) out[(size_t)token * RANKS + i % RANKS] = __float2bfloat16(total[i / RANKS][i % RANKS]);
    }
}

#define LOW_RANK(RANKS, WARPS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(WARPS * 32) low_rank_##RANKS(                                      \
        const __nv_bfloat16 *x, uint32_t stride, const __nv_bfloat16 *a, __nv_bfloat16 *out, uint32_t rows,         \
        uint32_t width) {                                                                                           \
        low_rank<RANKS>(x, stride, a, out, rows, width);                                                            \
    }

LOW_RANK(16, 16)
LOW_RANK(32, 16)
LOW_RANK(48, 16)
LOW_RANK(64, 8)
