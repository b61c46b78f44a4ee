// The operators on the CPU: the kernels for the best instruction set that the machine has, spread over torch's threads.
#include "operators.h"
#include "simd/kernels.h"

#include <cstdlib>
#include <cstring>
#include <string_view>

#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_dropout {

const CpuKernels& choose_kernels() {
  const char* setting = std::getenv("FUSED_DROPOUT_CPU_ISA");  // native.py has checked it
  const std::string_view wanted = setting ? setting : "auto";
#if defined(__x86_64__)
  __builtin_cpu_init();
  // Some compilers' __builtin_cpu_supports do not know F16C.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (wanted == "auto" || wanted == "avx512")) return kAvx512Kernels;
  if (avx2 && wanted != "portable") return kAvx2Kernels;
#endif
  return kPortableKernels;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose_kernels();
  return chosen;
}

namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 16;

// Calls part(begin, end) for ranges of so many parts of equal size, which have numel elements in all.
template <typename Part>
void in_parallel(int64_t numel, int64_t parts, const Part& part) {
  if (numel <= kGrain) return part(0, parts);
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, kGrain / (numel / parts)), part);
}

// A large new output has no pages yet: each is made when it is first written, and with huge ones that costs a fourth.
// Only pages that lie inside it whole are asked for, so that no memory is used that would not be anyway.
void ask_for_huge_pages(void* y, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(y) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(y) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // where it is refused, all goes on as before
#endif
}

constexpr int64_t kFlags = 1024;   // as many flags of elements stay in the first cache
constexpr int64_t kLongRun = 64;   // runs of as many elements are worth a call of their own
constexpr int64_t kLongRow = 256;  // and rows of as many a call of the kernel that draws, drops and scales at once

// Elements that lie next to each other in y, as the innermost dimension has them, and whose flags were drawn.
struct Run {
  const char* x;
  char* y;
  int64_t n;
  int64_t flags;   // where the flag of the first element stands among those drawn
  int64_t period;  // the flags repeat after as many elements: 1 if one flag is for all
};

// Visits a window of elements that is not one row. It collects the blocks that the next runs need, draws them all at
// once, and applies their flags run by run. So a short row costs no more than its elements, and an element that is
// shared by a broadcast mask is drawn once for many.
template <typename T>
class Walk {
 public:
  Walk(const KernelArgs& args, const MaskParams& params, const TypedKernels<T>& kernels, int64_t position)
      : args_(args), params_(params), kernels_(kernels), at_(args.dims.size()), index_(args.start) {
    for (size_t d = 0; d < at_.size(); ++d) {
      const Dim& dim = args.dims[d];
      at_[d] = position % dim.size;
      position /= dim.size;
      x_ += at_[d] * dim.x;
      y_ += at_[d] * dim.y;
      index_ += at_[d] * dim.index;
    }
  }

  void visit(int64_t n) {
    const Dim& inner = args_.dims[0];
    const bool packed = inner.x == 1 && inner.y == 1;
    while (n > 0) {
      int64_t length = std::min(n, inner.size - at_[0]);
      if (packed && inner.index == 1 && length >= kLongRow) {
        kernels_.drop(x(), y(), index_, length, params_);
      } else if (packed && inner.index == 1 && n >= inner.size && has_rows()) {
        length = rows_are_groups() ? visit_groups(n) : visit_rows(n);
      } else if (inner.index <= 1) {
        const bool whole = packed && inner.index == 0 && length >= kLongRun;
        length = add(whole ? length : std::min(length, kFlags), n);
      } else {
        length = std::min(length, kFlags / kBlock);
        add_scattered(length);
      }
      advance(length);
      n -= length;
    }
    finish();
  }

 private:
  // A mask has no x: its own memory is read in the place of one, and ignored.
  const T* x() const { return static_cast<const T*>(args_.x ? args_.x : args_.y) + x_; }
  T* y() const { return static_cast<T*>(args_.y) + y_; }

  // Whether the walk stands at the beginning of a short row, whose successors have indices of their own.
  bool has_rows() const { return at_[0] == 0 && args_.dims.size() > 1 && args_.dims[1].index != 0; }

