#include "low_rank.cu"

#include "check.h"

template <typename Kernel>
static void check(const std::string &name, uint32_t ranks, Kernel kernel) {
    for (uint32_t width : {32u, 96u, 640u, 2048u}) {
        for (uint32_t rows : {1u, 32u, 45u}) {
            for (uint32_t warps : {1u, 4u, ranks < 64 ? 16u : 8u}) {
                const uint32_t stride = width + 24;
                const auto x = random<__nv_bfloat16>((size_t)rows * stride), a = random<__nv_bfloat16>(ranks * width, 0.2);
                std::vector<__nv_bfloat16> out((size_t)rows * ranks + 16, narrow<__nv_bfloat16>(7.0));
                emulation::launch({(rows + 31) / 32, 1}, 32 * warps,
                                  [&] { kernel(x.data(), stride, a.data(), out.data(), rows, width); });
                std::vector<double> expected;
                for (uint32_t i = 0; i < rows * ranks; i++) {
                    double sum = 0;
                    for (uint32_t k = 0; k < width; k++) {
                        sum += wide(x[(size_t)(i / ranks) * stride + k]) * wide(a[(size_t)(i % ranks) * width + k]);
                    }
                    expected.push_back(sum);
                }
                // What lies behind the result stays as it is.
                expected.resize(out.size(), 7.0);
                expect(name + ", " + std::to_string(rows) + " x " + std::to_string(width) + ", " +
                           std::to_string(warps) + " warps",
                       out, expected);
            }
        }
    }
}

int main() {
    check("low_rank_16", 16, low_rank_16);
    check("low_rank_32", 32, low_rank_32);
    check("low_rank_48", 48, low_rank_48);
    check("low_rank_64", 64, low_rank_64);
    return exit_code();
}
