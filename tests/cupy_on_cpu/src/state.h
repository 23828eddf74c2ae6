// What all parts of the emulated driver share: the counts, the journal, submitting work.
//
// Everything that a call starts is over when the call returns. While a stream captures, its
// operations are kept as closures instead, and run whenever the graph is launched.
// Names: fk_cudaX replaces CUDA's cudaX (libraries.py writes jumps to it), cuX is the driver's own
// cuX, emu_x is called from Python.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <functional>
#include <mutex>
#include <vector>

#define API extern "C"

// counting.py has the same fields in the same order.
struct Counts {
    long long launches, products, device_copies, fills, uploads, downloads, waits, replays, allocations;
};
extern Counts counts;

extern bool computing;               // false: operations are counted, and nothing is done
extern std::recursive_mutex order;   // one operation at a time, from whatever thread
extern thread_local int current_device;

// One line per operation in a file, if somebody asked for that.
extern FILE* journal;
#define LOG(...)                       \
    do {                               \
        if (journal) {                 \
            fprintf(journal, __VA_ARGS__); \
            fputc('\n', journal);      \
        }                              \
    } while (0)

// The reason for an error is printed: CUDA's codes say little.
template <class... Args>
void explain(const char* format, Args... args) {
    fprintf(stderr, "cupy_on_cpu: ");
    fprintf(stderr, format, args...);
    fputc('\n', stderr);
}

using Work = std::function<void()>;
struct Graph {
    std::vector<Work> nodes;
};
extern Graph* graph;               // the one that is being captured
extern cudaStream_t graph_stream;  // by this stream

// cudaErrorStreamCaptureUnsupported, for what would wait while a stream captures.
cudaError_t refuse_in_capture(const char* what);

// Do the work and count it, or keep it for the graph. CUDA refuses the default stream meanwhile.
cudaError_t submit(long long Counts::*field, cudaStream_t stream, Work work);

// The device that an address belongs to; -1 if it is not memory of a device.
int device_of(const void* address);
