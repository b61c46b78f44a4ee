// Compares the CPU kernels of each instruction set, called as csrc/dropout_cpu.cpp calls them, with a loop over mask.h,
// bit for bit: every short length and the lengths around powers of two, every alignment, indices around the limits of
// 32 and 64 bits, ties. Buffers end at protected pages. The bytes around a result must not change.
//
//   cpu_kernels_test [avx512 | avx2 | portable ...]   these kernels; without a name, all that this CPU can run
//   cpu_kernels_test --threads [...]                  several threads in one buffer, for a thread sanitizer
//   cpu_kernels_test --golden tests/mask_v1.txt [...] tests the golden masks instead
//   cpu_kernels_test --dispatch                       prints the name of the best kernels
//   cpu_kernels_test --force ...                      also kernels that this CPU lacks: shows that they are detected
//
// The exit status is 77 if the CPU cannot run the named kernels.
#include "golden.h"
#include "simd/kernels.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

using namespace fused_dropout;

namespace {

// ---------------------------------------------------------------------------------------------- failures

// The current test case, for the message of a mismatch or of a signal.
struct Case {
  const char *isa, *dtype, *part;
  uint64_t index;
  int64_t n;
  MaskParams params;
  const void *x, *y;
} current;

void describe(const char* what) {
  const Case& c = current;
  std::printf("FAILED %s\n  kernels %s, %s, %s: index %" PRIu64 ", n %" PRId64 ", threshold %" PRIu64
              ", scale %.17g, key %" PRIu64 " %" PRIu64 "\n  x %% 64 = %d, y %% 64 = %d, %s\n",
              what, c.isa, c.dtype, c.part, c.index, c.n, c.params.threshold, c.params.scale, c.params.key.seed,
              c.params.key.offset, static_cast<int>(reinterpret_cast<uintptr_t>(c.x) % 64),
              static_cast<int>(reinterpret_cast<uintptr_t>(c.y) % 64), c.x == c.y ? "in place" : "out of place");
  std::fflush(stdout);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char what[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  describe(what);
  std::_Exit(1);
}

#if defined(__x86_64__)
__attribute__((force_align_arg_pointer))  // QEMU 7.2 enters handlers with a stack that is off by eight
#endif
void on_signal(int number, siginfo_t* info, void*) {
  char what[96];
  const char* meaning = number == SIGILL ? "an instruction that this CPU lacks" : "reads or writes outside its buffer";
  std::snprintf(what, sizeof(what), "%s (signal %d at %p)", meaning, number, info->si_addr);
  describe(what);
  std::_Exit(1);
}

// ---------------------------------------------------------------------------------------------- dtypes

template <typename T>
struct Dtype;
template <>
struct Dtype<float> {
  using Bits = uint32_t;
  using Scalar = float;
  using Compute = float;
  static constexpr const char* name = "float32";
  static const auto& kernels(const CpuKernels& k) { return k.float32; }
};
template <>
struct Dtype<double> {
  using Bits = uint64_t;
  using Scalar = double;
  using Compute = double;
  static constexpr const char* name = "float64";
  static const auto& kernels(const CpuKernels& k) { return k.float64; }
};
template <>
struct Dtype<Half> {
  using Bits = uint16_t;
  using Scalar = torch::headeronly::Half;
  using Compute = float;
  static constexpr const char* name = "float16";
  static const auto& kernels(const CpuKernels& k) { return k.float16; }
};
template <>
struct Dtype<BFloat16> {
  using Bits = uint16_t;
  using Scalar = torch::headeronly::BFloat16;
  using Compute = float;
  static constexpr const char* name = "bfloat16";
  static const auto& kernels(const CpuKernels& k) { return k.bfloat16; }
};
template <>
struct Dtype<bool> {
  using Bits = uint8_t;
  static constexpr const char* name = "mask";
  static const auto& kernels(const CpuKernels& k) { return k.mask; }
};

template <typename T>
using Bits = typename Dtype<T>::Bits;

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<To>::value);
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Element values of every kind, by their bits. All values of 16-bit floats occur.
template <typename T>
Bits<T> value(uint64_t i) {
  uint64_t z = (i + 1) * 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  z ^= z >> 31;
  if constexpr (sizeof(T) < 4) {
    return static_cast<Bits<T>>(z);
  } else {
    using Limits = std::numeric_limits<T>;
    const T special[] = {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(),      T(0), -T(0),
                         Limits::max(),       Limits::min(),      -Limits::denorm_min() * 9};
    if (z % 32 < 8) return bits_as<Bits<T>>(special[z % 8]);
    if (z % 32 < 16) return static_cast<Bits<T>>(z >> 5 ^ z);
    return bits_as<Bits<T>>(static_cast<T>(static_cast<int64_t>(z)) / static_cast<T>(int64_t{1} << 62));
  }
}

template <typename T>
bool is_nan(Bits<T> bits) {
  if constexpr (std::is_same<T, bool>::value) return false;
  if constexpr (!std::is_same<T, bool>::value) {
    const auto x = static_cast<double>(bits_as<typename Dtype<T>::Scalar>(bits));
    return x != x;
  }
}

// The scalar loop.
template <typename T>
Bits<T> expected(Bits<T> x, uint64_t index, const Words& words, const MaskParams& params) {
  const bool kept = keep(words, static_cast<int>(index % kBlock), params.threshold);
  if constexpr (std::is_same<T, bool>::value) {
    return kept;
  } else {
    const auto s = static_cast<typename Dtype<T>::Compute>(params.scale);
    return bits_as<Bits<T>>(drop_or_scale(kept, bits_as<typename Dtype<T>::Scalar>(x), s));
  }
}

// The scalar loop of an operation. Each step is rounded to the dtype.
template <typename T>
Bits<T> expected(Operation operation, Bits<T> of_x, Bits<T> of_residual, Bits<T> of_bias, bool kept, double scale) {
  using Scalar = typename Dtype<T>::Scalar;
  using Compute = typename Dtype<T>::Compute;
  const auto sum = [](Scalar a, Scalar b) {
    return static_cast<Scalar>(static_cast<Compute>(a) + static_cast<Compute>(b));
  };
  auto x = bits_as<Scalar>(of_x);
  const auto residual = bits_as<Scalar>(of_residual), zero = static_cast<Scalar>(Compute{0});
  if (operation == Operation::kBiasDropAdd) x = sum(x, bits_as<Scalar>(of_bias));
  if (operation == Operation::kReluDrop && static_cast<Compute>(x) < 0) x = zero;
  x = drop_or_scale(kept, x, static_cast<Compute>(scale));
  if (operation == Operation::kGate) return bits_as<Bits<T>>(static_cast<Compute>(residual) <= 0 ? zero : x);
  return bits_as<Bits<T>>(reads_residual(operation) ? sum(residual, x) : x);
}

template <typename T>
Streams<T> streams(const void* x, void* y, const void* residual = nullptr, const void* bias = nullptr) {
  const auto or_x = [x](const void* stream) { return static_cast<const T*>(stream ? stream : x); };
  return {or_x(x), static_cast<T*>(y), or_x(residual), or_x(bias)};
}

template <typename T>
void call(const CpuKernels& kernels, const void* x, void* y, uint64_t index, int64_t n, const MaskParams& params) {
  const bool mask = std::is_same<T, bool>::value;
  Dtype<T>::kernels(kernels)[0].drop(streams<T>(mask ? y : x, y), index, n, params);
}

// ---------------------------------------------------------------------------------------------- memory

// Memory between two protected pages.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size = (bytes + page - 1) / page * page;
    void* all = mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) std::perror("mmap"), std::exit(1);
    begin = static_cast<uint8_t*>(all) + page;
    if (mprotect(begin, size, PROT_READ | PROT_WRITE)) std::perror("mprotect"), std::exit(1);
  }
  Guarded(const Guarded&) = delete;

  uint8_t* begin;
  size_t size;
};

