// Compares the forward kernels of training with plain formulas in double precision, and the gradients with central
// differences of these formulas.

#include "training.cu"

#include "check.h"

using Values = std::vector<double>;

static Values widened(const std::vector<float> &x) { return Values(x.begin(), x.end()); }

// Returns the gradient of sum(weights * function(x)) with respect to x, by central differences. In double precision its
// error is far below that of the kernels.
template <typename Function>
static Values differences(Values x, const Values &weights, Function function) {
    Values gradient;
    for (double &value : x) {
        const double before = value, step = 1e-5;
        const auto sum = [&](double at) {
            value = at;
            const Values y = function(x);
            double total = 0;
            for (size_t i = 0; i < y.size(); i++) total += weights[i] * y[i];
            return total;
        };
        const double high = sum(before + step), low = sum(before - step);
        value = before;
        gradient.push_back((high - low) / (2 * step));
    }
    return gradient;
}

// Checks that `half` holds the values of `wide` rounded to bf16.
static void expect_rounded(const std::string &name, const std::vector<bf16> &half, const std::vector<float> &wide) {
    expect(name + ", rounded", half, widened(wide));
}

static Values normed(const Values &x, const std::vector<float> &weight) {
    const size_t width = weight.size();
    Values out(x.size());
    for (size_t row = 0; row < x.size(); row += width) {
        double sum = 0;
        for (size_t i = 0; i < width; i++) sum += x[row + i] * x[row + i];
        for (size_t i = 0; i < width; i++) out[row + i] = x[row + i] / std::sqrt(sum / width + 1e-6) * weight[i];
    }
    return out;
}

static void check_norms() {
    for (uint32_t width : {40u, 640u}) {
        const uint32_t rows = width == 40 ? 3 : 1;
        const auto x = random<float>(rows * width, 3.0), y = random<float>(rows * width, 2.0);
        const auto weight = random<float>(width), gradient = random<float>(rows * width);
        std::vector<float> out(rows * width);
        std::vector<bf16> half(rows * width);
        const std::string size = ", " + std::to_string(width) + " wide";
        emulation::launch({rows, 1}, THREADS, [&] {
            training_rms_norm(x.data(), weight.data(), out.data(), half.data(), width, 1e-6f);
        });
        expect("training_rms_norm" + size, out, normed(widened(x), weight));
        expect_rounded("training_rms_norm" + size, half, out);
        for (const float *post : {(const float *)nullptr, weight.data()}) {
            emulation::launch({rows, 1}, THREADS, [&] {
                training_add_norm(x.data(), y.data(), post, out.data(), width, 1e-6f);
            });
            Values expected = post ? normed(widened(y), weight) : widened(y);
            for (size_t i = 0; i < expected.size(); i++) expected[i] += x[i];
            expect("training_add_norm" + size + (post ? ", post" : ""), out, expected);
        }
        for (const float *residual : {(const float *)nullptr, y.data()}) {
            emulation::launch({rows, 1}, THREADS, [&] {
                training_rms_norm_backward(x.data(), weight.data(), gradient.data(), residual, out.data(),
                                           residual ? half.data() : nullptr, width, 1e-6f);
            });
            Values expected = differences(widened(x), widened(gradient),
                                          [&](const Values &x) { return normed(x, weight); });
            for (size_t i = 0; i < expected.size() && residual; i++) expected[i] += y[i];
            const std::string name = "training_rms_norm_backward" + size + (residual ? ", residual" : "");
            expect(name, out, expected);
            if (residual) expect_rounded(name, half, out);
        }
    }
}

static double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

static void check_geglu() {
    const uint32_t count = 1001;
    auto gate = random<float>(count, 6.0), up = random<float>(count);
    const auto gradient = random<float>(count);
    std::vector<float> out(count);
    std::vector<bf16> half(count), up_half(count);
    emulation::launch({2, 1}, 256, [&] { training_geglu(gate.data(), up.data(), out.data(), half.data(), count); });
    Values expected, d_gate, d_up;
    for (uint32_t i = 0; i < count; i++) {
        const double x = gate[i], step = 1e-5;
        expected.push_back(gelu(x) * up[i]);
        d_gate.push_back(gradient[i] * up[i] * (gelu(x + step) - gelu(x - step)) / (2 * step));
        d_up.push_back(gradient[i] * gelu(x));
    }
    expect("training_geglu", out, expected);
    expect_rounded("training_geglu", half, out);
    emulation::launch({2, 1}, 256, [&] {
        training_geglu_backward(gate.data(), half.data(), up.data(), up_half.data(), gradient.data(), count);
    });
    expect("training_geglu_backward, gate", gate, d_gate);
    expect("training_geglu_backward, up", up, d_up);
    expect_rounded("training_geglu_backward, gate", half, gate);
    expect_rounded("training_geglu_backward, up", up_half, up);
}

