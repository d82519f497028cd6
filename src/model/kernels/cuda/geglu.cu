// Computes gelu_tanh(gate) * up for each element, by the formula of ../geglu.rs.

#include "common.cuh"

template <typename T>
__device__ void geglu(const T *gate, const T *up, T *out, uint32_t count) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const float x = load(gate + i);
        const float z = 1.5957691216f * (x + 0.044715f * x * x * x);
        store(out + i, x / (1.0f + __expf(-z)) * load(up + i));
    }
}

extern "C" __global__ void geglu_f32(const float *gate, const float *up, float *out, uint32_t count) {
    geglu(gate, up, out, count);
}

extern "C" __global__ void geglu_bf16(const __nv_bfloat16 *gate, const __nv_bfloat16 *up, __nv_bfloat16 *out,
                                      uint32_t count) {
    geglu(gate, up, out, count);
}
