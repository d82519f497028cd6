// Generates random inputs and compares a kernel's output with a formula in double precision.

#pragma once

#include <cuda_bf16.h>

#include <string>
#include <vector>

// A linear congruential generator (Knuth's MMIX constants) of numbers from -1 to 1, the same on every run.
struct Random {
    uint64_t state = 1;
    double next() {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        return (double)(state >> 40) / (1 << 23) - 1.0;
    }
};
inline Random source;

template <typename T> T narrow(double x);
template <> inline float narrow<float>(double x) { return (float)x; }
template <> inline __nv_bfloat16 narrow<__nv_bfloat16>(double x) { return __float2bfloat16((float)x); }
inline double wide(float x) { return x; }
inline double wide(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
std::vector<T> random(size_t count, double scale = 1.0) {
    std::vector<T> out(count);
    for (T &x : out) x = narrow<T>(source.next() * scale);
    return out;
}

// The largest error that arithmetic in float and rounding the result to the dtype can explain.
template <typename T> constexpr double TOLERANCE = 2e-5;
template <> inline constexpr double TOLERANCE<__nv_bfloat16> = 8e-3;

inline int failures = 0;

template <typename T>
void expect(const std::string &name, const std::vector<T> &found, const std::vector<double> &expected,
            double tolerance = TOLERANCE<T>) {
    double worst = 0.0;
    for (size_t i = 0; i < expected.size(); i++) {
        const double error = std::fabs(wide(found[i]) - expected[i]) / (1.0 + std::fabs(expected[i]));
        // Written so that NaN counts as the worst error.
        if (!(error <= worst)) worst = error;
    }
    const bool agrees = found.size() == expected.size() && worst <= tolerance;
    failures += !agrees;
    printf("%-44s %8zu values, largest error %.1e, allowed %.0e%s\n", name.c_str(), expected.size(), worst, tolerance,
           agrees ? "" : "  WRONG");
}

inline int exit_code() { return failures == 0 ? 0 : 1; }
