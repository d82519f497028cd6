// The operations of a layer in training, forward and backward, by the formulas in ../training.
//
// Activations and gradients are float. Where a product with a frozen weight in bf16 reads a result, the kernel also
// writes it rounded to `half`, which is null if weights are float. Every sum has a fixed order, so that training gives
// the same numbers each time.

#include "common.cuh"

__device__ __forceinline__ void store(__nv_bfloat16 *p, float x) { *p = __float2bfloat16(x); }

// Returns the sum over a block of at most 32 full warps, in every thread. `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    // Other threads may still be reading the previous sum.
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}

constexpr int THREADS = 256;

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ void put(float *out, bf16 *half, size_t at, float x) {
    out[at] = x;
    if (half != nullptr) store(half + at, x);
}

extern "C" __global__ void training_copy(const float *x, float *out, bf16 *half, uint32_t count) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        put(out, half, i, x[i]);
    }
}

// Each block normalises one row.
extern "C" __global__ void __launch_bounds__(THREADS)
training_rms_norm(const float *x, const float *weight, float *out, bf16 *half, uint32_t width, float eps) {
    __shared__ float shared[32];
    const size_t row = (size_t)blockIdx.x * width;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) sum += x[row + i] * x[row + i];
    const float inverse = rsqrtf(block_sum(sum, shared) / width + eps);
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) put(out, half, row + i, x[row + i] * inverse * weight[i]);
}

// Writes residual + rms_norm(y, post), or residual + y if `post` is null. Each block computes one row.
extern "C" __global__ void __launch_bounds__(THREADS)
training_add_norm(const float *residual, const float *y, const float *post, float *out, uint32_t width, float eps) {
    __shared__ float shared[32];
    const size_t row = (size_t)blockIdx.x * width;
    float inverse = 1.0f;
    if (post != nullptr) {
        float sum = 0.0f;
        for (uint32_t i = threadIdx.x; i < width; i += THREADS) sum += y[row + i] * y[row + i];
        inverse = rsqrtf(block_sum(sum, shared) / width + eps);
    }
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        out[row + i] = residual[row + i] + (post != nullptr ? y[row + i] * inverse * post[i] : y[row + i]);
    }
}

// Writes the gradient with respect to x, plus `residual` unless that is null. Each block computes one row.
extern "C" __global__ void __launch_bounds__(THREADS)
training_rms_norm_backward(const float *x, const float *weight, const float *gradient, const float *residual,
                           float *out, bf16 *half, uint32_t width, float eps) {
    __shared__ float shared[32];
    const size_t row = (size_t)blockIdx.x * width;
    float squares = 0.0f, products = 0.0f;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        squares += x[row + i] * x[row + i];
        products += x[row + i] * gradient[row + i] * weight[i];
    }
    const float inverse = rsqrtf(block_sum(squares, shared) / width + eps);
    const float along = inverse * inverse * block_sum(products, shared) / width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        const float own = inverse * (gradient[row + i] * weight[i] - x[row + i] * along);
        put(out, half, row + i, residual != nullptr ? own + residual[row + i] : own);
    }
}

// GELU of x is x times the logistic function of u, and the derivative of u is `slope`.
__device__ __forceinline__ float gelu_logistic(float x, float *slope) {
    *slope = 1.5957691216f * (1.0f + 3.0f * 0.044715f * x * x);
    return 1.0f / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

extern "C" __global__ void training_geglu(const float *gate, const float *up, float *out, bf16 *half, uint32_t count) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        float slope;
        put(out, half, i, gate[i] * gelu_logistic(gate[i], &slope) * up[i]);
    }
}

// Replaces `gate` and `up` by their gradients.
extern "C" __global__ void training_geglu_backward(float *gate, bf16 *gate_half, float *up, bf16 *up_half,
                                                   const float *gradient, uint32_t count) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const float x = gate[i];
        float slope;
        const float logistic = gelu_logistic(x, &slope);
        const float derivative = logistic + x * logistic * (1.0f - logistic) * slope;
        const float d_gate = gradient[i] * up[i] * derivative;
        put(up, up_half, i, gradient[i] * x * logistic);
        put(gate, gate_half, i, d_gate);
    }
}

