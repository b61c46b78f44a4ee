// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC'11), for host and device. Words and constants in the order of Random123 and cuRAND.
#pragma once

#include <cstdint>

// Internal linkage: the CPU kernels compile these once for each instruction set, and no linker may pick one for
// another.
#if defined(__CUDACC__)
#define FUSED_DROPOUT_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define FUSED_DROPOUT_HOST_DEVICE static inline
#endif

namespace fused_dropout {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

// Four words of a counter, or of what comes out: of one block, or of one in each lane of a vector.
template <typename Word>
struct PhiloxWords {
  Word w[4];
};

using Words = PhiloxWords<uint32_t>;

struct PhiloxKey {
  uint32_t k[2];
};

// The key of a round depends on nothing inside a caller's loop, so compilers hoist it; vectors bring theirs ready-made.
FUSED_DROPOUT_HOST_DEVICE uint32_t round_key(const PhiloxKey& key, int round, int i) {
  return key.k[i] + static_cast<uint32_t>(round) * (i == 0 ? kPhiloxWeyl0 : kPhiloxWeyl1);
}

// What a vector of words defines anew: the 64-bit product, its halves, and the XOR of three.
FUSED_DROPOUT_HOST_DEVICE uint64_t multiply(uint32_t word, uint32_t multiplier) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // from the line below nvcc makes a product by 64 bits, and adds that with their upper half, 0
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(word), "r"(multiplier));
  return product;
#else
  return static_cast<uint64_t>(word) * multiplier;
#endif
}
FUSED_DROPOUT_HOST_DEVICE uint32_t high(uint64_t product) {
  return static_cast<uint32_t>(product >> 32);
}
FUSED_DROPOUT_HOST_DEVICE uint32_t low(uint64_t product) {
#if defined(__CUDA_ARCH__)
  uint32_t word;  // a cast would be taken together with a later shift, to two instructions instead of one
  asm("cvt.u32.u64 %0, %1;" : "=r"(word) : "l"(product));
  return word;
#else
  return static_cast<uint32_t>(product);
#endif
}
FUSED_DROPOUT_HOST_DEVICE uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) {
  return a ^ b ^ c;
}

template <typename Word, typename Key>
FUSED_DROPOUT_HOST_DEVICE PhiloxWords<Word> philox(PhiloxWords<Word> counter, const Key& key) {
  Word c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto product0 = multiply(c0, kPhiloxMultiplier0), product1 = multiply(c2, kPhiloxMultiplier1);
    c0 = xor3(high(product1), c1, round_key(key, round, 0));
    c2 = xor3(high(product0), c3, round_key(key, round, 1));
    c1 = low(product1);
    c3 = low(product0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fused_dropout
