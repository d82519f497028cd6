#include "norm.cu"

#include "check.h"

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

template <typename T, typename Alone, typename Fused>
void check(const std::string &dtype, Alone alone, Fused fused) {
    for (uint32_t width : {64u, 640u, 2304u, 8192u}) {
        const uint32_t rows = 3;
        const auto x = random<float>(rows * width, 3.0), weight = random<float>(width), post = random<float>(width);
        const auto y = random<T>(rows * width, 2.0);
        std::vector<T> out(rows * width);
        const std::string size = ", " + std::to_string(width) + " wide";
        emulation::launch({rows, 1}, THREADS, [&] { alone(x.data(), weight.data(), out.data(), width, 1e-6f); });
        expect("rms_norm_" + dtype + size, out, normed(widened(x), weight));
        for (const float *with : {(const float *)nullptr, post.data()}) {
            std::vector<float> sum(rows * width);
            emulation::launch({rows, 1}, THREADS, [&] {
                fused(x.data(), y.data(), with, weight.data(), sum.data(), out.data(), width, 1e-6f);
            });
            auto added = with ? normed(widened(y), post) : widened(y);
            for (size_t i = 0; i < added.size(); i++) added[i] += x[i];
            const std::string name = "add_rms_norm_" + dtype + (with ? ", post" : "") + size;
            expect(name + ", sum", sum, added);
            expect(name, out, normed(added, weight));
        }
    }
}

int main() {
    check<float>("f32", rms_norm_f32, add_rms_norm_f32);
    check<__nv_bfloat16>("bf16", rms_norm_bf16, add_rms_norm_bf16);
    return exit_code();
}
