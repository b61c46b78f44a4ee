// The operators attention and attention_backward on the CPU, which fused_dropout/attention.py calls. They work on one
// block of queries at a time: torch multiplies the matrices, and simd/softmax.h does the steps on rows between the
// products. No tensor of the size of the attention weights is saved: backward computes the weights again.
#include "operators.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fused_dropout {
namespace {

// The number of scores of one block of queries and one group of key heads. With their gradient they fit into the L2
// cache of a core.
constexpr int64_t kScoresPerBlock = 1 << 18;
constexpr int64_t kFewestRows = 32, kMostRows = 256;
constexpr int64_t kMostCausalRows = 128;  // fewer, because a block also multiplies its part beyond the diagonal
// Below this many scores a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

constexpr auto kFloat32 = ScalarType::Float, kBFloat16 = ScalarType::BFloat16;

// Whether torch multiplies bfloat16 matrices faster than float32 matrices: the CPU has AMX-BF16 or AVX512-BF16.
bool multiplies_bfloat16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  const bool avx512 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return amx || avx512;
#else
  return false;
#endif
}

// One matrix for each of several heads of one batch entry: a part of a tensor (batch, heads, rows, columns), or scratch
// memory. Strides are in elements.
struct Matrices {
  char* data;
  ScalarType dtype;
  int64_t heads, rows, columns, head_stride, row_stride, column_stride = 1;

