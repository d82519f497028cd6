// Random deltas of low-rank adapters, packed as delta.cuh describes, and their values in double precision.

#pragma once

#include "check.h"
#include "delta.cuh"

// The order of the outputs in `Delta::b`.
struct Order {
    // 0 in plain order, otherwise half of the width of a head.
    uint32_t half = 0;

    // Returns the output that the word at tile n and lane / 4 = g of a chunk stands for.
    uint32_t output(uint32_t chunk, uint32_t n, uint32_t g) const {
        if (half == 0) return 32 * chunk + 8 * (g / 2) + 2 * n + g % 2;
        const uint32_t chunks = half / 16, head = chunk / chunks, j = chunk % chunks;
        return head * 2 * half + 16 * j + 4 * (g / 2) + 2 * (n % 2) + g % 2 + (n < 2 ? 0 : half);
    }
};

struct RandomDelta {
    uint32_t rows, outputs, rank, stride, offset;
    std::vector<__nv_bfloat16> low, b;
    std::vector<uint32_t> words;

    // The low-rank activations are a slice of rows that are wider than the rank. Of the ranks, only the first `used`
    // are not zero. `scale` is about the size of the delta.
    RandomDelta(uint32_t rows, uint32_t outputs, uint32_t rank, uint32_t used, double scale, Order order = {})
        : rows(rows), outputs(outputs), rank(rank), stride(rank + 48), offset(16),
          low(random<__nv_bfloat16>((size_t)rows * stride)),
          b(random<__nv_bfloat16>((size_t)outputs * rank, scale * 3 / std::sqrt(used))) {
        for (uint32_t output = 0; output < outputs; output++) {
            for (uint32_t r = used; r < rank; r++) b[output * rank + r] = {0};
        }
        const uint32_t chunks = (outputs + 31) / 32, steps = rank / 16;
        words.assign((size_t)chunks * steps * 256, 0);
        for (uint32_t i = 0; i < words.size(); i++) {
            const uint32_t part = i % 4, lane = i / 4 % 32, m = i / 128 % 2;
            const uint32_t step = i / 256 % steps, chunk = i / 256 / steps;
            const uint32_t output = order.output(chunk, 2 * m + part % 2, lane / 4);
            const uint32_t first = step * 16 + part / 2 * 8 + lane % 4 * 2;
            if (output >= outputs) continue;
            words[i] = b[output * rank + first].bits | (uint32_t)b[output * rank + first + 1].bits << 16;
        }
    }

    Delta argument() const { return {low.data() + offset, (const uint4 *)words.data(), stride, rank}; }

    double value(uint32_t row, uint32_t output) const {
        double sum = 0;
        for (uint32_t r = 0; r < rank; r++) {
            sum += wide(low[(size_t)row * stride + offset + r]) * wide(b[(size_t)output * rank + r]);
        }
        return sum;
    }
};

// Returns the part of the delta that the outputs contain on average: the projection of their difference from the
// outputs without a delta on the effect that the delta has in double precision. Rounding that lost small deltas would
// return about 0, and rounding the sum once returns about 1.
inline double kept(const std::vector<__nv_bfloat16> &found, const std::vector<double> &without,
                   const std::vector<double> &with) {
    double product = 0, squares = 0;
    for (size_t i = 0; i < with.size(); i++) {
        product += (wide(found[i]) - without[i]) * (with[i] - without[i]);
        squares += (with[i] - without[i]) * (with[i] - without[i]);
    }
    return product / squares;
}

inline void expect_kept(const std::string &name, double kept) {
    const bool agrees = std::fabs(kept - 1) < 0.1;
    failures += !agrees;
    printf("%-44s %.3f of a small delta is kept, allowed 0.9 to 1.1%s\n", name.c_str(), kept, agrees ? "" : "  WRONG");
}