  // Whether each row is so many groups. The upper half of the block number has to be one for a group.
  bool rows_are_groups() const {
    const uint64_t size = args_.dims[0].size, group = cpu_kernels().group;
    return size % group == 0 && index_ % group == 0 && args_.dims[1].index % group == 0;
  }

  // The next whole rows, of whole groups.
  int64_t visit_groups(int64_t n) {
    const Dim row = args_.dims[0], next = args_.dims[1];
    const int64_t group = cpu_kernels().group, per_row = row.size / group;
    const int64_t rows = std::min({n / row.size, next.size - at_[1], kRuns / per_row});
    Group<T> groups[kRuns];
    Group<T> first = {x(), y(), index_ / kBlock};
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < per_row; ++i) {
        groups[count++] = {first.x + i * group, first.y + i * group, first.block + i * group / kBlock};
      }
      prefetch(first.x, row.size);
      first = {first.x + next.x, first.y + next.y, first.block + next.index / kBlock};
    }
    kernels_.drop_groups(groups, count, params_);
    return rows * row.size;
  }

  // The next whole rows, as many as there is room for, without further ado: the commonest window. Returns how many
  // elements they have.
  int64_t visit_rows(int64_t n) {
    finish();
    count_ = drawn_ = 0;
    first_ = kNone;
    const Dim row = args_.dims[0], next = args_.dims[1];
    const int64_t most_blocks = (row.size + 2 * (kBlock - 1)) / kBlock;
    const int64_t rows = std::min({n / row.size, next.size - at_[1], kBlocks / most_blocks});
    const auto blocks_of = [&](uint64_t index) {
      return (static_cast<int64_t>(index % kBlock) + row.size + 7) / kBlock;
    };
    int64_t count = 0;
    uint64_t index = index_;
    const T* x = this->x();
    for (int64_t r = 0; r < rows; ++r, index += next.index, x += next.x) {
      // Four at a time: what is written past the end is overwritten by the next row, or is padding.
      for (int64_t i = 0; i < blocks_of(index); i += 4) {
        for (int k = 0; k < 4; ++k) blocks_[count + i + k] = index / kBlock + i + k;
      }
      count += blocks_of(index);
      prefetch(x, row.size);
    }
    cpu_kernels().draw_flags(blocks_, flags_, count, params_);
    index = index_;
    x = this->x();
    T* y = this->y();
    const uint16_t* flags = flags_;
    for (int64_t r = 0; r < rows; ++r, index += next.index, x += next.x, y += next.y) {
      kernels_.select(x, y, flags + index % kBlock, row.size, args_.scale);
      flags += blocks_of(index) * kBlock;
    }
    return rows * row.size;
  }

  // The elements arrive while the flags are drawn: no hardware prefetcher follows short rows.
  static void prefetch(const T* x, int64_t n) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(x + i);
  }

  // A run of consecutive indices, or of one index. Returns how many elements it covers: more than given if the run is
  // repeated along the next dimension.
  int64_t add(int64_t length, int64_t n) {
    const auto& dims = args_.dims;
    const uint64_t first = index_ / kBlock, slot = index_ % kBlock;
    const bool one = dims[0].index == 0;
    const int64_t blocks = one ? 1 : (static_cast<int64_t>(slot) + length + kBlock - 1) / kBlock;
    int64_t period = one ? 1 : length;
    if (length == dims[0].size && dims.size() > 1 && dims[1].index == 0 && length < kLongRun && n > length) {
      const auto joins = [&](int64_t Dim::* stride) { return dims[1].*stride == dims[0].*stride * length; };
      if (joins(&Dim::x) && joins(&Dim::y)) {
        length *= std::min({n / length, dims[1].size - at_[1], kFlags / length});
      }
    }
    if (first_ != first || count_ - from_ != blocks) {
      if (count_ + blocks > kBlocks) {
        finish();
        count_ = drawn_ = 0;
      }
      // Runs of one index each: several of them may be in the block that was added last.
      if (!(one && count_ > 0 && blocks_[count_ - 1] == first)) {
        for (int64_t i = 0; i < blocks; ++i) blocks_[count_ + i] = first + i;
        count_ += blocks;
      }
      first_ = first;
      from_ = count_ - blocks;
    }
    push(length, from_ * kBlock + static_cast<int64_t>(slot), period);
    return length;
  }

  // A run whose indices are further apart: the flags are put next to each other once they are drawn.
  void add_scattered(int64_t length) {
    if (count_ + length > kBlocks || scattered_ + length > kFlags) {
      finish();
      count_ = drawn_ = scattered_ = 0;
    }
    const uint64_t stride = args_.dims[0].index;
    uint64_t index = index_;
    const int64_t begin = scattered_;
    for (int64_t i = 0; i < length; ++i, index += stride) {
      if (count_ == 0 || blocks_[count_ - 1] != index / kBlock) blocks_[count_++] = index / kBlock;
      places_[scattered_++] = static_cast<uint16_t>((count_ - 1) * kBlock + index % kBlock);
    }
    first_ = kNone;
    push(length, begin, kScattered);
  }

  void push(int64_t length, int64_t flags, int64_t period) {
    if (runs_ == kRuns) finish();
    run_[runs_++] = {reinterpret_cast<const char*>(x()), reinterpret_cast<char*>(y()), length, flags, period};
  }

  void advance(int64_t n) {
    const auto& dims = args_.dims;
    // n is a part of the innermost dimension, or that dimension several times.
    const int64_t times = n > dims[0].size - at_[0] ? n / dims[0].size : 0;
    size_t d = times ? 1 : 0;
    const int64_t steps = times ? times : n;
    at_[d] += steps;
    x_ += steps * dims[d].x;
    y_ += steps * dims[d].y;
    index_ += steps * dims[d].index;
    for (; at_[d] == dims[d].size && d + 1 < dims.size(); ++d) {
      x_ += dims[d + 1].x - dims[d].size * dims[d].x;
      y_ += dims[d + 1].y - dims[d].size * dims[d].y;
      index_ += dims[d + 1].index - dims[d].size * dims[d].index;
      at_[d] = 0;
      ++at_[d + 1];
    }
  }

  // Draws the blocks that are new, and applies the flags to the runs.
  void finish() {
    if (count_ > drawn_) {
      cpu_kernels().draw_flags(blocks_ + drawn_, flags_ + drawn_ * kBlock, count_ - drawn_, params_);
      drawn_ = count_;
    }
    const Dim& inner = args_.dims[0];
    const bool packed = inner.x == 1 && inner.y == 1;
    for (int64_t i = 0; i < runs_; ++i) {
      const Run& run = run_[i];
      const T* x = reinterpret_cast<const T*>(run.x);
      T* y = reinterpret_cast<T*>(run.y);
      const bool alone = i + 1 == runs_ || run_[i + 1].y != run.y + run.n * static_cast<int64_t>(sizeof(T));
      if (packed && run.period == run.n && (alone || run.n >= kLongRun)) {
        kernels_.select(x, y, flags_ + run.flags, run.n, args_.scale);
      } else if (packed && run.n >= kLongRun && run.period == 1) {
        if (flags_[run.flags]) {
          kernels_.select(x, y, nullptr, run.n, args_.scale);
        } else {
          std::memset(y, 0, run.n * sizeof(T));
        }
      } else {
        i = lay_out(i, packed);
      }
    }
    runs_ = 0;
  }

  // Puts the flags of runs next to each other, as long as the runs are short and lie next to each other, and applies
  // them in one call. Returns the last of these runs.
  int64_t lay_out(int64_t i, bool packed) {
    uint16_t flags[kFlags];
    const Run first = run_[i];
    int64_t n = 0;
    for (;; ++i) {
      const Run& run = run_[i];
      lay_out(run, flags + n);
      n += run.n;
      if (!packed || i + 1 == runs_) break;
      const Run& next = run_[i + 1];
      const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
      if (next.x != first.x + bytes || next.y != first.y + bytes || n + next.n > kFlags) break;
    }
    const T* x = reinterpret_cast<const T*>(first.x);
    T* y = reinterpret_cast<T*>(first.y);
    if (packed) {
      kernels_.select(x, y, flags, n, args_.scale);
      return i;
    }
    T buffer[kFlags];
    const Dim& inner = args_.dims[0];
    for (int64_t k = 0; k < n; ++k) buffer[k] = x[k * inner.x];
    kernels_.select(buffer, buffer, flags, n, args_.scale);
    for (int64_t k = 0; k < n; ++k) y[k * inner.y] = buffer[k];
    return i;
  }

  void lay_out(const Run& run, uint16_t* flags) {
    if (run.period == kScattered) {
      for (int64_t k = 0; k < run.n; ++k) flags[k] = flags_[places_[run.flags + k]];
    } else if (run.period == 1) {
      std::fill_n(flags, run.n, flags_[run.flags]);
    } else {
      for (int64_t k = 0; k < run.period; ++k) flags[k] = flags_[run.flags + k];
      for (int64_t k = run.period; k < run.n; ++k) flags[k] = flags[k - run.period];
    }
  }

  static constexpr int64_t kScattered = 0;
  static constexpr uint64_t kNone = ~uint64_t{0};  // no block
  static constexpr int64_t kRuns = 128, kBlocks = 2 * kFlags / kBlock;

  const KernelArgs& args_;
  const MaskParams& params_;
  const TypedKernels<T>& kernels_;
  std::vector<int64_t> at_;
  int64_t x_ = 0, y_ = 0;
  uint64_t index_;
  // Blocks up to drawn_ have their flags; those up to count_ are to be drawn. The last run that was added begins in
  // block number first_, which stands at from_.
  int64_t count_ = 0, drawn_ = 0, from_ = 0, runs_ = 0, scattered_ = 0;
  uint64_t first_ = kNone;
  Run run_[kRuns];
  uint64_t blocks_[kBlocks + kBlockPadding] = {};
  uint16_t flags_[(kBlocks + kBlockPadding) * kBlock], places_[kFlags];
};

