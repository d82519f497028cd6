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

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct Dim3 {
    uint32_t x, y;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 {
    uint32_t x, y, z, w;
};

// Vectors and functions of the elementwise kernels. A vector must be aligned as the hardware demands.
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
template <typename T>
inline T __ldcs(const T *p) {
    if ((uintptr_t)p % sizeof(T) != 0) {
        fprintf(stderr, "kernel: a load of %zu bytes is not aligned\n", sizeof(T));
        exit(1);
    }
    return *p;
}
inline float __uint_as_float(uint32_t bits) {
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

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
inline float __fdividef(float x, float y) { return x / y; }

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

// A copy of 16 bytes to shared memory that has been started. Without a source it writes zeros.
struct Copy {
    char *to;
    const char *from;
};

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool is_done = false;
    // The number of warp operations so far. Odd and even operations use separate memory.
    uint32_t operations = 0;
    // The copies that are not complete: those of each group that has ended, and the later ones.
    std::deque<std::vector<Copy>> copy_groups;
    std::vector<Copy> copies;
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
// The dynamic shared memory of the block, between `RED_ZONE` bytes that no thread may write. It begins at
// `SHARED_ADDRESS` of the address space of shared memory.
static std::vector<char> shared_memory;
static uint32_t shared_size;
constexpr uint32_t RED_ZONE = 1024, SHARED_ADDRESS = 1024;
// What a GPU of every compute capability from 8.0 on offers to one block.
constexpr uint32_t MOST_SHARED = 99 * 1024;
// Fills memory that nothing has been written to. As floats of either dtype, it is NaN.
constexpr char POISON = -1;

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

inline char *shared_begin() {
    // As on a GPU, the memory is aligned to 128 bytes, which the allocator does not promise.
    return (char *)(((uintptr_t)shared_memory.data() + RED_ZONE + 127) & ~(uintptr_t)127);
}

inline void check_red_zones() {
    const char *begin = shared_begin(), *end = begin + shared_size;
    const char *from = shared_memory.data(), *to = from + shared_memory.size();
    const auto is_poison = [](char x) { return x == POISON; };
    if (!std::all_of(from, begin, is_poison) || !std::all_of(end, to, is_poison)) {
        fail("a thread wrote beyond the block's dynamic shared memory");
    }
}

inline void entry() {
    body();
    const Fiber &own = fibers[current];
    for (const auto &group : own.copy_groups) {
        if (!group.empty()) fail("a thread ended without waiting for its copies");
    }
    if (!own.copies.empty()) fail("a thread ended without waiting for its copies");
    fibers[current].is_done = true;
    block.ended++;
    warps[current / 32].ended++;
    yield();
}

// `shared_bytes` is the size of the dynamic shared memory of each block.
inline void launch(Dim3 grid, uint32_t threads, std::function<void()> kernel, uint32_t shared_bytes = 0) {
    if (threads % 32 != 0) fail("the block size is not a multiple of 32");
    if (shared_bytes > MOST_SHARED) fail("some GPUs do not offer that much shared memory to a block");
    shared_size = shared_bytes;
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
            shared_memory.assign(shared_bytes + 2 * RED_ZONE + 128, POISON);
            for (uint32_t i = 0; i < threads; i++) {
                Fiber &fiber = fibers[i];
                fiber.is_done = false;
                fiber.copy_groups.clear();
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
            check_red_zones();
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

inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t x, int other) {
    float bits;
    memcpy(&bits, &x, 4);
    bits = __shfl_xor_sync(mask, bits, other);
    memcpy(&x, &bits, 4);
    return x;
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

// The functions and instructions of attention.cu and mma.cuh.

inline void __syncwarp() { emulation::wait(emulation::warps[emulation::current / 32]); }

namespace emulation {

// Calls `combine` with the values of the 32 lanes of this thread's warp and returns what it returns.
template <typename T, typename Combine>
T exchanged(T x, Combine combine) {
    static_assert(sizeof(T) == 4);
    const uint32_t own = current;
    memcpy(words(own % 32), &x, 4);
    wait(warps[own / 32]);
    T all[32];
    for (uint32_t lane = 0; lane < 32; lane++) memcpy(&all[lane], words(lane), 4);
    fibers[own].operations++;
    return combine(all);
}

// Returns the 16 bytes at an address of shared memory.
inline char *chunk_at(uint32_t address) {
    if (address % 16 != 0) fail("an address in shared memory is not a multiple of 16");
    if (address < SHARED_ADDRESS || address + 16 > SHARED_ADDRESS + shared_size) {
        fail("an address is outside the block's dynamic shared memory");
    }
    return shared_begin() + (address - SHARED_ADDRESS);
}

}  // namespace emulation

inline uint32_t __shfl_sync(uint32_t, uint32_t x, uint32_t lane) {
    return emulation::exchanged(x, [&](const uint32_t *all) { return all[lane % 32]; });
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t x) {
    return emulation::exchanged(x, [](const uint32_t *all) { return *std::min_element(all, all + 32); });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t x) {
    return emulation::exchanged(x, [](const uint32_t *all) { return *std::max_element(all, all + 32); });
}
inline int __any_sync(uint32_t, int x) {
    return emulation::exchanged(x, [](const int *all) {
        return (int)std::any_of(all, all + 32, [](int other) { return other != 0; });
    });
}

inline char *emulated_dynamic_shared() { return emulation::shared_begin(); }
inline uint32_t emulated_shared_address(const void *at) {
    return emulation::SHARED_ADDRESS + (uint32_t)((const char *)at - emulation::shared_begin());
}

// ldmatrix.sync.aligned.m8n8.x4, with .trans if `is_transposed`.
inline void emulated_ldmatrix(uint32_t out[4], uint32_t row, bool is_transposed) {
    using namespace emulation;
    const uint32_t own = current, lane = own % 32;
    memcpy(words(lane), chunk_at(row), 16);
    wait(warps[own / 32]);
    const auto element = [&](uint32_t matrix, uint32_t row, uint32_t column) {
        return words(matrix * 8 + row)[column / 2] >> 16 * (column % 2) & 0xffff;
    };
    for (uint32_t matrix = 0; matrix < 4; matrix++) {
        const uint32_t one = lane / 4, pair = lane % 4 * 2;
        out[matrix] = is_transposed ? element(matrix, pair, one) | element(matrix, pair + 1, one) << 16
                                    : element(matrix, one, pair) | element(matrix, one, pair + 1) << 16;
    }
    fibers[own].operations++;
}

// cp.async: a copy reads its source and writes its target as late as possible, when its thread waits for it. Until then
// the target holds NaN.
inline void emulated_copy_async(uint32_t to, const void *from, bool exists) {
    using namespace emulation;
    if ((uintptr_t)from % 16 != 0) fail("an address in global memory is not a multiple of 16");
    memset(chunk_at(to), POISON, 16);
    fibers[current].copies.push_back({chunk_at(to), exists ? (const char *)from : nullptr});
}
inline void emulated_end_copy_group() {
    emulation::Fiber &own = emulation::fibers[emulation::current];
    own.copy_groups.push_back(std::move(own.copies));
    own.copies.clear();
}
inline void emulated_wait_for_copies(uint32_t left) {
    using namespace emulation;
    auto &groups = fibers[current].copy_groups;
    for (; groups.size() > left; groups.pop_front()) {
        for (const Copy &copy : groups.front()) {
            if (copy.from) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        }
    }
}
