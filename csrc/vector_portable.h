// The vector layer in plain C++, for any CPU: four blocks at a time, in loops that compilers turn into what vectors the
// target has at least.
#pragma once

#include "cpu_kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace fused_dropout {
namespace {

constexpr int kLanes = 4;

struct Lanes {
  uint64_t v[kLanes];
};

template <typename F>
inline Lanes each_lane(const F& f) {
  Lanes out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

inline Lanes all_lanes(uint32_t word) {
  return each_lane([=](int) { return word; });
}
inline Lanes multiply(const Lanes& a, uint32_t multiplier) {
  return each_lane([&](int i) { return (a.v[i] & 0xFFFFFFFF) * multiplier; });
}
inline Lanes high(const Lanes& product) {
  return each_lane([&](int i) { return product.v[i] >> 32; });
}
inline Lanes low(const Lanes& product) {
  return product;
}
inline Lanes xor3(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each_lane([&](int i) { return a.v[i] ^ b.v[i] ^ c.v[i]; });
}
inline Lanes blocks_from(uint64_t first) {
  return each_lane([=](int i) { return first + static_cast<uint64_t>(i); });
}

constexpr int kDraws = kLanes * kBlock / 2;

struct Draws {
  uint16_t v[kDraws];
};

// A block's first two lanes of words go to the first vector of draws, the others to the second.
inline void draws_of(const PhiloxWords<Lanes>& words, Draws draws[2]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int word = 0; word < 4; ++word) {
      for (int half = 0; half < 2; ++half) {
        const int at = i * kBlock + 2 * word + half;
        draws[at / kDraws].v[at % kDraws] = static_cast<uint16_t>(words.w[word].v[i] >> (16 * half));
      }
    }
  }
}

using Limit = uint16_t;
using Kept = Draws;  // all ones or zeros

inline Limit limit_of(uint32_t high) {
  return static_cast<uint16_t>(high);
}
inline Kept below(const Draws& draws, Limit limit) {
  Kept kept;
  for (int i = 0; i < kDraws; ++i) kept.v[i] = draws.v[i] < limit ? 0xFFFF : 0;
  return kept;
}
inline bool any_equal(const Draws& a, const Draws& b, Limit limit) {
  uint16_t equal = 0;
  for (int i = 0; i < kDraws; ++i) equal |= (a.v[i] == limit) | (b.v[i] == limit);
  return equal;
}
inline Kept kept_of(const uint16_t* flags) {
  Kept kept;
  std::memcpy(kept.v, flags, sizeof(kept.v));
  return kept;
}

template <typename T>
inline void write(const T* x, T* y, const Kept& kept, T scale) {
  for (int i = 0; i < kDraws; ++i) y[i] = drop_or_scale(kept.v[i] != 0, x[i], scale);
}

// torch's own conversions of 16-bit floats.
template <typename Torch, typename T>
inline void write_converted(const T* x, T* y, const Kept& kept, float scale) {
  for (int i = 0; i < kDraws; ++i) {
    const Torch product = static_cast<float>(Torch(x[i].bits, Torch::from_bits())) * scale;
    y[i].bits = product.x & kept.v[i];
  }
}
inline void write(const Half* x, Half* y, const Kept& kept, float scale) {
  write_converted<torch::headeronly::Half>(x, y, kept, scale);
}
inline void write(const BFloat16* x, BFloat16* y, const Kept& kept, float scale) {
  write_converted<torch::headeronly::BFloat16>(x, y, kept, scale);
}

inline void write(const bool*, bool* y, const Kept& kept, float) {
  for (int i = 0; i < kDraws; ++i) y[i] = kept.v[i] != 0;
}

}  // namespace
}  // namespace fused_dropout