  int64_t bytes() const { return dtype == kFloat32 ? 4 : 2; }
  template <typename T>
  T* row(int64_t head, int64_t i) const {
    return reinterpret_cast<T*>(data) + head * head_stride + i * row_stride;
  }
  // `count` rows of each matrix.
  Matrices rows_from(int64_t first_row, int64_t count) const {
    Matrices result = *this;
    result.data += first_row * row_stride * bytes();
    result.rows = count;
    return result;
  }
  Matrices transposed() const { return {data, dtype, heads, columns, rows, head_stride, column_stride, row_stride}; }
  // A tensor (heads, rows, columns) on the same memory.
  Tensor tensor() const {
    const std::array<int64_t, 3> sizes{heads, rows, columns}, strides{head_stride, row_stride, column_stride};
    AtenTensorHandle handle = nullptr;
    check_torch(aoti_torch_create_tensor_from_blob(data, 3, sizes.data(), strides.data(), 0, dtype_code(dtype),
                                                   aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
};

// The matrices of `heads` heads of a batch entry, from `head` on.
Matrices heads_of(const Tensor& x, int64_t batch, int64_t head, int64_t heads) {
  Matrices result{nullptr, x.scalar_type(), heads, x.size(2), x.size(3), x.stride(1), x.stride(2), x.stride(3)};
  auto* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  result.data = data + (batch * x.stride(0) + head * x.stride(1)) * result.bytes();
  return result;
}

// out = a @ b.
void multiply(const Matrices& out, const Matrices& a, const Matrices& b) {
  const Tensor y = out.tensor(), left = a.tensor(), right = b.tensor();
  check_torch(aoti_torch_cpu_bmm_out(y.get(), left.get(), right.get()));
}

// out += a @ b.
void multiply_and_add(const Matrices& out, const Matrices& a, const Matrices& b) {
  const Tensor y = out.tensor(), left = a.tensor(), right = b.tensor();
  check_torch(aoti_torch_cpu_baddbmm_out(y.get(), y.get(), left.get(), right.get(), 1, 1));
}

// Uninitialised memory, aligned to kAlignment bytes.
struct Scratch {
  explicit Scratch(int64_t bytes) : memory(new char[bytes + kAlignment]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    data = memory.get() + (kAlignment - address % kAlignment);
  }
  float* floats() const { return reinterpret_cast<float*>(data); }

  static constexpr int64_t kAlignment = 64;
  std::unique_ptr<char[]> memory;
  char* data;
};

// A copy of matrices without gaps between rows, which torch multiplies faster. The copy is worth its time if several
// blocks of queries read it; otherwise `matrices` stays the original.
struct Packed {
  Packed(const Matrices& x, bool is_worth_copying)
      : memory(is_worth_copying ? x.heads * x.rows * x.columns * x.bytes() : 0), matrices(x) {
    if (!is_worth_copying) return;
    matrices = {memory.data, x.dtype, x.heads, x.rows, x.columns, x.rows * x.columns, x.columns};
    for (int64_t h = 0; h < x.heads; ++h) {
      for (int64_t i = 0; i < x.rows; ++i) {
        std::memcpy(memory.data + (h * x.rows + i) * x.columns * x.bytes(),
                    x.data + (h * x.head_stride + i * x.row_stride) * x.bytes(), x.columns * x.bytes());
      }
    }
  }
  Scratch memory;
  Matrices matrices;
};

// The arguments of a call, and how it is divided into groups of key heads and blocks of queries.
struct AttentionCall {
  const Tensor &query, &key, &value;  // (B, H, L, E), (B, K, S, E), (B, K, S, Ev); H is a multiple of K
  const std::optional<Tensor>& bias;  // attn_mask: (B, H, L, S), bool or float32
  bool is_causal;
  float scale;
  MaskParams params;

  int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
  int64_t key_heads = key.size(1), heads_per_key_head = heads / key_heads;
  int64_t pitch = (keys + kRowPadding - 1) / kRowPadding * kRowPadding;  // the distance between rows of scores
  // The queries of a block.
  int64_t rows =
      std::min(queries, std::clamp(kScoresPerBlock / pitch, kFewestRows, is_causal ? kMostCausalRows : kMostRows));
  int64_t threads = torch::stable::get_num_threads();
  // The key heads of a group, which are multiplied in one call.
  int64_t group_size =
      heads_per_key_head > 1
          ? 1
          : std::clamp<int64_t>(std::min(kScoresPerBlock / (rows * pitch), batch* heads / threads), 1, key_heads);
  const AttentionKernels& kernels = cpu_kernels().attention;

  // Whether prepare() has to scale the scores, because the kernels cannot: the mask is added after the scaling, and the
  // kernels only take a positive scale.
  bool needs_prepare() const { return bias || scale <= 0; }
  float kernel_scale() const { return needs_prepare() ? 1.0f : scale; }
  bool is_one_block() const { return queries == rows && heads_per_key_head == 1; }
  // The number of keys that the queries before end_row attend to.
  int64_t columns(int64_t end_row) const { return is_causal ? std::min(keys, end_row) : keys; }
  // The element index of the first attention weight of query i.
  uint64_t first_index(int64_t entry, int64_t head, int64_t i) const {
    return static_cast<uint64_t>(((entry * heads + head) * queries + i) * keys);
  }

  // Scales the n scores of query i and adds the mask, if needs_prepare().
  void prepare(float* scores, int64_t n, int64_t entry, int64_t head, int64_t i) const {
    if (!needs_prepare()) return;
    for (int64_t j = 0; j < n; ++j) scores[j] *= scale;
    if (!bias) return;
    const int64_t first = entry * bias->stride(0) + head * bias->stride(1) + i * bias->stride(2),
                  step = bias->stride(3);
    if (bias->scalar_type() == ScalarType::Bool) {
      const bool* attends = bias->const_data_ptr<bool>() + first;
      for (int64_t j = 0; j < n; ++j) scores[j] = attends[j * step] ? scores[j] : -INFINITY;
    } else {
      const float* added = bias->const_data_ptr<float>() + first;
      for (int64_t j = 0; j < n; ++j) scores[j] += added[j * step];
    }
  }

  // Calls work(batch entry, first key head, number of key heads) for all groups. Runs the groups in parallel if there
  // are enough of them. Otherwise the matrix products and each_row() run in parallel.
  template <typename Work>
  void each_group(const Work& work) const {
    const int64_t groups = (key_heads + group_size - 1) / group_size;
    const auto run_groups = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % groups * group_size;
        work(i / groups, first, std::min(group_size, key_heads - first));
      }
    };
    if (batch * groups < threads) return run_groups(0, batch * groups);
    torch::stable::parallel_for(0, batch * groups, 1, run_groups);
  }

  // Calls work(head in the group, row, scratch memory) for all rows. The scratch memory has room for three rows of
  // scores and then for two rows of values, in float32.
  template <typename Work>
  void each_row(int64_t head_count, int64_t row_count, const Work& work) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / keys);
    torch::stable::parallel_for(0, head_count * row_count, grain, [&](int64_t begin, int64_t end) {
      const Scratch scratch((3 * pitch + 2 * value.size(3)) * sizeof(float));
      for (int64_t i = begin; i < end; ++i) work(i / row_count, i % row_count, scratch.floats());
    });
  }

  // The scores of a block of queries, in scratch memory.
  Matrices block(const Scratch& scratch, int64_t head_count, int64_t row_count, int64_t column_count) const {
    return {scratch.data, query.scalar_type(), head_count, row_count, column_count, rows * pitch, pitch};
  }
};

