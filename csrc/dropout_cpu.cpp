// The operators on the CPU: blocks of eight draws, spread over torch's threads.
#include "operators.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fused_dropout {
namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

// Calls visit(i, kept) for the n elements that begin with this index.
template <typename Visit>
void for_each_kept(Key key, Threshold t, uint64_t index, int64_t n, const Visit& visit) {
  for (int64_t i = 0; i < n;) {
    const Words words = block_words(key, (index + i) / kBlock);
    int slot = (index + i) % kBlock;
    for (; slot < kBlock && i < n; ++slot, ++i) visit(i, keep(words, slot, t));
  }
}

// Cuts the rows into stretches of consecutive elements, several threads' worth, and calls
// stretch(position in x, position in y, index, length) for each.
template <typename Stretch>
void for_each_stretch(const Job& job, const Stretch& stretch) {
  const Rows& rows = job.rows;
  const auto cut = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / rows.length, column = i % rows.length;
      const int64_t n = std::min(end - i, rows.length - column);
      stretch(row * rows.x_stride + column, row * rows.y_stride + column, job.start + row * rows.pitch + column, n);
      i += n;
    }
  };
  if (job.numel() <= kGrain) return cut(0, job.numel());
  torch::stable::parallel_for(0, job.numel(), kGrain, cut);
}

template <typename T, typename Compute = float>
void drop(const Job& job, Key key) {
  const Threshold t = threshold(job.p);
  const Compute s = static_cast<Compute>(scale(job.p));
  for_each_stretch(job, [&](int64_t from, int64_t to, uint64_t index, int64_t n) {
    const T* x = static_cast<const T*>(job.x) + from;
    T* y = static_cast<T*>(job.y) + to;
    for_each_kept(key, t, index, n, [=](int64_t i, bool kept) { y[i] = drop_or_scale(kept, x[i], s); });
  });
}

void write_mask(const Job& job, Key key) {
  const Threshold t = threshold(job.p);
  for_each_stretch(job, [&](int64_t, int64_t to, uint64_t index, int64_t n) {
    bool* y = static_cast<bool*>(job.y) + to;
    for_each_kept(key, t, index, n, [=](int64_t i, bool kept) { y[i] = kept; });
  });
}

void run_cpu(const Job& job) {
  const uint64_t* words = job.key.const_data_ptr<uint64_t>();
  const Key key{words[0], words[1]};
  switch (job.dtype) {
    case ScalarType::Float: return drop<float>(job, key);
    case ScalarType::Double: return drop<double, double>(job, key);
    case ScalarType::Half: return drop<torch::headeronly::Half>(job, key);
    case ScalarType::BFloat16: return drop<torch::headeronly::BFloat16>(job, key);
    default: return write_mask(job, key);
  }
}

// A key from the CPU's default generator: what rng.draw_key does in four calls from Python.
Tensor draw_cpu_key() {
  const auto empty = [](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    const int64_t stride = 1;
    AtenTensorHandle x = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), &stride, dtype_code(dtype),
                                                    aoti_torch_device_type_cpu(), 0, &x));
    return Tensor(x);
  };
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(empty({}, ScalarType::Long)), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor seed = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor key = empty({2}, ScalarType::UInt64);
  uint64_t* words = key.mutable_data_ptr<uint64_t>();
  words[0] = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  words[1] = 0;
  return key;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CPU, m) {
  register_operators<run_cpu>(m);
}
STABLE_TORCH_LIBRARY_FRAGMENT(fused_dropout, m) {
  m.def("draw_cpu_key() -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CompositeExplicitAutograd, m) {
  m.impl("draw_cpu_key", TORCH_BOX(&draw_cpu_key));
}

}  // namespace fused_dropout
