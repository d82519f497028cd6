// Functions that the kernels share: loads and stores of both dtypes, and sums over a warp and a block.
//
// T is the dtype of the matrix products: float or __nv_bfloat16. All arithmetic is in float.

#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

__device__ __forceinline__ float load(const float *p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16 *p) { return __bfloat162float(*p); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16 *p, float x) { *p = __float2bfloat16(x); }

// Returns the sum over the 32 lanes, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

// Returns the sum over a block of at most 32 full warps, in every thread. `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    // Other threads may still be reading the previous sum.
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}