static void check_norm_rope() {
    for (uint32_t half : {5u, 32u, 128u}) {
        for (bool with_norm : {false, true}) {
            const uint32_t tokens = half == 128 ? 1 : 5, heads = half == 128 ? 1 : 3, table = 40;
            const auto x = random<float>(tokens * heads * 2 * half, 2.0), weight = random<float>(2 * half);
            const auto cos = random<float>(table * half), sin = random<float>(table * half);
            const auto gradient = random<float>(x.size());
            const std::vector<uint32_t> positions = {7, 0, 39, 12, 7};
            const auto formula = [&](const Values &x) {
                Values out(x.size());
                const Values own = with_norm ? normed(x, weight) : x;
                for (uint32_t head = 0; head < tokens * heads; head++) {
                    const uint32_t start = head * 2 * half, angle = positions[head / heads] * half;
                    for (uint32_t i = 0; i < half; i++) {
                        const double c = cos[angle + i], s = sin[angle + i];
                        out[start + i] = own[start + i] * c - own[start + half + i] * s;
                        out[start + half + i] = own[start + half + i] * c + own[start + i] * s;
                    }
                }
                return out;
            };
            std::vector<float> out(x.size());
            std::vector<bf16> rounded(x.size());
            const Dim3 grid = {(tokens * heads + ROPE_WARPS - 1) / ROPE_WARPS, 1};
            const float *norm = with_norm ? weight.data() : nullptr;
            emulation::launch(grid, ROPE_WARPS * 32, [&] {
                training_norm_rope(x.data(), cos.data(), sin.data(), positions.data(), norm, 1e-6f, out.data(), tokens,
                                   heads, half);
            });
            const std::string name = (with_norm ? ", norm" : "") + std::string(", half ") + std::to_string(half);
            expect("training_norm_rope" + name, out, formula(widened(x)));
            emulation::launch(grid, ROPE_WARPS * 32, [&] {
                training_norm_rope_backward(x.data(), cos.data(), sin.data(), positions.data(), norm, 1e-6f,
                                            gradient.data(), out.data(), rounded.data(), tokens, heads, half);
            });
            expect("training_norm_rope_backward" + name, out, differences(widened(x), widened(gradient), formula));
            expect_rounded("training_norm_rope_backward" + name, rounded, out);
        }
    }
}

// Computes attention by the plain formula. Rows share the first keys of the pass.
static Values attention(const Values &q, const Values &k, const Values &v, const std::vector<TrainingSpan> &spans,
                        const TrainingAttention &shape, Values *log_sums = nullptr) {
    Values out(q.size());
    const uint32_t dim = shape.head_dim;
    for (const TrainingSpan &span : spans) {
        for (uint32_t n = 0; n < span.queries; n++) {
            for (uint32_t head = 0; head < shape.heads; head++) {
                const size_t pair = (span.query_start + n) * shape.heads + head;
                const size_t column = head / (shape.heads / shape.kv_heads) * dim;
                const uint32_t last = span.shared + span.keys - span.queries + n;
                const uint32_t first = shape.window && last + 1 > shape.window ? last + 1 - shape.window : 0;
                Values scores;
                std::vector<size_t> at;
                double total = 0;
                for (uint32_t position = first; position <= last; position++) {
                    const size_t key = position < span.shared ? position : span.key_start + position - span.shared;
                    at.push_back(key * shape.kv_heads * dim + column);
                    double score = 0;
                    for (uint32_t i = 0; i < dim; i++) score += q[pair * dim + i] * k[at.back() + i];
                    score *= shape.scale;
                    if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
                    scores.push_back(score);
                    total += std::exp(score);
                }
                for (size_t j = 0; j < at.size(); j++) {
                    const double weight = std::exp(scores[j]) / total;
                    for (uint32_t i = 0; i < dim; i++) out[pair * dim + i] += weight * v[at[j] + i];
                }
                if (log_sums) (*log_sums)[pair] = std::log(total);
            }
        }
    }
    return out;
}

