// Modules and launches. A module is a shared library that kernels.py compiled from CUDA C++.
#include <dlfcn.h>
#include <xmmintrin.h>

#include <cstring>
#include <string>

#include "state.h"

API int emu_flushes_subnormals();

struct Kernel {
    void (*launch)(const unsigned* grid, const unsigned* block, void** parameters);
    std::vector<size_t> sizes;  // of its parameters, in bytes
    std::string name;
};

// The image of a module is "EMU:" and the path of the library.
API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    *module = (CUmodule)dlopen((const char*)image + 4, RTLD_NOW | RTLD_LOCAL);
    if (*module) return CUDA_SUCCESS;
    explain("%s", dlerror());
    return CUDA_ERROR_INVALID_IMAGE;
}
API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    std::string suffix = name;
    auto launch = (decltype(Kernel::launch))dlsym((void*)module, ("emu_launch_" + suffix).c_str());
    auto sizes_of = (size_t(*)(size_t*))dlsym((void*)module, ("emu_sizes_" + suffix).c_str());
    if (!launch || !sizes_of) return CUDA_ERROR_NOT_FOUND;
    size_t sizes[256];
    size_t count = sizes_of(sizes);
    *function = (CUfunction) new Kernel{launch, {sizes, sizes + count}, suffix};
    return CUDA_SUCCESS;
}

// CuPy has every kernel compiled with -ftz=true, which makes subnormal numbers 0.
static void run(const Kernel* kernel, const unsigned* grid, const unsigned* block, void** parameters) {
    static const bool flush = emu_flushes_subnormals();
    unsigned before = _mm_getcsr();
    if (flush) _mm_setcsr(before | 0x8040);  // results and operands
    kernel->launch(grid, block, parameters);
    _mm_setcsr(before);
}

// A pointer is a parameter's first eight bytes: of a pointer, or of CuPy's description of an array.
static bool belongs_elsewhere(const Kernel* kernel, void** parameters) {
    for (size_t i = 0; i < kernel->sizes.size(); i++) {
        if (kernel->sizes[i] < sizeof(void*)) continue;
        void* address;
        memcpy(&address, parameters[i], sizeof address);
        int device = device_of(address);
        if (device >= 0 && device != current_device) return true;
    }
    return false;
}

API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned dynamic_bytes, CUstream stream, void** parameters, void**) {
    auto kernel = (const Kernel*)function;
    LOG("kernel %s grid %u,%u,%u block %u,%u,%u", kernel->name.c_str(), gx, gy, gz, bx, by, bz);
    unsigned long long threads = (unsigned long long)bx * by * bz;
    if (!gx || !gy || !gz || !threads || threads > 1024 || gy > 65535 || gz > 65535) {
        explain("%s: a grid or block that CUDA refuses", kernel->name.c_str());
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (dynamic_bytes) {
        explain("%s: dynamic shared memory is not emulated", kernel->name.c_str());
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (belongs_elsewhere(kernel, parameters)) {
        explain("%s: an array of another device than the current one", kernel->name.c_str());
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    // Parameters are read now: a graph keeps their values.
    std::vector<std::string> values;
    for (size_t i = 0; i < kernel->sizes.size(); i++) values.emplace_back((char*)parameters[i], kernel->sizes[i]);
    auto work = [=]() mutable {
        std::vector<void*> pointers;
        for (std::string& value : values) pointers.push_back(&value[0]);
        const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
        run(kernel, grid, block, pointers.data());
    };
    return (CUresult)submit(&Counts::launches, (cudaStream_t)stream, work);
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute, CUfunction) {
    *value = 1024;
    return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int, size_t) {
    *blocks = 8;
    return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult, const char** text) {
    *text = "CUDA_ERROR_OF_CUPY_ON_CPU";
    return CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "the emulated driver refused; stderr says why";
    return CUDA_SUCCESS;
}
