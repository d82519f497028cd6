#include "embed.cu"

#include "check.h"

template <> inline __half narrow<__half>(double x) {
    // Only for numbers that are normal in f16, and rounded towards zero.
    if (x == 0) return {0};
    int exponent;
    const double fraction = std::frexp(std::fabs(x), &exponent);
    return {(uint16_t)((x < 0) << 15 | std::max(exponent + 14, 1) << 10 | ((int)(fraction * 2048) & 1023))};
}
inline double wide(__half x) { return __half2float(x); }

template <typename Table, typename T, typename Kernel>
void check(const std::string &name, Kernel kernel) {
    for (uint32_t width : {64u, 640u, 2048u, 2304u}) {
        const std::vector<uint32_t> tokens = {3, 0, 6, 3, 5, 1, 1};
        const uint32_t rows = tokens.size(), warps = (width + 639) / 640, per_block = std::max(1u, 4 / warps);
        const auto table = random<Table>(7 * width);
        const auto weight = random<float>(width);
        const float scale = std::sqrt((float)width);
        std::vector<float> residual(rows * width);
        std::vector<T> normed(rows * width);
        emulation::launch({(rows + per_block - 1) / per_block, 1}, 32 * warps * per_block, [&] {
            kernel(table.data(), tokens.data(), scale, weight.data(), residual.data(), normed.data(), rows, width,
                   1e-6f);
        });
        std::vector<double> expected, expected_normed;
        for (uint32_t row = 0; row < rows; row++) {
            double squares = 0;
            for (uint32_t i = 0; i < width; i++) {
                expected.push_back(wide(table[tokens[row] * width + i]) * (double)scale);
                squares += expected.back() * expected.back();
            }
            for (uint32_t i = 0; i < width; i++) {
                expected_normed.push_back(expected[row * width + i] / std::sqrt(squares / width + 1e-6) * weight[i]);
            }
        }
        const std::string size = ", " + std::to_string(width) + " wide";
        expect(name + size + ", residual", residual, expected);
        expect(name + size, normed, expected_normed);
    }
}

template <typename T, typename Kernel>
void check_gather(const std::string &name, Kernel kernel) {
    for (uint32_t width : {64u, 72u, 1152u, 2304u}) {
        const std::vector<uint32_t> indices = {4, 0, 8, 4};
        const uint32_t rows = indices.size();
        const auto residual = random<float>(9 * width);
        const auto normed = random<T>(9 * width);
        std::vector<float> out_residual(rows * width);
        std::vector<T> out_normed(rows * width);
        emulation::launch({rows, 1}, 128, [&] {
            kernel(residual.data(), normed.data(), indices.data(), out_residual.data(), out_normed.data(), rows, width);
        });
        std::vector<double> expected, expected_normed;
        for (uint32_t i = 0; i < rows * width; i++) {
            expected.push_back(residual[indices[i / width] * width + i % width]);
            expected_normed.push_back(wide(normed[indices[i / width] * width + i % width]));
        }
        const std::string size = ", " + std::to_string(width) + " wide";
        expect(name + size + ", residual", out_residual, expected, 0);
        expect(name + size, out_normed, expected_normed, 0);
    }
}

int main() {
    check<__nv_bfloat16, __nv_bfloat16>("embed_norm_bf16_bf16", embed_norm_bf16_bf16);
    check<__half, __nv_bfloat16>("embed_norm_f16_bf16", embed_norm_f16_bf16);
    check<float, __nv_bfloat16>("embed_norm_f32_bf16", embed_norm_f32_bf16);
    check<__nv_bfloat16, float>("embed_norm_bf16_f32", embed_norm_bf16_f32);
    check<__half, float>("embed_norm_f16_f32", embed_norm_f16_f32);
    check<float, float>("embed_norm_f32_f32", embed_norm_f32_f32);
    check_gather<float>("gather_rows_f32", gather_rows_f32);
    check_gather<__nv_bfloat16>("gather_rows_bf16", gather_rows_bf16);
    return exit_code();
}