// Each warp computes one head of one token, and its lanes keep the pairs (i, i + half) in registers.
constexpr int ROPE_WARPS = 4;
// Supports heads of up to 2 * 32 * 4 elements.
constexpr int PAIRS_PER_LANE = 4;

extern "C" __global__ void __launch_bounds__(ROPE_WARPS * 32)
training_norm_rope(const float *x, const float *cos, const float *sin, const uint32_t *positions, const float *weight,
                   float eps, float *out, uint32_t tokens, uint32_t heads, uint32_t half) {
    const uint32_t lane = threadIdx.x % 32, head = blockIdx.x * ROPE_WARPS + threadIdx.x / 32;
    if (head >= tokens * heads) return;
    const size_t start = (size_t)head * 2 * half, angle = (size_t)positions[head / heads] * half;
    float a[PAIRS_PER_LANE], b[PAIRS_PER_LANE], squares = 0.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        a[n] = i < half ? x[start + i] : 0.0f;
        b[n] = i < half ? x[start + half + i] : 0.0f;
        squares += a[n] * a[n] + b[n] * b[n];
    }
    const float inverse = weight != nullptr ? rsqrtf(warp_sum(squares) / (2 * half) + eps) : 1.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        if (i >= half) continue;
        if (weight != nullptr) {
            a[n] *= inverse * weight[i];
            b[n] *= inverse * weight[half + i];
        }
        const float c = cos[angle + i], s = sin[angle + i];
        out[start + i] = a[n] * c - b[n] * s;
        out[start + half + i] = b[n] * c + a[n] * s;
    }
}

extern "C" __global__ void __launch_bounds__(ROPE_WARPS * 32)
training_norm_rope_backward(const float *x, const float *cos, const float *sin, const uint32_t *positions,
                            const float *weight, float eps, const float *gradient, float *out, bf16 *out_half,
                            uint32_t tokens, uint32_t heads, uint32_t half) {
    const uint32_t lane = threadIdx.x % 32, head = blockIdx.x * ROPE_WARPS + threadIdx.x / 32;
    if (head >= tokens * heads) return;
    const size_t start = (size_t)head * 2 * half, angle = (size_t)positions[head / heads] * half;
    float a[PAIRS_PER_LANE], b[PAIRS_PER_LANE], squares = 0.0f, products = 0.0f;
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        a[n] = b[n] = 0.0f;
        if (i >= half) continue;
        const float c = cos[angle + i], s = sin[angle + i];
        const float first = gradient[start + i], second = gradient[start + half + i];
        a[n] = first * c + second * s;
        b[n] = second * c - first * s;
        if (weight == nullptr) continue;
        const float x_first = x[start + i], x_second = x[start + half + i];
        a[n] *= weight[i];
        b[n] *= weight[half + i];
        squares += x_first * x_first + x_second * x_second;
        products += a[n] * x_first + b[n] * x_second;
    }
    float inverse = 1.0f, along = 0.0f;
    if (weight != nullptr) {
        inverse = rsqrtf(warp_sum(squares) / (2 * half) + eps);
        along = inverse * inverse * warp_sum(products) / (2 * half);
    }
#pragma unroll
    for (int n = 0; n < PAIRS_PER_LANE; n++) {
        const uint32_t i = lane + 32 * n;
        if (i >= half) continue;
        if (weight != nullptr) {
            a[n] = inverse * (a[n] - x[start + i] * along);
            b[n] = inverse * (b[n] - x[start + half + i] * along);
        }
        put(out, out_half, start + i, a[n]);
        put(out, out_half, start + half + i, b[n]);
    }
}

// One row, with the fields of `Span` in ../spans.rs as `uint32_t`.
struct TrainingSpan {
    uint32_t query_start, queries, key_start, keys, shared;
};

