// Computes the products in FP8 that we request from cublasLt, as plain loops with float sums. Everything that NVIDIA
// documents as a condition of these products is checked, and what it does not support is refused. As in cublasLt, the
// work is queued on the stream. EMULATED_CUBLAS_VERSION sets the version.

#include <cmath>
#include <cstdlib>
#include <vector>

#include "enqueue.h"

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 7, INTERNAL_ERROR = 14, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_BF16 = 14, R_E4M3 = 28, COMPUTE_32F = 68, OUTER_VECTOR = 3 };

size_t version() {
    const char *set = getenv("EMULATED_CUBLAS_VERSION");
    return set ? strtoull(set, nullptr, 10) : 130002;
}

struct Operation {
    int compute, scale_type;
    int32_t a_transposed = 0, b_transposed = 0, a_mode = 0, b_mode = 0;
    int8_t fast_accumulation = 0;
    const float *a_scales = nullptr, *b_scales = nullptr;
};
struct Layout {
    int type;
    int64_t rows, columns, stride;
};
struct Preference {
    uint64_t workspace_bytes = 0;
};
struct Algorithm {
    uint64_t data[8];
};
struct Found {
    Algorithm algorithm;
    size_t workspace_bytes;
    int state;
    float waves;
    int reserved[4];
};

// Marks an algorithm as chosen for a size by the heuristic. Its workspace is not used, but must be there.
constexpr uint64_t CHOSEN = 0x0f8;
constexpr size_t NEEDED_BYTES = 1 << 20;

bool is_supported(const Operation &operation, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    // Products of e4m3 are computed only with A transposed, whose rows are then the columns of the layout.
    return version() >= 120900 && operation.compute == COMPUTE_32F && operation.scale_type == R_32F &&
           operation.a_transposed == 1 && operation.b_transposed == 0 && operation.a_mode == OUTER_VECTOR &&
           operation.b_mode == OUTER_VECTOR && a.type == R_E4M3 && b.type == R_E4M3 && c.type == R_BF16 &&
           d.type == R_BF16 && a.rows == b.rows && a.columns == d.rows && b.columns == d.columns && c.rows == d.rows &&
           c.columns == d.columns && a.stride % 16 == 0 && b.stride % 16 == 0 && d.stride % 8 == 0 && d.columns % 16 == 0;
}

// The number that a code stands for, by the definition of e4m3.
float value(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

struct Product {
    Layout a_layout, b_layout, d_layout;
    const uint8_t *a, *b;
    const float *a_scales, *b_scales;
    uint16_t *d;
};

void multiply(void *argument) {
    const Product *p = (const Product *)argument;
    const int64_t m = p->d_layout.rows, n = p->d_layout.columns, k = p->a_layout.rows;
    float values[256];
    for (int code = 0; code < 256; code++) values[code] = value(code);
    std::vector<float> a(m * k), b(n * k);
    for (int64_t i = 0; i < m; i++) {
        for (int64_t l = 0; l < k; l++) a[i * k + l] = values[p->a[i * p->a_layout.stride + l]];
    }
    for (int64_t j = 0; j < n; j++) {
        for (int64_t l = 0; l < k; l++) b[j * k + l] = values[p->b[j * p->b_layout.stride + l]];
    }
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            float sum = 0;
            for (int64_t l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
            p->d[i + j * p->d_layout.stride] = bf16(p->a_scales[i] * p->b_scales[j] * sum);
        }
    }
}

template <typename Owned>
int destroy(void *at) {
    delete (Owned *)at;
    return SUCCESS;
}

template <typename T>
int set(T &field, const void *value, size_t bytes) {
    if (bytes != sizeof(T)) return INVALID_VALUE;
    memcpy(&field, value, bytes);
    return SUCCESS;
}

}  // namespace

