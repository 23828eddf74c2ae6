// What the driver calls for each kernel: EMU_KERNEL follows the kernel.
#pragma once

template <class T>
using EmuValue = std::remove_const_t<std::remove_reference_t<T>>;
template <class... A, size_t... I>
inline void emu_call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
    kernel(*(EmuValue<A>*)parameters[I]...);
}
template <class... A>
inline void emu_call(void (*kernel)(A...), void** parameters) {
    emu_call(kernel, parameters, std::index_sequence_for<A...>());
}
template <class... A>
inline size_t emu_sizes(void (*)(A...), size_t* sizes) {
    size_t count = 0;
    ((sizes[count++] = sizeof(EmuValue<A>)), ...);
    return count;
}

inline void emu_run_grid(void (*body)(void**), const unsigned* grid, const unsigned* block, void** parameters) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    for (unsigned z = 0; z < gridDim.z; z++)
        for (unsigned y = 0; y < gridDim.y; y++)
            for (unsigned x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                emu_run_block(body, parameters, blockDim.x * blockDim.y * blockDim.z);
            }
}

// ONE_THREAD: a loop with a stride of the whole grid does all its work in one thread, much faster.
#define EMU_KERNEL(K, ONE_THREAD)                                                                     \
    extern "C" size_t emu_sizes_##K(size_t* sizes) { return emu_sizes(&K, sizes); }                   \
    extern "C" void emu_launch_##K(const unsigned* grid, const unsigned* block, void** parameters) {  \
        static const unsigned one[3] = {1, 1, 1};                                                     \
        auto body = [](void** values) { emu_call(&K, values); };                                      \
        emu_run_grid(body, ONE_THREAD ? one : grid, ONE_THREAD ? one : block, parameters);            \
    }