// A window whose innermost dimension in memory is not the one along which indices are consecutive, such as a gradient
// in another layout than forward's. It is visited in tiles of both dimensions, so that no block is drawn more than
// twice.
template <typename T>
class Tiles {
 public:
  static std::optional<size_t> consecutive_dim(const std::vector<Dim>& dims) {
    if (dims[0].index <= 1) return std::nullopt;
    for (size_t d = 1; d < dims.size(); ++d) {
      if (dims[d].index == 1 && dims[d].size >= kBlock) return d;
    }
    return std::nullopt;
  }

  Tiles(const KernelArgs& args, const MaskParams& params, const TypedKernels<T>& kernels, size_t consecutive)
      : args_(args), params_(params), kernels_(kernels), row_(args.dims[0]), column_(args.dims[consecutive]) {
    for (size_t d = 1; d < args.dims.size(); ++d) {
      if (d != consecutive) outer_.push_back(args.dims[d]);
    }
  }

  // How many tiles lie side by side along the rows, for all outer dimensions.
  int64_t strips() const { return (row_.size + kWide - 1) / kWide * (args_.numel / row_.size / column_.size); }

  void visit(int64_t strip) const {
    const int64_t per_row = (row_.size + kWide - 1) / kWide, first = strip % per_row * kWide;
    int64_t rest = strip / per_row, x = first * row_.x, y = first * row_.y;
    uint64_t index = args_.start + first * row_.index;
    for (const Dim& dim : outer_) {
      x += rest % dim.size * dim.x;
      y += rest % dim.size * dim.y;
      index += rest % dim.size * dim.index;
      rest /= dim.size;
    }
    const int64_t wide = std::min(kWide, row_.size - first);
    for (int64_t c = 0; c < column_.size; c += kHigh) {
      visit(x + c * column_.x, y + c * column_.y, index + c, wide, std::min(kHigh, column_.size - c));
    }
  }

