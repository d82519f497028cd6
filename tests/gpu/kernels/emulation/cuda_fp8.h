// The part of CUDA's cuda_fp8.h that our kernels use: conversions from float to e4m3, which round to nearest even.
//
// e4m3 has a sign, 4 bits of the exponent with a bias of 7, and 3 bits of the mantissa. There are no infinities. The
// largest magnitude is 448 (0x7e), and 0x7f and 0xff are NaN.

#pragma once

#include "cuda_bf16.h"

struct float2 {
    float x, y;
};
typedef uint16_t __nv_fp8x2_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

namespace emulation {

// Magnitudes above 448 become 448, infinity too, as with `cvt.satfinite`.
inline uint8_t e4m3(float x) {
    if (std::isnan(x)) return 0x7f;
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    const float magnitude = std::fabs(x);
    if (magnitude >= 448) return sign | 0x7e;
    // Numbers below 2^-6 are multiples of 2^-9. Rounding up to 2^-6 gives its code, 8.
    if (magnitude < 0x1p-6f) return sign | (uint8_t)std::nearbyint(std::ldexp(magnitude, 9));
    const int exponent = std::ilogb(magnitude);
    // 8 to 16 eighths. A sum with 16 carries into the exponent, as it should.
    const int eighths = (int)std::nearbyint(std::ldexp(magnitude, 3 - exponent));
    return sign | (uint8_t)(((exponent + 7) << 3) + eighths - 8);
}

}  // namespace emulation

inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t interpretation) {
    if (saturation != __NV_SATFINITE || interpretation != __NV_E4M3) emulation::fail("only e4m3 that saturates is known");
    return emulation::e4m3(x.x) | emulation::e4m3(x.y) << 8;
}
