// How a CPU visits a window of elements that is not one row: which kernel of simd/ it calls for which elements.
#pragma once

#include "operators.h"
#include "simd/kernels.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace fused_dropout {
namespace {

constexpr int64_t kFlags = 1024;   // as many flags of elements stay in the first cache
constexpr int64_t kLongRun = 64;   // runs of as many elements are worth a call of their own
constexpr int64_t kLongRow = 256;  // and rows of as many a call of the kernel that draws, drops and scales at once

// Elements that lie next to each other in y, as the innermost dimension has them, and whose flags were drawn.
template <typename T>
struct Run {
  Streams<T> at;
  int64_t n;
  // Where its flag, or that of the first element, stands among those drawn, or its place among the places.
  int64_t flag;
  enum class Flags { kOne, kEach, kScattered } flags;
};

// kernels.select for n elements along a dimension, at most kFlags, by way of buffers where they do not lie together.
template <typename T>
void select(const Streams<T>& at, const Dim& dim, const uint16_t* flags, int64_t n, const KernelArgs& args,
            const TypedKernels<T>& kernels) {
  if (is_apart(dim, 1)) return kernels.select(at, flags, n, args.scale);
  T x[kFlags], residual[kFlags], bias[kFlags];
  for (int64_t i = 0; i < n; ++i) x[i] = at.x[i * dim.x];
  if (args.residual) {
    for (int64_t i = 0; i < n; ++i) residual[i] = at.residual[i * dim.residual];
  }
  if (args.bias) {
    for (int64_t i = 0; i < n; ++i) bias[i] = at.bias[i * dim.bias];
  }
  kernels.select({x, x, residual, bias}, flags, n, args.scale);
  for (int64_t i = 0; i < n; ++i) at.y[i * dim.y] = x[i];
}

// Visits a window of elements that is not one row. It collects the blocks that the next runs need, draws them all at
// once, and applies their flags run by run. So a short row costs no more than its elements, and an element that is
// shared by a broadcast mask is drawn once for many.
template <typename T>
class Walk {
 public:
  Walk(const KernelArgs& args, const MaskParams& params, const TypedKernels<T>& kernels, int64_t position)
      : args_(args),
        params_(params),
        kernels_(kernels),
        at_(args.dims.size()),
        streams_(streams_of<T>(args)),
        index_(args.start) {
    for (size_t d = 0; d < at_.size(); ++d) {
      at_[d] = position % args.dims[d].size;
      position /= args.dims[d].size;
      move(args.dims[d], at_[d]);
    }
  }

  void visit(int64_t n) {
    while (n > 0) {
      const int64_t length = next(n);
      advance(length);
      n -= length;
    }
    finish();
  }

 private:
  using Flags = typename Run<T>::Flags;

  void move(const Dim& dim, int64_t n) {
    streams_ = step(streams_, dim, n);
    index_ += n * dim.index;
  }

  // Visits the next elements, at most n, in the way that is best for them. Returns how many.
  int64_t next(int64_t n) {
    const Dim& row = args_.dims[0];
    const int64_t length = std::min(n, row.size - at_[0]);
    if (packed_ && row.index <= 1 && length == row.size && args_.dims.size() > 1) {
      const Dim& outer = args_.dims[1];
      const bool joined = is_apart(outer, row.size);
      if (joined && outer.index == 0 && length <= kFlags) return visit_repeated(n);
      if (joined && outer.index == 1 && row.index == 0 && length < kLongRun) return visit_shared(n);
      if (row.index == 1 && length < kLongRow && outer.index != 0) {
        return rows_are_groups() ? visit_groups(n) : visit_rows(n);
      }
    }
    if (packed_ && row.index == 1 && length >= kLongRow) {
      kernels_.drop(streams_, index_, length, params_);
      return length;
    }
    if (row.index > 1) return add_scattered(std::min(length, kFlags / kBlock));
    return add(packed_ && row.index == 0 && length >= kLongRun ? length : std::min(length, kFlags));
  }

