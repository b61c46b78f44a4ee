// Philox4x32-10, the counter-based random number generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers:
// as easy as 1, 2, 3" (SC'11), for host and device. mask.h calls it for one block, and the kernels of simd/ and CUDA
// call it with their own types of words and round keys. Words and constants have the order of Random123 and cuRAND.
#pragma once

#include <cstdint>

// Internal linkage (static): the CPU kernels compile these functions once for each instruction set, and the linker must
// not merge the versions.
#if defined(__CUDACC__)
#define FUSED_DROPOUT_HOST_DEVICE static __host__ __device__ __forceinline__
#else
#define FUSED_DROPOUT_HOST_DEVICE static inline
#endif

namespace fused_dropout {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

// The four words of a Philox counter or of a Philox result. Word is uint32_t for one block, or a vector with one block
// in each lane.
template <typename Word>
struct PhiloxWords {
  Word w[4];
};

using Words = PhiloxWords<uint32_t>;

struct PhiloxKey {
  uint32_t k[2];
};

// Word i of the key of a round. It does not depend on the counter, so compilers move it out of a caller's loop. Callers
// with precomputed round keys overload this function.
FUSED_DROPOUT_HOST_DEVICE uint32_t round_key(const PhiloxKey& key, int round, int i) {
  return key.k[i] + static_cast<uint32_t>(round) * (i == 0 ? kPhiloxWeyl0 : kPhiloxWeyl1);
}

// The operations of a round: the 64-bit product, its two halves, and the XOR of three words. The vector layers of simd/
// overload them for vectors of words.
FUSED_DROPOUT_HOST_DEVICE uint64_t multiply(uint32_t word, uint32_t multiplier) {
#if defined(__CUDA_ARCH__)
  // For the expression below nvcc multiplies 64-bit numbers, and adds a product with their upper half, which is 0.
  uint64_t product;
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
  uint32_t word;  // nvcc would merge a cast with a later shift, and make two instructions instead of one
  asm("cvt.u32.u64 %0, %1;" : "=r"(word) : "l"(product));
  return word;
#else
  return static_cast<uint32_t>(product);
#endif
}
FUSED_DROPOUT_HOST_DEVICE uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) {
  return a ^ b ^ c;
}

// Ten rounds of Philox. Key is PhiloxKey, or a type with precomputed round keys.
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
