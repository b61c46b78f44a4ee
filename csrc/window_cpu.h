// Visits a window of elements on the CPU, if it is not a single row: chooses the kernel of simd/ for each part of it.
// dropout_cpu.cpp uses Tiles if indices are not consecutive along the innermost dimension, and WindowWalk otherwise.
#pragma once

#include "operators.h"
#include "simd/kernels.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace fused_dropout {
namespace {

// All three are numbers of elements.
constexpr int64_t kFlags = 1024;   // this many flags stay in the L1 cache
constexpr int64_t kLongRun = 64;   // a run of this length is worth its own call of TypedKernels::select
constexpr int64_t kLongRow = 256;  // a row of this length is worth its own call of TypedKernels::drop

// A run: n elements that follow each other along the innermost dimension, whose flags are drawn together with those of
// other runs.
template <typename T>
struct Run {
  Streams<T> at;
  int64_t n;
  // The position of its first flag: in WindowWalk::flags_, or in WindowWalk::flag_positions_ for kScattered.
  int64_t first_flag;
  // kOne: one flag for all elements. kEach: n flags, one behind the other. kScattered: n flags in any positions.
  enum class Flags { kOne, kEach, kScattered } flags;
};

// Calls kernels.select for n elements along a dimension; n is at most kFlags. Copies them to buffers and back if they
// are not adjacent in memory.
template <typename T>
void select_along(const Streams<T>& at, const Dim& dim, const uint16_t* flags, int64_t n, const KernelArgs& args,
                  const TypedKernels<T>& kernels) {
  if (has_stride(dim, 1)) return kernels.select(at, flags, n, args.scale);
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

// Visits n elements of a window from a position on, in the order of the dimensions. It collects the blocks that the
// next runs need, draws all of them at once, and then applies their flags run by run. So a short row costs no more than
// its elements, and a flag that a broadcast mask shares is drawn once for many elements.
template <typename T>
class WindowWalk {
 public:
  WindowWalk(const KernelArgs& args, const MaskParams& params, const TypedKernels<T>& kernels, int64_t position)
      : args_(args),
        params_(params),
        kernels_(kernels),
        position_(args.dims.size()),
        streams_(streams_of<T>(args)),
        index_(args.start) {
    for (size_t d = 0; d < position_.size(); ++d) {
      position_[d] = position % args.dims[d].size;
      position /= args.dims[d].size;
      move(args.dims[d], position_[d]);
    }
  }

  void visit(int64_t n) {
    while (n > 0) {
      const int64_t length = next(n);
      advance(length);
      n -= length;
    }
    flush();
  }

 private:
  using Flags = typename Run<T>::Flags;

  void move(const Dim& dim, int64_t n) {
    streams_ = advanced(streams_, dim, n);
    index_ += n * dim.index;
  }

  // Visits the next elements, at most n, in the fastest way for them. Returns their number.
  int64_t next(int64_t n) {
    const Dim& row = args_.dims[0];
    const int64_t length = std::min(n, row.size - position_[0]);
    if (is_contiguous_ && row.index <= 1 && length == row.size && args_.dims.size() > 1) {
      const Dim& outer = args_.dims[1];
      const bool joined = has_stride(outer, row.size);
      if (joined && outer.index == 0 && length <= kFlags) return visit_rows_of_same_indices(n);
      if (joined && outer.index == 1 && row.index == 0 && length < kLongRun) return visit_rows_of_one_index(n);
      if (row.index == 1 && length < kLongRow && outer.index != 0) {
        return rows_are_groups() ? visit_groups(n) : visit_rows(n);
      }
    }
    if (is_contiguous_ && row.index == 1 && length >= kLongRow) {
      kernels_.drop(streams_, index_, length, params_);
      return length;
    }
    if (row.index > 1) return add_scattered_run(std::min(length, kFlags / kBlock));
    return add_run(is_contiguous_ && row.index == 0 && length >= kLongRun ? length : std::min(length, kFlags));
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

  // Visits the next rows, which are adjacent in memory and have the same indices. One set of flags serves all rows.
  int64_t visit_rows_of_same_indices(int64_t n) {
    const Dim& row = args_.dims[0];
    const int64_t total = std::min(n / row.size, args_.dims[1].size - position_[1]) * row.size;
    uint16_t flags[kFlags];
    const int64_t laid_out = std::min(kFlags / row.size * row.size, total);
    std::copy_n(draw(row.size), row.size, flags);
    for (int64_t i = row.size; i < laid_out; ++i) flags[i] = flags[i - row.size];
    for (int64_t i = 0; i < total; i += laid_out) {
      kernels_.select(streams_ + i, flags, std::min(laid_out, total - i), args_.scale);
    }
    return total;
  }

  // Visits the next rows, which are short and adjacent in memory. All elements of row r have one index: the first + r.
  int64_t visit_rows_of_one_index(int64_t n) {
    const int64_t size = args_.dims[0].size, most = (kBlocks - 1) * kBlock;
    const int64_t rows = std::min({n / size, args_.dims[1].size - position_[1], most});
    const uint16_t* drawn = draw(rows);
    uint16_t flags[kFlags + kBlock];
    const int64_t at_once = kFlags / size;
    for (int64_t r = 0; r < rows; r += at_once) {
      const int64_t together = std::min(at_once, rows - r);
      for (int64_t k = 0; k < together; ++k) {
        // Eight at a time. The flags written past the row's end are overwritten by the next row, or never read.
        const uint16_t flag = drawn[r + k];
        for (int64_t i = 0; i < size; i += kBlock) std::fill_n(flags + k * size + i, kBlock, flag);
      }
      kernels_.select(streams_ + r * size, flags, together * size, args_.scale);
    }
    return rows * size;
  }

  // Whether each row consists of whole groups, which begin at multiples of the group size. The block numbers of such a
  // group have equal upper halves, which drop_groups needs.
  bool rows_are_groups() const {
    const uint64_t size = args_.dims[0].size, group = cpu_kernels().group;
    return size % group == 0 && index_ % group == 0 && args_.dims[1].index % group == 0;
  }

  // Visits the next rows, which consist of whole groups.
  int64_t visit_groups(int64_t n) {
    const Dim row = args_.dims[0], next = args_.dims[1];
    const int64_t group = cpu_kernels().group, per_row = row.size / group;
    const int64_t rows = std::min({n / row.size, next.size - position_[1], kRuns / per_row});
    Group<T> groups[kRuns];
    Group<T> first = {streams_, index_ / kBlock};
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < per_row; ++i) {
        groups[count++] = {first.at + i * group, first.block + i * group / kBlock};
      }
      prefetch(first.at.x, row.size);
      first = {advanced(first.at, next, 1), first.block + next.index / kBlock};
    }
    kernels_.drop_groups(groups, count, params_);
    return rows * row.size;
  }

  // Visits the next whole rows, as many as there is room for. This is the most common window, so no runs are collected.
  // Returns the number of elements.
  int64_t visit_rows(int64_t n) {
    reset();
    const Dim row = args_.dims[0], next = args_.dims[1];
    const int64_t most_blocks = (row.size + 2 * (kBlock - 1)) / kBlock;
    const int64_t rows = std::min({n / row.size, next.size - position_[1], kBlocks / most_blocks});
    const auto blocks_of = [&](uint64_t index) {
      return (static_cast<int64_t>(index % kBlock) + row.size + 7) / kBlock;
    };
    int64_t count = 0;
    uint64_t index = index_;
    const T* x = streams_.x;
    for (int64_t r = 0; r < rows; ++r, index += next.index, x += next.x) {
      // Four at a time. The numbers written past the row's end are overwritten by the next row, or are padding.
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
    for (int64_t r = 0; r < rows; ++r, index += next.index, at = advanced(at, next, 1)) {
      kernels_.select(at, flags + index % kBlock, row.size, args_.scale);
      flags += blocks_of(index) * kBlock;
    }
    return rows * row.size;
  }

  // Loads n elements into the cache while the flags are drawn. Hardware prefetchers do not follow short rows.
  static void prefetch(const T* x, int64_t n) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(x + i);
  }

  // Adds a run of consecutive indices, or of one index.
  int64_t add_run(int64_t length) {
    const uint64_t first = index_ / kBlock, slot = index_ % kBlock;
    const bool one = args_.dims[0].index == 0;
    const int64_t blocks = one ? 1 : (static_cast<int64_t>(slot) + length + kBlock - 1) / kBlock;
    if (last_run_block_ != first || block_count_ - last_run_at_ != blocks) {
      if (block_count_ + blocks > kBlocks) reset();
      // Several runs of one index each may share the block that was added last.
      if (!(one && block_count_ > 0 && blocks_[block_count_ - 1] == first)) {
        for (int64_t i = 0; i < blocks; ++i) blocks_[block_count_ + i] = first + i;
        block_count_ += blocks;
      }
      last_run_block_ = first;
      last_run_at_ = block_count_ - blocks;
    }
    return push(length, last_run_at_ * kBlock + static_cast<int64_t>(slot), one ? Flags::kOne : Flags::kEach);
  }

  // Adds a run with an index stride above 1. Its flags are put next to each other after they are drawn.
  int64_t add_scattered_run(int64_t length) {
    if (block_count_ + length > kBlocks || scattered_count_ + length > kFlags) reset();
    const uint64_t stride = args_.dims[0].index;
    uint64_t index = index_;
    const int64_t begin = scattered_count_;
    for (int64_t i = 0; i < length; ++i, index += stride) {
      if (block_count_ == 0 || blocks_[block_count_ - 1] != index / kBlock) blocks_[block_count_++] = index / kBlock;
      flag_positions_[scattered_count_++] = static_cast<uint16_t>((block_count_ - 1) * kBlock + index % kBlock);
    }
    last_run_block_ = kNone;
    return push(length, begin, Flags::kScattered);
  }

  // Adds a run to the list.
  int64_t push(int64_t length, int64_t first_flag, Flags flags) {
    if (run_count_ == kRuns) flush();
    runs_[run_count_++] = {streams_, length, first_flag, flags};
    return length;
  }

  // Moves the current position n elements further.
  void advance(int64_t n) {
    const auto& dims = args_.dims;
    // n is a part of the innermost dimension, or one or more times its whole size.
    const int64_t times = position_[0] == 0 && dims.size() > 1 ? n / dims[0].size : 0;
    size_t d = times ? 1 : 0;
    const int64_t steps = times ? times : n;
    position_[d] += steps;
    move(dims[d], steps);
    for (; position_[d] == dims[d].size && d + 1 < dims.size(); ++d) {
      move(dims[d], -dims[d].size);
      move(dims[d + 1], 1);
      position_[d] = 0;
      ++position_[d + 1];
    }
  }

  // Applies the flags of the collected runs, and removes all blocks.
  void reset() {
    flush();
    block_count_ = drawn_count_ = scattered_count_ = 0;
    last_run_block_ = kNone;
  }

  // Draws the blocks that have no flags yet, and applies the flags to the collected runs.
  void flush() {
    if (block_count_ > drawn_count_) {
      cpu_kernels().draw_flags(blocks_ + drawn_count_, flags_ + drawn_count_ * kBlock, block_count_ - drawn_count_,
                               params_);
      drawn_count_ = block_count_;
    }
    for (int64_t i = 0; i < run_count_; ++i) {
      const Run<T>& run = runs_[i];
      const bool alone = i + 1 == run_count_ || runs_[i + 1].at.y != run.at.y + run.n;
      if (is_contiguous_ && run.flags == Flags::kEach && (alone || run.n >= kLongRun)) {
        kernels_.select(run.at, flags_ + run.first_flag, run.n, args_.scale);
      } else if (is_contiguous_ && run.flags == Flags::kOne && run.n >= kLongRun) {
        if (flags_[run.first_flag]) {
          kernels_.select(run.at, nullptr, run.n, args_.scale);
        } else {
          write_dropped(run.at, run.n);
        }
      } else {
        i = apply_runs_from(i);
      }
    }
    run_count_ = 0;
  }

  // Writes the results of n elements that are all dropped: zeros, or the residual.
  void write_dropped(const Streams<T>& at, int64_t n) {
    if (!args_.residual) {
      std::memset(at.y, 0, n * sizeof(T));
      return;
    }
    const uint16_t none[kFlags] = {};
    for (int64_t i = 0; i < n; i += kFlags) kernels_.select(at + i, none, std::min(kFlags, n - i), args_.scale);
  }

  // Applies the flags of run i and of the runs after it in one call, as long as the runs are adjacent in memory and
  // their flags fit into one buffer. Returns the number of the last of these runs.
  int64_t apply_runs_from(int64_t i) {
    uint16_t flags[kFlags];
    const Streams<T> first = runs_[i].at;
    int64_t n = 0;
    for (;; ++i) {
      const Run<T>& run = runs_[i];
      copy_flags(run, flags + n);
      n += run.n;
      if (!is_contiguous_ || i + 1 == run_count_) break;
      const Streams<T>&next = runs_[i + 1].at, end = first + n;
      const bool joined = next.x == end.x && next.y == end.y && next.residual == end.residual && next.bias == end.bias;
      if (!joined || n + runs_[i + 1].n > kFlags) break;
    }
    select_along(first, args_.dims[0], flags, n, args_, kernels_);
    return i;
  }

  // Copies the flags of a run into a buffer, one for each element.
  void copy_flags(const Run<T>& run, uint16_t* flags) {
    switch (run.flags) {
      case Flags::kOne: std::fill_n(flags, run.n, flags_[run.first_flag]); break;
      case Flags::kEach: std::copy_n(flags_ + run.first_flag, run.n, flags); break;
      case Flags::kScattered:
        for (int64_t k = 0; k < run.n; ++k) flags[k] = flags_[flag_positions_[run.first_flag + k]];
    }
  }

  static constexpr uint64_t kNone = ~uint64_t{0};  // not a block number
  static constexpr int64_t kRuns = 128, kBlocks = 2 * kFlags / kBlock;

  const KernelArgs& args_;
  const MaskParams& params_;
  const TypedKernels<T>& kernels_;
  const bool is_contiguous_ = has_stride(args_.dims[0], 1);
  std::vector<int64_t> position_;
  Streams<T> streams_;
  uint64_t index_;
  // The first drawn_count_ of the block_count_ collected blocks have their flags already. The last run that was added
  // begins in block number last_run_block_, which is blocks_[last_run_at_].
  int64_t block_count_ = 0, drawn_count_ = 0, last_run_at_ = 0, run_count_ = 0, scattered_count_ = 0;
  uint64_t last_run_block_ = kNone;
  Run<T> runs_[kRuns];
  uint64_t blocks_[kBlocks + kBlockPadding] = {};
  uint16_t flags_[(kBlocks + kBlockPadding) * kBlock], flag_positions_[kFlags];
};

// Visits a window whose indices are not consecutive along the innermost dimension in memory, such as a gradient whose
// layout differs from forward's. Visits tiles of both dimensions, so that no block is drawn more than twice. A strip is
// a column of tiles.
template <typename T>
class Tiles {
 public:
  Tiles(const KernelArgs& args, const MaskParams& params, const TypedKernels<T>& kernels, size_t consecutive)
      : args_(args), params_(params), kernels_(kernels), row_(args.dims[0]), column_(args.dims[consecutive]) {
    for (size_t d = 1; d < args.dims.size(); ++d) {
      if (d != consecutive) outer_.push_back(args.dims[d]);
    }
  }

