// Computes gelu_tanh(gate) * up for each element, by the formula of ../geglu.rs.
//
// `gate` and `up` are (rows, width) with `stride` elements from one row to the next, so that both can be halves of one
// product; `out` is (rows, width) without gaps. Launches:
//
// | kernel           | block | grid                                    | width          |
// |------------------|-------|-----------------------------------------|----------------|
// | geglu_f32        | 128   | (ceil(rows / 4), ceil(width / 512))     | multiples of 4 |
// | geglu_bf16       | 128   | (ceil(rows / 4), ceil(width / 1024))    | multiples of 8 |
// | geglu_delta_bf16 | 256   | (ceil(rows / 32), ceil(width / 256))    | multiples of 8 |

#include "delta.cuh"

// x / (1 + exp(-z)) equals 0.5 x (1 + tanh(z / 2)), without the difference of nearly equal numbers for a negative x.
__device__ __forceinline__ float twice_the_tangent(float x) {
    return 1.5957691216057308f * x * (1.0f + 0.044715f * x * x);
}

// The result is float, so this takes the exact functions.
__device__ __forceinline__ float geglu_exact(float gate, float up) {
    return gate / (1.0f + expf(-twice_the_tangent(gate))) * up;
}

// The result is rounded to bf16, which hides the errors of the fast functions: 2 to 3 units of a float.
__device__ __forceinline__ float geglu_fast(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-twice_the_tangent(gate))) * up;
}

constexpr int THREADS = 128;
// The rows that a thread computes, in one group of columns, so that it waits for their loads together.
constexpr int ROWS = 4;

extern "C" __global__ void __launch_bounds__(THREADS)
geglu_f32(const float *gate, const float *up, uint32_t stride, float *out, uint32_t rows, uint32_t width) {
    const uint32_t column = (blockIdx.y * THREADS + threadIdx.x) * 4;
    if (column >= width) return;
    float4 gates[ROWS], ups[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const uint32_t row = blockIdx.x * ROWS + n;
        if (row >= rows) continue;
        gates[n] = stream4(gate + (size_t)row * stride + column);
        ups[n] = stream4(up + (size_t)row * stride + column);
    }
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const uint32_t row = blockIdx.x * ROWS + n;
        if (row >= rows) continue;
        store4(out + (size_t)row * width + column,
               {geglu_exact(gates[n].x, ups[n].x), geglu_exact(gates[n].y, ups[n].y),
                geglu_exact(gates[n].z, ups[n].z), geglu_exact(gates[n].w, ups[n].w)});
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
geglu_bf16(const __nv_bfloat16 *gate, const __nv_bfloat16 *up, uint32_t stride, __nv_bfloat16 *out, uint32_t rows,
           uint32_t width) {
    const uint32_t column = (blockIdx.y * THREADS + threadIdx.x) * 8;
    if (column >= width) return;
    uint4 gates[ROWS], ups[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const uint32_t row = blockIdx.x * ROWS + n;
        if (row >= rows) continue;
        gates[n] = __ldcs((const uint4 *)(gate + (size_t)row * stride + column));
        ups[n] = __ldcs((const uint4 *)(up + (size_t)row * stride + column));
    }
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
        const uint32_t row = blockIdx.x * ROWS + n;
        if (row >= rows) continue;
        float x[8], y[8];
        unpack(gates[n], x);
        unpack(ups[n], y);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = geglu_fast(x[i], y[i]);
        *(uint4 *)(out + (size_t)row * width + column) = pack(x);
    }
}

constexpr int DELTA_WARPS = 8;
// The tiles of a warp, which share the loads of B.
constexpr int TILES = 4;

// Computes gelu_tanh(gate + gate_delta) * (up + up_delta). Each warp computes one chunk of 32 columns for 32 tokens.
extern "C" __global__ void __launch_bounds__(DELTA_WARPS * 32, 2)
geglu_delta_bf16(const __nv_bfloat16 *gate, const __nv_bfloat16 *up, uint32_t stride, Delta gate_delta, Delta up_delta,
                 __nv_bfloat16 *out, uint32_t rows, uint32_t width) {
    const uint32_t chunk = blockIdx.y * DELTA_WARPS + threadIdx.x / 32;
    if (chunk * CHUNK_OUTPUTS >= width) return;
    const Place place = place_of(threadIdx.x % 32);
    const uint32_t first = blockIdx.x * TILES * TILE_TOKENS, column = chunk * CHUNK_OUTPUTS + place.group * 8;
    uint4 gates[TILES] = {}, ups[TILES] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const uint32_t row = first + n * TILE_TOKENS + place.token;
        if (row >= rows || column >= width) continue;
        gates[n] = __ldcs((const uint4 *)(gate + (size_t)row * stride + column));
        ups[n] = __ldcs((const uint4 *)(up + (size_t)row * stride + column));
    }
    float gate_sums[TILES][1][2][4] = {}, up_sums[TILES][1][2][4] = {};
    add_delta<TILES, 1>(gate_sums, gate_delta, chunk, 1, first, rows);
    add_delta<TILES, 1>(up_sums, up_delta, chunk, 1, first, rows);
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        float x[8], y[8], dx[8], dy[8];
        unpack(gates[n], x);
        unpack(ups[n], y);
        consecutive(gate_sums[n][0], dx);
        consecutive(up_sums[n][0], dy);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = geglu_fast(x[i] + dx[i], y[i] + dy[i]);
        const uint32_t row = first + n * TILE_TOKENS + place.token;
        if (row < rows && column < width) *(uint4 *)(out + (size_t)row * width + column) = pack(x);
    }
}
