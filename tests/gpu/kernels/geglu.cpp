#include "geglu.cu"

#include "check.h"
#include "delta.h"

static double formula(double gate, double up) {
    return 0.5 * gate * (1 + std::tanh(std::sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
}

// The two halves of one product.
template <typename T>
struct Product {
    uint32_t rows, width;
    std::vector<T> values;
    Product(uint32_t rows, uint32_t width)
        : rows(rows), width(width), values(random<T>((size_t)rows * 2 * width, 6.0)) {}
    double gate(uint32_t row, uint32_t column) const { return wide(values[(size_t)row * 2 * width + column]); }
    double up(uint32_t row, uint32_t column) const { return wide(values[((size_t)row * 2 + 1) * width + column]); }
};

template <typename T, typename Kernel>
void check(const std::string &name, Kernel kernel) {
    for (uint32_t width : {64u, 72u, 1032u, 2048u}) {
        for (uint32_t rows : {1u, 4u, 7u}) {
            const Product<T> product(rows, width);
            std::vector<T> out(rows * width);
            const uint32_t columns = 128 * 16 / sizeof(T);
            emulation::launch({(rows + 3) / 4, (width + columns - 1) / columns}, 128, [&] {
                kernel(product.values.data(), product.values.data() + width, 2 * width, out.data(), rows, width);
            });
            std::vector<double> expected;
            for (uint32_t i = 0; i < rows * width; i++) {
                expected.push_back(formula(product.gate(i / width, i % width), product.up(i / width, i % width)));
            }
            expect(name + ", " + std::to_string(rows) + " x " + std::to_string(width), out, expected);
        }
    }
}

// The extremes: the exponential function overflows or is zero.
template <typename T, typename Kernel>
void check_extremes(const std::string &name, Kernel kernel) {
    std::vector<T> gate, up(16, narrow<T>(0.5)), out(16);
    for (double x : {0.0, 1e-30, -1e-30, 1e-3, -1e-3, 1.0, 4.0, -4.0, 12.0, -12.0, 40.0, -40.0, 1e4, -1e4, 1e15,
                     -1e15}) {
        gate.push_back(narrow<T>(x));
    }
    emulation::launch({1, 1}, 128, [&] { kernel(gate.data(), up.data(), 16, out.data(), 1, 16); });
    std::vector<double> expected;
    for (T x : gate) expected.push_back(formula(wide(x), 0.5));
    expect(name + ", extremes", out, expected);
}

static void check_delta(uint32_t rows, uint32_t width, uint32_t rank, bool with_gate, bool with_up, double scale,
                        bool is_small) {
    const Product<__nv_bfloat16> product(rows, width);
    const RandomDelta gate(rows, width, rank, rank - 4, scale), up(rows, width, rank, rank, scale);
    std::vector<__nv_bfloat16> out((size_t)rows * width);
    emulation::launch({(rows + 31) / 32, (width + 255) / 256}, 256, [&] {
        geglu_delta_bf16(product.values.data(), product.values.data() + width, 2 * width,
                         with_gate ? gate.argument() : Delta{}, with_up ? up.argument() : Delta{}, out.data(), rows,
                         width);
    });
    std::vector<double> expected, without;
    for (uint32_t i = 0; i < rows * width; i++) {
        const uint32_t row = i / width, column = i % width;
        without.push_back(formula(product.gate(row, column), product.up(row, column)));
        expected.push_back(formula(product.gate(row, column) + (with_gate ? gate.value(row, column) : 0),
                                   product.up(row, column) + (with_up ? up.value(row, column) : 0)));
    }
    if (is_small) return expect_kept("geglu_delta_bf16", kept(out, without, expected));
    expect("geglu_delta_bf16, " + std::to_string(rows) + " x " + std::to_string(width) + ", rank " +
               (with_gate ? std::to_string(rank) : "none") + ", " + (with_up ? std::to_string(rank) : "none"),
           out, expected);
}

int main() {
    check<float>("geglu_f32", geglu_f32);
    check<__nv_bfloat16>("geglu_bf16", geglu_bf16);
    check_extremes<float>("geglu_f32", geglu_f32);
    check_extremes<__nv_bfloat16>("geglu_bf16", geglu_bf16);
    for (uint32_t rank : {16u, 32u, 64u}) {
        check_delta(33, 72, rank, true, true, 0.5, false);
        check_delta(7, 544, rank, true, true, 0.5, false);
    }
    check_delta(40, 256, 16, true, false, 0.5, false);
    check_delta(40, 256, 16, false, true, 0.5, false);
    check_delta(40, 256, 16, false, false, 0.5, false);
    check_delta(64, 512, 16, true, true, 2e-3, true);
    return exit_code();
}
