#include "norm_rope.cu"

#include "check.h"

template <typename T, typename Kernel>
void check(const std::string &dtype, Kernel kernel) {
    for (uint32_t half : {16u, 32u, 128u}) {
        for (bool with_norm : {false, true}) {
            const uint32_t tokens = 5, heads = 3, table = 40;
            const auto x = random<T>(tokens * heads * 2 * half, 2.0);
            const auto weight = random<float>(2 * half);
            std::vector<float> cos, sin;
            for (uint32_t i = 0; i < table * half; i++) {
                const double angle = i / half * std::pow(10000.0, -(double)(i % half) / half);
                cos.push_back((float)std::cos(angle));
                sin.push_back((float)std::sin(angle));
            }
            const std::vector<uint32_t> positions = {7, 0, 39, 12, 7};
            std::vector<T> out(x.size());
            emulation::launch({(tokens * heads + WARPS - 1) / WARPS, 1}, WARPS * 32, [&] {
                kernel(x.data(), cos.data(), sin.data(), positions.data(), with_norm ? weight.data() : nullptr, 1e-6f,
                       out.data(), tokens, heads, half);
            });
            std::vector<double> expected(x.size());
            for (uint32_t head = 0; head < tokens * heads; head++) {
                const uint32_t start = head * 2 * half, angle = positions[head / heads] * half;
                std::vector<double> own(2 * half);
                double squares = 0;
                for (uint32_t i = 0; i < 2 * half; i++) {
                    own[i] = wide(x[start + i]);
                    squares += own[i] * own[i];
                }
                for (uint32_t i = 0; i < 2 * half && with_norm; i++) {
                    own[i] *= weight[i] / std::sqrt(squares / (2 * half) + 1e-6);
                }
                for (uint32_t i = 0; i < half; i++) {
                    const double c = cos[angle + i], s = sin[angle + i];
                    expected[start + i] = own[i] * c - own[half + i] * s;
                    expected[start + half + i] = own[half + i] * c + own[i] * s;
                }
            }
            expect("norm_rope_" + dtype + (with_norm ? ", norm" : "") + ", half " + std::to_string(half), out, expected);
        }
    }
}

int main() {
    check<float>("f32", norm_rope_f32);
    check<__nv_bfloat16>("bf16", norm_rope_bf16);
    return exit_code();
}
