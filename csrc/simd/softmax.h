// The steps of attention between its matrix products, on one row of scores: softmax and dropout, forward and backward.
// They are written over a vector layer, like algorithm.h. tables.h puts them into the AttentionKernels table of
// kernels.h, where their parameters are described, and attention.cpp calls them from there.
#pragma once

#include "algorithm.h"

#include <limits>

namespace fused_dropout {
namespace {

using Float32s = decltype(load(static_cast<const float*>(nullptr)));
typedef int32_t Int32s __attribute__((vector_size(sizeof(Float32s))));
constexpr int64_t kFloats = sizeof(Float32s) / sizeof(float);
static_assert(kRowPadding % kFloats == 0, "rows are whole vectors");

inline Float32s all_floats(float x) {
  return Float32s{} + x;
}

// 2^x for x <= 0, with a relative error of 2e-7: 2^n * 2^f for the integer n closest to x. Results below 2^-126 become
// 0. A NaN stays a NaN. The coefficients are those of the polynomial of degree 6 with the smallest relative error for f
// in
// [-1/2, 1/2], which is 2e-9.
inline Float32s power_of_two(Float32s x) {
  constexpr float kToInteger = 1.5f * (1 << 23);  // a float of this size has no fraction bits, so adding it rounds x
  x = larger(all_floats(-127.0f), x);
  const Float32s shifted = x + kToInteger;
  const Float32s f = x - (shifted - kToInteger);
  const Int32s n = (Int32s)shifted - (Int32s)all_floats(kToInteger);
  Float32s y = all_floats(0.0001534581242594868f);
  y = multiply_add(y, f, all_floats(0.0013399930903688073f));
  y = multiply_add(y, f, all_floats(0.009618489071726799f));
  y = multiply_add(y, f, all_floats(0.05550328642129898f));
  y = multiply_add(y, f, all_floats(0.24022646248340607f));
  y = multiply_add(y, f, all_floats(0.6931471824645996f));
  y = multiply_add(y, f, all_floats(1.0f));
  return y * (Float32s)((n + 127) << 23);
}

constexpr float kLog2E = 1.44269504088896340736f;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The largest scale * score of a row of n scores; n is a multiple of kFloats. May ignore a NaN.
FUSED_DROPOUT_KERNEL float row_maximum(const float* scores, int64_t n, float scale) {
  Float32s largest[4];
  for (Float32s& each : largest) each = all_floats(-kInfinity);
  int64_t i = 0;
  for (; n - i >= 4 * kFloats; i += 4 * kFloats) {
    for (int k = 0; k < 4; ++k) largest[k] = larger(largest[k], load(scores + i + k * kFloats) * scale);
  }
  for (; i < n; i += kFloats) largest[0] = larger(largest[0], load(scores + i) * scale);
  return largest_of(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
}

// Writes y = factor * e^(scale * score - maximum), and returns the sum of y. n is a multiple of kFloats.
FUSED_DROPOUT_KERNEL float exponentials(const float* scores, float* y, int64_t n, float scale, float maximum,
                                        float factor) {
  Float32s sum = all_floats(0.0f);
  for (int64_t i = 0; i < n; i += kFloats) {
    const Float32s e = power_of_two((load(scores + i) * scale - maximum) * kLog2E) * factor;
    sum += e;
    store(y + i, e);
  }
  return sum_of(sum);
}

// Overwrites `gradient` with scale * (dropped * gradient - weights * delta). Works on n elements, rounded up to a
// multiple of kFloats.
FUSED_DROPOUT_KERNEL void score_gradients(const float* weights, const float* dropped, float* gradient, int64_t n,
                                          float scale, float delta) {
  for (int64_t i = 0; i < n; i += kFloats) {
    const Float32s step = load(dropped + i) * load(gradient + i) - load(weights + i) * delta;
    store(gradient + i, step * scale);
  }
}

// Fills the row behind its n elements with `value`, up to a multiple of kFloats. Returns that multiple.
inline int64_t pad(float* row, int64_t n, float value) {
  const int64_t padded = (n + kFloats - 1) / kFloats * kFloats;
  std::fill(row + n, row + padded, value);
  return padded;
}

// AttentionKernels::softmax_drop.
RowStatistics softmax_drop(float* scores, int64_t n, float scale, uint64_t index, const MaskParams& params) {
  const int64_t padded = pad(scores, n, -kInfinity);
  const float maximum = row_maximum(scores, padded, scale);
  if (maximum == -kInfinity) {
    // Either all scores are -infinity, so that the row is fully masked, or some are NaN.
    const bool masked = std::all_of(scores, scores + n, [](float score) { return score == -kInfinity; });
    const float weight = masked ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    std::fill_n(scores, n, weight);
    return {kInfinity, weight};
  }
  const float sum = exponentials(scores, scores, padded, scale, maximum, 1.0f);
  MaskParams normalised = params;
  normalised.scale /= sum;
  const Streams<float> at{scores, scores, scores, scores};
  drop<Operation::kDrop, float, float>(at, index, n, normalised);
  return {maximum, 1 / sum};
}

// AttentionKernels::softmax_drop_backward.
void softmax_drop_backward(float* scores, float* gradient, float* weights, int64_t n, float scale, float gradient_scale,
                           const RowStatistics& statistics, float delta, uint64_t index, const MaskParams& params) {
  const int64_t padded = pad(scores, n, -kInfinity);
  pad(gradient, n, 0.0f);
  exponentials(scores, weights, padded, scale, statistics.maximum, statistics.inverse);
  const Streams<float> at{weights, scores, weights, weights};
  drop<Operation::kDrop, float, float>(at, index, n, params);
  score_gradients(weights, scores, gradient, n, gradient_scale, delta);
}

// AttentionKernels::dot. Reads no padding.
FUSED_DROPOUT_KERNEL float dot(const float* a, const float* b, int64_t n) {
  Float32s sum = all_floats(0.0f);
  int64_t i = 0;
  for (; n - i >= kFloats; i += kFloats) sum = multiply_add(load(a + i), load(b + i), sum);
  float all = sum_of(sum);
  for (; i < n; ++i) all += a[i] * b[i];
  return all;
}

// AttentionKernels::widen.
FUSED_DROPOUT_KERNEL void widen(const BFloat16* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i].bits) << 16;
    std::memcpy(y + i, &bits, sizeof(bits));
  }
}

// AttentionKernels::narrow. Rounds to nearest, ties to even; a NaN becomes 0x7FC0.
FUSED_DROPOUT_KERNEL void narrow(const float* x, BFloat16* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    y[i].bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

}  // namespace
}  // namespace fused_dropout
