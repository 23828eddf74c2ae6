// The kernels of minilora, for numbers of C's type REAL: float or double, by -DREAL=...
//
// Arrays are contiguous, sizes are 64-bit integers. A kernel loops over all its numbers (FOR_EACH),
// or gives a row, or 32 columns, to each block. Sums go in a fixed order and nothing is atomic, so that two runs
// have the same bits. NVRTC compiles this file without the host's headers: no INFINITY, no <cmath>.
//
// N rows, C numbers per row, V vocabulary, O outputs and I inputs of a layer. REAL(0.5) and not 0.5,
// which would make a computation one in double.

using Int = long long;

// The whole grid shares the numbers 0 <= I < N: any number of blocks and threads is right.
#define FOR_EACH(I, N) \
    for (Int I = blockIdx.x * (Int)blockDim.x + threadIdx.x; I < (N); I += (Int)gridDim.x * blockDim.x)
// The threads of a block share the numbers 0 <= I < N of its row.
#define FOR_ROW(I, N) for (Int I = threadIdx.x; I < (N); I += blockDim.x)

// The lowest finite number, and NaN.
#define LOWEST (sizeof(REAL) == 4 ? REAL(-3.4028234663852886e38) : REAL(-1.7976931348623157e308))
#define NOT_A_NUMBER REAL(__int_as_float(0x7fffffff))

// Each of these three is for a block of any multiple of 32 threads, at most 1024, and gives every
// thread the same number. The first barrier waits until whoever read `parts` before has done so.

// The sum of x over a block.
template <class T>
__device__ T block_sum(T x) {
    __shared__ T parts[32];
    for (int k = 16; k; k /= 2) x += __shfl_xor_sync(~0u, x, k);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += parts[w];
    return sum;
}

// The largest x of a block, NaNs left out.
__device__ REAL block_max(REAL x) {
    __shared__ REAL parts[32];
    for (int k = 16; k; k /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, k));
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    REAL top = parts[0];
    for (int w = 1; w < (int)blockDim.x / 32; w++) top = fmax(top, parts[w]);
    return top;
}

