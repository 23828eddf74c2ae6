// CUDA C++ as C++: the words and functions that g++ does not know.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#ifdef EMU_HALF  // CuPy's headers for float16 and bfloat16 include CUDA's own
#include <cuda_runtime_api.h>
#include <cuda_fp16.h>
#define __CUDACC_VER_MAJOR__ 13
#undef __device__
#undef __global__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __align__
#endif
#define __device__
#define __global__
#define __host__
#define __shared__ static  // blocks run one after another
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct EmuIndex {
    unsigned x, y, z;
};
static EmuIndex threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

// ---- functions that C++ lacks, or has in std --------------------------------------------------

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
using std::signbit;
template <class A, class B>
using EmuMixed =
    std::enable_if_t<!std::is_same<A, B>::value && std::is_arithmetic<A>::value && std::is_arithmetic<B>::value>;
template <class A, class B, class = EmuMixed<A, B>>
inline std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <class A, class B, class = EmuMixed<A, B>>
inline std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float rsqrt(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }

template <class To, class From>
inline To emu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu_bits<double>(x); }
inline int __double2hiint(double x) { return (int)(__double_as_longlong(x) >> 32); }
inline int __double2loint(double x) { return (int)__double_as_longlong(x); }
inline double __hiloint2double(int high, int low) {
    return __longlong_as_double(((long long)high << 32) | (unsigned)low);
}

// One thread runs at a time, so plain loads and stores are atomic.
template <class T>
inline T emu_update(T* a, T value) { return std::exchange(*a, value); }
template <class T>
inline T atomicExch(T* a, T value) { return emu_update(a, value); }
template <class T>
inline T atomicCAS(T* a, T expected, T value) { return *a == expected ? emu_update(a, value) : *a; }
template <class T>
inline T atomicMax(T* a, T value) { return emu_update(a, *a > value ? *a : value); }
template <class T>
inline T atomicMin(T* a, T value) { return emu_update(a, *a < value ? *a : value); }
inline int atomicAdd(int* a, int v) { return emu_update(a, *a + v); }
inline unsigned atomicAdd(unsigned* a, unsigned v) { return emu_update(a, *a + v); }
inline unsigned long long atomicAdd(unsigned long long* a, unsigned long long v) { return emu_update(a, *a + v); }
inline float atomicAdd(float* a, float v) { return emu_update(a, *a + v); }
inline double atomicAdd(double* a, double v) { return emu_update(a, *a + v); }