  // Draws the flags of the next n indices.
  const uint16_t* draw(int64_t n) {
    reset();
    const uint64_t first = index_ / kBlock, slot = index_ % kBlock;
    const int64_t count = (static_cast<int64_t>(slot) + n + kBlock - 1) / kBlock;
    for (int64_t i = 0; i < count; ++i) blocks_[i] = first + i;
    cpu_kernels().draw_flags(blocks_, flags_, count, params_);
    return flags_ + slot;
  }

  // Visits the next rows if they are adjacent in memory and share their indices. One set of flags serves all of them.
  int64_t visit_repeated(int64_t n) {
    const Dim& row = args_.dims[0];
    const int64_t total = std::min(n / row.size, args_.dims[1].size - at_[1]) * row.size;
    uint16_t flags[kFlags];
    const int64_t laid_out = std::min(kFlags / row.size * row.size, total);
    std::copy_n(draw(row.size), row.size, flags);
    for (int64_t i = row.size; i < laid_out; ++i) flags[i] = flags[i - row.size];
    for (int64_t i = 0; i < total; i += laid_out) {
      kernels_.select(streams_ + i, flags, std::min(laid_out, total - i), args_.scale);
    }
    return total;
  }

  // Visits the next rows if they are short and adjacent in memory, and row r has the one index first + r.
  int64_t visit_shared(int64_t n) {
    const int64_t size = args_.dims[0].size, most = (kBlocks - 1) * kBlock;
    const int64_t rows = std::min({n / size, args_.dims[1].size - at_[1], most});
    const uint16_t* drawn = draw(rows);
    uint16_t flags[kFlags + kBlock];
    const int64_t at_once = kFlags / size;
    for (int64_t r = 0; r < rows; r += at_once) {
      const int64_t together = std::min(at_once, rows - r);
      for (int64_t k = 0; k < together; ++k) {
        // Eight at a time: what is written past the end is overwritten by the next row, or is never read.
        const uint16_t flag = drawn[r + k];
        for (int64_t i = 0; i < size; i += kBlock) std::fill_n(flags + k * size + i, kBlock, flag);
      }
      kernels_.select(streams_ + r * size, flags, together * size, args_.scale);
    }
    return rows * size;
  }

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
    Group<T> first = {streams_, index_ / kBlock};
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < per_row; ++i) {
        groups[count++] = {first.at + i * group, first.block + i * group / kBlock};
      }
      prefetch(first.at.x, row.size);
      first = {step(first.at, next, 1), first.block + next.index / kBlock};
    }
    kernels_.drop_groups(groups, count, params_);
    return rows * row.size;
  }

  // The next whole rows, as many as there is room for, without further ado: the commonest window. Returns how many
  // elements they have.
  int64_t visit_rows(int64_t n) {
    reset();
    const Dim row = args_.dims[0], next = args_.dims[1];
    const int64_t most_blocks = (row.size + 2 * (kBlock - 1)) / kBlock;
    const int64_t rows = std::min({n / row.size, next.size - at_[1], kBlocks / most_blocks});
    const auto blocks_of = [&](uint64_t index) {
      return (static_cast<int64_t>(index % kBlock) + row.size + 7) / kBlock;
    };
    int64_t count = 0;
    uint64_t index = index_;
    const T* x = streams_.x;
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
    Streams<T> at = streams_;
    const uint16_t* flags = flags_;
    for (int64_t r = 0; r < rows; ++r, index += next.index, at = step(at, next, 1)) {
      kernels_.select(at, flags + index % kBlock, row.size, args_.scale);
      flags += blocks_of(index) * kBlock;
    }
    return rows * row.size;
  }

  // The elements arrive while the flags are drawn: no hardware prefetcher follows short rows.
  static void prefetch(const T* x, int64_t n) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(x + i);
  }

  // A run of consecutive indices, or of one index.
  int64_t add(int64_t length) {
    const uint64_t first = index_ / kBlock, slot = index_ % kBlock;
    const bool one = args_.dims[0].index == 0;
    const int64_t blocks = one ? 1 : (static_cast<int64_t>(slot) + length + kBlock - 1) / kBlock;
    if (first_ != first || count_ - from_ != blocks) {
      if (count_ + blocks > kBlocks) reset();
      // Runs of one index each: several of them may be in the block that was added last.
      if (!(one && count_ > 0 && blocks_[count_ - 1] == first)) {
        for (int64_t i = 0; i < blocks; ++i) blocks_[count_ + i] = first + i;
        count_ += blocks;
      }
      first_ = first;
      from_ = count_ - blocks;
    }
    return push(length, from_ * kBlock + static_cast<int64_t>(slot), one ? Flags::kOne : Flags::kEach);
  }

  // A run whose indices are further apart: the flags are put next to each other once they are drawn.
  int64_t add_scattered(int64_t length) {
    if (count_ + length > kBlocks || scattered_ + length > kFlags) reset();
    const uint64_t stride = args_.dims[0].index;
    uint64_t index = index_;
    const int64_t begin = scattered_;
    for (int64_t i = 0; i < length; ++i, index += stride) {
      if (count_ == 0 || blocks_[count_ - 1] != index / kBlock) blocks_[count_++] = index / kBlock;
      places_[scattered_++] = static_cast<uint16_t>((count_ - 1) * kBlock + index % kBlock);
    }
    first_ = kNone;
    return push(length, begin, Flags::kScattered);
  }

  int64_t push(int64_t length, int64_t flag, Flags flags) {
    if (runs_ == kRuns) finish();
    run_[runs_++] = {streams_, length, flag, flags};
    return length;
  }

  void advance(int64_t n) {
    const auto& dims = args_.dims;
    // n is a part of the innermost dimension, or that dimension once or several times.
    const int64_t times = at_[0] == 0 && dims.size() > 1 ? n / dims[0].size : 0;
    size_t d = times ? 1 : 0;
    const int64_t steps = times ? times : n;
    at_[d] += steps;
    move(dims[d], steps);
    for (; at_[d] == dims[d].size && d + 1 < dims.size(); ++d) {
      move(dims[d], -dims[d].size);
      move(dims[d + 1], 1);
      at_[d] = 0;
      ++at_[d + 1];
    }
  }

  // Finishes what was added, and forgets its blocks.
  void reset() {
    finish();
    count_ = drawn_ = scattered_ = 0;
    first_ = kNone;
  }

  // Draws the blocks that are new, and applies the flags to the runs.
  void finish() {
    if (count_ > drawn_) {
      cpu_kernels().draw_flags(blocks_ + drawn_, flags_ + drawn_ * kBlock, count_ - drawn_, params_);
      drawn_ = count_;
    }
    for (int64_t i = 0; i < runs_; ++i) {
      const Run<T>& run = run_[i];
      const bool alone = i + 1 == runs_ || run_[i + 1].at.y != run.at.y + run.n;
      if (packed_ && run.flags == Flags::kEach && (alone || run.n >= kLongRun)) {
        kernels_.select(run.at, flags_ + run.flag, run.n, args_.scale);
      } else if (packed_ && run.flags == Flags::kOne && run.n >= kLongRun) {
        if (flags_[run.flag]) {
          kernels_.select(run.at, nullptr, run.n, args_.scale);
        } else {
          write_dropped(run.at, run.n);
        }
      } else {
        i = lay_out(i);
      }
    }
    runs_ = 0;
  }

  void write_dropped(const Streams<T>& at, int64_t n) {
    if (!args_.residual) {
      std::memset(at.y, 0, n * sizeof(T));
      return;
    }
    const uint16_t none[kFlags] = {};
    for (int64_t i = 0; i < n; i += kFlags) kernels_.select(at + i, none, std::min(kFlags, n - i), args_.scale);
  }

  // Puts the flags of runs next to each other, as long as the runs are short and lie next to each other, and applies
  // them in one call. Returns the last of these runs.
  int64_t lay_out(int64_t i) {
    uint16_t flags[kFlags];
    const Streams<T> first = run_[i].at;
    int64_t n = 0;
    for (;; ++i) {
      const Run<T>& run = run_[i];
      lay_out(run, flags + n);
      n += run.n;
      if (!packed_ || i + 1 == runs_) break;
      const Streams<T>&next = run_[i + 1].at, end = first + n;
      const bool joined = next.x == end.x && next.y == end.y && next.residual == end.residual && next.bias == end.bias;
      if (!joined || n + run_[i + 1].n > kFlags) break;
    }
    select(first, args_.dims[0], flags, n, args_, kernels_);
    return i;
  }

  void lay_out(const Run<T>& run, uint16_t* flags) {
    switch (run.flags) {
      case Flags::kOne: std::fill_n(flags, run.n, flags_[run.flag]); break;
      case Flags::kEach: std::copy_n(flags_ + run.flag, run.n, flags); break;
      case Flags::kScattered:
        for (int64_t k = 0; k < run.n; ++k) flags[k] = flags_[places_[run.flag + k]];
    }
  }

  static constexpr uint64_t kNone = ~uint64_t{0};  // no block
  static constexpr int64_t kRuns = 128, kBlocks = 2 * kFlags / kBlock;

  const KernelArgs& args_;
  const MaskParams& params_;
  const TypedKernels<T>& kernels_;
  const bool packed_ = is_apart(args_.dims[0], 1);
  std::vector<int64_t> at_;
  Streams<T> streams_;
  uint64_t index_;
  // Blocks up to drawn_ have their flags; those up to count_ are to be drawn. The last run that was added begins in
  // block number first_, which stands at from_.
  int64_t count_ = 0, drawn_ = 0, from_ = 0, runs_ = 0, scattered_ = 0;
  uint64_t first_ = kNone;
  Run<T> run_[kRuns];
  uint64_t blocks_[kBlocks + kBlockPadding] = {};
  uint16_t flags_[(kBlocks + kBlockPadding) * kBlock], places_[kFlags];
};

