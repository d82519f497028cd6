// Just enough of CUDA's dialect for a C++ compiler to run our kernels on the CPU, one block after another.
//
// The threads of a block are fibers: each runs until it waits for the others, at a barrier or in an operation of
// its warp, so the order is fixed and a barrier that not all reach is seen. This shows that a kernel's indices and
// formulas are right; speed, and what the hardware rounds otherwise, it cannot show.

#pragma once

#include <stdint.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)

struct Dim3 {
    uint32_t x, y;
};
inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
    uint32_t x, y, z, w;
};

// cuda_bf16.h, with round to nearest even as there.
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = (uint32_t)x.bits << 16;
    float out;
    memcpy(&out, &wide, 4);
    return out;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    return {(uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

namespace emulation {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool is_done = false;
    // Barriers and operations of the warp that it has come to.
    uint64_t block_waits = 0, warp_waits = 0;
};

inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline uint32_t current;
inline std::function<void()> body;
// What the lanes of each warp give each other.
inline std::vector<uint32_t> lanes;

inline void yield() { swapcontext(&fibers[current]->context, &scheduler); }

inline void fail(const char *what) {
    fprintf(stderr, "kernel: %s\n", what);
    exit(1);
}

// Goes on when all threads from `first` on have come as far.
template <uint64_t Fiber::*Waits>
inline void wait(uint32_t first, uint32_t count) {
    Fiber &own = *fibers[current];
    own.*Waits += 1;
    for (uint32_t i = first; i < first + count; i++) {
        while (*&(fibers[i].get()->*Waits) < own.*Waits) {
            if (fibers[i]->is_done) fail("a thread ended before a barrier of others");
            yield();
        }
    }
}

inline void wait_warp() { wait<&Fiber::warp_waits>(current / 32 * 32, 32); }

inline void entry() {
    body();
    fibers[current]->is_done = true;
    yield();
}

inline void launch(Dim3 grid, uint32_t threads, std::function<void()> kernel) {
    if (threads % 32 != 0) fail("blocks are of whole warps here");
    body = kernel;
    blockDim = {threads, 1};
    gridDim = grid;
    lanes.assign(threads * 8, 0);
    for (uint32_t y = 0; y < grid.y; y++) {
        for (uint32_t x = 0; x < grid.x; x++) {
            blockIdx = {x, y};
            fibers.clear();
            for (uint32_t i = 0; i < threads; i++) {
                fibers.push_back(std::make_unique<Fiber>());
                Fiber &fiber = *fibers.back();
                fiber.stack.resize(64 << 10);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = fiber.stack.size();
                makecontext(&fiber.context, entry, 0);
            }
            for (uint32_t left = threads; left > 0;) {
                left = 0;
                for (current = 0; current < threads; current++) {
                    if (fibers[current]->is_done) continue;
                    threadIdx = {current, 0};
                    swapcontext(&scheduler, &fibers[current]->context);
                    left += !fibers[current]->is_done;
                }
            }
        }
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait<&emulation::Fiber::block_waits>(0, blockDim.x); }

inline float __shfl_xor_sync(uint32_t, float x, int other) {
    using namespace emulation;
    const uint32_t own = current;
    memcpy(&lanes[own * 8], &x, 4);
    wait_warp();
    float out;
    memcpy(&out, &lanes[(own ^ other) * 8], 4);
    wait_warp();
    return out;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, as the PTX manual lays its fragments out.
inline void emulated_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    using namespace emulation;
    const uint32_t own = current, warp = own / 32 * 32;
    memcpy(&lanes[own * 8], a, 16);
    memcpy(&lanes[own * 8 + 4], b, 8);
    wait_warp();
    const auto half = [](uint32_t word, uint32_t index) {
        return __bfloat162float({(uint16_t)(index ? word >> 16 : word)});
    };
    for (int i = 0; i < 4; i++) {
        const uint32_t lane = own % 32, row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (uint32_t k = 0; k < 16; k++) {
            const uint32_t word = (row >= 8) + 2 * (k >= 8);
            const uint32_t left = lanes[(warp + row % 8 * 4 + k % 8 / 2) * 8 + word];
            const uint32_t right = lanes[(warp + column * 4 + k % 8 / 2) * 8 + 4 + (k >= 8)];
            c[i] += half(left, k % 2) * half(right, k % 2);
        }
    }
    wait_warp();
}
