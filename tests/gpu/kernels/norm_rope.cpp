#include "norm_rope.cu"

#include "check.h"
#include "delta.h"

// Rows that hold query heads, key heads, values, and columns that nobody may change.
struct Layout {
    uint32_t rows, heads, kv_heads, half, stride;
    uint32_t dim() const { return 2 * half; }
};

struct Angles {
    static constexpr uint32_t POSITIONS = 40;
    std::vector<float> cos, sin;
    std::vector<uint32_t> positions;
    Angles(uint32_t rows, uint32_t half) {
        for (uint32_t i = 0; i < POSITIONS * half; i++) {
            const double angle = i / half * std::pow(10000.0, -(double)(i % half) / half);
            cos.push_back((float)std::cos(angle));
            sin.push_back((float)std::sin(angle));
        }
        for (uint32_t row = 0; row < rows; row++) positions.push_back((row * 17 + 7) % POSITIONS);
    }
};

// Replaces the heads in `values` by the plain formula.
static void formula(std::vector<double> &values, const Layout &layout, const Angles &angles, const float *q_norm,
                    const float *k_norm) {
    const uint32_t half = layout.half;
    for (uint32_t row = 0; row < layout.rows; row++) {
        for (uint32_t head = 0; head < layout.heads + layout.kv_heads; head++) {
            double *own = &values[(size_t)row * layout.stride + head * layout.dim()];
            const float *weight = head < layout.heads ? q_norm : k_norm;
            double squares = 0;
            for (uint32_t i = 0; i < 2 * half; i++) squares += own[i] * own[i];
            for (uint32_t i = 0; i < 2 * half && weight; i++) {
                own[i] *= weight[i] / std::sqrt(squares / (2 * half) + 1e-6);
            }
            for (uint32_t i = 0; i < half; i++) {
                const uint32_t angle = angles.positions[row] * half + i;
                const double c = angles.cos[angle], s = angles.sin[angle], a = own[i], b = own[half + i];
                own[i] = a * c - b * s;
                own[half + i] = b * c + a * s;
            }
        }
    }
}

template <typename T>
static std::vector<double> widened(const std::vector<T> &x) {
    std::vector<double> out;
    for (T value : x) out.push_back(wide(value));
    return out;
}

static std::string described(const Layout &layout, bool with_norm) {
    return ", " + std::to_string(layout.heads) + " + " + std::to_string(layout.kv_heads) + " heads of " +
           std::to_string(layout.dim()) + (with_norm ? ", norm" : "");
}

template <typename T, typename Kernel>
void check(const std::string &name, Kernel kernel, std::vector<uint32_t> halves, uint32_t (*grid)(uint32_t, uint32_t),
           uint32_t threads) {
    for (uint32_t half : halves) {
        for (auto [heads, kv_heads] : {std::pair{3u, 1u}, {4u, 0u}, {0u, 2u}}) {
            for (bool with_norm : {false, true}) {
                const Layout layout = {5, heads, kv_heads, half, (heads + 2 * kv_heads) * 2 * half + 16};
                const Angles angles(layout.rows, half);
                const auto q_norm = random<float>(2 * half), k_norm = random<float>(2 * half);
                const float *q = with_norm ? q_norm.data() : nullptr, *k = with_norm ? k_norm.data() : nullptr;
                const auto x = random<T>(layout.rows * layout.stride, 2.0);
                auto expected = widened(x);
                formula(expected, layout, angles, q, k);
                const auto run = [&](const T *from, uint32_t stride, T *to, uint32_t out_stride) {
                    emulation::launch({grid(layout.rows * (heads + kv_heads), half), 1}, threads, [&] {
                        kernel(from, stride, to, out_stride, heads, kv_heads, q, k, 1e-6f, angles.cos.data(),
                               angles.sin.data(), angles.positions.data(), half, layout.rows);
                    });
                };
                auto in_place = x;
                run(in_place.data(), layout.stride, in_place.data(), layout.stride);
                expect(name + described(layout, with_norm), in_place, expected);
                // To dense rows.
                const uint32_t dense = (heads + kv_heads) * 2 * half;
                std::vector<T> out(layout.rows * dense);
                run(x.data(), layout.stride, out.data(), dense);
                std::vector<double> expected_dense;
                for (uint32_t i = 0; i < layout.rows * dense; i++) {
                    expected_dense.push_back(expected[i / dense * layout.stride + i % dense]);
                }
                expect(name + described(layout, with_norm) + ", dense", out, expected_dense);
            }
        }
    }
}

struct Deltas {
    bool q, k, v;
};