extern "C" {

size_t cublasLtGetVersion() { return version(); }
int cublasLtCreate(void **handle) {
    *handle = new char;
    return SUCCESS;
}
int cublasLtDestroy(void *handle) { return destroy<char>(handle); }

int cublasLtMatmulDescCreate(void **operation, int compute, int scale_type) {
    *operation = new Operation{compute, scale_type};
    return SUCCESS;
}
int cublasLtMatmulDescDestroy(void *operation) { return destroy<Operation>(operation); }
int cublasLtMatmulDescSetAttribute(void *at, unsigned attribute, const void *value, size_t bytes) {
    Operation &operation = *(Operation *)at;
    switch (attribute) {
        case 3: return set(operation.a_transposed, value, bytes);
        case 4: return set(operation.b_transposed, value, bytes);
        case 17: return set(operation.a_scales, value, bytes);
        case 18: return set(operation.b_scales, value, bytes);
        case 25: return set(operation.fast_accumulation, value, bytes);
        case 31: return set(operation.a_mode, value, bytes);
        case 32: return set(operation.b_mode, value, bytes);
        default: return INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(void **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = new Layout{type, (int64_t)rows, (int64_t)columns, stride};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(void *layout) { return destroy<Layout>(layout); }

int cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = new Preference;
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(void *preference) { return destroy<Preference>(preference); }
int cublasLtMatmulPreferenceSetAttribute(void *preference, unsigned attribute, const void *value, size_t bytes) {
    return attribute == 1 ? set(((Preference *)preference)->workspace_bytes, value, bytes) : INVALID_VALUE;
}

int cublasLtMatmulAlgoGetHeuristic(void *, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int requested, Found *found, int *count) {
    *count = 0;
    const bool fits = ((Preference *)preference)->workspace_bytes >= NEEDED_BYTES;
    const Layout &out = *(Layout *)d;
    // A null pointer means that there are no scales.
    if (!((Operation *)operation)->a_scales || !((Operation *)operation)->b_scales) return INVALID_VALUE;
    if (requested < 1 || !fits ||
        !is_supported(*(Operation *)operation, *(Layout *)a, *(Layout *)b, *(Layout *)c, out)) {
        return NOT_SUPPORTED;
    }
    // The choice is for this size alone.
    *found = {{{CHOSEN, (uint64_t)out.rows, (uint64_t)out.columns, (uint64_t)((Layout *)a)->rows}}, NEEDED_BYTES, SUCCESS, 1.0f, {}};
    *count = 1;
    return SUCCESS;
}

int cublasLtMatmul(void *, void *at, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const Algorithm *algorithm,
                   void *workspace, size_t workspace_bytes, void *stream) {
    const Operation &operation = *(Operation *)at;
    const Layout &of_a = *(Layout *)a_layout, &of_b = *(Layout *)b_layout, &of_c = *(Layout *)c_layout, &of_d = *(Layout *)d_layout;
    if (!is_supported(operation, of_a, of_b, of_c, of_d)) return NOT_SUPPORTED;
    const uint64_t *chosen = algorithm->data;
    const bool is_chosen = chosen[0] == CHOSEN && chosen[1] == (uint64_t)of_d.rows && chosen[2] == (uint64_t)of_d.columns &&
                           chosen[3] == (uint64_t)of_a.rows;
    const bool is_aligned = ((uintptr_t)a | (uintptr_t)b | (uintptr_t)d) % 16 == 0;
    if (!is_chosen || !is_aligned || !operation.a_scales || !operation.b_scales || c != d || !workspace ||
        workspace_bytes < NEEDED_BYTES || *(const float *)alpha != 1 || *(const float *)beta != 0) {
        return INVALID_VALUE;
    }
    auto *product = new Product{of_a, of_b, of_d, (const uint8_t *)a, (const uint8_t *)b, operation.a_scales,
                                operation.b_scales, (uint16_t *)d};
    return enqueue(stream, multiply, product) ? INTERNAL_ERROR : SUCCESS;
}

}