constexpr size_t kMargin = 128;  // checked bytes on each side of a result: two of the widest vectors
constexpr size_t kLongest = (1 << 16) + 600;
constexpr int kSentinel = 0xA5;

enum class Place { kStart, kEnd, kInside };

// ---------------------------------------------------------------------------------------------- the tests

constexpr uint64_t two_to(int exponent) {
  return uint64_t{1} << exponent;
}

constexpr Key kKeys[] = {{0x123456789ABCDEF0, 0x0FEDCBA987654321}, {0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF00000000}};
constexpr uint64_t kBases[] = {
    0, two_to(32) - 9, two_to(32) - 100, two_to(35) - 9, two_to(35) - 100, two_to(63) - 9, two_to(63) - 100};

MaskParams params_of(double p, Key key = kKeys[0]) {
  return {key, threshold(p), scale(p)};
}

// For a given threshold. The value of the scale does not matter.
MaskParams params_of_k(uint64_t k, Key key = kKeys[0]) {
  return {key, k, 1.25};
}

template <typename T>
class Tester {
 public:
  explicit Tester(const CpuKernels& kernels)
      : kernels_(kernels),
        x_(kLongest * sizeof(T)),
        y_(kLongest * sizeof(T)),
        flags_((kLongest + 2 * kBlockPadding * kBlock) * sizeof(uint16_t)) {
    std::memset(x_.begin, kSentinel, x_.size);
    std::memset(y_.begin, kSentinel, y_.size);
    current.isa = kernels.isa;
    current.dtype = Dtype<T>::name;
  }

