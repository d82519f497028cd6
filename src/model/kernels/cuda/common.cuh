// Functions that the kernels share: loads and stores of several elements at a time, and the sum over a warp.
//
// T is the dtype of the matrix products: float or __nv_bfloat16. All arithmetic is in float. Rows are aligned to the
// 8 or 16 bytes that one access moves, because the host launches these kernels only for such widths.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Returns the two bf16 elements of a word as floats. The lower half is the element at the lower address.
__device__ __forceinline__ float lower(uint32_t word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float upper(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }

// Rounds two floats to bf16 and returns them as one word.
__device__ __forceinline__ uint32_t packed(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return (uint32_t)__bfloat16_as_ushort(__float2bfloat16(low)) |
           (uint32_t)__bfloat16_as_ushort(__float2bfloat16(high)) << 16;
#endif
}

// Four elements as they lie in memory. Loads that are guarded by a condition keep this form until all of them are under
// way, because a conversion would make each one wait.
__device__ __forceinline__ float4 widened(float4 x) { return x; }
__device__ __forceinline__ float4 widened(uint2 words) {
    return {lower(words.x), upper(words.x), lower(words.y), upper(words.y)};
}
struct Halves {
    uint2 words;
};
__device__ __forceinline__ float4 widened(Halves x) {
    const auto half = [](uint32_t bits) { return __half2float(__ushort_as_half((unsigned short)bits)); };
    return {half(x.words.x & 0xffff), half(x.words.x >> 16), half(x.words.y & 0xffff), half(x.words.y >> 16)};
}
template <typename T> struct Four;
template <> struct Four<float> { using Raw = float4; };
template <> struct Four<__nv_bfloat16> { using Raw = uint2; };
template <> struct Four<__half> { using Raw = Halves; };

// Returns four elements that are read only once, so that they do not displace weights from the cache.
template <typename T>
__device__ __forceinline__ typename Four<T>::Raw stream4(const T *p) {
    return __ldcs((const typename Four<T>::Raw *)p);
}
__device__ __forceinline__ Halves stream4(const __half *p) { return {__ldcs((const uint2 *)p)}; }

// Returns four elements that other blocks and later passes read too, such as those of a weight.
__device__ __forceinline__ float4 load4(const float *p) { return *(const float4 *)p; }

__device__ __forceinline__ void store4(float *p, float4 x) { *(float4 *)p = x; }
__device__ __forceinline__ void store4(__nv_bfloat16 *p, float4 x) {
    *(uint2 *)p = {packed(x.x, x.y), packed(x.z, x.w)};
}

// The elements that one access of 16 bytes moves.
template <typename T> constexpr int PER_ACCESS = 16 / sizeof(T);

// Converts between eight bf16, as one access of 16 bytes moves them, and floats.
__device__ __forceinline__ void unpack(uint4 words, float out[8]) {
    const uint32_t all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = lower(all[i]);
        out[2 * i + 1] = upper(all[i]);
    }
}
__device__ __forceinline__ uint4 pack(const float x[8]) {
    return {packed(x[0], x[1]), packed(x[2], x[3]), packed(x[4], x[5]), packed(x[6], x[7])};
}

// Asks for the 32 bytes that contain `*p`, to be loaded later from the second-level cache. Takes no registers, as loads
// ahead of their use would.
__device__ __forceinline__ void prefetch(const void *p) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Returns the sum over the 32 lanes, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}
