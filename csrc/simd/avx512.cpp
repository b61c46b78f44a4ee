// The kernels for CPUs with AVX-512 (F, DQ, BW, VL) and F16C: kAvx512Kernels, which cpu_kernels() in dropout_cpu.cpp
// returns.
//
// Only this file is compiled for AVX-512. The headers that other files share are included before the target pragma:
// their inline functions must not contain AVX-512 instructions.
#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,f16c")
#endif

// GCC warns about undefined values that its own AVX-512 header makes on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "avx512.h"
#include "tables.h"

namespace fused_dropout {

extern const CpuKernels kAvx512Kernels = make_kernels("avx512");

}  // namespace fused_dropout

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