 private:
  void visit(int64_t x_at, int64_t y_at, uint64_t index, int64_t wide, int64_t high) const {
    uint64_t blocks[kBlocks * kWide + kBlockPadding] = {};
    uint16_t drawn[(kBlocks * kWide + kBlockPadding) * kBlock], place[kWide], flags[kWide];
    int64_t count = 0;
    for (int64_t i = 0; i < wide; ++i) {
      const uint64_t first = index + i * row_.index;
      place[i] = static_cast<uint16_t>(count * kBlock + first % kBlock);
      for (uint64_t block = first / kBlock; block <= (first + high - 1) / kBlock; ++block) blocks[count++] = block;
    }
    cpu_kernels().draw_flags(blocks, drawn, count, params_);
    const T* x = static_cast<const T*>(args_.x ? args_.x : args_.y) + x_at;
    T *y = static_cast<T*>(args_.y) + y_at, buffer[kWide];
    for (int64_t c = 0; c < high; ++c, x += column_.x, y += column_.y) {
      for (int64_t i = 0; i < wide; ++i) flags[i] = drawn[place[i] + c];
      if (row_.x == 1 && row_.y == 1) {
        kernels_.select(x, y, flags, wide, args_.scale);
      } else {
        for (int64_t i = 0; i < wide; ++i) buffer[i] = x[i * row_.x];
        kernels_.select(buffer, buffer, flags, wide, args_.scale);
        for (int64_t i = 0; i < wide; ++i) y[i * row_.y] = buffer[i];
      }
    }
  }