  // The number of strips: of tiles side by side along a row, times the outer dimensions.
  int64_t strips() const { return (row_.size + kWide - 1) / kWide * (args_.numel / row_.size / column_.size); }

  void visit(int64_t strip) const {
    const int64_t per_row = (row_.size + kWide - 1) / kWide, first = strip % per_row * kWide;
    int64_t rest = strip / per_row;
    Streams<T> at = advanced(streams_of<T>(args_), row_, first);
    uint64_t index = args_.start + first * row_.index;
    for (const Dim& dim : outer_) {
      at = advanced(at, dim, rest % dim.size);
      index += rest % dim.size * dim.index;
      rest /= dim.size;
    }
    const int64_t wide = std::min(kWide, row_.size - first);
    for (int64_t c = 0; c < column_.size; c += kHigh) {
      visit(advanced(at, column_, c), index + c, wide, std::min(kHigh, column_.size - c));
    }
  }

 private:
  // Visits one tile.
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
    for (int64_t c = 0; c < high; ++c, at = advanced(at, column_, 1)) {
      for (int64_t i = 0; i < wide; ++i) flags[i] = drawn[place[i] + c];
      select_along(at, row_, flags, wide, args_, kernels_);
    }
  }

  // The width and height of a tile in elements, and the most blocks that a column of it touches.
  static constexpr int64_t kWide = 128, kHigh = 32, kBlocks = kHigh / kBlock + 1;

  const KernelArgs& args_;
  const MaskParams& params_;
  const TypedKernels<T>& kernels_;
  const Dim row_, column_;
  std::vector<Dim> outer_;
};

}  // namespace
}  // namespace fused_dropout