// A row for the kernels: the row in memory if it is float32, otherwise a float32 copy of its n elements.
float* open_row(const Matrices& matrices, int64_t head, int64_t i, int64_t n, float* copy,
                const AttentionKernels& kernels) {
  if (matrices.dtype == kFloat32) return matrices.row<float>(head, i);
  kernels.widen(matrices.row<BFloat16>(head, i), copy, n);
  return copy;
}

// Writes back a row that open_row() returned, with zeros after the n elements.
void close_row(const Matrices& matrices, int64_t head, int64_t i, int64_t n, float* row,
               const AttentionKernels& kernels) {
  std::fill(row + n, row + matrices.columns, 0.0f);
  if (matrices.dtype != kFloat32) kernels.narrow(row, matrices.row<BFloat16>(head, i), matrices.columns);
}

// Writes `out` (B, H, L, Ev) and the statistics (B, H, L, 2), which are a RowStatistics for each query and head.
void forward(const AttentionCall& call, const Tensor& out, const Tensor& statistics) {
  auto* all_statistics = static_cast<RowStatistics*>(statistics.mutable_data_ptr());
  call.each_group([&](int64_t entry, int64_t key_head, int64_t count) {
    const Scratch memory(count * call.rows * call.pitch * sizeof(float));
    const Packed key_copy(heads_of(call.key, entry, key_head, count), !call.is_one_block());
    const Packed value_copy(heads_of(call.value, entry, key_head, count), !call.is_one_block());
    const Matrices &key = key_copy.matrices, &value = value_copy.matrices;
    for (int64_t head = key_head * call.heads_per_key_head; head < (key_head + 1) * call.heads_per_key_head; ++head) {
      const Matrices query = heads_of(call.query, entry, head, count), result = heads_of(out, entry, head, count);
      for (int64_t first = 0; first < call.queries; first += call.rows) {
        const int64_t rows = std::min(call.rows, call.queries - first), columns = call.columns(first + rows);
        const Matrices scores = call.block(memory, count, rows, columns);
        multiply(scores, query.rows_from(first, rows), key.rows_from(0, columns).transposed());
        call.each_row(count, rows, [&](int64_t h, int64_t i, float* scratch) {
          const int64_t n = call.columns(first + i + 1),
                        statistics_index = (entry * call.heads + head + h) * call.queries + first + i;
          float* row = open_row(scores, h, i, n, scratch, call.kernels);
          call.prepare(row, n, entry, head + h, first + i);
          all_statistics[statistics_index] = call.kernels.softmax_drop(
              row, n, call.kernel_scale(), call.first_index(entry, head + h, first + i), call.params);
          close_row(scores, h, i, n, row, call.kernels);
        });
        multiply(result.rows_from(first, rows), scores, value.rows_from(0, columns));
      }
    }
  });
}

