// The operators on the CPU. Chooses the kernels of simd/ for the best instruction set of the machine, and spreads the
// elements of a call over torch's threads. torch's dispatcher calls run_cpu() through the operators of operators.h.
#include "operators.h"
#include "window_cpu.h"

#include <cstdlib>
#include <cstring>
#include <string_view>

#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_dropout {

const CpuKernels& choose_kernels() {
  const char* setting = std::getenv("FUSED_DROPOUT_CPU_ISA");  // native.py has checked the value
  const std::string_view wanted = setting && *setting ? setting : "auto";
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The __builtin_cpu_supports of some compilers does not know F16C.
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

// Calls part(begin, end) for ranges that together are 0 to `parts`, on several threads if that is worth it. All parts
// have the same size, and numel elements together.
template <typename Part>
void in_parallel(int64_t numel, int64_t parts, const Part& part) {
  if (numel <= kGrain) return part(0, parts);
  torch::stable::parallel_for(0, parts, std::max<int64_t>(1, kGrain / (numel / parts)), part);
}

// Asks for huge pages for a new output of `bytes` bytes. The kernel of the operating system makes each page when it is
// first written; with huge pages that takes a fourth of the time. Only huge pages that lie completely inside y are
// asked for, so that no more memory is used.
void ask_for_huge_pages(void* y, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(y) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(y) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a failure has no effect, so it is ignored
#endif
}

// Visits all elements: as strips of tiles, as one row, or as a window of any other form.
template <typename T>
void visit_elements(const KernelArgs& args, const MaskParams& params, const KernelTable<T>& table) {
  const TypedKernels<T>& kernels = table[static_cast<int>(args.operation)];
  if (args.x != args.y) ask_for_huge_pages(args.y, args.numel * static_cast<int64_t>(sizeof(T)));
  if (const auto consecutive = consecutive_dim(args.dims)) {
    const Tiles<T> tiles(args, params, kernels, *consecutive);
    return in_parallel(args.numel, tiles.strips(), [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) tiles.visit(begin);
    });
  }
  const bool one_row = args.dims.size() == 1 && has_stride(args.dims[0], 1) && args.dims[0].index == 1;
  in_parallel(args.numel, args.numel, [&](int64_t begin, int64_t end) {
    if (args.operation == Operation::kGate) {
      kernels.select(streams_of<T>(args) + begin, nullptr, end - begin, args.scale);
    } else if (one_row) {
      kernels.drop(streams_of<T>(args) + begin, args.start + begin, end - begin, params);
    } else {
      WindowWalk<T>(args, params, kernels, begin).visit(end - begin);
    }
  });
}

void run_cpu(const KernelArgs& args) {
  MaskParams params{{}, threshold(args.p), args.scale};
  if (args.operation != Operation::kGate) {
    const uint64_t* key_words = args.key.const_data_ptr<uint64_t>();
    params.key = {key_words[0], key_words[1]};
  }
  const CpuKernels& kernels = cpu_kernels();
  switch (args.dtype) {
    case ScalarType::Float: return visit_elements(args, params, kernels.float32);
    case ScalarType::Double: return visit_elements(args, params, kernels.float64);
    case ScalarType::Half: return visit_elements(args, params, kernels.float16);
    case ScalarType::BFloat16: return visit_elements(args, params, kernels.bfloat16);
    default: return visit_elements(args, params, kernels.mask);
  }
}

// The operator draw_cpu_keys: draws the n keys that n calls would draw from the CPU's default generator. Returns a
// uint64 tensor of shape (n, 2). Does the same as draw_keys in fused_dropout/keys.py, in one call.
Tensor draw_cpu_keys(int64_t n) {
  const auto empty = [n](std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                         ScalarType dtype) {
    AtenTensorHandle x = nullptr;
    check_torch(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.begin(), dtype_code(dtype),
                                         aoti_torch_device_type_cpu(), 0, &x));
    return Tensor(x);
  };
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(empty({n}, {1}, ScalarType::Long)), from(std::nullopt)};
  check_torch(torch_call_dispatcher("aten::random_", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor seeds = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor keys = empty({n, 2}, {2, 1}, ScalarType::UInt64);
  uint64_t* key_words = keys.mutable_data_ptr<uint64_t>();
  for (int64_t i = 0; i < n; ++i) {
    key_words[2 * i] = static_cast<uint64_t>(seeds.const_data_ptr<int64_t>()[i]);
    key_words[2 * i + 1] = 0;
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
