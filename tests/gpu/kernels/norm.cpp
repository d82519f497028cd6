#include "norm.cu"

#include "check.h"
#include "delta.h"

// Computes RMSNorm of each row by the plain formula.
static std::vector<double> normed(const std::vector<double> &x, const std::vector<float> &weight) {
    const size_t width = weight.size();
    std::vector<double> out(x.size());
    for (size_t row = 0; row < x.size(); row += width) {
        double sum = 0;
        for (size_t i = 0; i < width; i++) sum += x[row + i] * x[row + i];
        for (size_t i = 0; i < width; i++) out[row + i] = x[row + i] / std::sqrt(sum / width + 1e-6) * weight[i];
    }
    return out;
}

template <typename T>
static std::vector<double> widened(const std::vector<T> &x) {
    std::vector<double> out;
    for (T value : x) out.push_back(wide(value));
    return out;
}

static std::vector<double> sum_of(const std::vector<float> &residual, std::vector<double> y,
                                  const std::vector<float> *post) {
    if (post) y = normed(y, *post);
    for (size_t i = 0; i < y.size(); i++) y[i] += residual[i];
    return y;
}

// The launch that rows.cuh states.
template <typename Kernel>
static void launch_rows(uint32_t rows, uint32_t width, Kernel kernel) {
    const uint32_t warps = (width + 639) / 640, per_block = std::max(1u, 4 / warps);
    emulation::launch({(rows + per_block - 1) / per_block, 1}, 32 * warps * per_block, kernel);
}

template <typename T, typename Alone, typename Fused>
void check(const std::string &dtype, Alone alone, Fused fused) {
    for (uint32_t width : {64u, 72u, 640u, 1152u, 2048u, 2304u, 3840u, 5376u, 8192u}) {
        const uint32_t rows = width < 1000 ? 9 : 3;
        const auto x = random<float>(rows * width, 3.0), weight = random<float>(width), post = random<float>(width);
        const auto y = random<T>(rows * width, 2.0);
        std::vector<T> out(rows * width);
        const std::string size = ", " + std::to_string(width) + " wide";
        launch_rows(rows, width, [&] { alone(x.data(), weight.data(), out.data(), rows, width, 1e-6f); });
        expect("rms_norm_" + dtype + size, out, normed(widened(x), weight));
        for (const auto *with : {(const std::vector<float> *)nullptr, &post}) {
            std::vector<float> sum(x);
            launch_rows(rows, width, [&] {
                fused(sum.data(), y.data(), with ? with->data() : nullptr, weight.data(), sum.data(), out.data(), rows,
                      width, 1e-6f);
            });
            const auto expected = sum_of(x, widened(y), with);
            const std::string name = "add_rms_norm_" + dtype + (with ? ", post" : "") + size;
            expect(name + ", sum", sum, expected);
            expect(name, out, normed(expected, weight));
        }
    }
}

// Rank 0 stands for no delta.
static void check_delta(const char *kernel_name, decltype(add_rms_norm_delta_bf16) kernel, uint32_t columns_per_warp,
                        std::vector<uint32_t> widths) {
    for (uint32_t width : widths) {
        for (uint32_t rank : {0u, 16u, 32u, 64u}) {
            if (rank > 16 && width > 640 && width != widths.back()) continue;
            const uint32_t rows = 11;
            const auto x = random<float>(rows * width, 3.0), weight = random<float>(width), post = random<float>(width);
            const auto y = random<__nv_bfloat16>(rows * width, 2.0);
            const RandomDelta delta(rows, width, std::max(rank, 16u), std::max(rank, 12u) - 4, 0.5);
            auto with_delta = widened(y);
            for (size_t i = 0; rank && i < y.size(); i++) with_delta[i] += delta.value(i / width, i % width);
            for (const auto *with : {(const std::vector<float> *)nullptr, &post}) {
                // In place, and from one buffer to another.
                for (bool in_place : {false, true}) {
                    std::vector<float> sum(in_place ? x : std::vector<float>(x.size()));
                    std::vector<__nv_bfloat16> out(y.size());
                    const uint32_t warps = (width + columns_per_warp - 1) / columns_per_warp;
                    emulation::launch({(rows + 7) / 8, 1}, 32 * warps, [&] {
                        kernel(in_place ? sum.data() : x.data(), y.data(), rank ? delta.argument() : Delta{},
                               with ? with->data() : nullptr, weight.data(), sum.data(), out.data(), rows, width,
                               1e-6f);
                    });
                    const auto expected = sum_of(x, with_delta, with);
                    const std::string name = std::string(kernel_name) + (with ? ", post" : "") + ", " +
                                             std::to_string(width) + " wide, rank " + std::to_string(rank);
                    expect(name + ", sum", sum, expected);
                    expect(name, out, normed(expected, weight));
                }
            }
        }
    }
}

// A delta of a fraction of a unit of bf16 must reach the sum, and the normalised sum on average.
static void check_small_delta() {
    const uint32_t rows = 32, width = 1152;
    const auto x = random<float>(rows * width, 3.0), weight = random<float>(width);
    const auto y = random<__nv_bfloat16>(rows * width, 2.0);
    const RandomDelta delta(rows, width, 16, 16, 4e-4);
    auto with_delta = widened(y);
    for (size_t i = 0; i < y.size(); i++) with_delta[i] += delta.value(i / width, i % width);
    std::vector<float> sum(x.size());
    std::vector<__nv_bfloat16> out(y.size());
    emulation::launch({rows / 8, 1}, 32 * 9, [&] {
        add_rms_norm_delta_bf16(x.data(), y.data(), delta.argument(), nullptr, weight.data(), sum.data(), out.data(),
                                rows, width, 1e-6f);
    });
    const auto without = normed(sum_of(x, widened(y), nullptr), weight);
    expect_kept("add_rms_norm_delta_bf16", kept(out, without, normed(sum_of(x, with_delta, nullptr), weight)));
}

int main() {
    check<float>("f32", rms_norm_f32, add_rms_norm_f32);
    check<__nv_bfloat16>("bf16", rms_norm_bf16, add_rms_norm_bf16);
    check_delta("add_rms_norm_delta_bf16", add_rms_norm_delta_bf16, 128, {64, 72, 640, 2304, 4096});
    check_delta("add_rms_norm_delta_wide_bf16", add_rms_norm_delta_wide_bf16, 256, {72, 640, 5376, 8192});
    check_small_delta();
    return exit_code();
}