// The gradient of a group's keys or values, to which each block of queries adds a product. It is summed in float32 and
// transposed, with one column for each key, because torch computes these products faster.
class GradientSum {
 public:
  // out: the memory of the result, which finish() writes. is_single_product: there is only one product, which covers
  // all of out; it is written to out directly.
  GradientSum(const Matrices& out, bool is_single_product)
      : out_(out),
        is_single_product_(is_single_product),
        pitch_(out.rows + (out.rows % 256 == 0 ? kRowPadding : 0)),
        sum_(is_single_product ? 0 : bytes(kFloat32)),
        product_(is_single_product || out.dtype == kFloat32 ? 0 : bytes(out.dtype)) {
    if (!is_single_product) std::fill_n(sum_.floats(), out.heads * out.columns * pitch_, 0.0f);
  }
  // Adds the product of the transposed a and b. The columns of b belong to the first b.columns keys.
  void add(const Matrices& a, const Matrices& b, const AttentionKernels& kernels) {
    if (is_single_product_) return multiply(out_, b.transposed(), a);
    if (out_.dtype == kFloat32) return multiply_and_add(matrices_in(sum_, b.columns), a.transposed(), b);
    const Matrices product = matrices_in(product_, b.columns), sum = matrices_in(sum_, b.columns, kFloat32);
    multiply(product, a.transposed(), b);
    const Scratch wide(b.columns * sizeof(float));
    for (int64_t h = 0; h < sum.heads; ++h) {
      for (int64_t i = 0; i < sum.rows; ++i) {
        kernels.widen(product.row<BFloat16>(h, i), wide.floats(), sum.columns);
        float* row = sum.row<float>(h, i);
        for (int64_t j = 0; j < sum.columns; ++j) row[j] += wide.floats()[j];
      }
    }
  }
  // Transposes the sum and converts it to out's dtype.
  void finish(const AttentionKernels& kernels) {
    if (is_single_product_) return;
    const Matrices sum = matrices_in(sum_, out_.rows, kFloat32);
    const Scratch copy(out_.columns * sizeof(float));
    for (int64_t h = 0; h < out_.heads; ++h) {
      for (int64_t i = 0; i < out_.rows; ++i) {
        float* row = out_.dtype == kFloat32 ? out_.row<float>(h, i) : copy.floats();
        for (int64_t j = 0; j < out_.columns; ++j) row[j] = sum.row<float>(h, j)[i];
        if (out_.dtype != kFloat32) kernels.narrow(row, out_.row<BFloat16>(h, i), out_.columns);
      }
    }
  }

 private:
  int64_t bytes(ScalarType dtype) const { return out_.heads * out_.columns * pitch_ * (dtype == kFloat32 ? 4 : 2); }
  Matrices matrices_in(const Scratch& memory, int64_t columns, std::optional<ScalarType> dtype = std::nullopt) const {
    return {memory.data, dtype.value_or(out_.dtype), out_.heads, out_.columns, columns, out_.columns * pitch_, pitch_};
  }

  Matrices out_;
  bool is_single_product_;
  int64_t pitch_;  // the distance between rows; not a multiple of 256, with which a column would map to one cache set
  Scratch sum_, product_;
};

// Writes the gradients of query, key and value: dquery, dkey and dvalue.
void backward(const AttentionCall& call, const Tensor& gradient, const Tensor& out, const Tensor& statistics,
              const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue) {
  const auto* all_statistics = static_cast<const RowStatistics*>(statistics.const_data_ptr());
  const int64_t width = out.size(3);
  call.each_group([&](int64_t entry, int64_t key_head, int64_t count) {
    const int64_t bytes = count * call.rows * call.pitch * sizeof(float);
    const Scratch scores_memory(bytes), gradients_memory(bytes);
    const Packed key_copy(heads_of(call.key, entry, key_head, count), !call.is_one_block());
    const Packed value_copy(heads_of(call.value, entry, key_head, count), !call.is_one_block());
    const Matrices &key = key_copy.matrices, &value = value_copy.matrices;
    const bool is_single_product = call.is_one_block() && call.columns(call.queries) == call.keys;
    GradientSum key_sum(heads_of(dkey, entry, key_head, count), is_single_product);
    GradientSum value_sum(heads_of(dvalue, entry, key_head, count), is_single_product);
    for (int64_t head = key_head * call.heads_per_key_head; head < (key_head + 1) * call.heads_per_key_head; ++head) {
      const Matrices query = heads_of(call.query, entry, head, count), result = heads_of(out, entry, head, count);
      const Matrices dresult = heads_of(gradient, entry, head, count), dq = heads_of(dquery, entry, head, count);
      for (int64_t first = 0; first < call.queries; first += call.rows) {
        const int64_t rows = std::min(call.rows, call.queries - first), columns = call.columns(first + rows);
        const Matrices scores = call.block(scores_memory, count, rows, columns);
        const Matrices gradients = call.block(gradients_memory, count, rows, columns);
        const Matrices q = query.rows_from(first, rows), g = dresult.rows_from(first, rows),
                       y = result.rows_from(first, rows);
        multiply(scores, q, key.rows_from(0, columns).transposed());
        multiply(gradients, g, value.rows_from(0, columns).transposed());
        call.each_row(count, rows, [&](int64_t h, int64_t i, float* scratch) {
          const int64_t n = call.columns(first + i + 1),
                        statistics_index = (entry * call.heads + head + h) * call.queries + first + i;
          float delta = 0;
          if (g.dtype == kFloat32) {
            delta = call.kernels.dot(g.row<float>(h, i), y.row<float>(h, i), width);
          } else {
            float* wide = scratch + 3 * call.pitch;
            delta = call.kernels.dot(open_row(g, h, i, width, wide, call.kernels),
                                     open_row(y, h, i, width, wide + width, call.kernels), width);
          }
          float* row = open_row(scores, h, i, n, scratch, call.kernels);
          float* drow = open_row(gradients, h, i, n, scratch + call.pitch, call.kernels);
          call.prepare(row, n, entry, head + h, first + i);
          call.kernels.softmax_drop_backward(row, drow, scratch + 2 * call.pitch, n, call.kernel_scale(), call.scale,
                                             all_statistics[statistics_index], delta,
                                             call.first_index(entry, head + h, first + i), call.params);
          close_row(scores, h, i, n, row, call.kernels);
          close_row(gradients, h, i, n, drow, call.kernels);
        });
        value_sum.add(g, scores, call.kernels);
        key_sum.add(q, gradients, call.kernels);
        multiply(dq.rows_from(first, rows), gradients, key.rows_from(0, columns));
      }
    }
    key_sum.finish(call.kernels);
    value_sum.finish(call.kernels);
  });
}

