// Rows in FP8 (e4m3) with a scale each, which are the inputs of products in FP8.
//
// The scale of a row is its largest magnitude / 448, the largest number of e4m3. Its codes are x / scale, rounded to
// nearest even, so that code * scale is about x. Codes are bytes without gaps, (rows, width). Scales are float, one for
// each row. Only GPUs of compute capability 8.9 and later have instructions for the conversion. On others, the host
// launches none of these kernels.
//
// Launches:
//
// | kernel            | block                   | grid | width                   |
// |-------------------|-------------------------|------|-------------------------|
// | add_rms_norm_fp8  | see rows.cuh            |      | multiples of 4 to 8192  |
// | geglu_fp8         | 32 * ceil(width / 1024) | rows | multiples of 8 to 32768 |
// | quantise_rows_fp8 | 32 * ceil(width / 1024) | rows | multiples of 8 to 32768 |

#include <cuda_fp8.h>

#include "rows.cuh"

constexpr float E4M3_MAX = 448.0f;
// Rows of smaller numbers count as zeros, because the inverse of their scale could overflow.
constexpr float SMALLEST_MAXIMUM = 1e-30f;

// Returns the scale of a row by its largest magnitude.
__device__ __forceinline__ float scale_of(float largest) { return largest / E4M3_MAX; }
// Returns what the elements of a row are multiplied by before they are rounded.
__device__ __forceinline__ float inverse_scale_of(float largest) {
    return largest > SMALLEST_MAXIMUM ? E4M3_MAX / largest : 0.0f;
}

// Rounds four floats to e4m3 and returns them as one word. Larger ones become the largest number.
__device__ __forceinline__ uint32_t codes(float4 x, float inverse_scale) {
    const float2 low = {x.x * inverse_scale, x.y * inverse_scale}, high = {x.z * inverse_scale, x.w * inverse_scale};
    return (uint32_t)__nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3) |
           (uint32_t)__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3) << 16;
}

__device__ __forceinline__ float largest_of(float4 x) {
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
}

// Returns the largest value over the 32 lanes, in every lane.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, other));
    return x;
}

// Returns the largest value over `warps` warps from `first` on, which this warp is one of. All warps of the block must
// call it.
__device__ __forceinline__ float warps_max(float x, float *shared, uint32_t first, uint32_t warps) {
    x = warp_max(x);
    if (warps == 1) return x;
    const uint32_t lane = threadIdx.x % 32;
    if (lane == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[first + lane] : 0.0f);
}

// Computes the same as add_rms_norm_bf16, but writes the normed row as codes and a scale. Nothing is rounded to bf16
// before it is quantised.
extern "C" __global__ void __launch_bounds__(MAX_ROW_WARPS * 32, 2)
add_rms_norm_fp8(const float *residual, const __nv_bfloat16 *y, const float *post, const float *next, float *sum,
                 uint8_t *normed, float *scales, uint32_t rows, uint32_t width, float eps) {
    __shared__ float shared[3][MAX_ROW_WARPS];
    const RowPart part = row_part(rows, width);
    float4 own[VECTORS], before[VECTORS] = {};
    Four<__nv_bfloat16>::Raw raw[VECTORS] = {};
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) {
            raw[n] = stream4(y + part.at(n));
            before[n] = stream4(residual + part.at(n));
        }
    }
#pragma unroll
    for (int n = 0; n < VECTORS; n++) own[n] = widened(raw[n]);
    float squares = 0.0f;
    if (post != nullptr) {
#pragma unroll
        for (int n = 0; n < VECTORS; n++) squares += sum_of_squares(own[n]);
        const float inverse = rsqrtf(row_sum(squares, shared[0], part) / width + eps);
#pragma unroll
        for (int n = 0; n < VECTORS; n++) {
            if (part.has(n)) own[n] = scaled(own[n], inverse, load4(post + part.column(n)));
        }
        squares = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        own[n] = added(before[n], own[n]);
        if (part.has(n)) store4(sum + part.at(n), own[n]);
        squares += sum_of_squares(own[n]);
    }
    const float inverse = rsqrtf(row_sum(squares, shared[1], part) / width + eps);
    float largest = 0.0f;
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) own[n] = scaled(own[n], inverse, load4(next + part.column(n)));
        largest = fmaxf(largest, largest_of(own[n]));
    }
    largest = warps_max(largest, shared[2], threadIdx.x / 32 / part.warps * part.warps, part.warps);
    const float inverse_scale = inverse_scale_of(largest);
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) *(uint32_t *)(normed + part.at(n)) = codes(own[n], inverse_scale);
    }
    if (part.groups != 0 && part.first == 0) scales[part.start / width] = scale_of(largest);
}

