// A small cuBLAS: products of float64, float32, float16 and bfloat16, as cublasGemmEx documents them.
//
// Sums are made in double, so a product's last bits differ from those of a GPU. What this shows is
// whether a call is right: shapes, leading dimensions, transposes, alpha, beta, types, the stream and
// its workspace. TF32 and bfloat16 arithmetic round the operands, so that a test sees which was asked.
// Scalars are read from the host. unsupported.inc, which libraries.py writes, has a function that
// refuses for every other name that CuPy looks up.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "state.h"

enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_64F = 1, R_16F = 2, R_16BF = 14 };  // cudaDataType
enum { EXACT_32F = 68, PEDANTIC_32F = 69, EXACT_64F = 70, PEDANTIC_64F = 71, FAST_16BF = 75, FAST_TF32 = 77 };
using Long = long long;

static int refuse(const char* what) {
    explain("cuBLAS: %s", what);
    return NOT_SUPPORTED;
}

// ---- the handle -------------------------------------------------------------------------------

struct Handle {
    int device;
    cudaStream_t stream = nullptr;
    void* workspace = nullptr;  // the caller's, for this stream
};

API int cublasCreate_v2(void** handle) {
    if (graph) return refuse("a handle is made while a stream captures");
    *handle = new Handle{current_device};
    return SUCCESS;
}
API int cublasDestroy_v2(void* handle) {
    delete (Handle*)handle;
    return SUCCESS;
}
API int cublasGetVersion_v2(void*, int* version) {
    *version = 130100;
    return SUCCESS;
}
API int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    auto h = (Handle*)handle;
    h->stream = stream;
    h->workspace = nullptr;  // cuBLAS goes back to its own
    return SUCCESS;
}
API int cublasGetStream_v2(void* handle, cudaStream_t* stream) {
    *stream = ((Handle*)handle)->stream;
    return SUCCESS;
}
API int cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    auto h = (Handle*)handle;
    if ((uintptr_t)workspace % 256 || !bytes || device_of(workspace) != h->device) {
        explain("cuBLAS: a workspace must be aligned to 256 bytes, and on the handle's device");
        return INVALID_VALUE;
    }
    h->workspace = workspace;
    return SUCCESS;
}
API const char* cublasGetStatusName(int status) {
    switch (status) {
        case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "unknown status";
}
API int cublasSetMathMode(void*, int) { return SUCCESS; }
API int cublasGetMathMode(void*, int* mode) {
    *mode = 0;
    return SUCCESS;
}
API int cublasSetPointerMode_v2(void*, int mode) { return mode ? refuse("scalars on the device") : SUCCESS; }
API int cublasGetPointerMode_v2(void*, int* mode) {
    *mode = 0;
    return SUCCESS;
}

// ---- numbers of 16 bits, and operands that are rounded before they are multiplied ---------------

// x without its last bits, rounded to nearest, ties to even.
static float drop_bits(float x, int count) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (std::isfinite(x)) bits += (1u << (count - 1)) - 1 + (bits >> count & 1);
    bits &= ~0u << count;
    if (std::isnan(x)) bits |= 1u << 22;
    memcpy(&x, &bits, 4);
    return x;
}

