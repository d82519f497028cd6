// The part of CUDA's C++ dialect that our kernels use, so that a C++ compiler can build them for the CPU. Blocks run
// one after another.
//
// The threads of a block are fibers. Each fiber runs until it waits for others, at a barrier or in a warp operation, so
// the order is fixed, and a barrier that some threads do not reach is reported. This shows that a kernel's indices and
// formulas are correct. It shows neither the speed nor the rounding of the hardware.

#pragma once

#include <stdint.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

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
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
    uint32_t x, y, z, w;
};

// Replaces CUDA's cuda_bf16.h and rounds to nearest even as it does.
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

#if defined(__x86_64__)
// Saves the callee-saved registers of the System V calling convention and resumes `to` where it was suspended. This
// replaces the system's swapcontext, whose system call for the signal mask would take most of the run time.
struct Context {
    void *stack = nullptr;
};
extern "C" void emulation_switch(void **from, void *to);
asm(R"(
.pushsection .text
.weak emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.popsection
)");
inline void switch_context(Context &from, Context &to) { emulation_switch(&from.stack, to.stack); }
inline void prepare(Context &context, char *stack, size_t size, void (*entry)()) {
    void **top = (void **)((uintptr_t)(stack + size) & ~(uintptr_t)15);
    *--top = nullptr;
    *--top = (void *)entry;
    context.stack = top - 6;
}
#else
struct Context {
    ucontext_t context;
};
inline void switch_context(Context &from, Context &to) { swapcontext(&from.context, &to.context); }
inline void prepare(Context &context, char *stack, size_t size, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = size;
    makecontext(&context.context, entry, 0);
}
#endif

constexpr size_t STACK = 64 << 10;

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool is_done = false;
    // The number of warp operations so far. Odd and even operations use separate memory.
    uint32_t operations = 0;
};

// A point where a group of threads waits until all of them have arrived.
struct Barrier {
    uint32_t size = 0, arrived = 0, ended = 0;
    uint64_t generation = 0;
};

static Context scheduler;
static std::vector<Fiber> fibers;
static Barrier block;
static std::vector<Barrier> warps;
static uint32_t current;
static std::function<void()> body;
// Memory through which the lanes of each warp exchange values.
static std::vector<uint32_t> lane_memory;

inline void yield() { switch_context(fibers[current].context, scheduler); }

inline void fail(const char *what) {
    fprintf(stderr, "kernel: %s\n", what);
    exit(1);
}

// Returns when all threads of the barrier have arrived at it.
inline void wait(Barrier &barrier) {
    const uint64_t own = barrier.generation;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == own) {
        if (barrier.ended) fail("a thread ended before a barrier that others wait at");
        yield();
    }
}

// Returns the 8 words of a lane of this thread's warp: the thread writes its own and reads those of other lanes.
inline uint32_t *words(uint32_t lane) {
    return &lane_memory[((fibers[current].operations % 2) * fibers.size() + current / 32 * 32 + lane) * 8];
}

inline void entry() {
    body();
    fibers[current].is_done = true;
    block.ended++;
    warps[current / 32].ended++;
    yield();
}

inline void launch(Dim3 grid, uint32_t threads, std::function<void()> kernel) {
    if (threads % 32 != 0) fail("the block size is not a multiple of 32");
    body = kernel;
    blockDim = {threads, 1};
    gridDim = grid;
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    lane_memory.assign(2 * fibers.size() * 8, 0);
    for (uint32_t y = 0; y < grid.y; y++) {
        for (uint32_t x = 0; x < grid.x; x++) {
            blockIdx = {x, y};
            block = {threads};
            warps.assign(threads / 32, {32});
            for (uint32_t i = 0; i < threads; i++) {
                Fiber &fiber = fibers[i];
                fiber.is_done = false;
                prepare(fiber.context, fiber.stack.get(), STACK, entry);
            }
            for (uint32_t left = threads; left > 0;) {
                left = 0;
                for (current = 0; current < threads; current++) {
                    if (fibers[current].is_done) continue;
                    threadIdx = {current, 0};
                    switch_context(scheduler, fibers[current].context);
                    left += !fibers[current].is_done;
                }
            }
        }
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }

inline float __shfl_xor_sync(uint32_t, float x, int other) {
    using namespace emulation;
    const uint32_t own = current;
    memcpy(words(own % 32), &x, 4);
    wait(warps[own / 32]);
    float out;
    memcpy(&out, words(own % 32 ^ other), 4);
    fibers[own].operations++;
    return out;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, with the fragment layout of the PTX manual.
inline void emulated_mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    using namespace emulation;
    const uint32_t own = current, lane = own % 32;
    memcpy(words(lane), a, 16);
    memcpy(words(lane) + 4, b, 8);
    wait(warps[own / 32]);
    const auto half = [](uint32_t word, uint32_t index) {
        return __bfloat162float({(uint16_t)(index ? word >> 16 : word)});
    };
    for (int i = 0; i < 4; i++) {
        const uint32_t row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        for (uint32_t k = 0; k < 16; k++) {
            const uint32_t word = (row >= 8) + 2 * (k >= 8);
            const uint32_t left = words(row % 8 * 4 + k % 8 / 2)[word];
            const uint32_t right = words(column * 4 + k % 8 / 2)[4 + (k >= 8)];
            c[i] += half(left, k % 2) * half(right, k % 2);
        }
    }
    fibers[own].operations++;
}
