// The golden masks of mask_v1.txt, for cpu_kernels_test.cpp. Philox and keep() of mask.h, and the CPU kernels, must
// give the values of the file.
#pragma once

#include "simd/kernels.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace fused_dropout {

// A mask or a single element of the file: indices, and whether each element is kept.
struct GoldenMask {
  Key key;
  double p;
  std::vector<uint64_t> indices;
  std::vector<bool> kept;
};

[[noreturn]] inline void golden_failure(const char* what, size_t line) {
  std::printf("FAILED golden masks, line %zu: %s\n", line, what);
  std::exit(1);
}

class GoldenMasks {
 public:
  // Reads the file, and checks the known answers of Philox.
  explicit GoldenMasks(const std::string& path) {
    std::ifstream file(path);
    std::string text;
    for (size_t line = 1; std::getline(file, text); ++line) {
      if (text[0] == '#') continue;
      std::istringstream fields(text);
      std::string kind;
      fields >> kind;
      if (kind == "philox") {
        check_philox(fields, line);
        continue;
      }
      masks_.push_back(kind == "mask" ? read_mask(fields) : read_element(fields));
      if (!fields || masks_.back().kept.size() != masks_.back().indices.size()) golden_failure("malformed", line);
      lines_.push_back(line);
    }
    if (masks_.size() < 200) golden_failure("too few records, or no file", masks_.size());
  }

  // Checks every record with keep(), and with the kernels in runs of consecutive indices. Returns the element count.
  int64_t check(const CpuKernels& kernels) const {
    int64_t elements = 0;
    for (size_t i = 0; i < masks_.size(); ++i) {
      const GoldenMask& mask = masks_[i];
      const size_t n = mask.indices.size();
      for (size_t from = 0, to; from < n; from = to) {
        for (to = from + 1; to < n && mask.indices[to] == mask.indices[to - 1] + 1;) ++to;
        check_run(kernels, mask, from, to, lines_[i]);
      }
      elements += static_cast<int64_t>(n);
    }
    return elements;
  }

 private:
  static void check_philox(std::istringstream& fields, size_t line) {
    uint32_t word[10] = {};
    for (uint32_t& w : word) fields >> std::hex >> w;
    const Words words = philox(Words{{word[0], word[1], word[2], word[3]}}, PhiloxKey{{word[4], word[5]}});
    for (int i = 0; i < 4; ++i) {
      if (!fields || words.w[i] != word[6 + i]) golden_failure("Philox's words", line);
    }
  }

  static double read_p(std::istringstream& fields) {
    std::string p;  // strtod reads the smallest numbers too; operator>> may refuse them
    fields >> p;
    return std::strtod(p.c_str(), nullptr);
  }

  static GoldenMask read_element(std::istringstream& fields) {
    GoldenMask mask = {};
    uint64_t index = 0;
    bool kept = false;
    fields >> std::hex >> mask.key.seed >> mask.key.offset >> std::dec >> index;
    mask.p = read_p(fields);
    fields >> kept;
    mask.indices = {index};
    mask.kept = {kept};
    return mask;
  }

  static GoldenMask read_mask(std::istringstream& fields) {
    GoldenMask mask = {};
    uint64_t start = 0;
    size_t dimensions = 0;
    fields >> std::hex >> mask.key.seed >> mask.key.offset >> std::dec;
    mask.p = read_p(fields);
    fields >> start >> dimensions;
    std::vector<uint64_t> sizes(dimensions), strides(dimensions);
    for (uint64_t& size : sizes) fields >> size;
    for (uint64_t& stride : strides) fields >> stride;
    mask.indices = {start};
    for (size_t d = 0; d < dimensions; ++d) {
      std::vector<uint64_t> longer;
      for (const uint64_t index : mask.indices) {
        for (uint64_t i = 0; i < sizes[d]; ++i) longer.push_back(index + i * strides[d]);
      }
      mask.indices = longer;
    }
    std::string digits;
    fields >> digits;
    for (const char digit : digits) {
      const int four = std::stoi(std::string(1, digit), nullptr, 16);
      for (int bit = 3; bit >= 0; --bit) mask.kept.push_back(four >> bit & 1);
    }
    return mask;
  }

  static void check_run(const CpuKernels& kernels, const GoldenMask& mask, size_t from, size_t to, size_t line) {
    const uint64_t k = threshold(mask.p);
    for (size_t i = from; i < to; ++i) {
      const uint64_t index = mask.indices[i];
      const int slot = static_cast<int>(index % kBlock);
      if (keep(block_words(mask.key, index / kBlock), slot, k) != mask.kept[i]) golden_failure("keep()", line);
    }
    // With elements before and after it, the run is in the middle of the kernels' vectors. Other code handles ties.
    for (const uint64_t margin : {0, 77}) {
      const uint64_t before = std::min(margin, mask.indices[from]);
      const uint64_t first = mask.indices[from] - before, n = before + (to - from) + margin;
      if (first + n > uint64_t{1} << 63) continue;
      const std::vector<float> x(n, 2.0f);
      std::vector<float> y(n);
      std::vector<uint8_t> kept(n);
      static_assert(sizeof(bool) == 1, "the mask is written to bytes");
      auto* kept_bools = reinterpret_cast<bool*>(kept.data());
      const Streams<bool> to_kept{kept_bools, kept_bools, kept_bools, kept_bools};
      const Streams<float> from_x{x.data(), y.data(), x.data(), x.data()};
      kernels.mask[0].drop(to_kept, first, static_cast<int64_t>(n), {mask.key, k, 0.5});
      kernels.float32[0].drop(from_x, first, static_cast<int64_t>(n), {mask.key, k, 0.5});
      for (size_t i = from; i < to; ++i) {
        const size_t at = before + (i - from);
        if (kept[at] != mask.kept[i]) golden_failure(kernels.isa, line);
        if (y[at] != (mask.kept[i] ? 1.0f : 0.0f)) golden_failure(kernels.isa, line);
      }
    }
  }

  std::vector<GoldenMask> masks_;
  std::vector<size_t> lines_;
};

}  // namespace fused_dropout
