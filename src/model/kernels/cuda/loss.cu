// The cross-entropy over the vocabulary and its gradient, between the two products with the unembedding that cuBLAS
// computes.
//
// An unembedding in bf16 is multiplied with factors in bf16. Each factor is therefore split into two parts, the factor
// rounded to bf16 and the rest rounded to bf16, which together are about as precise as a float. Their products are added
// here. Every sum has a fixed order, so that training gives the same numbers each time.

#include "common.cuh"

typedef __nv_bfloat16 bf16;

constexpr int THREADS = 256;
// Number of logits that a thread holds.
constexpr int ELEMENTS = 16;
// Number of logits of a block. A row of 262,144 logits then has 64 blocks, so that even few rows occupy a GPU.
constexpr uint32_t CHUNK = THREADS * ELEMENTS;

__device__ __forceinline__ void split(float x, bf16 *high, bf16 *low) {
    *high = __float2bfloat16(x);
    *low = __float2bfloat16(x - __bfloat162float(*high));
}

// Returns the largest x of a block of THREADS threads, in every thread.
__device__ __forceinline__ float block_max(float x, float *shared) {
    shared[threadIdx.x] = x;
    for (uint32_t half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + half]);
    }
    __syncthreads();
    return shared[0];
}

// Returns the sum of x over a block of THREADS threads, in every thread.
__device__ __forceinline__ double block_sum(double x, double *shared) {
    shared[threadIdx.x] = x;
    for (uint32_t half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

// Writes the two parts of each x, first all high ones, then all low ones.
extern "C" __global__ void __launch_bounds__(THREADS) loss_split(const float *x, bf16 *parts, uint64_t count) {
    for (uint64_t i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        split(x[i], parts + i, parts + count + i);
    }
}

// The largest logit of a block's chunk, and the sum of exp(logit - largest).
struct LossChunk {
    double sum;
    float largest;
};

// Adds the products of the low parts, unless they are null, to `logits`, and applies the soft-cap, unless it is zero.
// Each block computes one chunk of one row: the grid is (chunks of a row, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
loss_cap(float *logits, const float *low, LossChunk *chunks, uint32_t vocabulary, float cap) {
    __shared__ float maxima[THREADS];
    __shared__ double sums[THREADS];
    const size_t row = (size_t)blockIdx.y * vocabulary;
    const uint32_t first = blockIdx.x * CHUNK + threadIdx.x;
    float own[ELEMENTS];
#pragma unroll
    for (int n = 0; n < ELEMENTS; n++) {
        const uint32_t column = first + n * THREADS;
        own[n] = column < vocabulary ? logits[row + column] : -INFINITY;
    }
    if (low != nullptr) {
#pragma unroll
        for (int n = 0; n < ELEMENTS; n++) {
            const uint32_t column = first + n * THREADS;
            if (column < vocabulary) own[n] += low[row + column];
        }
    }
    float largest = -INFINITY;
#pragma unroll
    for (int n = 0; n < ELEMENTS; n++) {
        const uint32_t column = first + n * THREADS;
        if (column < vocabulary) {
            if (cap > 0.0f) own[n] = cap * tanhf(own[n] / cap);
            logits[row + column] = own[n];
            largest = fmaxf(largest, own[n]);
        }
    }
    largest = block_max(largest, maxima);
    double sum = 0.0;
#pragma unroll
    for (int n = 0; n < ELEMENTS; n++) {
        if (first + n * THREADS < vocabulary) sum += (double)expf(own[n] - largest);
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) chunks[(size_t)blockIdx.y * gridDim.x + blockIdx.x] = {sum, largest};
}

// What a row should predict, with the fields of loss.rs: the weight of its softmax, and its tokens in the list of all.
struct LossRow {
    float weight;
    uint32_t first, count;
};

// A token and the weight of its logit in the loss. The tokens of a row are distinct.
struct LossToken {
    uint32_t id;
    float weight;
};

__device__ __forceinline__ void put(float *gradient, uint64_t, size_t at, float x) { gradient[at] = x; }
// The parts lie as `loss_split` writes them: first the high ones of all `count` logits.
__device__ __forceinline__ void put(bf16 *gradient, uint64_t count, size_t at, float x) {
    split(x, gradient + at, gradient + count + at);
}

// Writes the gradient with respect to the logits before the soft-cap, and the loss of each row. The grid is that of
// `loss_cap`.
template <typename T>
__device__ __forceinline__ void write_gradient(const float *logits, const LossChunk *chunks, const LossRow *rows,
                                               const LossToken *tokens, T *gradient, double *losses,
                                               uint32_t vocabulary, float cap) {
    __shared__ float maxima[THREADS];
    __shared__ double sums[THREADS];
    const LossRow target = rows[blockIdx.y];
    const size_t row = (size_t)blockIdx.y * vocabulary;
    const uint64_t count = (uint64_t)gridDim.y * vocabulary;
    const LossChunk *own = chunks + (size_t)blockIdx.y * gridDim.x;
    float largest = -INFINITY;
    for (uint32_t i = threadIdx.x; i < gridDim.x; i += THREADS) largest = fmaxf(largest, own[i].largest);
    largest = block_max(largest, maxima);
    double sum = 0.0;
    for (uint32_t i = threadIdx.x; i < gridDim.x; i += THREADS) sum += own[i].sum * exp((double)(own[i].largest - largest));
    sum = block_sum(sum, sums);
    const float inverse = (float)(1.0 / sum);
    const auto slope = [&](float logit) { return cap > 0.0f ? 1.0f - (logit / cap) * (logit / cap) : 1.0f; };
    const auto softmax = [&](float logit) { return target.weight * (expf(logit - largest) * inverse); };
    const uint32_t begin = blockIdx.x * CHUNK;
#pragma unroll
    for (int n = 0; n < ELEMENTS; n++) {
        const uint32_t column = begin + threadIdx.x + n * THREADS;
        if (column < vocabulary) {
            const float logit = logits[row + column];
            put(gradient, count, row + column, softmax(logit) * slope(logit));
        }
    }
    // The tokens of this chunk are written again.
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < target.count; i += THREADS) {
        const LossToken token = tokens[target.first + i];
        if (token.id >= begin && token.id - begin < CHUNK) {
            const float logit = logits[row + token.id];
            put(gradient, count, row + token.id, (softmax(logit) - token.weight) * slope(logit));
        }
    }
    if (blockIdx.x != 0) return;
    const double log_sum = (double)largest + log(sum);
    double loss = 0.0;
    for (uint32_t i = threadIdx.x; i < target.count; i += THREADS) {
        const LossToken token = tokens[target.first + i];
        loss += (double)token.weight * (log_sum - (double)logits[row + token.id]);
    }
    // Other threads may still be reading the previous sum.
    __syncthreads();
    loss = block_sum(loss, sums);
    if (threadIdx.x == 0) losses[blockIdx.y] = loss;
}

extern "C" __global__ void __launch_bounds__(THREADS)
loss_gradient_f32(const float *logits, const LossChunk *chunks, const LossRow *rows, const LossToken *tokens,
                  float *gradient, double *losses, uint32_t vocabulary, float cap) {
    write_gradient(logits, chunks, rows, tokens, gradient, losses, vocabulary, cap);
}

extern "C" __global__ void __launch_bounds__(THREADS)
loss_gradient_bf16(const float *logits, const LossChunk *chunks, const LossRow *rows, const LossToken *tokens,
                   bf16 *gradient, double *losses, uint32_t vocabulary, float cap) {
    write_gradient(logits, chunks, rows, tokens, gradient, losses, vocabulary, cap);
}

// Writes the sums of `terms` arrays of `count` elements, which follow each other.
extern "C" __global__ void __launch_bounds__(THREADS)
loss_add(const float *x, float *out, uint64_t count, uint32_t terms) {
    for (uint64_t i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        float sum = 0.0f;
        for (uint32_t term = 0; term < terms; term++) sum += x[term * count + i];
        out[i] = sum;
    }
}
