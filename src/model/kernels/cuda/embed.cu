// Reads rows: the embeddings of tokens together with the first norm, and the rows that go on after the last layer.
//
// Launches:
//
// | kernel        | block and grid | width                                                 |
// |---------------|----------------|-------------------------------------------------------|
// | embed_norm_*  | see rows.cuh   | multiples of 4 (f32) or 8 (bf16, f16) elements to 8192 |
// | gather_rows_* | 128; rows      | multiples of 4 (f32) or 8 (bf16) elements              |

#include "rows.cuh"

// Writes table[token] * scale to `residual` and rms_norm(residual, weight) to `normed`.
template <typename Table, typename T>
__device__ __forceinline__ void embed_norm(const Table *table, const uint32_t *tokens, float scale,
                                           const float *weight, float *residual, T *normed, uint32_t rows,
                                           uint32_t width, float eps) {
    __shared__ float shared[MAX_ROW_WARPS];
    const RowPart part = row_part(rows, width);
    const Table *from = part.groups != 0 ? table + (size_t)tokens[part.start / width] * width : nullptr;
    float4 own[VECTORS];
    typename Four<Table>::Raw raw[VECTORS] = {};
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) raw[n] = stream4(from + part.column(n));
    }
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        own[n] = widened(raw[n]);
        own[n] = {own[n].x * scale, own[n].y * scale, own[n].z * scale, own[n].w * scale};
        if (part.has(n)) store4(residual + part.at(n), own[n]);
        squares += sum_of_squares(own[n]);
    }
    const float inverse = inverse_of(row_sum(squares, shared, part), width, eps);
    store_normed(own, inverse, weight, normed, part);
}

#define EMBED_NORM(TABLE_NAME, Table, NAME, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(MAX_ROW_WARPS * 32, 2) embed_norm_##TABLE_NAME##_##NAME(            \
        const Table *table, const uint32_t *tokens, float scale, const float *weight, float *residual, T *normed,    \
        uint32_t rows, uint32_t width, float eps) {                                                                  \
        embed_norm(table, tokens, scale, weight, residual, normed, rows, width, eps);                                \
    }

EMBED_NORM(bf16, __nv_bfloat16, bf16, __nv_bfloat16)
EMBED_NORM(f16, __half, bf16, __nv_bfloat16)
EMBED_NORM(f32, float, bf16, __nv_bfloat16)
EMBED_NORM(bf16, __nv_bfloat16, f32, float)
EMBED_NORM(f16, __half, f32, float)
EMBED_NORM(f32, float, f32, float)

constexpr int THREADS = 128;

// Copies `count` accesses of 16 bytes.
__device__ __forceinline__ void copy(const uint4 *from, uint4 *to, uint32_t count) {
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) to[i] = from[i];
}

// Copies the rows at `indices` of the residual stream and of its normalised rows.
template <typename T>
__device__ __forceinline__ void gather_rows(const float *residual, const T *normed, const uint32_t *indices,
                                            float *out_residual, T *out_normed, uint32_t width) {
    const size_t from = (size_t)indices[blockIdx.x] * width, to = (size_t)blockIdx.x * width;
    copy((const uint4 *)(residual + from), (uint4 *)(out_residual + to), width / PER_ACCESS<float>);
    copy((const uint4 *)(normed + from), (uint4 *)(out_normed + to), width / PER_ACCESS<T>);
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows_f32(const float *residual, const float *normed, const uint32_t *indices, float *out_residual,
                float *out_normed, uint32_t rows, uint32_t width) {
    if (blockIdx.x < rows) gather_rows(residual, normed, indices, out_residual, out_normed, width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows_bf16(const float *residual, const __nv_bfloat16 *normed, const uint32_t *indices, float *out_residual,
                 __nv_bfloat16 *out_normed, uint32_t rows, uint32_t width) {
    if (blockIdx.x < rows) gather_rows(residual, normed, indices, out_residual, out_normed, width);
}