static void check_delta(const Layout &layout, uint32_t rank, bool with_norm, Deltas deltas, bool with_v, double scale,
                        bool is_small) {
    const uint32_t dim = layout.dim(), half = layout.half;
    const uint32_t q_width = layout.heads * dim, kv_width = layout.kv_heads * dim;
    const Angles angles(layout.rows, half);
    const auto q_norm = random<float>(dim), k_norm = random<float>(dim);
    const float *q_weight = with_norm ? q_norm.data() : nullptr, *k_weight = with_norm ? k_norm.data() : nullptr;
    const auto x = random<__nv_bfloat16>(layout.rows * layout.stride, 2.0);
    const auto values = random<float>(layout.rows * kv_width, 2.0);
    const RandomDelta q(layout.rows, q_width, rank, rank - 4, scale, {half});
    const RandomDelta k(layout.rows, kv_width, rank, rank, scale, {half});
    const RandomDelta v(layout.rows, kv_width, rank, rank, scale);
    auto out = x;
    emulation::launch({(layout.rows + 31) / 32, layout.heads + layout.kv_heads * (with_v ? 2 : 1)}, 128, [&] {
        norm_rope_delta_bf16(out.data(), layout.stride, out.data(), layout.stride, layout.heads, layout.kv_heads,
                             q_weight, k_weight, 1e-6f, angles.cos.data(), angles.sin.data(), angles.positions.data(),
                             half, layout.rows, deltas.q ? q.argument() : Delta{}, deltas.k ? k.argument() : Delta{},
                             deltas.v ? v.argument() : Delta{}, with_v ? values.data() : nullptr, q_width + kv_width);
    });
    const auto expected_of = [&](Deltas used) {
        auto expected = widened(x);
        for (uint32_t row = 0; row < layout.rows; row++) {
            double *own = &expected[(size_t)row * layout.stride];
            for (uint32_t i = 0; used.q && i < q_width; i++) own[i] += q.value(row, i);
            for (uint32_t i = 0; used.k && i < kv_width; i++) own[q_width + i] += k.value(row, i);
            for (uint32_t i = 0; with_v && i < kv_width; i++) {
                own[q_width + kv_width + i] = values[row * kv_width + i] + (used.v ? v.value(row, i) : 0);
            }
        }
        formula(expected, layout, angles, q_weight, k_weight);
        return expected;
    };
    const std::string name = "norm_rope_delta_bf16" + described(layout, with_norm);
    if (is_small) {
        const std::string of = deltas.v ? ", v" : ", q and k";
        return expect_kept("norm_rope_delta_bf16" + of, kept(out, expected_of({}), expected_of(deltas)));
    }
    expect(name + ", rank " + std::to_string(rank) + (with_v ? ", v" : ""), out, expected_of(deltas));
}

static uint32_t f32_grid(uint32_t heads, uint32_t) { return (heads + 3) / 4; }

static uint32_t bf16_grid(uint32_t heads, uint32_t half) {
    uint32_t lanes = 1;
    while (lanes < half / 8) lanes *= 2;
    return (heads + 256 / lanes - 1) / (256 / lanes);
}

int main() {
    check<float>("norm_rope_f32", norm_rope_f32, {4, 16, 36, 128}, f32_grid, 128);
    check<__nv_bfloat16>("norm_rope_bf16", norm_rope_bf16, {16, 32, 48, 64, 96, 128}, bf16_grid, 256);
    for (uint32_t half : {16u, 48u, 64u, 128u}) {
        for (bool with_norm : {false, true}) {
            const Layout layout = {37, 3, 2, half, 7 * 2 * half + 16};
            check_delta(layout, half == 64 ? 64 : 32, with_norm, {true, true, true}, true, 0.3, false);
            check_delta(layout, 16, with_norm, {true, true, false}, false, 0.3, false);
        }
    }
    const Layout layout = {19, 2, 1, 128, 4 * 256};
    for (bool with_norm : {false, true}) {
        check_delta(layout, 16, with_norm, {true, false, false}, false, 0.3, false);
        check_delta(layout, 16, with_norm, {false, true, true}, true, 0.3, false);
        check_delta(layout, 16, with_norm, {false, false, true}, true, 0.3, false);
        check_delta(layout, 16, with_norm, {false, false, false}, true, 0.3, false);
        check_delta({9, 0, 2, 128, 4 * 256}, 16, with_norm, {false, true, true}, true, 0.3, false);
        check_delta({9, 2, 0, 32, 2 * 64}, 16, with_norm, {true, false, false}, false, 0.3, false);
    }
    // With a norm. Without one, a query or key head at position 0 is the product's own bf16, which hides small deltas.
    check_delta({64, 2, 1, 128, 4 * 256}, 16, true, {true, true, false}, true, 7e-4, true);
    check_delta({64, 2, 2, 128, 6 * 256}, 16, false, {false, false, true}, true, 7e-4, true);
    return exit_code();
}
