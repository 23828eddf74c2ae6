// out[i] = sum of rows[n] over index[n] == i, for backend.py. REAL is float or double, by -DREAL=...
//
// order (N,) sorts the index; the rows of i are order[start[i]] to order[start[i + 1] - 1];
// rows (N, width), out (count, width). One thread per element of `out` adds its rows in order:
// CuPy's scatter_add uses atomics, whose order of addition, and so whose last bits, change from run
// to run.

extern "C" __global__ void add_rows(const REAL* rows, const long long* order, const long long* start,
                                    REAL* out, long long count, long long width) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count * width) return;
    long long row = i / width, column = i % width;
    REAL sum = 0;
    for (long long n = start[row]; n < start[row + 1]; n++) sum += rows[order[n] * width + column];
    out[i] = sum;
}
