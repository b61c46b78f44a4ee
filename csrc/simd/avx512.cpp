// The CPU kernels for AVX-512: this file alone is compiled for it, below the headers that others share.
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

// GCC's own header makes the undefined values that it then warns of.
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
