// The operators on the CPU: the kernels for the best instruction set that the machine has, spread over torch's threads.
#include "simd/kernels.h"
#include "operators.h"

#include <cstdlib>
#include <cstring>
#include <memory>
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

template <typename Part>
void in_parallel(int64_t numel, const Part& part) {
  if (numel <= kGrain) return part(0, numel);
  torch::stable::parallel_for(0, numel, kGrain, part);
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
  in_parallel(job.numel(), cut);
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

template <typename T>
void drop(const Job& job, const Draw& draw, void (*kernel)(const T*, T*, uint64_t, int64_t, const Draw&)) {
  if (job.x != job.y) ask_for_huge_pages(job.y, job.numel() * static_cast<int64_t>(sizeof(T)));
  for_each_stretch(job, [&](int64_t from, int64_t to, uint64_t index, int64_t n) {
    kernel(static_cast<const T*>(job.x) + from, static_cast<T*>(job.y) + to, index, n, draw);
  });
}

void write_mask(const Job& job, const Draw& draw) {
  for_each_stretch(job, [&](int64_t, int64_t to, uint64_t index, int64_t n) {
    cpu_kernels().mask(static_cast<bool*>(job.y) + to, index, n, draw);
  });
}

constexpr int64_t kFlags = 1024;  // as many flags of elements stay in the first cache
constexpr int64_t kLongRun = 64;  // elements that are worth a call of their own

// Goes through memory, and says of each element what the mask, of the noise's shape, has for it.
class Broadcast {
 public:
  Broadcast(const Noise& noise, const uint16_t* mask, int64_t position) : dims_(noise.dims), mask_(mask) {
    for (const Noise::Dim& dim : dims_) {
      at_.push_back(position % dim.size);
      mask_ += at_.back() * dim.stride;
      position /= dim.size;
    }
  }

  // What the next elements have in common, up to n: the flags of several that lie together, or, if one of the mask's
  // decides for many, whether they are kept (no flags) or dropped. Shorter runs are laid out one after the other.
  struct Next {
    int64_t n;
    const uint16_t* flags;
    bool dropped;
  };

  Next next(int64_t n) {
    const auto [size, stride] = dims_[0];
    const int64_t run = std::min(n, size - at_[0]);
    if (run < kLongRun || stride > 1) {
      n = std::min(n, kFlags);
      lay_out(n);
      return {n, buffer_, false};
    }
    const Next found = {run, stride == 0 ? nullptr : mask_, stride == 0 && *mask_ == 0};
    advance(run);
    return found;
  }

 private:
  void lay_out(int64_t n) {
    const auto [size, stride] = dims_[0];
    for (uint16_t* flags = buffer_; n > 0;) {
      const int64_t run = std::min(n, size - at_[0]);
      if (stride == 0) {
        std::fill_n(flags, run, *mask_);
      } else {
        for (int64_t i = 0; i < run; ++i) flags[i] = mask_[i * stride];
      }
      int64_t done = run;
      if (run == size && dims_.size() > 1 && dims_[1].stride == 0) {  // the same once more, several times over
        const int64_t times = std::min(n / size, dims_[1].size - at_[1]);
        for (; done < times * size; ++done) flags[done] = flags[done - size];
        at_[1] += times - 1;
      }
      flags += done;
      n -= done;
      advance(run);
    }
  }

  void advance(int64_t n) {
    at_[0] += n;
    mask_ += n * dims_[0].stride;
    for (size_t d = 0; at_[d] == dims_[d].size && d + 1 < dims_.size(); ++d) {
      at_[d] = 0;
      ++at_[d + 1];
      mask_ += dims_[d + 1].stride - dims_[d].size * dims_[d].stride;
    }
  }

  const std::vector<Noise::Dim>& dims_;
  const uint16_t* mask_;
  std::vector<int64_t> at_;
  uint16_t buffer_[kFlags];
};

template <typename T>
void drop_broadcast(const Job& job, const uint16_t* mask,
                    void (*select)(const T*, T*, const uint16_t*, int64_t, double)) {
  if (job.x != job.y) ask_for_huge_pages(job.y, job.numel() * static_cast<int64_t>(sizeof(T)));
  in_parallel(job.numel(), [&](int64_t begin, int64_t end) {
    Broadcast broadcast(*job.noise, mask, begin);
    while (begin < end) {
      const auto [n, flags, dropped] = broadcast.next(end - begin);
      T* y = static_cast<T*>(job.y) + begin;
      if (dropped) {
        std::memset(y, 0, n * sizeof(T));
      } else {
        select(static_cast<const T*>(job.x) + begin, y, flags, n, job.scale);
      }
      begin += n;
    }
  });
}

void run_broadcast(const Job& job, const Draw& draw) {
  const int64_t numel = job.noise->numel;
  const std::unique_ptr<bool[]> kept(new bool[numel]);
  const std::unique_ptr<uint16_t[]> mask(new uint16_t[numel]);
  Job of_mask = job;
  of_mask.y = kept.get();
  of_mask.rows = one_row(numel);
  write_mask(of_mask, draw);
  for (int64_t i = 0; i < numel; ++i) mask[i] = static_cast<uint16_t>(-static_cast<int>(kept[i]));
  switch (job.dtype) {
    case ScalarType::Float: return drop_broadcast(job, mask.get(), cpu_kernels().select_float32);
    case ScalarType::Double: return drop_broadcast(job, mask.get(), cpu_kernels().select_float64);
    case ScalarType::Half: return drop_broadcast(job, mask.get(), cpu_kernels().select_float16);
    default: return drop_broadcast(job, mask.get(), cpu_kernels().select_bfloat16);
  }
}

void run_cpu(const Job& job) {
  const uint64_t* words = job.key.const_data_ptr<uint64_t>();
  const Draw draw{{words[0], words[1]}, threshold(job.p), job.scale};
  if (job.noise) return run_broadcast(job, draw);
  switch (job.dtype) {
    case ScalarType::Float: return drop(job, draw, cpu_kernels().float32);
    case ScalarType::Double: return drop(job, draw, cpu_kernels().float64);
    case ScalarType::Half: return drop(job, draw, cpu_kernels().float16);
    case ScalarType::BFloat16: return drop(job, draw, cpu_kernels().bfloat16);
    default: ask_for_huge_pages(job.y, job.numel()); return write_mask(job, draw);
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
