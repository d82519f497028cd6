// Instructions that CUDA's C++ dialect has no functions for: products on the tensor cores, loads of their fragments,
// and copies to shared memory that run in the background. They need compute capability 8.0. When the kernels are built
// for the CPU (tests/gpu/kernels/emulation), functions of that emulation replace them.
//
// A fragment is the part of a small matrix that one lane of a warp holds, as the PTX manual documents it for
// mma.m16n8k16. Addresses in shared memory are 32-bit, because that is what the instructions take.

#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

#ifdef __CUDA_ARCH__
// Declares `name` as a pointer to the shared memory whose size is given at the launch. It is aligned to 128 bytes.
#define DYNAMIC_SHARED(name)                                 \
    extern __shared__ __align__(128) char dynamic_shared[]; \
    char *const name = dynamic_shared
#else
#define DYNAMIC_SHARED(name) char *const name = emulated_dynamic_shared()
#endif

__device__ __forceinline__ uint32_t shared_address(const void *at) {
#ifdef __CUDA_ARCH__
    return (uint32_t)__cvta_generic_to_shared(at);
#else
    return emulated_shared_address(at);
#endif
}

// Computes c (16 x 8) += a (16 x 16) b (16 x 8) with one warp.
__device__ __forceinline__ void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#ifdef __CUDA_ARCH__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulated_mma(c, a, b);
#endif
}

// Loads four 8 x 8 matrices. Lane i gives the address of row i % 8 of matrix i / 8, which is 16 bytes long. In out[m] it
// receives the elements 2 * (i % 4) and 2 * (i % 4) + 1 of row i / 4 of matrix m.
__device__ __forceinline__ void ldmatrix(uint32_t out[4], uint32_t row) {
#ifdef __CUDA_ARCH__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row));
#else
    emulated_ldmatrix(out, row, false);
#endif
}

// Like `ldmatrix`, but each matrix is transposed: out[m] holds the elements i / 4 of the rows 2 * (i % 4) and
// 2 * (i % 4) + 1.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t out[4], uint32_t row) {
#ifdef __CUDA_ARCH__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row));
#else
    emulated_ldmatrix(out, row, true);
#endif
}

// Starts to copy 16 bytes from global to shared memory. If `exists` is false, `from` is not read, and zeros are
// written.
__device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool exists) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0));
#else
    emulated_copy_async(to, from, exists);
#endif
}

// Ends a group: the copies that this thread has started since the previous group. A group may be empty.
__device__ __forceinline__ void end_copy_group() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;");
#else
    emulated_end_copy_group();
#endif
}

// Waits until all copy groups of this thread except for the last `LEFT` are complete. Other threads see what was copied
// after the next barrier.
template <int LEFT>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" : : "n"(LEFT) : "memory");
#else
    emulated_wait_for_copies(LEFT);
#endif
}

// Rounds two floats to bf16 and packs them into a word.
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#else
    return (uint32_t)__bfloat16_as_ushort(__float2bfloat16(low)) |
           (uint32_t)__bfloat16_as_ushort(__float2bfloat16(high)) << 16;
#endif
}

// Returns 2^x with a relative error of at most 2^-22. It is 0 where a float would be denormal.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
