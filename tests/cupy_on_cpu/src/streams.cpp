// Streams and events are numbers. Captures, graphs and their replay; what is counted.
#include <utility>

#include "state.h"

Counts counts;
FILE* journal;
bool computing = true;
std::recursive_mutex order;
Graph* graph;
cudaStream_t graph_stream;

API Counts* emu_counts() { return &counts; }
API void emu_compute(int yes) { computing = yes; }
API void emu_journal(const char* path) {
    if (journal) fclose(journal);
    journal = path ? fopen(path, "w") : nullptr;
}
// Work that Python does for the device, such as a sort: a launch, or a node of the graph.
API int emu_submit(const char* name, cudaStream_t stream, void (*work)()) {
    LOG("kernel %s", name);
    return submit(&Counts::launches, stream, work);
}
API int emu_flushes_subnormals() { return getenv("CUPY_ON_CPU_FLUSH") != nullptr; }
API long long emu_nodes() { return graph ? (long long)graph->nodes.size() : -1; }

cudaError_t refuse_in_capture(const char* what) {
    explain("%s while a stream captures", what);
    LOG("REFUSED in a capture: %s", what);
    return cudaErrorStreamCaptureUnsupported;
}

cudaError_t submit(long long Counts::*field, cudaStream_t stream, Work work) {
    std::lock_guard<std::recursive_mutex> guard(order);
    if (graph && stream == graph_stream) {
        graph->nodes.push_back(std::move(work));
        return cudaSuccess;
    }
    if (graph && (!stream || stream == cudaStreamLegacy)) {
        explain("an operation on the default stream while another one captures");
        return cudaErrorStreamCaptureImplicit;
    }
    ++(counts.*field);
    if (computing) work();
    return cudaSuccess;
}

// ---- streams and events -----------------------------------------------------------------------

static long long last_handle = 0x1000;
template <class Handle>
static cudaError_t new_handle(Handle* handle) {
    *handle = (Handle)(last_handle += 16);
    return cudaSuccess;
}
static cudaError_t wait(const char* what) {
    if (graph) return refuse_in_capture(what);
    counts.waits++;
    LOG("%s", what);
    return cudaSuccess;
}
API cudaError_t fk_cudaStreamCreate(cudaStream_t* stream) { return new_handle(stream); }
API cudaError_t fk_cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return new_handle(stream); }
API cudaError_t fk_cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return new_handle(stream); }
API cudaError_t fk_cudaStreamGetFlags(cudaStream_t, unsigned* flags) {
    *flags = cudaStreamNonBlocking;
    return cudaSuccess;
}
API cudaError_t fk_cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}
API cudaError_t fk_cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t fk_cudaStreamSynchronize(cudaStream_t) { return wait("waiting for a stream"); }
API cudaError_t fk_cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t fk_cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t fk_cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
    function(data);
    return cudaSuccess;
}
API cudaError_t fk_cudaEventCreate(cudaEvent_t* event) { return new_handle(event); }
API cudaError_t fk_cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return new_handle(event); }
API cudaError_t fk_cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
API cudaError_t fk_cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t fk_cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
API cudaError_t fk_cudaEventSynchronize(cudaEvent_t) { return wait("waiting for an event"); }
API cudaError_t fk_cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;  // no time passes here; not 0, because somebody may divide by it
    return cudaSuccess;
}

// ---- captures and graphs ----------------------------------------------------------------------

API cudaError_t fk_cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    bool captures = graph && stream == graph_stream;
    *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
API cudaError_t fk_cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    if (graph) return cudaErrorIllegalState;
    graph = new Graph;
    graph_stream = stream;
    return cudaSuccess;
}
API cudaError_t fk_cudaStreamEndCapture(cudaStream_t, cudaGraph_t* captured) {
    *captured = (cudaGraph_t)std::exchange(graph, nullptr);
    return cudaSuccess;
}
API cudaError_t fk_cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t from, unsigned long long) {
    *made = (cudaGraphExec_t) new Graph(*(Graph*)from);
    return cudaSuccess;
}
API cudaError_t fk_cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
API cudaError_t fk_cudaGraphLaunch(cudaGraphExec_t what, cudaStream_t) {
    std::lock_guard<std::recursive_mutex> guard(order);
    const std::vector<Work>& nodes = ((Graph*)what)->nodes;
    LOG("replay of %zu nodes", nodes.size());
    counts.replays++;
    if (computing)
        for (const Work& work : nodes) work();
    return cudaSuccess;
}
API cudaError_t fk_cudaGraphDestroy(cudaGraph_t g) {
    delete (Graph*)g;
    return cudaSuccess;
}
API cudaError_t fk_cudaGraphExecDestroy(cudaGraphExec_t g) {
    delete (Graph*)g;
    return cudaSuccess;
}
