// Replaces CUDA's cuda_fp16.h: what our kernels use of it.

#pragma once

#include <stdint.h>

#include <cmath>

struct __half {
    uint16_t bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    float out = exponent == 0    ? std::ldexp((float)fraction, -24)
                : exponent == 31 ? (fraction ? NAN : INFINITY)
                                 : std::ldexp((float)(fraction + 1024), exponent - 25);
    return x.bits >> 15 ? -out : out;
}
