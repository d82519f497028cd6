#include "fp8.cu"

#include <limits>

#include "check.h"

// Returns the number that a code stands for, by the definition of e4m3.
static double value(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

static uint8_t code_of(double x) {
    return (uint8_t)__nv_cvt_float2_to_fp8x2({(float)x, 0.0f}, __NV_SATFINITE, __NV_E4M3);
}

// Every code stands for itself. Halfway between two neighbours, the even code wins, and next to that the nearer one.
static void check_conversion() {
    int wrong = 0;
    for (int code = 0; code < 256; code++) {
        if ((code & 0x7f) == 0x7f) {
            wrong += !std::isnan(value(code)) || (code_of(NAN) & 0x7f) != 0x7f;
            continue;
        }
        wrong += code_of(value(code)) != code;
        if ((code & 0x7f) == 0x7e) continue;
        const uint8_t next = code + 1, even = code % 2 == 0 ? code : next;
        const float tie = (float)((value(code) + value(next)) / 2);
        wrong += code_of(tie) != even;
        wrong += code_of(std::nextafter(tie, (float)value(code))) != code;
        wrong += code_of(std::nextafter(tie, (float)value(next))) != next;
    }
    for (double large : {448.0, 449.0, 464.0, 480.0, 1e30, (double)std::numeric_limits<float>::infinity()}) {
        wrong += code_of(large) != 0x7e || code_of(-large) != 0xfe;
    }
    // The second of two floats is the upper byte.
    wrong += __nv_cvt_float2_to_fp8x2({1.0f, -448.0f}, __NV_SATFINITE, __NV_E4M3) != 0xfe38;
    failures += wrong != 0;
    printf("%-44s %8d values, %d wrong\n", "conversion to e4m3", 256, wrong);
}

// Compares codes and scales with rows in double precision. `error` is how far the kernel's float may be from a row's
// largest magnitude, relative to it.
static void expect_rows(const std::string &name, const std::vector<uint8_t> &codes, const std::vector<float> &scales,
                        const std::vector<double> &expected, double error) {
    const size_t width = codes.size() / scales.size();
    double worst_scale = 0, worst = 0;
    for (size_t row = 0; row < scales.size(); row++) {
        double largest = 0;
        for (size_t i = 0; i < width; i++) largest = std::max(largest, std::fabs(expected[row * width + i]));
        const double scale_error = largest > 0 ? std::fabs(scales[row] * 448.0 / largest - 1) : std::fabs(scales[row]);
        if (!(scale_error <= worst_scale)) worst_scale = scale_error;
        for (size_t i = 0; i < width; i++) {
            const double x = largest > 0 ? expected[row * width + i] / largest * 448 : 0;
            // Half the distance of two codes around x: 2^-4 of its power of two, at least half of 2^-9.
            const double half = std::ldexp(1.0, std::max(-6, std::ilogb(std::fabs(x) + 1e-30)) - 4);
            const double allowed = half + 2 * error * 448;
            const double found = std::fabs(value(codes[row * width + i]) - x) / allowed;
            if (!(found <= worst)) worst = found;
        }
    }
    const bool agrees = worst_scale <= error && worst <= 1;
    failures += !agrees;
    printf("%-44s %8zu values, largest error %.3f of half a step, scales %.1e, allowed 1 and %.0e%s\n", name.c_str(),
           codes.size(), worst, worst_scale, error, agrees ? "" : "  WRONG");
}

static double geglu(double x, double y) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) * y;
}

// Rows of different sizes, so that a scale of another row would be noticed, and one row of zeros.
static double size_of(uint32_t row) { return row == 2 ? 0.0 : std::pow(5.0, row % 5); }

static void check_rows(uint32_t width) {
    const uint32_t rows = 7, stride = 2 * width, threads = 32 * ((width + 1023) / 1024);
    auto both = random<__nv_bfloat16>((size_t)rows * stride, 3.0), x = random<__nv_bfloat16>((size_t)rows * width);
    std::vector<double> products, plain;
    for (uint32_t row = 0; row < rows; row++) {
        for (uint32_t i = 0; i < width; i++) {
            auto &up = both[(size_t)row * stride + width + i];
            up = narrow<__nv_bfloat16>(wide(up) * size_of(row));
            products.push_back(geglu(wide(both[(size_t)row * stride + i]), wide(up)));
            auto &own = x[(size_t)row * width + i];
            own = narrow<__nv_bfloat16>(wide(own) * size_of(row));
            plain.push_back(wide(own));
        }
    }
    const std::string size = ", " + std::to_string(width) + " wide";
    std::vector<uint8_t> codes((size_t)rows * width);
    std::vector<float> scales(rows);
    emulation::launch({rows, 1}, threads, [&] {
        geglu_fp8(both.data(), both.data() + width, stride, codes.data(), scales.data(), width);
    });
    expect_rows("geglu_fp8" + size, codes, scales, products, 2e-6);
    emulation::launch({rows, 1}, threads, [&] { quantise_rows_fp8(x.data(), codes.data(), scales.data(), width); });
    expect_rows("quantise_rows_fp8" + size, codes, scales, plain, 2e-7);
}

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

static void check_norm(uint32_t width) {
    const uint32_t rows = width < 1000 ? 9 : 3, warps = (width + 639) / 640, per_block = std::max(1u, 4 / warps);
    const auto x = random<float>((size_t)rows * width, 3.0), weight = random<float>(width), post = random<float>(width);
    auto y = random<__nv_bfloat16>((size_t)rows * width, 2.0);
    for (const auto *with : {(const std::vector<float> *)nullptr, &post}) {
        std::vector<float> sum(x), scales(rows);
        std::vector<uint8_t> codes((size_t)rows * width);
        emulation::launch({(rows + per_block - 1) / per_block, 1}, 32 * warps * per_block, [&] {
            add_rms_norm_fp8(sum.data(), y.data(), with ? with->data() : nullptr, weight.data(), sum.data(), codes.data(),
                             scales.data(), rows, width, 1e-6f);
        });
        std::vector<double> expected;
        for (auto value : y) expected.push_back(wide(value));
        if (with) expected = normed(expected, *with);
        for (size_t i = 0; i < expected.size(); i++) expected[i] += x[i];
        const std::string name = std::string("add_rms_norm_fp8") + (with ? ", post" : "") + ", " + std::to_string(width) + " wide";
        expect(name + ", sum", sum, expected);
        expect_rows(name, codes, scales, normed(expected, weight), 5e-6);
    }
}

int main() {
    check_conversion();
    for (uint32_t width : {64u, 128u, 1024u, 2048u, 6912u, 16384u, 32768u}) check_rows(width);
    for (uint32_t width : {64u, 72u, 640u, 1152u, 2304u, 5376u, 8192u}) check_norm(width);
    return exit_code();
}