  static constexpr int64_t kWide = 128, kHigh = 32, kBlocks = kHigh / kBlock + 1;  // elements, elements, blocks

  const KernelArgs& args_;
  const MaskParams& params_;
  const TypedKernels<T>& kernels_;
  const Dim row_, column_;
  std::vector<Dim> outer_;
};

template <typename T>
void run(const KernelArgs& args, const MaskParams& params, const TypedKernels<T>& kernels) {
  if (args.x != args.y) ask_for_huge_pages(args.y, args.numel * static_cast<int64_t>(sizeof(T)));
  if (const auto consecutive = Tiles<T>::consecutive_dim(args.dims)) {
    const Tiles<T> tiles(args, params, kernels, *consecutive);
    return in_parallel(args.numel, tiles.strips(), [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) tiles.visit(begin);
    });
  }
  const Dim& inner = args.dims[0];
  const bool one_row = args.dims.size() == 1 && inner.x == 1 && inner.y == 1 && inner.index == 1;
  in_parallel(args.numel, args.numel, [&](int64_t begin, int64_t end) {
    if (one_row) {
      const T* x = static_cast<const T*>(args.x ? args.x : args.y) + begin;
      kernels.drop(x, static_cast<T*>(args.y) + begin, args.start + begin, end - begin, params);
    } else {
      Walk<T>(args, params, kernels, begin).visit(end - begin);
    }
  });
}

void run_cpu(const KernelArgs& args) {
  const uint64_t* words = args.key.const_data_ptr<uint64_t>();
  const MaskParams params{{words[0], words[1]}, threshold(args.p), args.scale};
  const CpuKernels& kernels = cpu_kernels();
  switch (args.dtype) {
    case ScalarType::Float: return run(args, params, kernels.float32);
    case ScalarType::Double: return run(args, params, kernels.float64);
    case ScalarType::Half: return run(args, params, kernels.float16);
    case ScalarType::BFloat16: return run(args, params, kernels.bfloat16);
    default: return run(args, params, kernels.mask);
  }
}

// The n keys that n calls draw from the CPU's default generator: keys.draw_keys in one call.
Tensor draw_cpu_keys(int64_t n) {
  const auto empty = [n](std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                         ScalarType dtype) {
    AtenTensorHandle x = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(), dtype_code(dtype),
                                                    aoti_torch_device_type_cpu(), 0, &x));
    return Tensor(x);
  };
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(empty({n}, {1}, ScalarType::Long)), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor seeds = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor keys = empty({n, 2}, {2, 1}, ScalarType::UInt64);
  uint64_t* words = keys.mutable_data_ptr<uint64_t>();
  for (int64_t i = 0; i < n; ++i) {
    words[2 * i] = static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[i]);
    words[2 * i + 1] = 0;
  }
  return keys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CPU, m) {
  register_operators<run_cpu>(m);
}
STABLE_TORCH_LIBRARY_FRAGMENT(fused_dropout, m) {
  m.def("draw_cpu_keys(int n) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CompositeExplicitAutograd, m) {
  m.impl("draw_cpu_keys", TORCH_BOX(&draw_cpu_keys));
}

}  // namespace fused_dropout
