// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC'11), for host and device. Words and constants in the order of Random123 and cuRAND.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSED_DROPOUT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSED_DROPOUT_HOST_DEVICE inline
#endif

namespace fused_dropout {

struct Words {
  uint32_t w[4];
};

struct PhiloxKey {
  uint32_t k[2];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

FUSED_DROPOUT_HOST_DEVICE Words philox(Words counter, PhiloxKey key) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c2;
    // The round keys depend on nothing inside a caller's loop, so compilers hoist them out of it.
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ (key.k[0] + static_cast<uint32_t>(round) * kPhiloxWeyl0);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ (key.k[1] + static_cast<uint32_t>(round) * kPhiloxWeyl1);
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fused_dropout