  int64_t run() {
    short_lengths();
    long_lengths();
    alignments();
    ties();
    every_value();
    if constexpr (!kMask) operations();
    return cases_;
  }

 private:
  using Element = Bits<T>;
  static constexpr bool kMask = std::is_same<T, bool>::value;

  // Makes the inputs and the expected results of all elements of [base, base + n).
  void prepare(const char* part, uint64_t base, int64_t n, const MaskParams& params) {
    current.part = part;
    params_ = params;
    base_ = base;
    input_.resize(static_cast<size_t>(n));
    output_.resize(static_cast<size_t>(n));
    kept_.resize(static_cast<size_t>(n));
    Words words = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t index = base + static_cast<uint64_t>(i);
      if (i == 0 || index % kBlock == 0) words = block_words(params.key, index / kBlock);
      input_[i] = value<T>(static_cast<uint64_t>(i));
      output_[i] = expected<T>(input_[i], index, words, params);
      kept_[i] = keep(words, static_cast<int>(index % kBlock), params.threshold) ? 0xFFFF : 0;
    }
  }

  uint8_t* at(const Guarded& memory, Place place, size_t bytes, size_t inside) const {
    if (place == Place::kStart) return memory.begin;
    return place == Place::kEnd ? memory.begin + memory.size - bytes : memory.begin + kMargin + inside;
  }

  // One call of the kernel, and one of the kernel that gets the flags: n elements from index base_ + first on.
  void check(int64_t first, int64_t n, bool in_place, Place x_place, Place y_place, size_t x_inside = 0,
             size_t y_inside = 0) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    const Element *input = input_.data() + first, *wanted = output_.data() + first;
    uint8_t* y = at(y_, y_place, bytes, y_inside);
    uint8_t* x = in_place ? y : at(x_, x_place, bytes, x_inside);
    if (!kMask) std::memcpy(x, input, bytes);
    current.index = base_ + static_cast<uint64_t>(first);
    current.n = n;
    current.params = params_;
    current.x = x;
    current.y = y;
    call<T>(kernels_, x, y, current.index, n, params_);
    ++cases_;
    compare(y, wanted, n);
    check_groups(x, y, input, wanted, n, in_place);
    if constexpr (kMask) {
      check_flags(first, n, y_place);
    } else {
      if (in_place) std::memcpy(x, input, bytes);
      uint8_t* flags = at(flags_, y_place, n * sizeof(uint16_t), y_inside / sizeof(T) * sizeof(uint16_t));
      std::memcpy(flags, kept_.data() + first, n * sizeof(uint16_t));
      const TypedKernels<T>& kernels = Dtype<T>::kernels(kernels_)[0];
      kernels.select(streams<T>(x, y), reinterpret_cast<const uint16_t*>(flags), n, params_.scale);
      compare(y, wanted, n);
      // Without flags all are kept.
      if (std::find(kept_.begin() + first, kept_.begin() + first + n, 0) == kept_.begin() + first + n) {
        if (in_place) std::memcpy(x, input, bytes);
        kernels.select(streams<T>(x, y), nullptr, n, params_.scale);
        compare(y, wanted, n);
      }
    }
    if (!in_place && !kMask) {
      if (std::memcmp(x, input, bytes)) fail("its input was written to");
      std::memset(x, kSentinel, bytes);
    }
    std::memset(y, kSentinel, bytes);  // so that a result of an earlier call cannot be mistaken for this one's
    untouched(y - std::min<size_t>(kMargin, y - y_.begin), y, "before");
    uint8_t* end = y_.begin + y_.size;
    untouched(y + bytes, y + bytes + std::min<size_t>(kMargin, end - (y + bytes)), "after");
  }

  // The whole groups among these elements, the last one first. The other elements have their results already.
  void check_groups(uint8_t* x, uint8_t* y, const Element* input, const Element* wanted, int64_t n, bool in_place) {
    std::vector<Group<T>> groups;
    std::vector<int64_t> firsts;
    int64_t i = static_cast<int64_t>((kBlock - current.index % kBlock) % kBlock);
    for (; i + kernels_.group <= n; i += kernels_.group) {
      const uint64_t block = (current.index + static_cast<uint64_t>(i)) / kBlock;
      const uint64_t last = block + static_cast<uint64_t>(kernels_.group / kBlock) - 1;
      if (block >> 32 != last >> 32) continue;  // the kernel's limit
      // A mask has no x, so its own memory is passed instead.
      groups.push_back({streams<T>(kMask ? y : x, y) + i, block});
      firsts.push_back(i);
    }
    for (const int64_t begin : firsts) {
      const size_t bytes = static_cast<size_t>(kernels_.group) * sizeof(T);
      std::memset(y + begin * sizeof(T), kSentinel, bytes);
      if (in_place && !kMask) std::memcpy(x + begin * sizeof(T), input + begin, bytes);
    }
    std::reverse(groups.begin(), groups.end());
    Dtype<T>::kernels(kernels_)[0].drop_groups(groups.data(), static_cast<int64_t>(groups.size()), params_);
    compare(y, wanted, n);
  }

  // The flags of the blocks of these elements, in falling order.
  void check_flags(int64_t first, int64_t n, Place place) const {
    if (n == 0) return;
    const uint64_t from = current.index / kBlock,
                   count = (current.index + static_cast<uint64_t>(n) - 1) / kBlock - from + 1;
    const size_t room = (count + kBlockPadding - 1) / kBlockPadding * kBlockPadding;
    std::vector<uint64_t> blocks(room);
    for (size_t i = 0; i < count; ++i) blocks[i] = from + count - 1 - i;
    auto* flags = reinterpret_cast<uint16_t*>(at(flags_, place, room * kBlock * sizeof(uint16_t), 0));
    kernels_.draw_flags(blocks.data(), flags, static_cast<int64_t>(count), params_);
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t index = current.index + static_cast<uint64_t>(i);
      const uint16_t got = flags[(count - 1 - (index / kBlock - from)) * kBlock + index % kBlock];
      if (got != kept_[static_cast<size_t>(first + i)]) fail("the flag of element %" PRId64 " is 0x%" PRIX16, i, got);
    }
  }

  void compare(const uint8_t* y, const Element* wanted, int64_t n) const {
    if (std::memcmp(y, wanted, static_cast<size_t>(n) * sizeof(T)) == 0) return;
    for (int64_t i = 0; i < n; ++i) {
      Element got;
      std::memcpy(&got, y + i * sizeof(T), sizeof(T));
      if (got == wanted[i] || (is_nan<T>(got) && is_nan<T>(wanted[i]))) continue;
      fail("element %" PRId64 " is 0x%" PRIX64 " and not 0x%" PRIX64, i, static_cast<uint64_t>(got),
           static_cast<uint64_t>(wanted[i]));
    }
  }

  void untouched(const uint8_t* from, const uint8_t* to, const char* side) const {
    for (const uint8_t* byte = from; byte < to; ++byte) {
      if (*byte != kSentinel) fail("a byte %s the result was written to: 0x%02X", side, *byte);
    }
  }

  void every_place(int64_t first, int64_t n) {
    for (Place y : {Place::kStart, Place::kEnd}) {
      check(first, n, true, y, y);
      if (kMask) continue;
      for (Place x : {Place::kStart, Place::kEnd}) check(first, n, false, x, y);
    }
  }

  // The other operations, in place and not. The last element of each stream is followed by a protected page.
  void operations() {
    Guarded residuals(kLongest * sizeof(T)), biases(kLongest * sizeof(T));
    for (const uint64_t base : {uint64_t{0}, two_to(35) - 103}) {
      prepare("operations", base, 700, params_of(0.4));
      for (int i = 1; i < kOperations; ++i) {
        for (int64_t n = 0; n <= 200; ++n) {
          for (int64_t first : {0, 3, 13}) check_operation(i, residuals, biases, first, n);
        }
        for (int64_t first : {0, 5}) check_operation(i, residuals, biases, first, 680);
      }
    }
  }

  void check_operation(int number, const Guarded& residuals, const Guarded& biases, int64_t first, int64_t n) {
    const auto operation = static_cast<Operation>(number);
    const TypedKernels<T>& kernels = Dtype<T>::kernels(kernels_)[number];
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    const Element* input = input_.data() + first;
    const uint16_t* flags = kept_.data() + first;
    std::vector<Element> residual(n + 1), bias(n + 1), wanted(n + 1);  // not null if n is 0
    for (int64_t i = 0; i < n; ++i) {
      residual[i] = value<T>(static_cast<uint64_t>(i + 1000 * number));
      bias[i] = value<T>(static_cast<uint64_t>(i + 5000 * number));
      const bool kept = operation == Operation::kGate || flags[i];
      wanted[i] = expected<T>(operation, input[i], residual[i], bias[i], kept, params_.scale);
    }
    uint8_t *r = at(residuals, Place::kEnd, bytes, 0), *b = at(biases, Place::kEnd, bytes, 0);
    std::memcpy(r, residual.data(), bytes);
    std::memcpy(b, bias.data(), bytes);
    current.index = base_ + static_cast<uint64_t>(first);
    current.n = n;
    for (const bool in_place : {false, true}) {
      uint8_t* y = at(y_, Place::kEnd, bytes, 0);
      uint8_t* x = in_place ? y : at(x_, Place::kEnd, bytes, 0);
      current.x = x;
      current.y = y;
      const auto run = [&](const auto& kernel) {
        std::memcpy(x, input, bytes);
        kernel(streams<T>(x, y, r, b));
        ++cases_;
        compare(y, wanted.data(), n);
        std::memset(x, kSentinel, bytes);
        std::memset(y, kSentinel, bytes);
        untouched(y - kMargin, y, "before");
      };
      if (operation == Operation::kGate) {
        run([&](const Streams<T>& all) { kernels.select(all, nullptr, n, params_.scale); });
        continue;
      }
      run([&](const Streams<T>& all) { kernels.drop(all, current.index, n, params_); });
      run([&](const Streams<T>& all) { kernels.select(all, flags, n, params_.scale); });
      if (current.index % kBlock == 0 && n % kernels_.group == 0) {
        run([&](const Streams<T>& all) {
          std::vector<Group<T>> groups;
          for (int64_t i = 0; i < n; i += kernels_.group) {
            groups.push_back({all + i, (current.index + static_cast<uint64_t>(i)) / kBlock});
          }
          kernels.drop_groups(groups.data(), static_cast<int64_t>(groups.size()), params_);
        });
      }
    }
    if (std::memcmp(r, residual.data(), bytes) || std::memcmp(b, bias.data(), bytes)) fail("an operand was written to");
  }

  void short_lengths() {
    for (const uint64_t base : kBases) {
      for (const double p : {0.1, 0.9}) {
        prepare("short lengths", base, 218, params_of(p, kKeys[p > 0.5]));
        for (int64_t n = 0; n <= 200; ++n) {
          for (int64_t first = p > 0.5; first < 18; first += 1 + (p > 0.5)) every_place(first, n);
        }
      }
    }
  }

  void long_lengths() {
    const uint64_t bases[] = {0, two_to(32) - 30000, two_to(35) - 30001, two_to(63) - 30002};
    for (const uint64_t base : bases) {
      prepare("long lengths", base, (1 << 16) + 20, params_of(0.3));
      for (int power = 8; power <= 16; ++power) {
        for (int64_t n = (1 << power) - 1; n <= (1 << power) + 1; ++n) {
          every_place((n + power) % 18, n);
        }
      }
    }
  }

  void alignments() {
    prepare("alignments", 0, 220, params_of(0.5));
    for (size_t y = 0; y < 64; y += sizeof(T)) {
      for (int64_t n = 0; n <= 200; ++n) {
        for (int64_t first : {0, 3}) check(first, n, true, Place::kInside, Place::kInside, y, y);
      }
      for (size_t x = 0; x < 64 && !kMask; x += sizeof(T)) {
        for (int64_t n : {1, 31, 32, 64, 71, 200}) {
          for (int64_t first : {0, 5}) check(first, n, false, Place::kInside, Place::kInside, x, y);
        }
      }
    }
  }

  // Chooses K so that an element's 48 bits are just dropped, then just kept: at every place in a group, head and tail.
  // Also if the high part of K is 0, 65535 or, with all kept, 65536.
  void ties() {
    for (const uint64_t base : {uint64_t{0}, two_to(35) - 96}) {
      for (int64_t i = 0; i < 200; ++i) {
        for (int kept = 0; kept < 2; ++kept) tie_at("ties", base, 200, i, kept, {0, 5});
      }
    }
    for (const uint64_t k : {uint64_t{0}, uint64_t{1}, two_to(48) - 1, two_to(48), 0xFFFF * two_to(32), two_to(32)}) {
      prepare("extreme thresholds", 0, 218, params_of_k(k));
      for (int64_t n = 0; n <= 200; ++n) every_place(n % 18, n);
    }
    prepare("p = 0", 0, 218, params_of(0));
    every_place(3, 200);
    prepare("p = 1", 0, 218, params_of(1));  // the scale is infinite
    every_place(3, 200);
    for (const uint32_t high : {0u, 0xFFFFu}) {
      const uint64_t found = index_with_draw(high);
      for (uint64_t before = 0; before < 18 * kBlock; before += kBlock) {
        const uint64_t base = found / kBlock * kBlock - before;
        const int64_t i = static_cast<int64_t>(found - base);
        for (int kept = 0; kept < 2; ++kept) tie_at("ties of the extreme draws", base, 200, i, kept, {0, 1});
        for (const uint64_t k : {uint64_t{0}, two_to(48), two_to(48) - 1, high * two_to(32)}) {
          prepare("extreme draws", base, 200, params_of_k(k));
          check(0, 200, false, Place::kEnd, Place::kEnd);
          check(1, 199, true, Place::kEnd, Place::kEnd);
        }
      }
    }
  }

  void tie_at(const char* part, uint64_t base, int64_t n, int64_t i, bool kept, std::initializer_list<int> firsts) {
    const uint64_t index = base + static_cast<uint64_t>(i);
    const Words words = block_words(kKeys[0], index / kBlock);
    const int slot = static_cast<int>(index % kBlock);
    const uint32_t word = words.w[slot / 2];
    const uint64_t draw = slot % 2 ? word >> 16 : word & 0xFFFF;
    const uint64_t tie = words.w[0] ^ words.w[1] ^ words.w[2] ^ words.w[3] ^ word;
    const MaskParams chosen = params_of_k((draw << 32 | tie) + kept);
    if (keep(words, slot, chosen.threshold) != kept) fail("the loop itself decides element %" PRId64 " otherwise", i);
    prepare(part, base, n, chosen);
    for (const int first : firsts) {
      check(first, n - first, false, Place::kEnd, Place::kEnd);
      if (i >= first) check(first, i + 1 - first, true, Place::kEnd, Place::kEnd);  // the tie is the last element
      if (i >= first) check(i, n - i, true, Place::kStart, Place::kStart);          // the tie is the first
    }
  }

  static uint64_t index_with_draw(uint32_t wanted) {
    for (uint64_t block = 100;; ++block) {
      const Words words = block_words(kKeys[0], block);
      for (int i = 0; i < kBlock; ++i) {
        if ((words.w[i / 2] >> (16 * (i % 2)) & 0xFFFF) == wanted) return block * kBlock + static_cast<uint64_t>(i);
      }
    }
  }

  // All 16-bit floats, and as many values of the wider types. All are kept, with scales that round in many ways.
  void every_value() {
    if (kMask) return;
    for (const double s : {1.0, 1 / 0.9, 1 / 0.6, 1.5, 1 / 0.3, 1 / (1 - 0.999)}) {
      prepare("every value", 0, 1 << 16, {kKeys[0], two_to(48), s});
      if (sizeof(T) == 2) {
        const Words none = {};
        for (uint32_t i = 0; i < 1 << 16; ++i) {
          input_[i] = static_cast<Element>(i);
          output_[i] = expected<T>(input_[i], 0, none, params_);
        }
      }
      check(0, 1 << 16, true, Place::kEnd, Place::kEnd);
    }
  }

  const CpuKernels& kernels_;
  const Guarded x_, y_, flags_;
  MaskParams params_ = {};
  uint64_t base_ = 0;
  std::vector<Element> input_, output_;
  std::vector<uint16_t> kept_;
  int64_t cases_ = 0;
};

