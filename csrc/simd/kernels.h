// What the CPU kernels of every instruction set offer: dropout of consecutive elements, for each dtype, and their mask.
#pragma once

#include "../mask.h"

namespace fused_dropout {

struct Draw {
  Key key;
  uint64_t threshold;
  double scale;
};

// 16-bit floats by their bits: how they are converted is each instruction set's own affair.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// n elements from x to y, which may be the same; index is that of the first one.
struct CpuKernels {
  const char* isa;
  void (*float32)(const float* x, float* y, uint64_t index, int64_t n, const Draw& draw);
  void (*float64)(const double* x, double* y, uint64_t index, int64_t n, const Draw& draw);
  void (*float16)(const Half* x, Half* y, uint64_t index, int64_t n, const Draw& draw);
  void (*bfloat16)(const BFloat16* x, BFloat16* y, uint64_t index, int64_t n, const Draw& draw);
  void (*mask)(bool* y, uint64_t index, int64_t n, const Draw& draw);
  // The same by flags of 16 bits for each element, all of them set where it is kept; with no flags all are kept.
  void (*select_float32)(const float* x, float* y, const uint16_t* flags, int64_t n, double scale);
  void (*select_float64)(const double* x, double* y, const uint16_t* flags, int64_t n, double scale);
  void (*select_float16)(const Half* x, Half* y, const uint16_t* flags, int64_t n, double scale);
  void (*select_bfloat16)(const BFloat16* x, BFloat16* y, const uint16_t* flags, int64_t n, double scale);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

// The best of them for the machine that runs, or those of a lower instruction set if FUSED_DROPOUT_CPU_ISA names one.
const CpuKernels& cpu_kernels();

}  // namespace fused_dropout