// The groups of eight columns in each thread of the kernels with one block for each row.
constexpr int GROUPS = 4;
constexpr int MAX_THREADS = 1024;

// Writes the codes and the scale of a row. This thread holds its groups threadIdx.x, threadIdx.x + blockDim.x, and so on.
__device__ __forceinline__ void store_row(const float own[GROUPS][8], uint8_t *out, float *scales, uint32_t groups) {
    __shared__ float shared[MAX_THREADS / 32];
    float largest = 0.0f;
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(own[n][i]));
    }
    largest = warps_max(largest, shared, 0, blockDim.x / 32);
    const float inverse_scale = inverse_scale_of(largest);
    uint2 *row = (uint2 *)out + (size_t)blockIdx.x * groups;
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
        const uint32_t group = n * blockDim.x + threadIdx.x;
        const float *x = own[n];
        if (group < groups) {
            row[group] = {codes({x[0], x[1], x[2], x[3]}, inverse_scale), codes({x[4], x[5], x[6], x[7]}, inverse_scale)};
        }
    }
    if (threadIdx.x == 0) scales[blockIdx.x] = scale_of(largest);
}

// The formula of ../geglu.rs, with the fast functions, as in geglu.cu.
__device__ __forceinline__ float geglu_fast(float gate, float up) {
    const float z = 1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate);
    return __fdividef(gate, 1.0f + __expf(-z)) * up;
}

// Computes gelu_tanh(gate) * up and writes it as codes and scales. `gate` and `up` have `stride` elements from one row to
// the next. Nothing is rounded to bf16 before it is quantised.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
geglu_fp8(const __nv_bfloat16 *gate, const __nv_bfloat16 *up, uint32_t stride, uint8_t *out, float *scales,
          uint32_t width) {
    const uint4 *gates_of_row = (const uint4 *)(gate + (size_t)blockIdx.x * stride);
    const uint4 *ups_of_row = (const uint4 *)(up + (size_t)blockIdx.x * stride);
    uint4 gates[GROUPS] = {}, ups[GROUPS] = {};
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
        const uint32_t group = n * blockDim.x + threadIdx.x;
        if (group < width / 8) {
            gates[n] = __ldcs(gates_of_row + group);
            ups[n] = __ldcs(ups_of_row + group);
        }
    }
    float own[GROUPS][8];
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
        float y[8];
        unpack(gates[n], own[n]);
        unpack(ups[n], y);
#pragma unroll
        for (int i = 0; i < 8; i++) own[n][i] = geglu_fast(own[n][i], y[i]);
    }
    store_row(own, out, scales, width / 8);
}

// Writes the rows of x, (rows, width), as codes and scales.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
quantise_rows_fp8(const __nv_bfloat16 *x, uint8_t *out, float *scales, uint32_t width) {
    const uint4 *row = (const uint4 *)(x + (size_t)blockIdx.x * width);
    uint4 words[GROUPS] = {};
#pragma unroll
    for (int n = 0; n < GROUPS; n++) {
        const uint32_t group = n * blockDim.x + threadIdx.x;
        if (group < width / 8) words[n] = __ldcs(row + group);
    }
    float own[GROUPS][8];
#pragma unroll
    for (int n = 0; n < GROUPS; n++) unpack(words[n], own[n]);
    store_row(own, out, scales, width / 8);
}