// Several threads in one buffer, each with every fourth piece of irregular length. The memory beside a piece belongs to
// another thread. Reading or writing outside a piece is therefore a race, even if the same values are written back.
template <typename T>
int64_t side_by_side(const CpuKernels& kernels) {
  constexpr int kThreads = 4, kLength = 20000;
  const MaskParams params = params_of(0.4);
  std::vector<Bits<T>> buffer(kLength), wanted(kLength);
  for (int i = 0; i < kLength; ++i) {
    const auto index = static_cast<uint64_t>(i);
    buffer[i] = value<T>(index);
    wanted[i] = expected<T>(buffer[i], index, block_words(params.key, index / kBlock), params);
  }
  std::vector<int> cuts = {0};
  for (int i = 0; cuts.back() < kLength; ++i) {
    cuts.push_back(std::min(kLength, cuts.back() + 1 + static_cast<int>(value<Half>(i) % (i % 2 ? 200 : 20))));
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = static_cast<size_t>(t); i + 1 < cuts.size(); i += kThreads) {
        Bits<T>* y = buffer.data() + cuts[i];
        call<T>(kernels, y, y, static_cast<uint64_t>(cuts[i]), cuts[i + 1] - cuts[i], params);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  current = {kernels.isa, Dtype<T>::name, "threads", 0, kLength, params, buffer.data(), buffer.data()};
  for (int i = 0; i < kLength; ++i) {
    if (buffer[i] != wanted[i] && !(is_nan<T>(buffer[i]) && is_nan<T>(wanted[i]))) fail("element %d differs", i);
  }
  return static_cast<int64_t>(cuts.size()) - 1;
}

// ---------------------------------------------------------------------------------------------- attention

// The memory of a row, which ends at a protected page.
struct RowMemory {
  explicit RowMemory(int64_t n) : all(static_cast<size_t>(n + kRowPadding) * sizeof(float)) {
    const int64_t padded = (n + kRowPadding - 1) / kRowPadding * kRowPadding;
    row = reinterpret_cast<float*>(all.begin + all.size) - padded;
  }
  Guarded all;
  float* row;
};

void near(double got, double wanted, double tolerance, const char* what, int64_t i) {
  if (!(std::abs(got - wanted) <= tolerance)) fail("%s %" PRId64 " is %.9g, not %.9g", what, i, got, wanted);
}

// A row of scores against a loop in float64.
void attention_row(const CpuKernels& kernels, int64_t n, uint64_t index, float scale, float step) {
  const MaskParams params = params_of(0.3);
  const RowMemory scores(n), gradient(n), weights(n);
  current = {kernels.isa, "float32", "attention", index, n, params, scores.row, gradient.row};
  std::vector<double> of_scores(static_cast<size_t>(n)), of_gradient(of_scores), softmax(of_scores), kept(of_scores);
  double maximum = -1e300, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    of_scores[i] = static_cast<float>(step * static_cast<float>(static_cast<int64_t>(value<Half>(i) % 2001) - 1000));
    of_gradient[i] = static_cast<float>(value<Half>(i + n) % 2001) / 1000.0f - 1;
    scores.row[i] = static_cast<float>(of_scores[i]);
    gradient.row[i] = static_cast<float>(of_gradient[i]);
    const uint64_t element = index + static_cast<uint64_t>(i);
    kept[i] = keep(block_words(params.key, element / kBlock), element % kBlock, params.threshold) ? params.scale : 0;
    maximum = std::max<double>(maximum, static_cast<float>(of_scores[i]) * scale);
  }
  for (int64_t i = 0; i < n; ++i) sum += softmax[i] = std::exp(of_scores[i] * scale - maximum);
  const RowStatistics statistics = kernels.attention.softmax_drop(scores.row, n, scale, index, params);
  near(statistics.maximum, maximum, 1e-5 * (1 + std::abs(maximum)), "the maximum", 0);
  near(statistics.inverse * sum, 1, 1e-5, "the sum", 0);
  const float delta = 0.25f, outer = 0.5f;
  for (int64_t i = 0; i < n; ++i) near(scores.row[i], kept[i] * softmax[i] / sum, 1e-5, "weight", i);
  for (int64_t i = 0; i < n; ++i) scores.row[i] = static_cast<float>(of_scores[i]);
  kernels.attention.softmax_drop_backward(scores.row, gradient.row, weights.row, n, scale, outer, statistics, delta,
                                          index, params);
  double dot = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double weight = softmax[i] / sum;
    near(scores.row[i], kept[i] * weight, 1e-5, "weight in backward", i);
    near(gradient.row[i], outer * weight * (kept[i] * of_gradient[i] - delta), 1e-5, "gradient", i);
    dot += static_cast<double>(scores.row[i]) * gradient.row[i];
  }
  near(kernels.attention.dot(scores.row, gradient.row, n), dot, 1e-5, "dot", 0);
}