// Raises an error if an argument has a wrong shape, dtype, device or value.
void check(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double p,
           const Tensor& dropout_key) {
  for (const Tensor* x : {&query, &key, &value}) {
    STD_TORCH_CHECK(
        x->dim() == 4 && x->scalar_type() == query.scalar_type() && x->is_cpu() && x->numel() > 0,
        "query, key and value have to be CPU tensors (batch, heads, rows, columns) of one dtype, not empty, "
        "but one is ",
        describe(*x), " for a query ", describe(query));
  }
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == kFloat32 || dtype == kBFloat16 || dtype == ScalarType::Half,
                  "attention takes float32, bfloat16 and float16, but got ", torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(
      key.size(0) == query.size(0) && value.size(0) == query.size(0) && key.size(3) == query.size(3) &&
          value.size(1) == key.size(1) && value.size(2) == key.size(2) && query.size(1) % key.size(1) == 0,
      "query (B, H, L, E), key (B, K, S, E) and value (B, K, S, Ev) have to fit, with H a multiple of K, but are ",
      describe(query), ", ", describe(key), " and ", describe(value));
  STD_TORCH_CHECK(!bias || ((bias->scalar_type() == ScalarType::Bool || bias->scalar_type() == kFloat32) &&
                            bias->dim() == 4 && bias->size(0) == query.size(0) && bias->size(1) == query.size(1) &&
                            bias->size(2) == query.size(2) && bias->size(3) == key.size(2)),
                  "attn_mask has to be bool or float32 of shape (", query.size(0), ", ", query.size(1), ", ",
                  query.size(2), ", ", key.size(2), "), but is ", describe(*bias));
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout probability has to be at least 0 and below 1, but got ", p);
  STD_TORCH_CHECK(
      dropout_key.scalar_type() == ScalarType::UInt64 && dropout_key.dim() == 1 && dropout_key.size(0) == 2 &&
          dropout_key.is_cpu() && dropout_key.is_contiguous(),
      "a dropout key has to be a contiguous uint64 tensor of shape (2,) on the CPU, [seed, offset], but is ",
      describe(dropout_key));
}

// The AttentionCall keeps references to the tensors, which must live as long as it does.
AttentionCall attention_call_of(const Tensor& query, const Tensor& key, const Tensor& value,
                                const std::optional<Tensor>& bias, double p, const Tensor& dropout_key, bool is_causal,
                                double scale_of_scores) {
  const uint64_t* words = dropout_key.const_data_ptr<uint64_t>();
  return {query,
          key,
          value,
          bias,
          is_causal,
          static_cast<float>(scale_of_scores),
          {{words[0], words[1]}, threshold(p), scale(p)}};
}

