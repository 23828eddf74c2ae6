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
template <class T>
__device__ T block_sum(T x) {
    __shared__ T parts[32];
    for (int k = 16; k; k /= 2) x += __shfl_xor_sync(~0u, x, k);
    __syncthreads();  // whoever read `parts` before has done so
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
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

// ---- the optimiser: many arrays in one launch ---------------------------------------------------

// Up to MOST arrays of each of three kinds, passed by value: so no table is uploaded. The blocks
// first[i] <= b < first[i + 1] work on array i, each on CHUNK of its numbers. The struct has less
// than 4 KiB, which every version of CUDA takes.
enum { MOST = 96, CHUNK = 4096 };
struct Arrays {
    REAL* at[3][MOST];
    Int size[MOST];
    Int start[MOST];  // where the array begins in a vector of all
    int first[MOST + 1];
    int count;
};

// The array that this block works on, and its part of it.
struct Piece {
    int array;
    Int begin, end;
    __device__ Piece(const Arrays& arrays) {
        int low = 0, high = arrays.count;
        while (high - low > 1) {
            int middle = (low + high) / 2;
            if (arrays.first[middle] <= (int)blockIdx.x) low = middle;
            else high = middle;
        }
        array = low;
        begin = (Int)(blockIdx.x - arrays.first[low]) * CHUNK;
        end = begin + CHUNK < arrays.size[low] ? begin + CHUNK : arrays.size[low];
    }
};
#define FOR_PIECE(I, PIECE) for (Int I = (PIECE).begin + threadIdx.x; I < (PIECE).end; I += blockDim.x)

// squares[b] = the sum of squares of block b's part
extern "C" __global__ void sum_squares(const Arrays arrays, double* squares) {
    Piece piece(arrays);
    const REAL* g = arrays.at[0][piece.array];
    double sum = 0;
    FOR_PIECE(i, piece) sum += (double)g[i] * g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

// clip[0] = norm, clip[1] = min(1, max_norm / (norm + 1e-6)), or 1 if the norm is not finite
extern "C" __global__ void clip_factor(const double* squares, double* clip, Int count, double max_norm) {
    double sum = 0;
    FOR_ROW(i, count) sum += squares[i];
    double norm = sqrt(block_sum(sum)), factor = max_norm / (norm + 1e-6);
    if (threadIdx.x) return;
    clip[0] = norm;
    clip[1] = isfinite(norm) && factor < 1 ? factor : 1;
}

// out = in * clip[1]
extern "C" __global__ void scale_all(const Arrays arrays, const double* clip) {
    Piece piece(arrays);
    const REAL *in = arrays.at[0][piece.array], factor = (REAL)clip[1];
    REAL* out = arrays.at[1][piece.array];
    FOR_PIECE(i, piece) out[i] = in[i] * factor;
}

// The numbers of AdamW that differ from step to step.
struct Rates {
    double step, root, keep;  // -lr / (1 - b1^t), sqrt(1 - b2^t), 1 - lr wd
};

// m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- keep p + step m / (sqrt(v) / root + eps)
// arrays: p, g; m and v are vectors of all. `device_rates` replaces `rates` if it is given; unless
// *check is finite, nothing changes.
extern "C" __global__ void adamw(const Arrays arrays, REAL* moments_m, REAL* moments_v, double b1, double b2,
                                 double eps, const Rates rates, const double* device_rates, const double* check) {
    if (check && !isfinite(*check)) return;
    Piece piece(arrays);
    REAL* p = arrays.at[0][piece.array];
    const REAL* g = arrays.at[1][piece.array];
    REAL *m = moments_m + arrays.start[piece.array], *v = moments_v + arrays.start[piece.array];
    const REAL step = device_rates ? device_rates[0] : rates.step, root = device_rates ? device_rates[1] : rates.root;
    const REAL keep = device_rates ? device_rates[2] : rates.keep, c1 = 1 - b1, c2 = 1 - b2;
    FOR_PIECE(i, piece) {
        m[i] = m[i] * (REAL)b1 + g[i] * c1;
        v[i] = v[i] * (REAL)b2 + g[i] * g[i] * c2;
        p[i] = p[i] * keep + step * (m[i] / (sqrt(v[i]) / root + (REAL)eps));
    }
}
