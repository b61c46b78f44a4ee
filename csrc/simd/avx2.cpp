// The kernels for CPUs with AVX2 and F16C: kAvx2Kernels, which cpu_kernels() in dropout_cpu.cpp returns.
//
// Only this file is compiled for AVX2. The headers that other files share are included before the target pragma: their
// inline functions must not contain AVX2 instructions.
#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

#include "avx2.h"
#include "tables.h"

namespace fused_dropout {

extern const CpuKernels kAvx2Kernels = make_kernels("avx2");

}  // namespace fused_dropout

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
