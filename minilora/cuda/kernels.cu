// The kernels of minilora, for numbers of C's type REAL: float or double, by -DREAL=...
//
// Arrays are contiguous, sizes are 64-bit integers. A kernel loops over all its numbers (FOR_EACH),
// or gives a row to each block. Sums go in a fixed order and nothing is atomic, so that two runs
// have the same bits. NVRTC compiles this file without the host's headers: no INFINITY, no <cmath>.
//
// N rows, C numbers per row, V vocabulary.

using Int = long long;

// The whole grid shares the numbers 0 <= I < N: any number of blocks and threads is right.
#define FOR_EACH(I, N) \
    for (Int I = blockIdx.x * (Int)blockDim.x + threadIdx.x; I < (N); I += (Int)gridDim.x * blockDim.x)
// The threads of a block share the numbers 0 <= I < N of its row.
#define FOR_ROW(I, N) for (Int I = threadIdx.x; I < (N); I += blockDim.x)

// The sum of x over a block of any multiple of 32 threads, at most 1024; the same in every thread.
__device__ REAL block_sum(REAL x) {
    __shared__ REAL parts[32];
    for (int k = 16; k; k /= 2) x += __shfl_xor_sync(~0u, x, k);
    __syncthreads();  // whoever read `parts` before has done so
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    REAL sum = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += parts[w];
    return sum;
}

// ---- rows added up ------------------------------------------------------------------------------

// out[i] = sum of rows[n] over index[n] == i    rows (N, C), out (count, C)
// order (N,) sorts the index; the rows of i are order[start[i]] to order[start[i + 1] - 1].
// One thread per number of `out` adds in order: CuPy's scatter_add uses atomics, whose order of
// addition, and so whose last bits, change from run to run.
extern "C" __global__ void add_rows(const REAL* rows, const Int* order, const Int* start, REAL* out, Int count,
                                    Int C) {
    FOR_EACH(i, count * C) {
        Int row = i / C, column = i % C;
        REAL sum = 0;
        for (Int n = start[row]; n < start[row + 1]; n++) sum += rows[order[n] * C + column];
        out[i] = sum;
    }
}

// out[n] = sum_c a[n, c] b[n, c]    a, b (N, C), out (N,); a block per row
extern "C" __global__ void row_dot(const REAL* a, const REAL* b, REAL* out, Int C) {
    Int at = blockIdx.x * C;
    REAL sum = 0;
    FOR_ROW(c, C) sum += a[at + c] * b[at + c];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// ---- norms: a block per row ---------------------------------------------------------------------

// y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps)    x, y (N, C), w (C,), rstd (N,)
extern "C" __global__ void rms_norm(const REAL* x, const REAL* w, REAL* y, REAL* rstd, Int C, REAL eps) {
    Int at = blockIdx.x * C;
    REAL sum = 0;
    FOR_ROW(c, C) sum += x[at + c] * x[at + c];
    REAL r = 1 / sqrt(block_sum(sum) / C + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    FOR_ROW(c, C) y[at + c] = x[at + c] * r * w[c];
}

// dx = rstd (dy w - x rstd mean(dy w x rstd))
extern "C" __global__ void rms_norm_back(const REAL* x, const REAL* w, const REAL* rstd, const REAL* dy, REAL* dx,
                                         Int C) {
    Int at = blockIdx.x * C;
    REAL r = rstd[blockIdx.x], sum = 0;
    FOR_ROW(c, C) sum += dy[at + c] * w[c] * (x[at + c] * r);
    REAL mean = block_sum(sum) / C;
    FOR_ROW(c, C) dx[at + c] = (dy[at + c] * w[c] - x[at + c] * r * mean) * r;
}
