// A device's memory is memory of the host that remembers its device. Copies and fills.
#include <cstdlib>
#include <cstring>
#include <map>

#include "state.h"

struct Block {
    size_t bytes;
    int device;
};
static std::map<const char*, Block> blocks;  // what cudaMalloc gave

int device_of(const void* address) {
    std::lock_guard<std::recursive_mutex> guard(order);
    auto next = blocks.upper_bound((const char*)address);
    if (next == blocks.begin()) return -1;
    auto found = std::prev(next);
    bool inside = (const char*)address < found->first + found->second.bytes;
    return inside ? found->second.device : -1;
}

API cudaError_t fk_cudaMalloc(void** p, size_t bytes) {
    if (posix_memalign(p, 512, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
    // All bits set is NaN, and no valid index: whoever reads what nobody wrote will notice.
    // Where nothing is computed it is 0, so that what a program decides by is the same each time.
    memset(*p, computing ? 0xFF : 0, bytes);
    std::lock_guard<std::recursive_mutex> guard(order);
    counts.allocations++;
    blocks[(char*)*p] = {bytes, current_device};
    return cudaSuccess;
}
API cudaError_t fk_cudaFree(void* p) {
    if (graph) return refuse_in_capture("cudaFree");
    std::lock_guard<std::recursive_mutex> guard(order);
    blocks.erase((char*)p);
    free(p);
    return cudaSuccess;
}
API cudaError_t fk_cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return fk_cudaMalloc(p, bytes); }
API cudaError_t fk_cudaFreeAsync(void* p, cudaStream_t) { return fk_cudaFree(p); }
API cudaError_t fk_cudaHostAlloc(void** p, size_t bytes, unsigned) {
    return posix_memalign(p, 512, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}
API cudaError_t fk_cudaFreeHost(void* p) {
    free(p);
    return cudaSuccess;
}
API cudaError_t fk_cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
    memset(attributes, 0, sizeof *attributes);
    int device = device_of(p);
    attributes->type = device < 0 ? cudaMemoryTypeUnregistered : cudaMemoryTypeDevice;
    attributes->device = device;
    attributes->devicePointer = (void*)p;
    return cudaSuccess;
}

static cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream,
                        bool waits) {
    bool is_upload = kind == cudaMemcpyHostToDevice, is_download = kind == cudaMemcpyDeviceToHost;
    if (graph && (waits || is_download)) return refuse_in_capture("a copy that waits");
    const char* name = is_upload ? "upload" : is_download ? "download" : "copy";
    LOG("%s %zu bytes%s", name, bytes, waits ? ", and wait" : "");
    counts.waits += waits;
    if (!is_upload && !is_download)
        return submit(&Counts::device_copies, stream, [=] { memmove(to, from, bytes); });
    if (graph) return submit(&Counts::uploads, stream, [=] { memmove(to, from, bytes); });
    (is_upload ? counts.uploads : counts.downloads)++;
    memmove(to, from, bytes);  // even where nothing is computed: these data are the caller's
    return cudaSuccess;
}
API cudaError_t fk_cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    return copy(to, from, bytes, kind, nullptr, true);
}
API cudaError_t fk_cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    return copy(to, from, bytes, kind, stream, false);
}
API cudaError_t fk_cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    LOG("fill %zu bytes", bytes);
    return submit(&Counts::fills, stream, [=] { memset(p, value, bytes); });
}
API cudaError_t fk_cudaMemset(void* p, int value, size_t bytes) {
    return fk_cudaMemsetAsync(p, value, bytes, nullptr);
}