// The first row is the prefix of the others. In the last layer, it has no queries, and each other row has one.
static void check_attention(TrainingAttention shape, bool is_last) {
    constexpr uint32_t PREFIX = 6;
    const std::vector<std::pair<uint32_t, uint32_t>> lengths = {{PREFIX, 0}, {5, 6}, {1, 6}, {9, 3}, {4, 0}};
    std::vector<TrainingSpan> spans;
    std::vector<uint32_t> span_of;
    uint32_t queries = 0, keys = 0;
    for (auto [own, shared] : lengths) {
        if (!is_last || keys > 0) {
            const uint32_t count = is_last ? 1 : own;
            span_of.insert(span_of.end(), count, spans.size());
            spans.push_back({queries, count, keys, own, shared});
            queries += count;
        }
        keys += own;
    }
    const uint32_t q_width = shape.heads * shape.head_dim, kv_width = shape.kv_heads * shape.head_dim;
    const auto q = random<float>(queries * q_width, 2.0), k = random<float>(keys * kv_width, 2.0);
    const auto v = random<float>(keys * kv_width), gradient = random<float>(queries * q_width);
    std::vector<float> out(q.size()), log_sums(queries * shape.heads), along(log_sums.size());
    std::vector<float> d_q(q.size()), d_k(k.size()), d_v(v.size());
    std::vector<bf16> half(q.size()), d_v_half(v.size());
    emulation::launch({queries, shape.heads}, 32, [&] {
        training_attention(q.data(), k.data(), v.data(), spans.data(), span_of.data(), out.data(), half.data(),
                           log_sums.data(), shape);
    });
    emulation::launch({queries, shape.heads}, 32, [&] {
        training_attention_queries(q.data(), k.data(), v.data(), out.data(), gradient.data(), log_sums.data(),
                                   spans.data(), span_of.data(), d_q.data(), along.data(), shape);
    });
    emulation::launch({keys, shape.kv_heads}, KEY_WARPS * 32, [&] {
        training_attention_keys(q.data(), k.data(), v.data(), gradient.data(), log_sums.data(), along.data(),
                                spans.data(), (uint32_t)spans.size(), PREFIX, d_k.data(), d_v.data(), d_v_half.data(),
                                shape);
    });
    const Values wide_q = widened(q), wide_k = widened(k), wide_v = widened(v), weights = widened(gradient);
    Values sums(log_sums.size());
    const std::string name = ", " + std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " heads of " +
                             std::to_string(shape.head_dim) + (shape.window ? ", window" : "") +
                             (shape.softcap > 0 ? ", softcap" : "") + (is_last ? ", last" : "");
    expect("attention" + name, out, attention(wide_q, wide_k, wide_v, spans, shape, &sums));
    expect_rounded("attention" + name, half, out);
    expect("log sums" + name, log_sums, sums);
    expect("d_q" + name, d_q, differences(wide_q, weights, [&](const Values &q) {
        return attention(q, wide_k, wide_v, spans, shape);
    }));
    expect("d_k" + name, d_k, differences(wide_k, weights, [&](const Values &k) {
        return attention(wide_q, k, wide_v, spans, shape);
    }));
    expect("d_v" + name, d_v, differences(wide_v, weights, [&](const Values &v) {
        return attention(wide_q, wide_k, v, spans, shape);
    }));
    expect_rounded("d_v" + name, d_v_half, d_v);
}