int64_t attention_rows(const CpuKernels& kernels) {
  int64_t rows = 0;
  for (const int64_t n : {1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 200, 1000}) {
    for (const uint64_t index : {uint64_t{0}, uint64_t{13}, two_to(35) - 9}) {
      for (const float step : {0.0f, 0.01f, 1.0f}) attention_row(kernels, n, index, 0.125f, step), ++rows;
    }
    // Fully masked.
    const RowMemory masked(n);
    std::fill_n(masked.row, n, -std::numeric_limits<float>::infinity());
    const RowStatistics statistics = kernels.attention.softmax_drop(masked.row, n, 1.0f, 0, params_of(0.3));
    if (!(statistics.maximum > 1e38f) || statistics.inverse != 0) fail("the statistics of a masked row");
    for (int64_t i = 0; i < n; ++i) near(masked.row[i], 0, 0, "masked weight", i);
    // Converts all values of bfloat16 and back.
    std::vector<BFloat16> half(static_cast<size_t>(n)), back(half);
    for (int64_t i = 0; i < n; ++i) half[i].bits = static_cast<uint16_t>(value<BFloat16>(i));
    const RowMemory wide(n);
    kernels.attention.widen(half.data(), wide.row, n);
    kernels.attention.narrow(wide.row, back.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const bool both_nan = is_nan<BFloat16>(half[i].bits) && is_nan<BFloat16>(back[i].bits);
      if (half[i].bits != back[i].bits && !both_nan) fail("bfloat16 %" PRId64 " changes", i);
    }
  }
  return rows;
}

