// Makes the CpuKernels table of one instruction set from the kernels of algorithm.h and softmax.h. portable.cpp,
// avx2.cpp and avx512.cpp include this file after their vector layer, and call make_kernels().
#pragma once

#include "algorithm.h"
#include "softmax.h"

namespace fused_dropout {
namespace {

template <Operation operation, typename T, typename Compute>
constexpr TypedKernels<T> kernels_of() {
  return {drop<operation, T, Compute>, drop_groups<operation, T, Compute>, select<operation, T, Compute>};
}

template <typename T, typename Compute>
constexpr KernelTable<T> table_of() {
  return {kernels_of<Operation::kDrop, T, Compute>(),
          kernels_of<Operation::kDropAdd, T, Compute>(),
          kernels_of<Operation::kBiasDropAdd, T, Compute>(),
          kernels_of<Operation::kReluDrop, T, Compute>(),
          {nullptr, nullptr, select<Operation::kGate, T, Compute>}};
}

constexpr CpuKernels make_kernels(const char* isa) {
  return {isa,
          kGroup,
          table_of<float, float>(),
          table_of<double, double>(),
          table_of<Half, float>(),
          table_of<BFloat16, float>(),
          {kernels_of<Operation::kDrop, bool, float>()},
          draw_flags,
          {softmax_drop, softmax_drop_backward, dot, widen, narrow}};
}

}  // namespace
}  // namespace fused_dropout
