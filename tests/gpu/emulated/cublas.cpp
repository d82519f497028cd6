// Computes the matrix products that candle requests from cuBLAS, as plain loops with float sums. As in cuBLAS, the work
// is queued on the driver's stream.

#include <vector>

#include "enqueue.h"

namespace {

struct Handle {
    void *stream;
};

enum { R_32F = 0, R_BF16 = 14 };

float load(const void *at, int type, size_t index) {
    if (type == R_32F) return ((const float *)at)[index];
    const uint32_t wide = (uint32_t)((const uint16_t *)at)[index] << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

void store(void *at, int type, size_t index, float x) {
    if (type == R_32F) {
        ((float *)at)[index] = x;
        return;
    }
    ((uint16_t *)at)[index] = bf16(x);
}

struct Product {
    bool a_transposed, b_transposed;
    int64_t m, n, k;
    float alpha, beta;
    const void *a, *b;
    void *c;
    // The types of both factors and of the result.
    int type, c_type;
    int64_t lda, ldb, ldc, a_stride, b_stride, c_stride;
    int batch;
};

// Matrices are column-major, as in cuBLAS.
void multiply(void *argument) {
    Product *p = (Product *)argument;
    std::vector<float> a(p->m * p->k), b(p->n * p->k);
    for (int batch = 0; batch < p->batch; batch++) {
        for (int64_t i = 0; i < p->m; i++) {
            for (int64_t l = 0; l < p->k; l++) {
                const int64_t at = p->a_transposed ? l + i * p->lda : i + l * p->lda;
                a[i * p->k + l] = load(p->a, p->type, batch * p->a_stride + at);
            }
        }
        for (int64_t j = 0; j < p->n; j++) {
            for (int64_t l = 0; l < p->k; l++) {
                const int64_t at = p->b_transposed ? j + l * p->ldb : l + j * p->ldb;
                b[j * p->k + l] = load(p->b, p->type, batch * p->b_stride + at);
            }
        }
        for (int64_t j = 0; j < p->n; j++) {
            for (int64_t i = 0; i < p->m; i++) {
                float sum = 0;
                for (int64_t l = 0; l < p->k; l++) sum += a[i * p->k + l] * b[j * p->k + l];
                const int64_t at = batch * p->c_stride + i + j * p->ldc;
                const float before = p->beta == 0 ? 0 : p->beta * load(p->c, p->c_type, at);
                store(p->c, p->c_type, at, p->alpha * sum + before);
            }
        }
    }
}

}  // namespace

extern "C" {

int cublasCreate_v2(void **handle) {
    *handle = new Handle{nullptr};
    return 0;
}
int cublasDestroy_v2(void *handle) {
    delete (Handle *)handle;
    return 0;
}
int cublasSetStream_v2(void *handle, void *stream) {
    ((Handle *)handle)->stream = stream;
    return 0;
}
int cublasSetMathMode(void *, int) { return 0; }
int cublasSetWorkspace_v2(void *, void *workspace, size_t bytes) { return workspace && bytes ? 0 : 7; }
static int enqueue_product(void *handle, Product product) {
    const bool is_known = (product.type == R_32F || product.type == R_BF16) &&
                          (product.c_type == R_32F || product.c_type == product.type);
    if (!is_known) return 15;
    // 14 is the internal error that cuBLAS returns when the device has failed.
    return enqueue(((Handle *)handle)->stream, multiply, new Product(product)) ? 14 : 0;
}
int cublasGemmStridedBatchedEx(void *handle, int a_operation, int b_operation, int m, int n, int k, const void *alpha,
                               const void *a, int a_type, int lda, long long a_stride, const void *b, int b_type, int ldb,
                               long long b_stride, const void *beta, void *c, int c_type, int ldc, long long c_stride,
                               int batch, int, int) {
    if (a_type != b_type || a_operation > 1 || b_operation > 1) return 15;
    return enqueue_product(handle, {a_operation == 1, b_operation == 1, m, n, k, *(const float *)alpha, *(const float *)beta,
                                    a, b, c, a_type, c_type, lda, ldb, ldc, a_stride, b_stride, c_stride, batch});
}
int cublasGemmEx(void *handle, int a_operation, int b_operation, int m, int n, int k, const void *alpha, const void *a,
                 int a_type, int lda, const void *b, int b_type, int ldb, const void *beta, void *c, int c_type, int ldc, int,
                 int) {
    if (a_type != b_type || a_operation > 1 || b_operation > 1) return 15;
    return enqueue_product(handle, {a_operation == 1, b_operation == 1, m, n, k, *(const float *)alpha, *(const float *)beta,
                                    a, b, c, a_type, c_type, lda, ldb, ldc, 0, 0, 0, 1});
}
int cublasDgemmStridedBatched() { return 15; }

}