// A window whose innermost dimension in memory is not the one along which indices are consecutive, such as a gradient
// in another layout than forward's. It is visited in tiles of both dimensions, so that no block is drawn more than
// twice.
template <typename T>
class Tiles {
 public:
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
    int64_t rest = strip / per_row;
    Streams<T> at = step(streams_of<T>(args_), row_, first);
    uint64_t index = args_.start + first * row_.index;
    for (const Dim& dim : outer_) {
      at = step(at, dim, rest % dim.size);
      index += rest % dim.size * dim.index;
      rest /= dim.size;
    }
    const int64_t wide = std::min(kWide, row_.size - first);
    for (int64_t c = 0; c < column_.size; c += kHigh) {
      visit(step(at, column_, c), index + c, wide, std::min(kHigh, column_.size - c));
    }
  }

 private:
  void visit(Streams<T> at, uint64_t index, int64_t wide, int64_t high) const {
    uint64_t blocks[kBlocks * kWide + kBlockPadding] = {};
    uint16_t drawn[(kBlocks * kWide + kBlockPadding) * kBlock], place[kWide], flags[kWide];
    int64_t count = 0;
    for (int64_t i = 0; i < wide; ++i) {
      const uint64_t first = index + i * row_.index;
      place[i] = static_cast<uint16_t>(count * kBlock + first % kBlock);
      for (uint64_t block = first / kBlock; block <= (first + high - 1) / kBlock; ++block) blocks[count++] = block;
    }
    cpu_kernels().draw_flags(blocks, drawn, count, params_);
    for (int64_t c = 0; c < high; ++c, at = step(at, column_, 1)) {
      for (int64_t i = 0; i < wide; ++i) flags[i] = drawn[place[i] + c];
      select(at, row_, flags, wide, args_, kernels_);
    }
  }

  static constexpr int64_t kWide = 128, kHigh = 32, kBlocks = kHigh / kBlock + 1;  // elements, elements, blocks

  const KernelArgs& args_;
  const MaskParams& params_;
  const TypedKernels<T>& kernels_;
  const Dim row_, column_;
  std::vector<Dim> outer_;
};

}  // namespace
}  // namespace fused_dropout
