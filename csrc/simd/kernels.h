// The operations on an element, for every device, and what the CPU kernels of every instruction set offer, for each
// dtype.
#pragma once

#include "../mask.h"

#include <array>

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
// Their bits as a signed number: -0 is the least, then come the negative values up to this one, then NaNs, then +0.
// Inline, since Clang defines a specialization that is not inline in every file that includes this one.
template <typename T>
inline constexpr int16_t kMinusInfinity = 0;
template <>
inline constexpr int16_t kMinusInfinity<Half> = -0x0400;
template <>
inline constexpr int16_t kMinusInfinity<BFloat16> = -0x0080;
constexpr int16_t kMinusZero = INT16_MIN;

// What is done to an element: dropout, and what stands before and after it. Each step rounds to the dtype.
enum class Operation {
  kDrop,         // drop(x)
  kDropAdd,      // residual + drop(x)
  kBiasDropAdd,  // residual + drop(x + bias)
  kReluDrop,     // drop(relu(x))
  kGate,         // x * scale, or 0 where the residual is 0 or less: the backward pass of kReluDrop, which draws nothing
};
constexpr int kOperations = 5;

constexpr bool reads_residual(Operation operation) {
  return operation == Operation::kDropAdd || operation == Operation::kBiasDropAdd || operation == Operation::kGate;
}
constexpr bool reads_bias(Operation operation) {
  return operation == Operation::kBiasDropAdd;
}

// Where one element is in each tensor. What an operation does not read stands at x.
template <typename T>
struct Streams {
  const T* x;
  T* y;  // may be x
  const T* residual;
  const T* bias;
};
template <typename T>
FUSED_DROPOUT_HOST_DEVICE Streams<T> operator+(const Streams<T>& at, int64_t n) {
  return {at.x + n, at.y + n, at.residual + n, at.bias + n};
}

// Elements that are drawn together: as many consecutive ones, the first of which begins a block.
template <typename T>
struct Group {
  Streams<T> at;
  uint64_t block;  // of the first element
};

template <typename T>
struct TypedKernels {
  // Draws for n consecutive elements; index is that of the first.
  void (*drop)(const Streams<T>& at, uint64_t index, int64_t n, const MaskParams& params);
  // The same for n groups of CpuKernels::group elements, wherever they are: for short rows.
  void (*drop_groups)(const Group<T>* groups, int64_t n, const MaskParams& params);
  // The same with a flag for each element: 0xFFFF where it is kept, else 0. Without flags all are kept.
  void (*select)(const Streams<T>& at, const uint16_t* flags, int64_t n, double scale);
};

template <typename T>
using KernelTable = std::array<TypedKernels<T>, kOperations>;  // by Operation

// draw_flags() works on this many blocks at a time: its arrays have room for n rounded up to a multiple of it.
constexpr int kBlockPadding = 8;

// What the backward pass of attention needs of a row of scores: their maximum, and 1 / the sum of e^(score - maximum).
// A row that is masked whole has +infinity and 0.
struct RowStatistics {
  float maximum, inverse;
};

// Rows have memory up to a multiple of so many floats.
constexpr int64_t kRowPadding = 16;

// Attention's steps on a row of n scores, of which the first has an element index. scale > 0.
struct AttentionKernels {
  // The scores become their softmax, dropped: scale stands before the exponent, the mask's own scale after it.
  RowStatistics (*softmax_drop)(float* scores, int64_t n, float scale, uint64_t index, const MaskParams& params);
  // The scores become the same again. `gradient` holds the gradient of the dropped weights, and then that of the scores
  // times gradient_scale. delta: the sum of the output times its gradient. weights: memory to work in.
  void (*softmax_drop_backward)(float* scores, float* gradient, float* weights, int64_t n, float scale,
                                float gradient_scale, const RowStatistics& statistics, float delta, uint64_t index,
                                const MaskParams& params);
  float (*dot)(const float* a, const float* b, int64_t n);
  void (*widen)(const BFloat16* x, float* y, int64_t n);
  void (*narrow)(const float* x, BFloat16* y, int64_t n);
};

struct CpuKernels {
  const char* isa;
  int group;
  KernelTable<float> float32;
  KernelTable<double> float64;
  KernelTable<Half> float16;
  KernelTable<BFloat16> bfloat16;
  KernelTable<bool> mask;  // kDrop alone: true where an element is kept; x is not read
  // The flags of n blocks, eight for each, given their numbers in any order.
  void (*draw_flags)(const uint64_t* blocks, uint16_t* flags, int64_t n, const MaskParams& params);
  AttentionKernels attention;
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

// The best of them for the machine that runs, or those of a lower instruction set if FUSED_DROPOUT_CPU_ISA names one.
const CpuKernels& cpu_kernels();

}  // namespace fused_dropout
