// Devices: two of them, which say that they are H200s. The current one belongs to a thread.
#include <cstring>

#include "state.h"

static const int DEVICES = 2;
static const size_t MEMORY = 143771ull << 20;
thread_local int current_device = 0;

API cudaError_t fk_cudaGetLastError() { return cudaSuccess; }
API cudaError_t fk_cudaPeekAtLastError() { return cudaSuccess; }
API cudaError_t fk_cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
API cudaError_t fk_cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}
API cudaError_t fk_cudaSetDevice(int device) {
    if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}
API cudaError_t fk_cudaGetDeviceCount(int* count) {
    *count = DEVICES;
    return cudaSuccess;
}
API cudaError_t fk_cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;  // so CuPy refuses arrays of another device
    return cudaSuccess;
}
API cudaError_t fk_cudaDeviceSynchronize() {
    if (graph) return refuse_in_capture("waiting for the device");
    counts.waits++;
    LOG("wait for the device");
    return cudaSuccess;
}
API cudaError_t fk_cudaMemGetInfo(size_t* available, size_t* total) {
    *available = *total = MEMORY;
    return cudaSuccess;
}

API cudaError_t fk_cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = 65535; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
        case cudaDevAttrWarpSize: *value = 32; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
        default: *value = 0;
    }
    return cudaSuccess;
}
API cudaError_t fk_cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device < 0 || device >= DEVICES) return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    strcpy(p->name, "H200, emulated on a CPU");
    p->totalGlobalMem = MEMORY;
    p->sharedMemPerBlock = 49152;
    p->regsPerBlock = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->major = 9;
    p->multiProcessorCount = 132;
    p->l2CacheSize = 60 << 20;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerMultiprocessor = 233472;
    p->sharedMemPerBlockOptin = 232448;
    for (int i = 0; i < 3; i++) {
        p->maxThreadsDim[i] = i < 2 ? 1024 : 64;
        p->maxGridSize[i] = i ? 65535 : 2147483647;
    }
    return cudaSuccess;
}