// A new tensor of x's shape, but with `columns` columns. In memory the heads are inside the rows, as in the result of a
// projection to all heads.
Tensor empty_heads(const Tensor& x, int64_t columns) {
  const std::array<int64_t, 4> sizes{x.size(0), x.size(1), x.size(2), columns};
  const std::array<int64_t, 4> strides{sizes[1] * sizes[2] * columns, columns, sizes[1] * columns, 1};
  AtenTensorHandle handle = nullptr;
  check_torch(aoti_torch_empty_strided(4, sizes.data(), strides.data(), dtype_code(x.scalar_type()),
                                       aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Whether x is converted to float32 first: float16, and bfloat16 if the CPU does not multiply it faster.
bool computes_in_float32(const Tensor& x) {
  static const bool has_bfloat16 = multiplies_bfloat16();
  return x.scalar_type() == ScalarType::Half || (x.scalar_type() == kBFloat16 && !has_bfloat16);
}

// x, or a contiguous copy if the elements of a row are not adjacent. torch.compile may pass such tensors.
Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

// The operator attention. Returns the output (B, H, L, Ev) and the statistics (B, H, L, 2) in float32.
std::tuple<Tensor, Tensor> attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const std::optional<Tensor>& bias, double p, const Tensor& dropout_key,
                                     bool is_causal, double scale_of_scores) {
  using torch::stable::to;
  check(query, key, value, bias, p, dropout_key);
  if (computes_in_float32(query)) {
    const auto [out, statistics] = attention(to(query, kFloat32), to(key, kFloat32), to(value, kFloat32), bias, p,
                                             dropout_key, is_causal, scale_of_scores);
    return {to(out, query.scalar_type()), statistics};
  }
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const AttentionCall call = attention_call_of(q, k, v, bias, p, dropout_key, is_causal, scale_of_scores);
  const Tensor out = empty_heads(query, value.size(3));
  const std::array<int64_t, 4> sizes{call.batch, call.heads, call.queries, 2};
  const Tensor statistics = torch::stable::empty({sizes.data(), 4}, kFloat32);
  forward(call, out, statistics);
  return {out, statistics};
}

// The operator attention_backward. Returns the gradients of query, key and value.
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& gradient, const Tensor& query, const Tensor& key,
                                                      const Tensor& value, const Tensor& out, const Tensor& statistics,
                                                      const std::optional<Tensor>& bias, double p,
                                                      const Tensor& dropout_key, bool is_causal,
                                                      double scale_of_scores) {
  using torch::stable::to;
  check(query, key, value, bias, p, dropout_key);
  for (const Tensor* x : {&gradient, &out}) {
    STD_TORCH_CHECK(x->dim() == 4 && x->scalar_type() == query.scalar_type() && x->is_cpu() &&
                        x->size(0) == query.size(0) && x->size(1) == query.size(1) && x->size(2) == query.size(2) &&
                        x->size(3) == value.size(3),
                    "the output and its gradient have to have the query's dtype and the shape (", query.size(0), ", ",
                    query.size(1), ", ", query.size(2), ", ", value.size(3), ") on the CPU, but one is ", describe(*x));
  }
  STD_TORCH_CHECK(statistics.scalar_type() == kFloat32 && statistics.is_contiguous() && statistics.is_cpu() &&
                      statistics.numel() == 2 * query.size(0) * query.size(1) * query.size(2),
                  "statistics have to be contiguous float32 of shape (", query.size(0), ", ", query.size(1), ", ",
                  query.size(2), ", 2) on the CPU, as attention returns them, but are ", describe(statistics));
  if (computes_in_float32(query)) {
    const auto dtype = query.scalar_type();
    const auto [dquery, dkey, dvalue] =
        attention_backward(to(gradient, kFloat32), to(query, kFloat32), to(key, kFloat32), to(value, kFloat32),
                           to(out, kFloat32), statistics, bias, p, dropout_key, is_causal, scale_of_scores);
    return {to(dquery, dtype), to(dkey, dtype), to(dvalue, dtype)};
  }
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value);
  const AttentionCall call = attention_call_of(q, k, v, bias, p, dropout_key, is_causal, scale_of_scores);
  const Tensor dquery = empty_heads(query, query.size(3)), dkey = empty_heads(key, key.size(3));
  const Tensor dvalue = empty_heads(value, value.size(3));
  backward(call, with_contiguous_rows(gradient), with_contiguous_rows(out), statistics, dquery, dkey, dvalue);
  return {dquery, dkey, dvalue};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_dropout, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace fused_dropout
