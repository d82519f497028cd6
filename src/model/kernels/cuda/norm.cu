// RMSNorm, alone and fused with the residual addition before it, by the formulas of ../norm.rs.
//
// The residual stream is float for both values of T. Rows stay in registers between the sums.
//
// Launches:
//
// | kernel                       | block                  | grid           | width                  |
// |------------------------------|------------------------|----------------|------------------------|
// | rms_norm_*, add_rms_norm_*   | see rows.cuh           | see rows.cuh   | multiples of 4 to 8192 |
// | add_rms_norm_delta_bf16      | 32 * ceil(width / 128) | ceil(rows / 8) | multiples of 8 to 4096 |
// | add_rms_norm_delta_wide_bf16 | 32 * ceil(width / 256) | ceil(rows / 8) | multiples of 8 to 8192 |

#include "delta.cuh"
#include "rows.cuh"

template <typename T>
__device__ __forceinline__ void rms_norm(const float *x, const float *weight, T *out, uint32_t rows, uint32_t width,
                                         float eps) {
    __shared__ float shared[MAX_ROW_WARPS];
    const RowPart part = row_part(rows, width);
    float4 own[VECTORS] = {};
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) own[n] = stream4(x + part.at(n));
    }
#pragma unroll
    for (int n = 0; n < VECTORS; n++) squares += sum_of_squares(own[n]);
    const float inverse = inverse_of(row_sum(squares, shared, part), width, eps);
    store_normed(own, inverse, weight, out, part);
}

// Writes residual + y, or residual + rms_norm(y, post) if there is a post-norm, to `sum`, and rms_norm(sum, next) to
// `normed`. `sum` may be `residual`.
template <typename T>
__device__ __forceinline__ void add_rms_norm(const float *residual, const T *y, const float *post, const float *next,
                                             float *sum, T *normed, uint32_t rows, uint32_t width, float eps) {
    __shared__ float shared[2][MAX_ROW_WARPS];
    const RowPart part = row_part(rows, width);
    float4 own[VECTORS], before[VECTORS] = {};
    typename Four<T>::Raw raw[VECTORS] = {};
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        if (part.has(n)) {
            raw[n] = stream4(y + part.at(n));
            before[n] = stream4(residual + part.at(n));
        }
    }
#pragma unroll
    for (int n = 0; n < VECTORS; n++) own[n] = widened(raw[n]);
    if (post != nullptr) {
        float squares = 0.0f;
#pragma unroll
        for (int n = 0; n < VECTORS; n++) squares += sum_of_squares(own[n]);
        const float inverse = inverse_of(row_sum(squares, shared[0], part), width, eps);
#pragma unroll
        for (int n = 0; n < VECTORS; n++) {
            if (part.has(n)) own[n] = scaled(own[n], inverse, load4(post + part.column(n)));
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < VECTORS; n++) {
        own[n] = added(before[n], own[n]);
        if (part.has(n)) store4(sum + part.at(n), own[n]);
        squares += sum_of_squares(own[n]);
    }
    const float inverse = inverse_of(row_sum(squares, shared[1], part), width, eps);
    store_normed(own, inverse, next, normed, part);
}