struct TrainingAttention {
    uint32_t heads, kv_heads, head_dim;
    // A query attends to itself and the `window - 1` positions before it, or to all of them if this is 0.
    uint32_t window;
    float scale;
    // Scores become cap * tanh(score / cap), or stay the same if this is 0.
    float softcap;
};

// The elements of a head that a lane holds. Supports heads of up to 32 * 8 elements.
constexpr int ELEMENTS_PER_LANE = 8;

struct Lane {
    float x[ELEMENTS_PER_LANE];
};

__device__ __forceinline__ Lane load_head(const float *x, uint32_t lane, uint32_t head_dim) {
    Lane own;
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) own.x[n] = lane + 32 * n < head_dim ? x[lane + 32 * n] : 0.0f;
    return own;
}

__device__ __forceinline__ float head_product(const Lane &a, const Lane &b) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) sum += a.x[n] * b.x[n];
    return warp_sum(sum);
}

__device__ __forceinline__ void add_scaled(Lane &sum, float factor, const Lane &x) {
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) sum.x[n] += factor * x.x[n];
}

// Returns the score of an inner product, and its derivative through `slope`.
__device__ __forceinline__ float score_of(float product, const TrainingAttention &shape, float *slope) {
    const float score = product * shape.scale;
    *slope = shape.scale;
    if (shape.softcap <= 0.0f) return score;
    const float share = tanhf(score / shape.softcap);
    *slope = shape.scale * (1.0f - share * share);
    return shape.softcap * share;
}

// The positions [first, last] that a query attends to, counted over the shared prefix and then the row's own tokens.
__device__ __forceinline__ void visible(const TrainingSpan &span, uint32_t query, uint32_t window, uint32_t *first,
                                        uint32_t *last) {
    *last = span.shared + span.keys - span.queries + query;
    *first = window != 0 && *last + 1 > window ? *last + 1 - window : 0;
}

// The prefix is the first keys of the pass.
__device__ __forceinline__ size_t key_at(const TrainingSpan &span, uint32_t position) {
    return position < span.shared ? position : span.key_start + position - span.shared;
}

// Each block is one warp that computes one query and head: the grid is (query, head). `log_sums`, (queries, heads), gets
// the logarithm of the sum of the exponentials of the scores.
extern "C" __global__ void __launch_bounds__(32)
training_attention(const float *q, const float *k, const float *v, const TrainingSpan *spans, const uint32_t *span_of,
                   float *out, bf16 *half, float *log_sums, TrainingAttention shape) {
    const uint32_t lane = threadIdx.x, query = blockIdx.x, head = blockIdx.y, dim = shape.head_dim;
    const TrainingSpan span = spans[span_of[query]];
    const uint32_t kv_width = shape.kv_heads * dim, column = head / (shape.heads / shape.kv_heads) * dim;
    const size_t row = ((size_t)query * shape.heads + head) * dim;
    const Lane own = load_head(q + row, lane, dim);
    Lane sum = {};
    float highest = -1e30f, total = 0.0f, slope;
    uint32_t first, last;
    visible(span, query - span.query_start, shape.window, &first, &last);
    for (uint32_t position = first; position <= last; position++) {
        const size_t at = key_at(span, position) * kv_width + column;
        const float score = score_of(head_product(own, load_head(k + at, lane, dim)), shape, &slope);
        const float next = fmaxf(highest, score);
        const float shrink = expf(highest - next), weight = expf(score - next);
        total = total * shrink + weight;
        highest = next;
#pragma unroll
        for (int n = 0; n < ELEMENTS_PER_LANE; n++) sum.x[n] *= shrink;
        add_scaled(sum, weight, load_head(v + at, lane, dim));
    }
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
        if (lane + 32 * n < dim) put(out, half, row + lane + 32 * n, sum.x[n] / total);
    }
    if (lane == 0) log_sums[(size_t)query * shape.heads + head] = highest + logf(total);
}