// ---------------------------------------------------------------------------------------------- main

struct Set {
  const CpuKernels& kernels;
  bool supported;
};

std::vector<Set> all_sets() {
  std::vector<Set> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // older compilers' cpu_supports lacks it
  const bool avx2 = __builtin_cpu_supports("avx2") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  sets.push_back({kAvx512Kernels, avx512});
  sets.push_back({kAvx2Kernels, avx2});
#endif
  sets.push_back({kPortableKernels, true});
  return sets;
}

int64_t run(const CpuKernels& kernels, bool threads) {
  if (threads) {
    return side_by_side<float>(kernels) + side_by_side<double>(kernels) + side_by_side<Half>(kernels) +
           side_by_side<BFloat16>(kernels) + side_by_side<bool>(kernels);
  }
  return Tester<float>(kernels).run() + Tester<double>(kernels).run() + Tester<Half>(kernels).run() +
         Tester<BFloat16>(kernels).run() + Tester<bool>(kernels).run() + attention_rows(kernels);
}

}  // namespace

int main(int count, char** arguments) {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO;
  for (const int number : {SIGSEGV, SIGBUS, SIGILL}) sigaction(number, &action, nullptr);

  std::vector<std::string> wanted(arguments + 1, arguments + count);
  const auto option = [&](const char* name) {
    const auto found = std::find(wanted.begin(), wanted.end(), name);
    if (found == wanted.end()) return false;
    wanted.erase(found);
    return true;
  };
  const std::vector<Set> sets = all_sets();
  if (option("--dispatch")) {
    for (const Set& set : sets) {
      if (set.supported) return std::puts(set.kernels.isa) < 0;
    }
  }
  const bool threads = option("--threads");
  std::unique_ptr<GoldenMasks> golden;
  if (option("--golden")) {
    if (wanted.empty()) return std::puts("--golden: which file?"), 2;
    golden = std::make_unique<GoldenMasks>(wanted.front());
    wanted.erase(wanted.begin());
  }
  const bool force = option("--force");
  for (const std::string& name : wanted) {
    const auto same = [&](const Set& set) { return name == set.kernels.isa; };
    const auto found = std::find_if(sets.begin(), sets.end(), same);
    if (found == sets.end()) return std::printf("there are no kernels named %s\n", name.c_str()), 2;
    if (!found->supported && !force) return std::printf("skipped %s: this CPU lacks it\n", name.c_str()), 77;
  }
  for (const Set& set : sets) {
    const bool named = std::find(wanted.begin(), wanted.end(), set.kernels.isa) != wanted.end();
    if (wanted.empty() ? !set.supported : !named) continue;
    const int64_t checked = golden ? golden->check(set.kernels) : run(set.kernels, threads);
    std::printf("ok %s %" PRId64 "\n", set.kernels.isa, checked);
    std::fflush(stdout);
  }
  return 0;
}
