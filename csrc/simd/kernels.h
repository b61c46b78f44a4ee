// The types that all kernels share, and the table of CPU kernels. algorithm.h and softmax.h define these kernels once
// for each instruction set. dropout_cpu.cpp, window_cpu.h and attention.cpp call them through cpu_kernels().
#pragma once

#include "../mask.h"

#include <array>

namespace fused_dropout {

// The parameters of a call's mask, and the factor of kept elements.
struct MaskParams {
  Key key;
  uint64_t threshold;
  double scale;
};

// 16-bit floats, held as bits. Each instruction set has its own conversions.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// The bits of -infinity as a signed integer. As signed integers, the bits of -0 are the smallest. Then follow the
// negative values, from the one closest to 0 to -infinity, then the negative NaNs, then +0.
// Inline, since Clang defines a specialization that is not inline in every file that includes this one.
template <typename T>
inline constexpr int16_t kMinusInfinity = 0;
template <>
inline constexpr int16_t kMinusInfinity<Half> = -0x0400;
template <>
inline constexpr int16_t kMinusInfinity<BFloat16> = -0x0080;
constexpr int16_t kMinusZero = INT16_MIN;

// What a kernel does to an element: dropout, and the steps before and after it. Each step rounds to the dtype.
enum class Operation {
  kDrop,         // drop(x)
  kDropAdd,      // residual + drop(x)
  kBiasDropAdd,  // residual + drop(x + bias)
  kReluDrop,     // drop(relu(x))
  kGate,         // the backward pass of kReluDrop, which draws nothing: x * scale, or 0 where residual <= 0
};
constexpr int kOperations = 5;

constexpr bool reads_residual(Operation operation) {
  return operation == Operation::kDropAdd || operation == Operation::kBiasDropAdd || operation == Operation::kGate;
}
constexpr bool reads_bias(Operation operation) {
  return operation == Operation::kBiasDropAdd;
}

// The addresses of one element in each tensor of an operation. The pointers to tensors that the operation does not read
// are equal to x.
template <typename T>
struct Streams {
  const T* x;
  T* y;  // may be x
  const T* residual;
  const T* bias;
};

// The addresses n elements later.
template <typename T>
FUSED_DROPOUT_HOST_DEVICE Streams<T> operator+(const Streams<T>& at, int64_t n) {
  return {at.x + n, at.y + n, at.residual + n, at.bias + n};
}

// A group: CpuKernels::group elements with consecutive indices, which are drawn together. They are consecutive in
// memory too. The first element is the first one of a block.
template <typename T>
struct Group {
  Streams<T> at;
  uint64_t block;  // the block number of the first element
};

// The kernels of one operation and one dtype. They read x, and residual and bias if the operation does, and write y.
// For T = bool, y is the mask, and the values at x are ignored. All counts are in elements. params is the mask and the
// factor of kept elements.
template <typename T>
struct TypedKernels {
  // Draws and applies the mask of n elements with consecutive indices. Null for kGate.
  //   at      the first element; n elements follow each other in each tensor
  //   index   the element index of the first one
  void (*drop)(const Streams<T>& at, uint64_t index, int64_t n, const MaskParams& params);
  // The same for elements in groups, which may be anywhere: for short rows. Null for kGate.
  //   groups  n groups of CpuKernels::group elements each; the block numbers of a group have equal upper 32 bits
  void (*drop_groups)(const Group<T>* groups, int64_t n, const MaskParams& params);
  // Applies flags that are drawn already.
  //   at      the first element; n elements follow each other in each tensor
  //   flags   n flags, read: 0xFFFF for a kept element and 0 for a dropped one; or null: all are kept
  //   scale   the factor of kept elements
  void (*select)(const Streams<T>& at, const uint16_t* flags, int64_t n, double scale);
};

template <typename T>
using KernelTable = std::array<TypedKernels<T>, kOperations>;  // indexed by Operation

// The arrays of draw_flags() have room for n blocks, rounded up to a multiple of this number.
constexpr int kBlockPadding = 8;

// The statistics of a row of scores, which the backward pass of attention needs: the maximum of scale * score, and 1 /
// the sum of e^(scale * score - maximum). A fully masked row has maximum +infinity and inverse 0.
struct RowStatistics {
  float maximum, inverse;
};

// Each row of floats that softmax_drop and softmax_drop_backward write has memory for n floats, rounded up to a
// multiple of this number.
constexpr int64_t kRowPadding = 16;

// The steps of attention on one row, between the matrix products. All counts are in elements.
struct AttentionKernels {
  // Turns a row of scores into dropped attention weights: dropout(softmax(scale * scores)).
  //   scores  n floats, read and overwritten; the padding behind them is overwritten too
  //   scale   greater than 0; the factor of kept weights is params.scale
  //   index   the element index of the first score
  RowStatistics (*softmax_drop)(float* scores, int64_t n, float scale, uint64_t index, const MaskParams& params);
  // The backward pass of softmax_drop. The padding behind the rows is overwritten too.
  //   scores          n floats: the scores as softmax_drop read them, overwritten with the dropped weights
  //   gradient        n floats: the gradient of the dropped weights, overwritten with gradient_scale * the gradient of
  //                   scale * scores
  //   weights         n floats of scratch memory
  //   statistics      what softmax_drop returned for the row
  //   delta           the dot product of the row's output and its gradient
  void (*softmax_drop_backward)(float* scores, float* gradient, float* weights, int64_t n, float scale,
                                float gradient_scale, const RowStatistics& statistics, float delta, uint64_t index,
                                const MaskParams& params);
  // Reads n floats of a and of b, and returns their dot product.
  float (*dot)(const float* a, const float* b, int64_t n);
  // Converts n elements from x to y. narrow rounds to nearest, ties to even.
  void (*widen)(const BFloat16* x, float* y, int64_t n);
  void (*narrow)(const float* x, BFloat16* y, int64_t n);
};

// The kernels of one instruction set.
struct CpuKernels {
  const char* isa;  // "portable", "avx2" or "avx512"
  int group;        // elements of a Group
  KernelTable<float> float32;
  KernelTable<double> float64;
  KernelTable<Half> float16;
  KernelTable<BFloat16> bfloat16;
  KernelTable<bool> mask;  // kDrop only: writes true where an element is kept
  // Draws the flags of n blocks. Both arrays have room for n blocks, rounded up to a multiple of kBlockPadding.
  //   blocks  n block numbers in any order, read together with the padding
  //   flags   8 flags a block, written: 0xFFFF for a kept element, 0 for a dropped one
  void (*draw_flags)(const uint64_t* blocks, uint16_t* flags, int64_t n, const MaskParams& params);
  AttentionKernels attention;
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

// The kernels for the best instruction set that this CPU has, or for the one that FUSED_DROPOUT_CPU_ISA names if that
// is lower.
const CpuKernels& cpu_kernels();

}  // namespace fused_dropout
