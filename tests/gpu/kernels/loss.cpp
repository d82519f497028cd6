// Compares the kernels of the loss with plain formulas in double precision.

#include "loss.cu"

#include "check.h"

using Values = std::vector<double>;

// Splits x, and checks that the two parts together are close to it: each rounding leaves an error of 2^-9.
static void check_split() {
    const auto x = random<float>(1001, 8.0);
    std::vector<bf16> parts(2 * x.size());
    emulation::launch({2, 1}, THREADS, [&] { loss_split(x.data(), parts.data(), x.size()); });
    std::vector<float> sums, high;
    Values expected, rounded;
    for (size_t i = 0; i < x.size(); i++) {
        sums.push_back(__bfloat162float(parts[i]) + __bfloat162float(parts[x.size() + i]));
        high.push_back(__bfloat162float(parts[i]));
        expected.push_back(x[i]);
        rounded.push_back(__bfloat162float(__float2bfloat16(x[i])));
    }
    expect("loss_split, sum of the parts", sums, expected, 1e-5);
    expect("loss_split, high part", high, rounded, 0.0);
}

static void check_add() {
    const size_t count = 301, terms = 5;
    const auto x = random<float>(count * terms);
    std::vector<float> out(count);
    emulation::launch({1, 1}, THREADS, [&] { loss_add(x.data(), out.data(), count, terms); });
    Values expected(count);
    for (size_t i = 0; i < x.size(); i++) expected[i % count] += x[i];
    expect("loss_add", out, expected);
}

// The targets of four rows: none, one token, the first and last token of a chunk and of the vocabulary, and more tokens
// than a block has threads.
struct Targets {
    std::vector<LossRow> rows;
    std::vector<LossToken> tokens;

    explicit Targets(uint32_t vocabulary) {
        const auto add = [&](float weight, const std::vector<LossToken> &own) {
            rows.push_back({weight, (uint32_t)tokens.size(), (uint32_t)own.size()});
            tokens.insert(tokens.end(), own.begin(), own.end());
        };
        add(0.0f, {});
        add(0.5f, {{17, 0.5f}});
        add(1.0f, {{0, 0.25f}, {std::min(CHUNK, vocabulary / 2), 0.25f}, {vocabulary - 1, 0.5f}});
        std::vector<LossToken> many;
        for (uint32_t i = 0; i < 300; i++) many.push_back({3 * i, 2.0f / 300});
        add(2.0f, many);
    }
};

static void check_loss(uint32_t vocabulary, float cap, bool is_half) {
    const Targets targets(vocabulary);
    const uint32_t rows = targets.rows.size();
    const size_t count = (size_t)rows * vocabulary;
    auto logits = random<float>(count, 12.0);
    const auto low = random<float>(count, 0.1);
    const Dim3 grid = {(vocabulary + CHUNK - 1) / CHUNK, rows};
    std::vector<LossChunk> chunks(grid.x * rows);
    Values capped, gradient(count), losses;
    for (size_t i = 0; i < count; i++) {
        const double x = logits[i] + (is_half ? (double)low[i] : 0.0);
        capped.push_back(cap > 0 ? cap * std::tanh(x / cap) : x);
    }
    for (uint32_t row = 0; row < rows; row++) {
        const LossRow &own = targets.rows[row];
        const double *x = &capped[(size_t)row * vocabulary];
        double *out = &gradient[(size_t)row * vocabulary], total = 0, loss = 0;
        for (uint32_t i = 0; i < vocabulary; i++) total += std::exp(x[i]);
        for (uint32_t i = 0; i < vocabulary; i++) out[i] = own.weight * std::exp(x[i]) / total;
        for (uint32_t i = own.first; i < own.first + own.count; i++) {
            const LossToken &token = targets.tokens[i];
            out[token.id] -= token.weight;
            loss += token.weight * (std::log(total) - x[token.id]);
        }
        for (uint32_t i = 0; i < vocabulary && cap > 0; i++) out[i] *= 1 - x[i] / cap * x[i] / cap;
        losses.push_back(loss);
    }
    const std::string name = ", " + std::to_string(vocabulary) + (cap > 0 ? ", cap" : "") + (is_half ? ", bf16" : "");
    emulation::launch(grid, THREADS, [&] {
        loss_cap(logits.data(), is_half ? low.data() : nullptr, chunks.data(), vocabulary, cap);
    });
    expect("loss_cap" + name, logits, capped);
    std::vector<float> found(count, NAN);
    std::vector<double> found_losses(rows, NAN);
    if (is_half) {
        std::vector<bf16> parts(2 * count);
        emulation::launch(grid, THREADS, [&] {
            loss_gradient_bf16(logits.data(), chunks.data(), targets.rows.data(), targets.tokens.data(), parts.data(),
                               found_losses.data(), vocabulary, cap);
        });
        for (size_t i = 0; i < count; i++) found[i] = __bfloat162float(parts[i]) + __bfloat162float(parts[count + i]);
    } else {
        emulation::launch(grid, THREADS, [&] {
            loss_gradient_f32(logits.data(), chunks.data(), targets.rows.data(), targets.tokens.data(), found.data(),
                              found_losses.data(), vocabulary, cap);
        });
    }
    // Most values of a softmax are small, so errors are relative to the largest value of a row, and to each value.
    Values ones;
    std::vector<float> ratios;
    for (size_t i = vocabulary; i < count; i++) {
        ones.push_back(1);
        ratios.push_back(gradient[i] == 0 ? 1 + found[i] : found[i] / gradient[i]);
    }
    expect("loss_gradient" + name, found, gradient, 2e-6);
    expect("loss_gradient, ratio" + name, ratios, ones, 1e-4);
    const std::vector<float> rounded(found_losses.begin(), found_losses.end());
    expect("loss_gradient, loss" + name, rounded, losses, 1e-6);
}

int main() {
    check_split();
    check_add();
    for (uint32_t vocabulary : {1000u, CHUNK, 2 * CHUNK + 133}) {
        for (float cap : {0.0f, 5.0f}) {
            for (bool is_half : {false, true}) check_loss(vocabulary, cap, is_half);
        }
    }
    return exit_code();
}
