// A small cuBLAS: the products that CuPy's matmul and dot ask for, in float32 and float64.
//
// Sums are made in double, so a product's last bits differ from those of a GPU. What this shows is
// whether a call is right: shapes, leading dimensions, transposes, alpha, beta, capture.
// Scalars are read from the host. unsupported.inc, which libraries.py writes, has a function that
// refuses for every other name that CuPy looks up.
#include <cstring>

#include "state.h"

enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum { R_32F = 0, R_64F = 1 };  // cudaDataType
enum { FIRST_HANDLE = 0x77 };
using Long = long long;

static thread_local cudaStream_t current_stream;

static int refuse(const char* what) {
    explain("cuBLAS: %s", what);
    return NOT_SUPPORTED;
}

// ---- the handle -------------------------------------------------------------------------------

API int cublasCreate_v2(void** handle) {
    *handle = (void*)FIRST_HANDLE;
    return SUCCESS;
}
API int cublasDestroy_v2(void*) { return SUCCESS; }
API int cublasGetVersion_v2(void*, int* version) {
    *version = 130100;
    return SUCCESS;
}
API int cublasSetStream_v2(void*, cudaStream_t stream) {
    current_stream = stream;
    return SUCCESS;
}
API int cublasGetStream_v2(void*, cudaStream_t* stream) {
    *stream = current_stream;
    return SUCCESS;
}
API int cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }
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

// ---- C = alpha op(A) op(B) + beta C, by columns: op(A) (m, k), op(B) (k, n), C (m, n) ---------

struct Shape {
    int ta, tb, m, n, k, lda, ldb, ldc;
    bool is_wrong() const {
        return lda < 1 || ldb < 1 || ldc < 1 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m;
    }
};

template <class T>
static void multiply(Shape s, T alpha, const T* A, const T* B, T beta, T* C) {
    std::vector<double> column(s.m);
    for (int j = 0; j < s.n; j++) {
        for (double& sum : column) sum = 0;
        for (int p = 0; p < s.k; p++) {
            double b = s.tb ? B[j + (Long)p * s.ldb] : B[p + (Long)j * s.ldb];
            const T* a = s.ta ? A + p : A + (Long)p * s.lda;
            Long step = s.ta ? s.lda : 1;
            for (int i = 0; i < s.m; i++) column[i] += a[i * step] * b;
        }
        T* c = C + (Long)j * s.ldc;
        for (int i = 0; i < s.m; i++) {
            T product = alpha * (T)column[i];
            c[i] = beta == 0 ? product : product + beta * c[i];  // with beta 0, C is not read
        }
    }
}

static int submit_product(const char* call, Shape s, int batch, const void* A, const void* B, const void* C,
                          Work work) {
    char text[200];
    snprintf(text, sizeof text, "product %s %c%c m %d n %d k %d lda %d ldb %d ldc %d batch %d", call, "NT"[s.ta],
             "NT"[s.tb], s.m, s.n, s.k, s.lda, s.ldb, s.ldc, batch);
    LOG("%s", text);
    if (s.is_wrong()) {
        explain("cuBLAS: a leading dimension is too small: %s", text);
        return INVALID_VALUE;
    }
    for (const void* p : {A, B, C})
        if (device_of(p) >= 0 && device_of(p) != current_device) {
            explain("cuBLAS: an array of another device than the current one");
            return INVALID_VALUE;
        }
    return submit(&Counts::products, current_stream, std::move(work)) == cudaSuccess ? SUCCESS : NOT_SUPPORTED;
}

// ---- operands at a constant distance ----------------------------------------------------------

template <class T>
static int strided(const char* call, Shape s, const void* alpha, const void* A, Long sa, const void* B, Long sb,
                   const void* beta, void* C, Long sc, int batch) {
    T al = *(const T*)alpha, be = *(const T*)beta;
    auto a = (const T*)A, b = (const T*)B;
    auto c = (T*)C;
    return submit_product(call, s, batch, A, B, C, [=] {
        for (int i = 0; i < batch; i++) multiply<T>(s, al, a + i * sa, b + i * sb, be, c + i * sc);
    });
}
static int of_any_type(const char* call, Shape s, const void* alpha, const void* A, int at, Long sa, const void* B,
                       int bt, Long sb, const void* beta, void* C, int ct, Long sc, int batch) {
    if (at != bt || at != ct) return refuse("operands of several types");
    if (at == R_32F) return strided<float>(call, s, alpha, A, sa, B, sb, beta, C, sc, batch);
    if (at == R_64F) return strided<double>(call, s, alpha, A, sa, B, sb, beta, C, sc, batch);
    return refuse("a type other than float32 and float64");
}
API int cublasGemmEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* A, int at, int lda,
                     const void* B, int bt, int ldb, const void* beta, void* C, int ct, int ldc, int, int) {
    return of_any_type("gemmEx", {ta, tb, m, n, k, lda, ldb, ldc}, alpha, A, at, 0, B, bt, 0, beta, C, ct, 0, 1);
}
API int cublasGemmStridedBatchedEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* A,
                                   int at, int lda, Long sa, const void* B, int bt, int ldb, Long sb,
                                   const void* beta, void* C, int ct, int ldc, Long sc, int batch, int, int) {
    Shape s{ta, tb, m, n, k, lda, ldb, ldc};
    return of_any_type("gemmStridedBatchedEx", s, alpha, A, at, sa, B, bt, sb, beta, C, ct, sc, batch);
}

// ---- operands by tables of pointers, which are read when the product runs ---------------------

template <class T>
static int by_pointers(const char* call, Shape s, const T* alpha, T** A, T** B, const T* beta, T** C, int batch) {
    T al = *alpha, be = *beta;
    return submit_product(call, s, batch, A, B, C, [=] {
        for (int i = 0; i < batch; i++) multiply<T>(s, al, A[i], B[i], be, C[i]);
    });
}
API int cublasSgemmBatched(void*, int ta, int tb, int m, int n, int k, const float* alpha, float** A, int lda,
                           float** B, int ldb, const float* beta, float** C, int ldc, int batch) {
    return by_pointers<float>("sgemmBatched", {ta, tb, m, n, k, lda, ldb, ldc}, alpha, A, B, beta, C, batch);
}
API int cublasDgemmBatched(void*, int ta, int tb, int m, int n, int k, const double* alpha, double** A, int lda,
                           double** B, int ldb, const double* beta, double** C, int ldc, int batch) {
    return by_pointers<double>("dgemmBatched", {ta, tb, m, n, k, lda, ldb, ldc}, alpha, A, B, beta, C, batch);
}

#define UNSUPPORTED(NAME) \
    API int NAME() { return refuse(#NAME " is not emulated"); }
#include "unsupported.inc"