// Writes the gradients of the queries, and the sum of output times gradient to `along`, (queries, heads). The grid is
// that of `training_attention`.
extern "C" __global__ void __launch_bounds__(32)
training_attention_queries(const float *q, const float *k, const float *v, const float *output, const float *gradient,
                           const float *log_sums, const TrainingSpan *spans, const uint32_t *span_of, float *d_q,
                           float *along, TrainingAttention shape) {
    const uint32_t lane = threadIdx.x, query = blockIdx.x, head = blockIdx.y, dim = shape.head_dim;
    const TrainingSpan span = spans[span_of[query]];
    const uint32_t kv_width = shape.kv_heads * dim, column = head / (shape.heads / shape.kv_heads) * dim;
    const size_t pair = (size_t)query * shape.heads + head, row = pair * dim;
    const Lane own = load_head(q + row, lane, dim), d_out = load_head(gradient + row, lane, dim);
    const float mean = head_product(load_head(output + row, lane, dim), d_out), log_sum = log_sums[pair];
    Lane sum = {};
    uint32_t first, last;
    visible(span, query - span.query_start, shape.window, &first, &last);
    for (uint32_t position = first; position <= last; position++) {
        const size_t at = key_at(span, position) * kv_width + column;
        const Lane key = load_head(k + at, lane, dim);
        float slope;
        const float score = score_of(head_product(own, key), shape, &slope);
        const float d_weight = head_product(d_out, load_head(v + at, lane, dim));
        add_scaled(sum, expf(score - log_sum) * (d_weight - mean) * slope, key);
    }
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
        if (lane + 32 * n < dim) d_q[row + lane + 32 * n] = sum.x[n];
    }
    if (lane == 0) along[pair] = mean;
}

constexpr int KEY_WARPS = 8;

// Writes the gradients of the keys and values. Each block computes one key of one key-value head, the grid is (key,
// kv_head), and its warps share the (query, head) pairs that attend to the key. A key of the prefix, which is one of the
// first `prefix` keys, has such pairs in every row that shares it.
extern "C" __global__ void __launch_bounds__(KEY_WARPS * 32)
training_attention_keys(const float *q, const float *k, const float *v, const float *gradient, const float *log_sums,
                        const float *along, const TrainingSpan *spans, uint32_t rows, uint32_t prefix, float *d_k,
                        float *d_v, bf16 *d_v_half, TrainingAttention shape) {
    __shared__ float shared[KEY_WARPS][2][32 * ELEMENTS_PER_LANE];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, index = blockIdx.x, dim = shape.head_dim;
    const uint32_t group = shape.heads / shape.kv_heads;
    const size_t at = ((size_t)index * shape.kv_heads + blockIdx.y) * dim;
    const Lane key = load_head(k + at, lane, dim), value = load_head(v + at, lane, dim);
    Lane key_sum = {}, value_sum = {};
    for (uint32_t row = 0; row < rows; row++) {
        const TrainingSpan span = spans[row];
        const bool is_own = index >= span.key_start && index < span.key_start + span.keys;
        const bool is_shared = index < prefix && index < span.shared;
        if (!is_own && !is_shared) continue;
        const uint32_t position = is_own ? span.shared + index - span.key_start : index;
        // The position of the row's first query, and the queries that attend to the key.
        const uint32_t begin = span.shared + span.keys - span.queries;
        const uint32_t from = position > begin ? position - begin : 0;
        uint32_t to = span.queries;
        if (shape.window != 0) {
            const uint32_t end = position + shape.window;
            to = end <= begin ? 0 : end - begin < to ? end - begin : to;
        }
        if (from >= to) continue;
        for (uint32_t pair = warp; pair < (to - from) * group; pair += KEY_WARPS) {
            const size_t query = span.query_start + from + pair / group;
            const size_t head = query * shape.heads + blockIdx.y * group + pair % group;
            const Lane own = load_head(q + head * dim, lane, dim);
            const Lane d_out = load_head(gradient + head * dim, lane, dim);
            float slope;
            const float score = score_of(head_product(own, key), shape, &slope);
            const float weight = expf(score - log_sums[head]);
            add_scaled(key_sum, weight * (head_product(d_out, value) - along[head]) * slope, own);
            add_scaled(value_sum, weight, d_out);
        }
    }
#pragma unroll
    for (int n = 0; n < ELEMENTS_PER_LANE; n++) {
        shared[warp][0][lane + 32 * n] = key_sum.x[n];
        shared[warp][1][lane + 32 * n] = value_sum.x[n];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < dim; i += KEY_WARPS * 32) {
        float key_total = 0.0f, value_total = 0.0f;
        for (int other = 0; other < KEY_WARPS; other++) {
            key_total += shared[other][0][i];
            value_total += shared[other][1][i];
        }
        d_k[at + i] = key_total;
        put(d_v, d_v_half, at + i, value_total);
    }
}