struct Bfloat16 {
    uint16_t bits;
    Bfloat16(float x) {
        x = drop_bits(x, 16);
        memcpy(&bits, (char*)&x + 2, 2);
    }
    operator double() const {
        uint32_t wide = bits << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
};
struct Float16 {
    _Float16 value;
    Float16(float x) : value(x) {}
    operator double() const { return value; }
};
struct Tf32 {  // a float32 with 10 bits of mantissa
    float value;
    operator double() const { return drop_bits(value, 13); }
};
struct RoundedToBfloat16 {
    float value;
    operator double() const { return drop_bits(value, 16); }
};

// ---- C = alpha op(A) op(B) + beta C, by columns: op(A) (m, k), op(B) (k, n), C (m, n) ---------

struct Shape {
    int ta, tb, m, n, k, lda, ldb, ldc;
    bool is_wrong() const {
        return m < 0 || n < 0 || k < 0 || lda < 1 || ldb < 1 || ldc < 1 || lda < (ta ? k : m) || ldb < (tb ? n : k) ||
               ldc < m;
    }
};

// Real is the type of the arithmetic, and of alpha and beta.
template <class In, class Out, class Real>
static void multiply(Shape s, Real alpha, const In* A, const In* B, Real beta, Out* C) {
    std::vector<double> column(s.m);
    for (int j = 0; j < s.n; j++) {
        for (double& sum : column) sum = 0;
        for (int p = 0; p < s.k; p++) {
            double b = s.tb ? B[j + (Long)p * s.ldb] : B[p + (Long)j * s.ldb];
            const In* a = s.ta ? A + p : A + (Long)p * s.lda;
            Long step = s.ta ? s.lda : 1;
            for (int i = 0; i < s.m; i++) column[i] += a[i * step] * b;
        }
        Out* c = C + (Long)j * s.ldc;
        for (int i = 0; i < s.m; i++) {
            Real product = alpha * (Real)column[i];
            c[i] = beta == 0 ? product : product + beta * (Real)c[i];  // with beta 0, C is not read
        }
    }
}

static int submit_product(const char* call, const Handle* handle, Shape s, int batch, int compute, const void* A,
                          const void* B, const void* C, Work work) {
    char text[200];
    snprintf(text, sizeof text, "product %s %c%c m %d n %d k %d lda %d ldb %d ldc %d batch %d compute %d%s", call,
             "NT"[s.ta], "NT"[s.tb], s.m, s.n, s.k, s.lda, s.ldb, s.ldc, batch, compute,
             handle->workspace ? " workspace" : "");
    LOG("%s", text);
    if (s.is_wrong()) {
        explain("cuBLAS: a size or a leading dimension is too small: %s", text);
        return INVALID_VALUE;
    }
    if (handle->device != current_device) {
        explain("cuBLAS: a handle of another device than the current one");
        return INVALID_VALUE;
    }
    for (const void* p : {A, B, C})
        if (device_of(p) >= 0 && device_of(p) != current_device) {
            explain("cuBLAS: an array of another device than the current one");
            return INVALID_VALUE;
        }
    if (graph && handle->stream == graph_stream && !handle->workspace)
        return refuse("a captured product without a workspace of its own would allocate one at each replay");
    bool done = submit(&Counts::products, handle->stream, std::move(work)) == cudaSuccess;
    return done ? SUCCESS : NOT_SUPPORTED;
}

// ---- operands at a constant distance ----------------------------------------------------------

struct Call {
    const char* name;
    const Handle* handle;
    Shape shape;
    const void *alpha, *A;
    Long sa;
    const void* B;
    Long sb;
    const void *beta, *C;
    Long sc;
    int batch, compute;
};

template <class In, class Out, class Real>
static int strided(Call c) {
    Real alpha = *(const Real*)c.alpha, beta = *(const Real*)c.beta;
    auto A = (const In*)c.A, B = (const In*)c.B;
    auto C = (Out*)c.C;
    return submit_product(c.name, c.handle, c.shape, c.batch, c.compute, A, B, C, [=] {
        for (int i = 0; i < c.batch; i++)
            multiply<In, Out, Real>(c.shape, alpha, A + i * c.sa, B + i * c.sb, beta, C + i * c.sc);
    });
}

// The types that cublasGemmEx documents: of A and B (one), of C, and of the arithmetic.
static int of_types(Call c, int at, int bt, int ct) {
    bool in_32f = c.compute == EXACT_32F || c.compute == PEDANTIC_32F;
    bool in_64f = c.compute == EXACT_64F || c.compute == PEDANTIC_64F;
    if (at != bt) return refuse("operands of two types");
    if (at == R_64F && ct == R_64F && in_64f) return strided<double, double, double>(c);
    if (at == R_32F && ct == R_32F && in_32f) return strided<float, float, float>(c);
    if (at == R_32F && ct == R_32F && c.compute == FAST_TF32) return strided<Tf32, float, float>(c);
    if (at == R_32F && ct == R_32F && c.compute == FAST_16BF) return strided<RoundedToBfloat16, float, float>(c);
    if (at == R_16BF && ct == R_32F && in_32f) return strided<Bfloat16, float, float>(c);
    if (at == R_16BF && ct == R_16BF && in_32f) return strided<Bfloat16, Bfloat16, float>(c);
    if (at == R_16F && ct == R_32F && in_32f) return strided<Float16, float, float>(c);
    if (at == R_16F && ct == R_16F && in_32f) return strided<Float16, Float16, float>(c);
    explain("cuBLAS: operands of type %d, result of type %d, arithmetic %d", at, ct, c.compute);
    return NOT_SUPPORTED;
}
API int cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* A, int at,
                     int lda, const void* B, int bt, int ldb, const void* beta, void* C, int ct, int ldc, int compute,
                     int) {
    Shape s{ta, tb, m, n, k, lda, ldb, ldc};
    return of_types({"gemmEx", (Handle*)handle, s, alpha, A, 0, B, 0, beta, C, 0, 1, compute}, at, bt, ct);
}
API int cublasGemmStridedBatchedEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* A,
                                   int at, int lda, Long sa, const void* B, int bt, int ldb, Long sb,
                                   const void* beta, void* C, int ct, int ldc, Long sc, int batch, int compute, int) {
    Shape s{ta, tb, m, n, k, lda, ldb, ldc};
    Call c{"gemmStridedBatchedEx", (Handle*)handle, s, alpha, A, sa, B, sb, beta, C, sc, batch, compute};
    return of_types(c, at, bt, ct);
}

// ---- operands by tables of pointers, which are read when the product runs ---------------------

template <class T>
static int by_pointers(const char* call, void* handle, Shape s, const T* alpha, T** A, T** B, const T* beta, T** C,
                       int batch) {
    T al = *alpha, be = *beta;
    int compute = sizeof(T) == 8 ? EXACT_64F : EXACT_32F;
    return submit_product(call, (Handle*)handle, s, batch, compute, A, B, C, [=] {
        for (int i = 0; i < batch; i++) multiply<T, T, T>(s, al, A[i], B[i], be, C[i]);
    });
}
API int cublasSgemmBatched(void* handle, int ta, int tb, int m, int n, int k, const float* alpha, float** A, int lda,
                           float** B, int ldb, const float* beta, float** C, int ldc, int batch) {
    return by_pointers<float>("sgemmBatched", handle, {ta, tb, m, n, k, lda, ldb, ldc}, alpha, A, B, beta, C, batch);
}
API int cublasDgemmBatched(void* handle, int ta, int tb, int m, int n, int k, const double* alpha, double** A, int lda,
                           double** B, int ldb, const double* beta, double** C, int ldc, int batch) {
    return by_pointers<double>("dgemmBatched", handle, {ta, tb, m, n, k, lda, ldb, ldc}, alpha, A, B, beta, C, batch);
}

#define UNSUPPORTED(NAME) \
    API int NAME() { return refuse(#NAME " is not emulated"); }
#include "unsupported.inc"
