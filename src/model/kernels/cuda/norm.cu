// RMSNorm, alone and fused with the residual addition before it, by the formulas of ../norm.rs.
//
// The residual stream is float for both values of T. Each block computes one row, and its threads keep their elements
// in registers between the two sums.

#include "common.cuh"

constexpr int THREADS = 256;
// Supports rows of up to 256 * 32 elements.
constexpr int ELEMENTS_PER_THREAD = 32;

template <typename T>
__device__ void rms_norm(const float *x, const float *weight, T *out, uint32_t width, float eps) {
    __shared__ float shared[32];
    const size_t row = (size_t)blockIdx.x * width;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) sum += x[row + i] * x[row + i];
    const float inverse = rsqrtf(block_sum(sum, shared) / width + eps);
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) store(out + row + i, x[row + i] * inverse * weight[i]);
}

// Writes residual + y, or residual + rms_norm(y, post) if there is a post-norm, to `sum`, and rms_norm(sum, next) to
// `normed`.
template <typename T>
__device__ void add_rms_norm(const float *residual, const T *y, const float *post, const float *next, float *sum,
                             T *normed, uint32_t width, float eps) {
    __shared__ float shared[32];
    const size_t row = (size_t)blockIdx.x * width;
    float own[ELEMENTS_PER_THREAD];
    float inverse = 1.0f;
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_THREAD; n++) {
        const uint32_t i = threadIdx.x + n * THREADS;
        own[n] = i < width ? load(y + row + i) : 0.0f;
        squares += own[n] * own[n];
    }
    if (post != nullptr) inverse = rsqrtf(block_sum(squares, shared) / width + eps);
    squares = 0.0f;
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_THREAD; n++) {
        const uint32_t i = threadIdx.x + n * THREADS;
        if (i < width) {
            own[n] = residual[row + i] + (post != nullptr ? own[n] * inverse * post[i] : own[n]);
            sum[row + i] = own[n];
            squares += own[n] * own[n];
        }
    }
    inverse = rsqrtf(block_sum(squares, shared) / width + eps);
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_THREAD; n++) {
        const uint32_t i = threadIdx.x + n * THREADS;
        if (i < width) store(normed + row + i, own[n] * inverse * next[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_f32(const float *x, const float *weight, float *out, uint32_t width, float eps) {
    rms_norm(x, weight, out, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_bf16(const float *x, const float *weight, __nv_bfloat16 *out, uint32_t width, float eps) {
    rms_norm(x, weight, out, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_rms_norm_f32(const float *residual, const float *y, const float *post, const float *next, float *sum,
                 float *normed, uint32_t width, float eps) {
    add_rms_norm(residual, y, post, next, sum, normed, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_rms_norm_bf16(const float *residual, const __nv_bfloat16 *y, const float *post, const float *next, float *sum,
                  __nv_bfloat16 *normed, uint32_t width, float eps) {
    add_rms_norm(residual, y, post, next, sum, normed, width, eps);
}
