// What the kernels share: loads and stores of both dtypes, and sums over a warp and a block.
//
// T is what the matrix products take and give: float or __nv_bfloat16. All arithmetic is in float.

#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

__device__ __forceinline__ float load(const float *p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16 *p) { return __bfloat162float(*p); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(__nv_bfloat16 *p, float x) { *p = __float2bfloat16(x); }

// The sum over the 32 lanes, in all of them.
__device__ __forceinline__ float warp_sum(float x) {
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

// The sum over a block of at most 32 whole warps, in all threads; `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    // Whoever still reads the last sum is waited for.
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}
