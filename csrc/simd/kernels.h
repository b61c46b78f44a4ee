// What the CPU kernels of every instruction set offer, for each dtype.
#pragma once

#include "../mask.h"

namespace fused_dropout {

// What the mask of a call depends on, and what kept elements are multiplied by.
struct MaskParams {
  Key key;
  uint64_t threshold;
  double scale;
};

// 16-bit floats as bits: each instruction set has its own conversions.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Elements that are drawn together: as many consecutive ones, the first of which begins a block.
template <typename T>
struct Group {
  const T* x;
  T* y;
  uint64_t block;  // of the first element
};

template <typename T>
struct TypedKernels {
  // Dropout of n elements from x to y, which may be the same; index is that of the first element.
  void (*drop)(const T* x, T* y, uint64_t index, int64_t n, const MaskParams& params);
  // Dropout of n groups of CpuKernels::group elements, wherever they are: for short rows.
  void (*drop_groups)(const Group<T>* groups, int64_t n, const MaskParams& params);
  // Dropout by a flag for each element: 0xFFFF where it is kept, else 0. Without flags all are kept.
  void (*select)(const T* x, T* y, const uint16_t* flags, int64_t n, double scale);
};

// draw_flags() works on this many blocks at a time: its arrays have room for n rounded up to a multiple of it.
constexpr int kBlockPadding = 8;

struct CpuKernels {
  const char* isa;
  int group;
  TypedKernels<float> float32;
  TypedKernels<double> float64;
  TypedKernels<Half> float16;
  TypedKernels<BFloat16> bfloat16;
  TypedKernels<bool> mask;  // true where an element is kept; x is not read
  // The flags of n blocks, eight for each, given their numbers in any order.
  void (*draw_flags)(const uint64_t* blocks, uint16_t* flags, int64_t n, const MaskParams& params);
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

// The best of them for the machine that runs, or those of a lower instruction set if FUSED_DROPOUT_CPU_ISA names one.
const CpuKernels& cpu_kernels();

}  // namespace fused_dropout