// The sum of x over the threads of a block with the same threadIdx.x % 32: one column of 32.
__device__ REAL column_sum(REAL x) {
    __shared__ REAL parts[32][32];
    int lane = threadIdx.x % 32;
    __syncthreads();
    parts[threadIdx.x / 32][lane] = x;
    __syncthreads();
    REAL sum = 0;
    for (int w = 0; w < (int)blockDim.x / 32; w++) sum += parts[w][lane];
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

// y = (x - mean) rstd w + b, rstd = 1 / sqrt(mean((x - mean)^2) + eps)    x, y (N, C), w, b (C,)
extern "C" __global__ void layer_norm(const REAL* x, const REAL* w, const REAL* b, REAL* y, REAL* mean, REAL* rstd,
                                      Int C, REAL eps) {
    Int at = blockIdx.x * C;
    REAL sum = 0, squares = 0;
    FOR_ROW(c, C) sum += x[at + c];
    REAL m = block_sum(sum) / C;
    FOR_ROW(c, C) squares += (x[at + c] - m) * (x[at + c] - m);
    REAL r = 1 / sqrt(block_sum(squares) / C + eps);
    if (threadIdx.x == 0) mean[blockIdx.x] = m, rstd[blockIdx.x] = r;
    FOR_ROW(c, C) y[at + c] = (x[at + c] - m) * r * w[c] + b[c];
}

// dx = rstd (d - mean(d) - xhat mean(d xhat)), d = dy w, xhat = (x - mean) rstd
extern "C" __global__ void layer_norm_back(const REAL* x, const REAL* w, const REAL* mean, const REAL* rstd,
                                           const REAL* dy, REAL* dx, Int C) {
    Int at = blockIdx.x * C;
    REAL m = mean[blockIdx.x], r = rstd[blockIdx.x], sum = 0, along = 0;
    FOR_ROW(c, C) {
        REAL d = dy[at + c] * w[c];
        sum += d;
        along += d * ((x[at + c] - m) * r);
    }
    sum = block_sum(sum) / C;
    along = block_sum(along) / C;
    FOR_ROW(c, C) dx[at + c] = r * (dy[at + c] * w[c] - (sum + (x[at + c] - m) * r * along));
}

// dw = sum over rows of dy (x - mean) rstd, db = sum over rows of dy    x, dy (N, C), dw, db (C,)
// mean is null for RMSNorm, dw or db where it is not wanted. A block per 32 columns: a row's 32 are
// read at once, and each warp adds every so many rows.
extern "C" __global__ void norm_weights_back(const REAL* x, const REAL* mean, const REAL* rstd, const REAL* dy,
                                             REAL* dw, REAL* db, Int N, Int C) {
    Int c = blockIdx.x * (Int)32 + threadIdx.x % 32;
    REAL w = 0, b = 0;
    if (c < C)
        for (Int n = threadIdx.x / 32; n < N; n += blockDim.x / 32) {
            REAL d = dy[n * C + c], m = mean ? mean[n] : REAL(0);
            w += d * ((x[n * C + c] - m) * rstd[n]);
            b += d;
        }
    w = column_sum(w);
    b = column_sum(b);
    if (threadIdx.x >= 32 || c >= C) return;
    if (dw) dw[c] = w;
    if (db) db[c] = b;
}

// ---- activations: n numbers, one by one ---------------------------------------------------------

// exp(-x) may be infinite: then this is 0, as it should be.
__device__ REAL sigmoid(REAL x) {
    REAL e = exp(-x);
    return 1 / (1 + e);
}

// d silu(x) / dx = s + x s (1 - s)
__device__ REAL silu_slope(REAL x, REAL s) { return s * (1 + x * (1 - s)); }

// y = x sigmoid(x)
extern "C" __global__ void silu(const REAL* x, REAL* y, Int n) { FOR_EACH(i, n) y[i] = x[i] * sigmoid(x[i]); }

extern "C" __global__ void silu_back(const REAL* x, const REAL* dy, REAL* dx, Int n) {
    FOR_EACH(i, n) dx[i] = dy[i] * silu_slope(x[i], sigmoid(x[i]));
}

// y = silu(gate) up    x = [gate, up] (2, n), y (n,)
extern "C" __global__ void swiglu(const REAL* x, REAL* y, Int n) {
    FOR_EACH(i, n) y[i] = x[i] * sigmoid(x[i]) * x[n + i];
}

extern "C" __global__ void swiglu_back(const REAL* x, const REAL* dy, REAL* dx, Int n) {
    FOR_EACH(i, n) {
        REAL gate = x[i], up = x[n + i], s = sigmoid(gate);
        dx[i] = silu_slope(gate, s) * up * dy[i];
        dx[n + i] = gate * s * dy[i];
    }
}

// The normal distribution function Phi(x).
__device__ REAL normal_cdf(REAL x) {
    REAL e = erf(x * REAL(0.70710678118654752));  // 1 / sqrt(2)
    return REAL(0.5) * (1 + e);
}

// y = x Phi(x)
extern "C" __global__ void gelu(const REAL* x, REAL* y, Int n) { FOR_EACH(i, n) y[i] = x[i] * normal_cdf(x[i]); }

extern "C" __global__ void gelu_back(const REAL* x, const REAL* dy, REAL* dx, Int n) {
    FOR_EACH(i, n) {
        REAL e = exp(REAL(-0.5) * x[i] * x[i]);
        REAL density = e * REAL(0.39894228040143268);  // 1 / sqrt(2 pi)
        dx[i] = dy[i] * (normal_cdf(x[i]) + x[i] * density);
    }
}

// GELU's tanh form is x sigmoid(c (x + 0.044715 x^3)) with c = 2 sqrt(2 / pi).
#define C_OF_GELU REAL(1.5957691216057308)
#define CUBIC REAL(0.044715)
__device__ REAL gelu_sigmoid(REAL x) { return sigmoid(x * (C_OF_GELU + CUBIC * C_OF_GELU * (x * x))); }

extern "C" __global__ void gelu_tanh(const REAL* x, REAL* y, Int n) {
    FOR_EACH(i, n) y[i] = x[i] * gelu_sigmoid(x[i]);
}

extern "C" __global__ void gelu_tanh_back(const REAL* x, const REAL* dy, REAL* dx, Int n) {
    FOR_EACH(i, n) {
        REAL s = gelu_sigmoid(x[i]);
        REAL square = fmin(x[i] * x[i], REAL(1e4));  // beyond, s (1 - s) is 0 and the slope may be infinite
        REAL slope = C_OF_GELU + 3 * CUBIC * C_OF_GELU * square;
        dx[i] = dy[i] * (s + x[i] * s * (1 - s) * slope);
    }
}

// ---- dropout: the mask of Backend.random_words, which is never stored ---------------------------

using Word = unsigned long long;
#define GOLDEN 0x9E3779B97F4A7C15ull

__device__ Word mix(Word z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// A round of mix_key.
__device__ Word mixed_key(Word key, Word number) { return mix((key ^ number) + GOLDEN); }

// y = x scale where 32 random bits are at least `threshold`, x 0 elsewhere    x, y (rows, C)
// A word has the bits of two numbers; `start` words of each row come before these. `step`, one number or
// null, is mixed into the key here.
extern "C" __global__ void dropout(const REAL* x, REAL* y, Word key, const Word* step, Word first, Int rows, Int C,
                                   Int start, unsigned threshold, REAL scale) {
    Int words = (C + 1) / 2;
    if (step) key = mixed_key(key, *step);
    FOR_EACH(i, rows * words) {
        Int row = i / words, word = i % words, at = row * C + 2 * word;
        Word bits = mix(mixed_key(key, first + row) + (start + word + 1) * GOLDEN);
        y[at] = x[at] * ((unsigned)bits >= threshold ? scale : REAL(0));
        if (2 * word + 1 < C) y[at + 1] = x[at + 1] * ((unsigned)(bits >> 32) >= threshold ? scale : REAL(0));
    }
}

// ---- losses -------------------------------------------------------------------------------------

// weight = 1 / the number of targets that are not ignored, or 1 if all are    targets (N,); one block
extern "C" __global__ void mean_weight(const Int* targets, Int ignored, REAL* weight, Int N) {
    double count = 0;
    FOR_ROW(n, N) count += targets[n] != ignored;
    count = block_sum(count);
    if (threadIdx.x == 0) *weight = count ? 1 / count : 1;
}

// sum = the sum of x (N,); one block
extern "C" __global__ void add_up(const REAL* x, REAL* sum, Int N) {
    double s = 0;
    FOR_ROW(n, N) s += x[n];
    s = block_sum(s);
    if (threadIdx.x == 0) *sum = s;
}

// loss[n] = w (log sum_v exp(z[n, v]) - z[n, target]), dz = w (softmax(z[n]) - onehot(target))
// z, dz (N, V), targets, loss (N,), w one number, or null for 1. dz may be z, or null. A block per
// row. The maximum and the sum of exponentials take one pass over z (Milakov & Gimelshein 2018). Of
// an ignored row z is not read, and loss and dz are 0. A target outside [0, V) makes them NaN.
extern "C" __global__ void cross_entropy(const REAL* z, const Int* targets, Int ignored, const REAL* weight,
                                         REAL* loss, REAL* dz, Int V) {
    Int at = blockIdx.x * V, target = targets[blockIdx.x];
    if (target == ignored) {
        if (threadIdx.x == 0) loss[blockIdx.x] = 0;
        if (dz) FOR_ROW(v, V) dz[at + v] = 0;
        return;  // all threads of the block do
    }
    REAL mine = LOWEST, total = 0;
    FOR_ROW(v, V) {
        REAL before = mine;
        mine = fmax(mine, z[at + v]);
        REAL shrink = exp(before - mine), e = exp(z[at + v] - mine);
        total = total * shrink + e;
    }
    REAL top = block_max(mine), shrink = exp(mine - top), w = weight ? *weight : REAL(1);
    REAL hit = 0 <= target && target < V ? z[at + target] : NOT_A_NUMBER;
    total = block_sum(total * shrink);  // its barrier: z has been read, and may be overwritten
    if (threadIdx.x == 0) loss[blockIdx.x] = w * (log(total) - (hit - top));  // not log + top - hit: rounding
    REAL scale = hit == hit ? w / total : NOT_A_NUMBER;
    if (dz) FOR_ROW(v, V) {
        REAL e = exp(z[at + v] - top);
        dz[at + v] = e * scale - (v == target ? w : REAL(0));
    }
}

// ---- DoRA ---------------------------------------------------------------------------------------

// k = m / norm: 1 where the norm is 0, NaN where it is beyond the dtype
__device__ REAL row_scale(REAL m, REAL norm) {
    if (!isfinite(norm)) return NOT_A_NUMBER;
    return norm == 0 ? REAL(1) : m / norm;
}

// The same of each row, and dm for norms that are constants    m, norms, k, dk, dm (n,)
extern "C" __global__ void row_scales(const REAL* m, const REAL* norms, REAL* k, Int n) {
    FOR_EACH(i, n) k[i] = row_scale(m[i], norms[i]);
}

extern "C" __global__ void row_scales_back(const REAL* norms, const REAL* dk, REAL* dm, Int n) {
    FOR_EACH(i, n) dm[i] = norms[i] == 0 ? REAL(0) : dk[i] / norms[i];
}

// norms[o] = |V[o]|, k = row_scale(m, norms), `least` in place of 0, out = k V
// V, out (O, I), m, norms, k (O,); a block per row. out may be V. Without m only norms is written.
extern "C" __global__ void scale_rows(const REAL* V, const REAL* m, REAL least, REAL* norms, REAL* k, REAL* out,
                                      Int I) {
    Int at = blockIdx.x * I;
    REAL sum = 0;
    FOR_ROW(i, I) sum += V[at + i] * V[at + i];
    REAL norm = sqrt(block_sum(sum));
    if (threadIdx.x == 0) norms[blockIdx.x] = norm;
    if (!m) return;
    REAL scale = row_scale(m[blockIdx.x], norm);
    if (scale == 0) scale = least;
    if (threadIdx.x == 0) k[blockIdx.x] = scale;
    FOR_ROW(i, I) out[at + i] = V[at + i] * scale;
}

// dm[o] = sum over rows of dY Y, / (k norms), with 1 for a norm of 0    a block per 32 columns
// dY, Y (N, O), whose rows are dY_stride and Y_stride numbers apart; k, norms, dm (O,)
extern "C" __global__ void magnitudes_back(const REAL* dY, Int dY_stride, const REAL* Y, Int Y_stride, const REAL* k,
                                           const REAL* norms, REAL* dm, Int N, Int O) {
    Int o = blockIdx.x * (Int)32 + threadIdx.x % 32;
    REAL sum = 0;
    if (o < O)
        for (Int n = threadIdx.x / 32; n < N; n += blockDim.x / 32) sum += dY[n * dY_stride + o] * Y[n * Y_stride + o];
    sum = column_sum(sum);
    if (threadIdx.x < 32 && o < O) dm[o] = sum * (1 / (k[o] * (norms[o] == 0 ? REAL(1) : norms[o])));
}

// ---- weights in fewer bits ----------------------------------------------------------------------

// The product rounded to float32 once. In double it is exact, so no fused multiply-add can skip that.
__device__ float rounded_product(float a, float b) { return (float)((double)a * b); }

// out[i] = the value of code i, times the absmax of its block, in float32    out (size,)
// codes (bytes,): a byte decodes to values[byte] (256, per_byte). absmax has one number per 2^shift
// of out; or, with absmax_codes (not null, double quantisation), one per 2^absmax_shift of these:
// then a block's absmax is absmax_values[its code] times that, plus offset.
extern "C" __global__ void decode(const unsigned char* codes, const float* values, Int per_byte, Int shift,
                                  const float* absmax, const unsigned char* absmax_codes, const float* absmax_values,
                                  Int absmax_shift, float offset, REAL* out, Int size) {
    FOR_EACH(byte, (size + per_byte - 1) / per_byte)
        for (Int i = byte * per_byte; i < (byte + 1) * per_byte && i < size; i++) {
            Int b = i >> shift;
            float scale = absmax[b >> absmax_shift];
            if (absmax_codes) scale = rounded_product(absmax_values[absmax_codes[b]], scale) + offset;
            out[i] = rounded_product(values[codes[byte] * per_byte + i % per_byte], scale);
        }
}

// codes = a float32 rounded to a bfloat16: to nearest, ties to even    x, codes (size,)
extern "C" __global__ void narrow_bfloat16(const REAL* x, unsigned short* codes, Int size) {
    FOR_EACH(i, size) {
        unsigned bits = __float_as_uint((float)x[i]);
        bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        unsigned rounded = (bits + (bits >> 16 & 1) + 0x7fff) >> 16;
        codes[i] = is_nan ? 0x7fc0 : rounded;
    }
}

// out = a bfloat16 (its upper 16 bits) as a float32    codes, out (size,)
extern "C" __global__ void widen_bfloat16(const unsigned short* codes, REAL* out, Int size) {
    FOR_EACH(i, size) out[i] = __uint_as_float((unsigned)codes[i] << 16);
}

// ---- attention ----------------------------------------------------------------------------------
//
// B sequences of T queries and S keys (the queries are the last T of S), H heads, K heads of keys
// and values, D <= 256 channels per head. Query t sees the keys from first_seen(t) to S - T + t.
// Scores are never in memory: a block keeps a few queries in registers, reads keys and values tile by
// tile, and shrinks its sums when a larger score turns up (Milakov & Gimelshein 2018; Dao et al.
// 2022). Backward computes the scores again: in `attention_dq` a block owns queries and reads keys, in
// `attention_dkv` it owns keys and reads queries. So each sum has one thread, and a fixed order.
//
// A row (a query or a key) belongs to `parts` neighbouring threads, a power of two, with OWNED
// channels each. So a block has 128 / parts rows, and a tile in shared memory as many. The channels
// of a thread are 4 parts i + 4 part + j, i and j from 0 to 3: the threads of a row together read
// whole lines of a tile. Channels from D on are 0.

const int ATTENTION_BLOCK = 128, OWNED = 16, MOST_PARTS = 16, TILE = ATTENTION_BLOCK * OWNED;

#define UNROLLED _Pragma("unroll")
#define FOR_OWNED(I) UNROLLED for (int I = 0; I < OWNED; I++)

// Which channels of a row the thread has.
struct Share {
    int parts, part;  // threads per row, and this thread's number among them

    __device__ Share(int parts) : parts(parts), part(threadIdx.x % parts) {}

    // The channel of the thread's number i.
    __device__ int channel(int i) const { return i / 4 * 4 * parts + 4 * part + i % 4; }

    // own = the thread's channels of a row, times scale; 0 if there is no such row
    __device__ void read(const REAL* data, bool exists, int D, REAL scale, REAL* own) const {
        FOR_OWNED(i) own[i] = exists && channel(i) < D ? data[channel(i)] * scale : 0;
    }

    __device__ void write(const REAL* own, REAL scale, bool exists, int D, REAL* data) const {
        FOR_OWNED(i) if (exists && channel(i) < D) data[channel(i)] = own[i] * scale;
    }

    // The sum over the threads of a row, the same in each of them.
    __device__ REAL sum_parts(REAL x) const {
        UNROLLED for (int k = 1; k < MOST_PARTS; k *= 2) {
            if (k < parts) x += __shfl_xor_sync(~0u, x, k);
        }
        return x;
    }
};

// Which row of which head the thread works on, and its tiles.
struct Place : Share {
    int rows, first;  // of the block: how many rows, and the first
    int row;          // of the thread; it may be past the last
    Int b, head;

    // The blocks of a head follow each other, those with the most work first.
    __device__ Place(int parts, Int count, Int heads, bool is_first_longest) : Share(parts) {
        rows = ATTENTION_BLOCK / parts;
        int blocks = (count + rows - 1) / rows;
        int block = blockIdx.x % blocks;
        first = (is_first_longest ? block : blocks - 1 - block) * rows;
        row = first + threadIdx.x / parts;
        head = blockIdx.x / blocks % heads;
        b = blockIdx.x / blocks / heads;
    }

    // Where channel(i) of row n of a tile is.
    __device__ int in_tile(int n, int i) const { return i / 4 * (TILE / 4) + n * 4 * parts + 4 * part + i % 4; }

    // The block copies its rows from `from` on into a tile, those from `end` on as 0. A tile is
    // (4, rows, 4 parts): four quarters of the channels.
    __device__ void read_tile(const REAL* data, Int stride, int from, int end, int D, REAL* tile) const {
        int width = 4 * parts, column = threadIdx.x % width;
        UNROLLED for (int j = 0; j < 4; j++) {
            int n = threadIdx.x / width + j * (rows / 4);
            const REAL* row = data + (from + n) * stride;
            UNROLLED for (int i = 0; i < 4; i++) {
                int c = i * width + column;
                tile[i * (TILE / 4) + n * width + column] = from + n < end && c < D ? row[c] : 0;
            }
        }
    }

    // The product of the thread's row with row n of a tile.
    __device__ REAL dot_tile(const REAL* own, const REAL* tile, int n) const {
        REAL x = 0;
        FOR_OWNED(i) x += own[i] * tile[in_tile(n, i)];
        return sum_parts(x);
    }

    // sums += x * row n of a tile
    __device__ void add(REAL* sums, REAL x, const REAL* tile, int n) const {
        FOR_OWNED(i) sums[i] += x * tile[in_tile(n, i)];
    }
};

// The first key that a query sees whose own is `own`.    first_key (B, T) or null, n = b T + t
__device__ int first_seen(const Int* first_key, Int n, Int own, Int window) {
    Int first = window && own >= window ? own - window + 1 : 0;
    return first_key && first_key[n] > first ? first_key[n] : first;
}

// The smallest x of a block, the same in every thread.
__device__ int block_min(int x) {
    __shared__ int parts[ATTENTION_BLOCK / 32];
    for (int k = 16; k; k /= 2) x = min(x, __shfl_xor_sync(~0u, x, k));
    __syncthreads();  // whoever read `parts`, or a tile, before has done so
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < ATTENTION_BLOCK / 32; w++) x = min(x, parts[w]);
    return x;
}

// Rotate q and k: y = z cos + sign swapped(z) sin, see apply_rotary; v is copied.    a block per row
// z and y (N, heads, D), which may be one array; cos, sin (table_rows, rotated D), table_rows divides N
extern "C" __global__ void rotate(const REAL* z, REAL* y, const REAL* cos, const REAL* sin, Int table_rows, Int heads,
                                  Int rotated, Int D, REAL sign) {
    int half = D / 2;
    Int at = blockIdx.x * heads * D, table = blockIdx.x % table_rows * rotated * D;
    FOR_ROW(i, heads * half) {
        int head = (int)i / half;
        Int a = head * D + (int)i % half, b = a + half;  // the two channels of a pair
        REAL x = z[at + a], w = z[at + b];
        bool turns = head < rotated;
        y[at + a] = turns ? x * cos[table + a] + sign * (w * sin[table + a]) : x;
        y[at + b] = turns ? w * cos[table + b] + sign * (x * sin[table + b]) : w;
    }
}

// o = softmax(scale q k^T) v    a block per head and queries
// q (B, T, H, D), k and v (B, S, K, D) by the strides of B and of T or S -> o (B, T, H, D), and
// softmax (B, H, T, 2), the largest score and 1 / the sum of exp(score - largest)
extern "C" __global__ void __launch_bounds__(ATTENTION_BLOCK)
    attention(const REAL* q, const REAL* k, const REAL* v, const Int* first_key, REAL* o, REAL* softmax, Int T, Int S,
              Int H, Int K, Int D, Int parts, Int window, Int q_batch, Int q_row, Int k_batch, Int k_row, REAL scale) {
    __align__(16) __shared__ REAL keys[TILE], values[TILE];
    Place at(parts, T, H, false);
    bool exists = at.row < T;
    int last = S - T + at.row;
    int first = exists ? first_seen(first_key, at.b * T + at.row, last, window) : S;
    Int head = at.b * k_batch + at.head / (H / K) * D;
    REAL own[OWNED], sums[OWNED] = {}, top = LOWEST, total = 0;
    at.read(q + at.b * q_batch + at.row * q_row + at.head * D, exists, D, scale, own);
    int end = min(S, S - T + at.first + at.rows);
    for (int from = block_min(first); from < end; from += at.rows) {
        __syncthreads();  // whoever read the tiles before has done so
        at.read_tile(k + head, k_row, from, end, D, keys);
        at.read_tile(v + head, k_row, from, end, D, values);
        __syncthreads();
        for (int n = 0; n < at.rows; n += 4) {
            REAL score[4], higher = top;
            bool seen[4];
            UNROLLED for (int j = 0; j < 4; j++) {
                score[j] = at.dot_tile(own, keys, n + j);
                seen[j] = first <= from + n + j && from + n + j <= last;
                if (seen[j]) higher = fmax(higher, score[j]);
            }
            REAL shrink = exp(top - higher);
            top = higher;
            total *= shrink;
            FOR_OWNED(i) sums[i] *= shrink;
            UNROLLED for (int j = 0; j < 4; j++) {
                REAL p = seen[j] ? exp(score[j] - top) : 0;
                total += p;
                at.add(sums, p, values, n + j);
            }
        }
    }
    at.write(sums, 1 / total, exists, D, o + ((at.b * T + at.row) * H + at.head) * D);
    if (exists && at.part == 0) {
        REAL* kept = softmax + 2 * ((at.b * H + at.head) * T + at.row);
        kept[0] = top;
        kept[1] = 1 / total;
    }
}

// dq = scale sum_s ds k, ds = p (dp - mean), dp = do v    a block per head and queries, as above
// mean = sum_s p dp = do o is written into `means` (B, H, T) for attention_dkv. dq's strides are
// d_batch and d_row.
extern "C" __global__ void __launch_bounds__(ATTENTION_BLOCK)
    attention_dq(const REAL* q, const REAL* k, const REAL* v, const Int* first_key, const REAL* o, const REAL* softmax,
                 const REAL* d_o, REAL* dq, REAL* means, Int T, Int S, Int H, Int K, Int D, Int parts, Int window,
                 Int q_batch, Int q_row, Int k_batch, Int k_row, Int d_batch, Int d_row, REAL scale) {
    __align__(16) __shared__ REAL keys[TILE], values[TILE];
    Place at(parts, T, H, false);
    bool exists = at.row < T;
    int last = S - T + at.row;
    int first = exists ? first_seen(first_key, at.b * T + at.row, last, window) : S;
    Int head = at.b * k_batch + at.head / (H / K) * D;
    Int out = ((at.b * T + at.row) * H + at.head) * D, n = (at.b * H + at.head) * T + at.row;
    REAL own[OWNED], d_own[OWNED], sums[OWNED];
    at.read(o + out, exists, D, 1, own);
    at.read(d_o + out, exists, D, 1, d_own);
    REAL mean = 0, top = exists ? softmax[2 * n] : 0, share = exists ? softmax[2 * n + 1] : 0;
    FOR_OWNED(i) mean += own[i] * d_own[i], sums[i] = 0;
    mean = at.sum_parts(mean);
    if (exists && at.part == 0) means[n] = mean;
    at.read(q + at.b * q_batch + at.row * q_row + at.head * D, exists, D, scale, own);
    int end = min(S, S - T + at.first + at.rows);
    for (int from = block_min(first); from < end; from += at.rows) {
        __syncthreads();  // whoever read the tiles before has done so
        at.read_tile(k + head, k_row, from, end, D, keys);
        at.read_tile(v + head, k_row, from, end, D, values);
        __syncthreads();
        _Pragma("unroll 2") for (int n = 0; n < at.rows; n++) {
            REAL score = at.dot_tile(own, keys, n), dp = at.dot_tile(d_own, values, n);
            bool seen = first <= from + n && from + n <= last;
            at.add(sums, seen ? exp(score - top) * share * (dp - mean) : 0, keys, n);
        }
    }
    at.write(sums, scale, exists, D, dq + at.b * d_batch + at.row * d_row + at.head * D);
}

// dk = scale sum_t ds q, dv = sum_t p do, over the queries t of the H / K heads, in order
// a block per head and keys
extern "C" __global__ void __launch_bounds__(ATTENTION_BLOCK)
    attention_dkv(const REAL* q, const REAL* k, const REAL* v, const Int* first_key, const REAL* softmax,
                  const REAL* means, const REAL* d_o, REAL* dk, REAL* dv, Int T, Int S, Int H, Int K, Int D, Int parts,
                  Int window, Int q_batch, Int q_row, Int k_batch, Int k_row, Int d_batch, Int d_row, REAL scale) {
    __align__(16) __shared__ REAL queries[TILE], d_outs[TILE];
    __shared__ REAL tops[ATTENTION_BLOCK], shares[ATTENTION_BLOCK], averages[ATTENTION_BLOCK];
    __shared__ int firsts[ATTENTION_BLOCK];
    Place at(parts, S, K, true);
    bool exists = at.row < S;
    Int head = at.b * k_batch + at.row * k_row + at.head * D;
    REAL key[OWNED], value[OWNED], d_key[OWNED] = {}, d_value[OWNED] = {};
    at.read(k + head, exists, D, scale, key);
    at.read(v + head, exists, D, 1, value);
    int earlier = S - T;  // keys before the first query's own
    int begin = max(0, at.first - earlier), end = T;
    if (window) end = min(T, at.first + at.rows - 1 + window - earlier);
    for (Int h = at.head * (H / K); h < (at.head + 1) * (H / K); h++) {
        for (int from = begin; from < end; from += at.rows) {
            int t = from + threadIdx.x;  // the query that this thread looks up
            bool looks = threadIdx.x < at.rows && t < end;
            int first = looks ? first_seen(first_key, at.b * T + t, earlier + t, window) : S;
            if (block_min(first) >= at.first + at.rows) continue;  // no query sees a key of the block
            at.read_tile(q + at.b * q_batch + h * D, q_row, from, end, D, queries);
            at.read_tile(d_o + (at.b * T * H + h) * D, H * D, from, end, D, d_outs);
            firsts[threadIdx.x] = first;
            if (looks) {
                Int i = (at.b * H + h) * T + t;
                tops[threadIdx.x] = softmax[2 * i];
                shares[threadIdx.x] = softmax[2 * i + 1];
                averages[threadIdx.x] = means[i];
            }
            __syncthreads();
            _Pragma("unroll 2") for (int n = 0; n < at.rows; n++) {
                REAL score = at.dot_tile(key, queries, n), dp = at.dot_tile(value, d_outs, n);
                bool seen = firsts[n] <= at.row && at.row <= earlier + from + n;
                REAL p = seen ? exp(score - tops[n]) * shares[n] : 0;
                at.add(d_value, p, d_outs, n);
                at.add(d_key, seen ? p * (dp - averages[n]) : 0, queries, n);
            }
        }
    }
    Int out = at.b * d_batch + at.row * d_row + at.head * D;
    at.write(d_key, scale, exists, D, dk + out);
    at.write(d_value, 1, exists, D, dv + out);
}

// ---- one more token per sequence ----------------------------------------------------------------

const int NEWEST_BLOCK = 256;

// out = one head z (D,), normed if there are weights w, rotated: the pair of 2 i is 2 i + 1. factors
// (D,) are cos and sin of each pair. The whole block must call it.
__device__ void norm_and_rotate(const REAL* z, const REAL* w, const REAL* factors, Int D, REAL eps, REAL* out) {
    REAL sum = 0, r = 1;
    FOR_ROW(d, D) sum += z[d] * z[d];
    if (w) r = 1 / sqrt(block_sum(sum) / D + eps);
    FOR_ROW(i, D / 2) {
        REAL a = z[2 * i] * r, b = z[2 * i + 1] * r, c = factors[2 * i], s = factors[2 * i + 1];
        if (w) a *= w[2 * i], b *= w[2 * i + 1];
        out[2 * i] = a * c - b * s;
        out[2 * i + 1] = a * s + b * c;
    }
}

// y = softmax(q k^T) v of the token at position lengths[b], whose k and v are written into the cache
// a block per sequence and head    qkv (B, (H + 2 K) D), cache (2, B, K, limit, D): keys and values,
// factors (limit, (H + K) D) and weights (H + K, D) or null as above, y (B, H D)
//
// Each group of `parts` threads has every 256 / parts-th key, and sums as in `attention`; then the
// groups' sums are added up. The blocks of the H / K heads with the same keys all compute the newest
// key, and read older ones only; so the first of them can write it.
extern "C" __global__ void __launch_bounds__(NEWEST_BLOCK)
    attend_newest(const REAL* qkv, REAL* cache, const REAL* factors, const REAL* weights, const Int* lengths, REAL* y,
                  Int B, Int H, Int K, Int limit, Int D, Int parts, Int window, REAL eps) {
    __shared__ REAL query[MOST_PARTS * OWNED], key[MOST_PARTS * OWNED], value[MOST_PARTS * OWNED];
    __shared__ REAL tops[NEWEST_BLOCK], totals[NEWEST_BLOCK], all[NEWEST_BLOCK * OWNED];
    Int b = blockIdx.x / H, h = blockIdx.x % H, j = h / (H / K), at = lengths[b];
    const REAL* z = qkv + b * (H + 2 * K) * D;
    const REAL *w = weights ? weights + h * D : weights, *u = weights ? weights + (H + j) * D : weights;
    norm_and_rotate(z + h * D, w, factors + (at * (H + K) + h) * D, D, eps, query);
    norm_and_rotate(z + (H + j) * D, u, factors + (at * (H + K) + H + j) * D, D, eps, key);
    FOR_ROW(d, D) value[d] = z[(H + K + j) * D + d];
    __syncthreads();
    REAL *keys = cache + (b * K + j) * limit * D, *values = keys + B * K * limit * D;
    if (h % (H / K) == 0) {
        FOR_ROW(d, D) keys[at * D + d] = key[d], values[at * D + d] = value[d];
    }
    Share mine(parts);
    int groups = NEWEST_BLOCK / mine.parts, group = threadIdx.x / mine.parts;
    REAL own[OWNED], row[OWNED], sums[OWNED] = {}, top = LOWEST, total = 0;
    mine.read(query, true, D, 1, own);
    for (Int from = window && at >= window ? at - window + 1 : 0; from <= at; from += groups) {
        Int s = from + group;
        bool seen = s <= at;
        mine.read(s < at ? keys + s * D : key, true, D, 1, row);
        REAL score = 0;
        FOR_OWNED(i) score += own[i] * row[i];
        score = mine.sum_parts(score);
        REAL higher = seen ? fmax(top, score) : top, shrink = exp(top - higher), p = seen ? exp(score - higher) : 0;
        top = higher;
        total = total * shrink + p;
        mine.read(s < at ? values + s * D : value, true, D, 1, row);
        FOR_OWNED(i) sums[i] = sums[i] * shrink + p * row[i];
    }
    tops[threadIdx.x] = top;
    __syncthreads();
    REAL highest = LOWEST;
    for (int g = 0; g < groups; g++) highest = fmax(highest, tops[g * mine.parts]);
    REAL shrink = exp(top - highest);
    totals[threadIdx.x] = total * shrink;
    int width = OWNED * mine.parts;
    FOR_OWNED(i) all[group * width + mine.channel(i)] = sums[i] * shrink;
    __syncthreads();
    FOR_ROW(d, D) {
        REAL sum = 0, share = 0;
        for (int g = 0; g < groups; g++) sum += all[g * width + d], share += totals[g * mine.parts];
        y[blockIdx.x * D + d] = sum / share;
    }
}

// ids[n] = the first of the largest numbers of row n of z (N, V); -1 if it is not finite, or any is
// NaN    a block per row
extern "C" __global__ void pick_largest(const REAL* z, Int* ids, Int V) {
    __shared__ REAL tops[32];
    __shared__ Int places[32];
    z += blockIdx.x * V;
    REAL top = LOWEST, broken = 0;
    Int place = V;
    FOR_ROW(v, V) {
        if (z[v] != z[v] || z[v] > -LOWEST) broken = 1;
        if (z[v] > top || (z[v] == top && place == V)) top = z[v], place = v;
    }
    broken = block_sum(broken);
    for (int k = 16; k; k /= 2) {
        REAL other = __shfl_xor_sync(~0u, top, k);
        Int there = __shfl_xor_sync(~0u, place, k);
        if (other > top || (other == top && there < place)) top = other, place = there;
    }
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, places[threadIdx.x / 32] = place;
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < blockDim.x / 32; w++) {
        if (tops[w] > top || (tops[w] == top && places[w] < place)) top = tops[w], place = places[w];
    }
    ids[blockIdx.x] = broken > 0 || place == V ? -1 : place;
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