// Writes the rows of x at these indices. Each block copies one row.
extern "C" __global__ void __launch_bounds__(THREADS)
training_select(const float *x, const uint32_t *indices, float *out, bf16 *half, uint32_t width) {
    const size_t from = (size_t)indices[blockIdx.x] * width, to = (size_t)blockIdx.x * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) put(out, half, to + i, x[from + i]);
}

// Adds the rows of x to those of `out` at these distinct indices. Each block adds one row.
extern "C" __global__ void __launch_bounds__(THREADS)
training_add_at(const float *x, const uint32_t *indices, float *out, bf16 *half, uint32_t width) {
    const size_t from = (size_t)blockIdx.x * width, to = (size_t)indices[blockIdx.x] * width;
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) put(out, half, to + i, out[to + i] + x[from + i]);
}

// One variable of the optimiser, with the fields of `TensorTable` in optimizer.rs.
struct TrainingTensor {
    float *variable, *first, *second, *gradient;
    uint64_t count;
};

// Writes the sum of the squares of each gradient. Each block computes one tensor.
extern "C" __global__ void __launch_bounds__(THREADS)
training_square_sums(const TrainingTensor *tensors, double *sums) {
    __shared__ double shared[THREADS];
    const TrainingTensor own = tensors[blockIdx.x];
    double sum = 0.0;
    for (uint64_t i = threadIdx.x; i < own.count; i += THREADS) sum += (double)own.gradient[i] * own.gradient[i];
    shared[threadIdx.x] = sum;
    for (uint32_t half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

// Multiplies each gradient by a factor. The grid is (blocks of a tensor, tensor).
extern "C" __global__ void __launch_bounds__(THREADS)
training_scale_gradients(const TrainingTensor *tensors, float factor) {
    const TrainingTensor own = tensors[blockIdx.y];
    for (uint64_t i = blockIdx.x * THREADS + threadIdx.x; i < own.count; i += gridDim.x * THREADS) {
        own.gradient[i] *= factor;
    }
}

struct TrainingAdamW {
    // The decay rates of the moments, and the shares of a new gradient, which are one minus the rates. A difference of
    // floats would not be precise enough.
    float beta1, share1, beta2, share2;
    float eps;
    // The learning rate divided by the bias correction of the first moment.
    float rate;
    // The root of the bias correction of the second moment.
    float root_correction;
    // The factor by which weight decay shrinks a variable.
    float decay;
};

// Updates the moments and each variable by one step of AdamW. The grid is that of `training_scale_gradients`.
extern "C" __global__ void __launch_bounds__(THREADS)
training_adamw(const TrainingTensor *tensors, TrainingAdamW step) {
    const TrainingTensor own = tensors[blockIdx.y];
    for (uint64_t i = blockIdx.x * THREADS + threadIdx.x; i < own.count; i += gridDim.x * THREADS) {
        const float gradient = own.gradient[i];
        const float first = own.first[i] * step.beta1 + gradient * step.share1;
        const float second = own.second[i] * step.beta2 + gradient * gradient * step.share2;
        own.first[i] = first;
        own.second[i] = second;
        const float root = sqrtf(second) / step.root_correction + step.eps;
        own.variable[i] = own.variable[i] * step.decay - first / root * step.rate;
    }
}