extern "C" __global__ void __launch_bounds__(MAX_ROW_WARPS * 32, 2)
rms_norm_f32(const float *x, const float *weight, float *out, uint32_t rows, uint32_t width, float eps) {
    rms_norm(x, weight, out, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(MAX_ROW_WARPS * 32, 2)
rms_norm_bf16(const float *x, const float *weight, __nv_bfloat16 *out, uint32_t rows, uint32_t width, float eps) {
    rms_norm(x, weight, out, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(MAX_ROW_WARPS * 32, 2)
add_rms_norm_f32(const float *residual, const float *y, const float *post, const float *next, float *sum,
                 float *normed, uint32_t rows, uint32_t width, float eps) {
    add_rms_norm(residual, y, post, next, sum, normed, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(MAX_ROW_WARPS * 32, 2)
add_rms_norm_bf16(const float *residual, const __nv_bfloat16 *y, const float *post, const float *next, float *sum,
                  __nv_bfloat16 *normed, uint32_t rows, uint32_t width, float eps) {
    add_rms_norm(residual, y, post, next, sum, normed, rows, width, eps);
}

// The kernels with a delta compute the 8 rows of a tile in each block. A lane holds two groups of four columns of each
// of its chunks. It exchanges one of them with the next lane, so that the accesses of a warp to floats cover whole
// sectors of memory.
struct TilePart {
    // The first row of the tile, and the first element of this lane's row.
    uint32_t first;
    size_t start;
    int group;
    // The columns of the row, 0 for a row beyond the end.
    int limit;

    // The first column of the 8 that the lane holds of a chunk before the exchange.
    __device__ int column(int chunk) const { return chunk * CHUNK_OUTPUTS + group * 8; }
    // The first column of the four that the lane holds after it. `half` is 0 or 1.
    __device__ int column(int chunk, int half) const {
        return chunk * CHUNK_OUTPUTS + group / 2 * 16 + half * 8 + group % 2 * 4;
    }
};

__device__ __forceinline__ TilePart tile_part(uint32_t rows, uint32_t width) {
    const Place place = place_of(threadIdx.x % 32);
    const uint32_t first = blockIdx.x * TILE_TOKENS;
    const uint32_t row = first + place.token;
    return {first, (size_t)row * width, (int)place.group, row < rows ? (int)width : 0};
}

// Exchanges the inner halves of this lane's values and those of the lane that holds the next or previous group. Doing
// so twice changes nothing.
template <int HALF, typename Value>
__device__ __forceinline__ void exchange(Value values[2 * HALF]) {
    const bool is_odd = threadIdx.x / 8 % 2 == 1;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const Value other = __shfl_xor_sync(0xffffffffu, is_odd ? values[i] : values[HALF + i], 8);
        values[i] = is_odd ? other : values[i];
        values[HALF + i] = is_odd ? values[HALF + i] : other;
    }
}

// Returns the eight elements of `y` that the lane holds of a chunk, or zeros.
__device__ __forceinline__ uint4 chunk_of(const __nv_bfloat16 *y, const TilePart &part, int chunk) {
    const int column = part.column(chunk);
    return column < part.limit ? __ldcs((const uint4 *)(y + part.start + column)) : uint4{0, 0, 0, 0};
}

// Sets `own` to y + delta after the exchange, given the product of the delta.
__device__ __forceinline__ void with_delta(float own[8], uint4 y, const float sums[2][4]) {
    float delta[8];
    unpack(y, own);
    consecutive(sums, delta);
#pragma unroll
    for (int i = 0; i < 8; i++) own[i] += delta[i];
    exchange<4>(own);
}

__device__ __forceinline__ float sum_of_squares(const float own[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += own[i] * own[i];
    return sum;
}

// Multiplies COUNT chunks by inverse * post if there is a post-norm, adds the residual, writes the sum and returns its
// squares.
template <int COUNT>
__device__ __forceinline__ float add_residual(float own[COUNT][8], const float *residual, const float *post,
                                              float inverse, float *sum, const TilePart &part, int chunk) {
    float4 before[COUNT][2] = {};
#pragma unroll
    for (int n = 0; n < 2 * COUNT; n++) {
        const int column = part.column(chunk + n / 2, n % 2);
        if (column < part.limit) {
            before[n / 2][n % 2] = __ldcs((const float4 *)(residual + part.start + column));
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < 2 * COUNT; n++) {
        const int column = part.column(chunk + n / 2, n % 2);
        if (column >= part.limit) continue;
        float *x = own[n / 2] + n % 2 * 4;
        float4 all = {x[0], x[1], x[2], x[3]};
        if (post != nullptr) all = scaled(all, inverse, load4(post + column));
        all = added(before[n / 2][n % 2], all);
        store4(sum + part.start + column, all);
        squares += sum_of_squares(all);
        x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    }
    return squares;
}

// Writes own * inverse * weight.
__device__ __forceinline__ void store_chunk(const float own[8], float inverse, const float *weight,
                                            __nv_bfloat16 *normed, const TilePart &part, int chunk,
                                            uint32_t width) {
    uint32_t words[4] = {};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = part.column(chunk, half);
        if (column >= (int)width) continue;
        const float4 w = load4(weight + column);
        words[half * 2] = packed(own[half * 4] * inverse * w.x, own[half * 4 + 1] * inverse * w.y);
        words[half * 2 + 1] = packed(own[half * 4 + 2] * inverse * w.z, own[half * 4 + 3] * inverse * w.w);
    }
    exchange<2>(words);
    const int column = part.column(chunk);
    if (column < part.limit) {
        *(uint4 *)(normed + part.start + column) = {words[0], words[1], words[2], words[3]};
    }
}

// Returns the sum over a row of the tile, in every lane that holds a part of the row.
__device__ __forceinline__ float tile_sum(float x, float shared[32][TILE_TOKENS]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Place place = place_of(lane);
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    x += __shfl_xor_sync(0xffffffffu, x, 16);
    if (place.group == 0) shared[warp][place.token] = x;
    __syncthreads();
    x = 0.0f;
    for (uint32_t other = place.group; other < warps; other += 4) x += shared[other][place.token];
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

// The chunks of a warp. 1024 threads have 64 registers each, and this takes 32 of them.
constexpr int CHUNKS = 4;

// Computes add_rms_norm with y + delta in place of y. The row stays in registers.
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm_delta_bf16(const float *residual, const __nv_bfloat16 *y, Delta delta, const float *post,
                        const float *next, float *sum, __nv_bfloat16 *normed, uint32_t rows, uint32_t width,
                        float eps) {
    __shared__ float shared[2][32][TILE_TOKENS];
    const TilePart part = tile_part(rows, width);
    const int from = threadIdx.x / 32 * CHUNKS;
    const uint32_t begin = from * CHUNK_OUTPUTS, end = begin + CHUNKS * CHUNK_OUTPUTS;
    prefetch_tile(y, width, part.first, rows, begin, end < width ? end : width);
    prefetch_tile(residual, width, part.first, rows, begin, end < width ? end : width);
    float sums[1][CHUNKS][2][4] = {};
    const int count = (int)((width + CHUNK_OUTPUTS - 1) / CHUNK_OUTPUTS) - from;
    add_delta<1, CHUNKS>(sums, delta, from, count, part.first, rows);
    float own[CHUNKS][8];
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < CHUNKS; n += 2) {
        const uint4 raw[2] = {chunk_of(y, part, from + n), chunk_of(y, part, from + n + 1)};
#pragma unroll
        for (int i = n; i < n + 2; i++) {
            with_delta(own[i], raw[i - n], sums[0][i]);
            squares += sum_of_squares(own[i]);
        }
    }
    float inverse = 1.0f;
    if (post != nullptr) inverse = inverse_of(tile_sum(squares, shared[0]), width, eps);
    squares = 0.0f;
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) {
        squares += add_residual<1>(own + n, residual, post, inverse, sum, part, from + n);
    }
    inverse = inverse_of(tile_sum(squares, shared[1]), width, eps);
#pragma unroll
    for (int n = 0; n < CHUNKS; n++) store_chunk(own[n], inverse, next, normed, part, from + n, width);
}

// Computes the same for rows that do not fit into registers: y + delta is computed for each sum, and the sum with the
// residual is read again, from the cache.
extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm_delta_wide_bf16(const float *residual, const __nv_bfloat16 *y, Delta delta, const float *post,
                             const float *next, float *sum, __nv_bfloat16 *normed, uint32_t rows, uint32_t width,
                             float eps) {
    __shared__ float shared[2][32][TILE_TOKENS];
    const TilePart part = tile_part(rows, width);
    const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int chunks = (width + CHUNK_OUTPUTS - 1) / CHUNK_OUTPUTS;
    float own[1][8];
    float inverse = 1.0f, squares = 0.0f;
    const auto compute = [&](int chunk) {
        const uint4 raw = chunk_of(y, part, chunk);
        float sums[1][1][2][4] = {};
        add_delta<1, 1>(sums, delta, chunk, 1, part.first, rows);
        with_delta(own[0], raw, sums[0][0]);
    };
    if (post != nullptr) {
        for (int chunk = warp; chunk < chunks; chunk += warps) {
            compute(chunk);
            squares += sum_of_squares(own[0]);
        }
        inverse = inverse_of(tile_sum(squares, shared[0]), width, eps);
    }
    squares = 0.0f;
    for (int chunk = warp; chunk < chunks; chunk += warps) {
        compute(chunk);
        squares += add_residual<1>(own, residual, post, inverse, sum, part, chunk);
    }
    inverse = inverse_of(tile_sum(squares, shared[1]), width, eps);
#pragma unroll 2
    for (int chunk = warp; chunk < chunks; chunk += warps) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = part.column(chunk, half);
            const float4 x = column < part.limit ? load4(sum + part.start + column) : float4{0, 0, 0, 0};
            float *to = own[0] + half * 4;
            to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
        }
        store_chunk(own[0], inverse, next, normed, part, chunk, width);
    }
}
