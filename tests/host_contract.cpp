// csrc/philox.h and csrc/mask.h as a plain C library, for tests/test_host_contract.py: no torch, no Python.
#include "mask.h"

using namespace fused_dropout;

extern "C" {

void philox_words(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  const Words w = philox(Words{{counter[0], counter[1], counter[2], counter[3]}}, PhiloxKey{{key[0], key[1]}});
  for (int i = 0; i < 4; ++i) words[i] = w.w[i];
}

uint64_t threshold_of(double p) {
  return threshold(p);
}

bool keep_words(const uint32_t* words, int slot, uint64_t k) {
  return keep({{words[0], words[1], words[2], words[3]}}, slot, k);
}

bool keep_index(uint64_t seed, uint64_t offset, uint64_t index, double p) {
  return keep(block_words({seed, offset}, index / kBlock), index % kBlock, threshold(p));
}

float drop_or_scale_float(bool kept, float x, float s) {
  return drop_or_scale(kept, x, s);
}
}
