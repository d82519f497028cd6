#include "geglu.cu"

#include "check.h"

template <typename T, typename Kernel>
void check(const char *name, Kernel kernel) {
    const uint32_t count = 3001;
    const auto gate = random<T>(count, 6.0), up = random<T>(count);
    std::vector<T> out(count);
    emulation::launch({3, 1}, 256, [&] { kernel(gate.data(), up.data(), out.data(), count); });
    std::vector<double> expected;
    for (uint32_t i = 0; i < count; i++) {
        const double x = wide(gate[i]);
        expected.push_back(0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) * wide(up[i]));
    }
    expect(name, out, expected);
}

int main() {
    check<float>("geglu_f32", geglu_f32);
    check<__nv_bfloat16>("geglu_bf16", geglu_bf16);
    return exit_code();
}