static void check_rows() {
    const uint32_t width = 40;
    const std::vector<uint32_t> indices = {5, 0, 3};
    const auto x = random<float>(6 * width), added = random<float>(3 * width);
    std::vector<float> out(3 * width), sum = x;
    std::vector<bf16> half(3 * width), sum_half(6 * width);
    emulation::launch({3, 1}, THREADS, [&] {
        training_select(x.data(), indices.data(), out.data(), half.data(), width);
    });
    emulation::launch({3, 1}, THREADS, [&] {
        training_add_at(added.data(), indices.data(), sum.data(), sum_half.data(), width);
    });
    Values selected, expected = widened(x);
    for (uint32_t row = 0; row < 3; row++) {
        for (uint32_t i = 0; i < width; i++) {
            selected.push_back(x[indices[row] * width + i]);
            expected[indices[row] * width + i] += added[row * width + i];
        }
    }
    expect("training_select", out, selected, 0);
    expect_rounded("training_select", half, out);
    expect("training_add_at", sum, expected);
    for (uint32_t row : indices) {
        const std::vector<bf16> found(&sum_half[row * width], &sum_half[(row + 1) * width]);
        expect_rounded("training_add_at", found, std::vector<float>(&sum[row * width], &sum[(row + 1) * width]));
    }
    emulation::launch({1, 1}, 256, [&] { training_copy(x.data(), sum.data(), sum_half.data(), x.size()); });
    expect("training_copy", sum, widened(x), 0);
    expect_rounded("training_copy", sum_half, x);
}

static void check_optimizer() {
    const std::vector<uint64_t> counts = {1, 300, 1000};
    std::vector<std::vector<float>> variables, firsts, seconds, gradients;
    std::vector<TrainingTensor> tensors;
    for (uint64_t count : counts) {
        variables.push_back(random<float>(count));
        firsts.push_back(random<float>(count));
        seconds.push_back(random<float>(count));
        gradients.push_back(random<float>(count));
        for (float &second : seconds.back()) second = second * second;
    }
    for (size_t n = 0; n < counts.size(); n++) {
        tensors.push_back({variables[n].data(), firsts[n].data(), seconds[n].data(), gradients[n].data(), counts[n]});
    }
    std::vector<double> sums(counts.size());
    emulation::launch({(uint32_t)counts.size(), 1}, THREADS, [&] { training_square_sums(tensors.data(), sums.data()); });
    const Dim3 grid = {2, (uint32_t)counts.size()};
    std::vector<std::vector<float>> before = gradients;
    emulation::launch(grid, THREADS, [&] { training_scale_gradients(tensors.data(), 0.25f); });
    for (size_t n = 0; n < counts.size(); n++) {
        Values scaled, sum = {0};
        for (float x : before[n]) {
            scaled.push_back(0.25 * x);
            sum[0] += (double)x * x;
        }
        expect("training_square_sums", std::vector<float>{(float)sums[n]}, sum);
        expect("training_scale_gradients", gradients[n], scaled);
    }
    const TrainingAdamW step = {0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 0.01f, 0.3f, 0.99f};
    std::vector<Values> expected;
    for (size_t n = 0; n < counts.size(); n++) {
        Values variable, first, second;
        for (uint64_t i = 0; i < counts[n]; i++) {
            const double gradient = gradients[n][i];
            first.push_back(firsts[n][i] * 0.9 + gradient * 0.1);
            second.push_back(seconds[n][i] * 0.999 + gradient * gradient * 0.001);
            const double root = std::sqrt(second.back()) / 0.3 + 1e-8;
            variable.push_back(variables[n][i] * 0.99 - first.back() / root * 0.01);
        }
        expected.insert(expected.end(), {variable, first, second});
    }
    emulation::launch(grid, THREADS, [&] { training_adamw(tensors.data(), step); });
    for (size_t n = 0; n < counts.size(); n++) {
        expect("training_adamw, variable", variables[n], expected[3 * n]);
        expect("training_adamw, first moment", firsts[n], expected[3 * n + 1]);
        expect("training_adamw, second moment", seconds[n], expected[3 * n + 2]);
    }
}

int main() {
    check_norms();
    check_geglu();
    check_norm_rope();
    for (bool is_last : {false, true}) {
        check_attention({4, 1, 16, 0, 0.25f, 0}, is_last);
        check_attention({4, 2, 16, 4, 0.25f, 5}, is_last);
        check_attention({2, 2, 40, 0, 0.2f, 3}, is_last);
        check_attention({1, 1, 256, 3, 0.0625f, 0}, is_last);
    }
    check_rows();
    check_optimizer();
    return exit_code();
}
