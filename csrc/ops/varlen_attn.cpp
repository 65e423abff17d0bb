// genkernels::varlen_attn_forward, varlen_attn_backward and varlen_attn_double_backward: the kernels of attention for
// each of several sequences. Schema and meaning: genkernels/ops/varlen_attn.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

CallCounter forward_calls("varlen_attn_forward"), backward_calls("varlen_attn_backward"),
    double_backward_calls("varlen_attn_double_backward");

// Where each sequence begins, and the end.
std::vector<int64_t> begins_of(const char* name, const Tensor& cu_seq, int64_t rows) {
  const bool is_long = cu_seq.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(cu_seq.is_cpu() && (is_long || cu_seq.scalar_type() == ScalarType::Int) && cu_seq.dim() == 1 &&
                      cu_seq.numel() > 0,
                  name, ": expected a CPU tensor of int32 or int64 of one dimension, not empty");
  std::vector<int64_t> begins(size_t(cu_seq.numel()));
  for (size_t n = 0; n < begins.size(); ++n) {
    const int64_t at = int64_t(n) * cu_seq.stride(0);
    begins[n] = is_long ? static_cast<const int64_t*>(cu_seq.const_data_ptr())[at]
                        : static_cast<const int32_t*>(cu_seq.const_data_ptr())[at];
  }
  STD_TORCH_CHECK(begins.front() == 0 && begins.back() == rows && std::is_sorted(begins.begin(), begins.end()), name,
                  ": expected numbers that do not fall, from 0 to ", rows);
  return begins;
}

struct Sequence {
  int64_t query, queries, key, keys;  // the first of each, and how many
};

// Rows of a tensor [T, H, columns] from `first` on, as a batch of one.
HeadsInput rows_of(const Tensor& tensor, int64_t first) {
  const char* const data = static_cast<const char*>(tensor.const_data_ptr());
  return {data + first * tensor.stride(0) * int64_t(tensor.element_size()), 0, tensor.stride(1), tensor.stride(0)};
}
HeadsInput rows_of(const std::optional<Tensor>& tensor, int64_t first) {
  return tensor ? rows_of(*tensor, first) : HeadsInput{};
}
HeadsOutput mutable_rows_of(const Tensor& tensor, int64_t first) {
  if (tensor.dim() != 3) return {};  // not wanted
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  return {data + first * tensor.stride(0) * int64_t(tensor.element_size()), 0, tensor.stride(1), tensor.stride(0)};
}
// The numbers of queries from `first` on, of a contiguous tensor [.., H, T].
const void* numbers_of(const Tensor& tensor, int64_t first) {
  return static_cast<const char*>(tensor.const_data_ptr()) + first * int64_t(tensor.element_size());
}
const void* numbers_of(const std::optional<Tensor>& tensor, int64_t first) {
  return tensor ? numbers_of(*tensor, first) : nullptr;
}
void* mutable_numbers_of(const Tensor& tensor, int64_t first) {
  return static_cast<char*>(tensor.mutable_data_ptr()) + first * int64_t(tensor.element_size());
}

// What all passes are given, with rows that are contiguous.
struct Sequences {
  Tensor query, key, value;
  int64_t window_left, window_right;
  Attention of{};                 // of all rows
  std::vector<Sequence> by_work;  // those that take longest come first

  Sequences(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& cu_seq_q,
            const Tensor& cu_seq_k, int64_t left, int64_t right, double scale)
      : query(query_), key(key_), value(value_), window_left(left), window_right(right) {
    for (const auto& [name, tensor] : {std::pair("query", &query), std::pair("key", &key), std::pair("value", &value)})
      STD_TORCH_CHECK(tensor->dim() == 3, name, ": expected 3 dimensions, got ", tensor->dim());
    const int64_t H = query.size(1), Hk = key.size(1), D = query.size(2);
    check_like("key", key, query);
    check_like("value", value, query);
    check_shape("key", key, {key.size(0), Hk, D});
    check_shape("value", value, {key.size(0), Hk, value.size(2)});
    STD_TORCH_CHECK(H == Hk || (Hk > 0 && H % Hk == 0), "key: expected a number of heads that divides query's ", H,
                    ", got ", Hk);
    STD_TORCH_CHECK(left >= -1 && right >= -1, "window_size: expected numbers of keys, or -1, got (", left, ", ", right,
                    ")");
    query = with_contiguous_rows(query);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    of.dtype = dtype_of(query, true);
    of.batch = 1;
    of.heads = H;
    of.kv_heads = Hk;
    of.all_queries = query.size(0);
    of.head_size = D;
    of.value_size = value.size(2);
    of.dropout.scale = 1;
    of.scale = scale;
    const std::vector<int64_t> of_queries = begins_of("cu_seq_q", cu_seq_q, query.size(0)),
                               of_keys = begins_of("cu_seq_k", cu_seq_k, key.size(0));
    STD_TORCH_CHECK(of_keys.size() == of_queries.size(), "cu_seq_k: expected as many elements as cu_seq_q, ",
                    of_queries.size(), ", got ", of_keys.size());
    for (size_t n = 0; n + 1 < of_queries.size(); ++n)
      by_work.push_back({of_queries[n], of_queries[n + 1] - of_queries[n], of_keys[n], of_keys[n + 1] - of_keys[n]});
    std::stable_sort(by_work.begin(), by_work.end(),
                     [&](const Sequence& a, const Sequence& b) { return products(a) > products(b); });
  }

  double products(const Sequence& at) const {
    const bool is_limited = window_left >= 0 && window_right >= 0;
    const double window = is_limited ? double(window_left) + double(window_right) + 1 : double(at.keys);
    return double(at.queries) * std::min(double(at.keys), window);
  }

  Attention part(const Sequence& at) const {
    Attention result = of;
    result.queries = at.queries;
    result.keys = at.keys;
    result.query = rows_of(query, at.query);
    result.key = rows_of(key, at.key);
    result.value = rows_of(value, at.key);
    const int64_t offset = at.keys - at.queries, reach = at.keys + at.queries;
    result.diagonal = window_right < 0 ? at.keys : std::min(at.keys, offset + std::min(window_right, reach));
    if (window_left >= 0) result.first_diagonal = offset - std::min(window_left, reach);
    return result;
  }

  // call(sequence, runtime) for all; `size` is how many products a query and a key of a head take. Sequences that would
  // keep a thread busy when the others are done are shared out over all threads, one sequence after another. Of the
  // rest each is one thread's: a parallel region for each would cost more than a short sequence.
  template <class Call>
  void each(int64_t size, const Call& call) const {
    const double operations = 2 * double(of.heads * size);
    double all = 0;
    for (const Sequence& at : by_work) all += operations * products(at);
    const int threads = CallRuntime(all).get().threads;
    const double shared_out = std::max(all / (kTurns * threads), kWorkOfThread * threads);
    size_t first = 0;
    for (; threads > 1 && first < by_work.size(); ++first) {
      const double work = operations * products(by_work[first]);
      if (work < shared_out) break;
      CallRuntime runtime(work);
      call(by_work[first], runtime.get());
    }
    std::atomic<size_t> next = first;
    const auto take_turns = [&](int64_t, int64_t) {
      CallRuntime own(0);
      for (size_t n; (n = next++) < by_work.size();) {
        call(by_work[n], own.get());
        own.get().release(own.get().owner);
      }
    };
    const int64_t turns = std::min<int64_t>(threads, int64_t(by_work.size() - first));
    if (turns > 1)
      torch::stable::parallel_for(0, turns, 1, take_turns);
    else
      take_turns(0, 1);
  }

 private:
  static constexpr double kTurns = 8, kWorkOfThread = 4e6;
};

void check_saved(const Sequences& sequences, const Tensor& grad_output, const std::optional<Tensor>& grad_logsumexp,
                 const Tensor& output, const Tensor& statistics) {
  const int64_t H = sequences.of.heads, T = sequences.of.all_queries;
  const Tensor& query = sequences.query;
  for (const auto& [name, tensor] : {std::pair("grad_output", &grad_output), std::pair("output", &output)}) {
    check_like(name, *tensor, query);
    check_shape(name, *tensor, {T, H, sequences.of.value_size});
  }
  const auto check_sums = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == accumulator_dtype(query), name,
                    ": expected a CPU tensor of query's dtype, or of float32 beside 16 bits");
    check_shape(name, tensor, shape);
  };
  check_sums("statistics", statistics, {2, H, T});
  if (grad_logsumexp) check_sums("grad_logsumexp", *grad_logsumexp, {H, T});
}

std::tuple<Tensor, Tensor> varlen_attn_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k,
                                               int64_t window_left, int64_t window_right, double scale) {
  const Sequences sequences(query, key, value, cu_seq_q, cu_seq_k, window_left, window_right, scale);
  const Attention& of = sequences.of;
  ++forward_calls.calls;
  const Tensor output = new_kept(query, {of.all_queries, of.heads, of.value_size});
  const Tensor statistics = new_accumulator(query, {2, of.heads, of.all_queries});
  const Kernels& level = kernels();
  sequences.each(of.head_size + of.value_size, [&](const Sequence& at, const Runtime& runtime) {
    if (at.queries * of.heads == 0) return;
    level.attention_forward(
        {sequences.part(at), mutable_rows_of(output, at.query), mutable_numbers_of(statistics, at.query)}, runtime);
  });
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attn_backward(Tensor grad_output_, std::optional<Tensor> grad_logsumexp_,
                                                        Tensor query, Tensor key, Tensor value, Tensor cu_seq_q,
                                                        Tensor cu_seq_k, Tensor output_, Tensor statistics_,
                                                        int64_t window_left, int64_t window_right, double scale) {
  const Sequences sequences(query, key, value, cu_seq_q, cu_seq_k, window_left, window_right, scale);
  const Attention& of = sequences.of;
  check_saved(sequences, grad_output_, grad_logsumexp_, output_, statistics_);
  ++backward_calls.calls;
  const Tensor output = with_contiguous_rows(output_), grad_output = with_contiguous_rows(grad_output_);
  const Tensor statistics = as_contiguous(statistics_);
  const std::optional<Tensor> grad_logsumexp = as_contiguous(grad_logsumexp_);
  const Tensor grad_query = new_kept(query, query.sizes()), grad_key = new_kept(query, key.sizes()),
               grad_value = new_kept(query, value.sizes());
  const Kernels& level = kernels();
  sequences.each(3 * of.head_size + 2 * of.value_size, [&](const Sequence& at, const Runtime& runtime) {
    AttentionBackward backward{};
    backward.of = sequences.part(at);
    backward.output = rows_of(output, at.query);
    backward.grad_output = rows_of(grad_output, at.query);
    backward.statistics = numbers_of(statistics, at.query);
    backward.grad_logsumexp = numbers_of(grad_logsumexp, at.query);
    backward.grad_query = mutable_rows_of(grad_query, at.query);
    backward.grad_key = mutable_rows_of(grad_key, at.key);
    backward.grad_value = mutable_rows_of(grad_value, at.key);
    level.attention_backward(backward, runtime);
  });
  return {grad_query, grad_key, grad_value};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> varlen_attn_double_backward(
    std::optional<Tensor> grad_grad_query, std::optional<Tensor> grad_grad_key, std::optional<Tensor> grad_grad_value,
    Tensor grad_output_, std::optional<Tensor> grad_logsumexp_, Tensor query, Tensor key, Tensor value, Tensor cu_seq_q,
    Tensor cu_seq_k, Tensor output, Tensor statistics_, int64_t window_left, int64_t window_right, double scale,
    bool needs_grad_output, bool needs_query, bool needs_key, bool needs_value) {
  const Sequences sequences(query, key, value, cu_seq_q, cu_seq_k, window_left, window_right, scale);
  const Attention& of = sequences.of;
  check_saved(sequences, grad_output_, grad_logsumexp_, output, statistics_);
  const auto check_rows = [&](const char* name, std::optional<Tensor>& tensor, const Tensor& like) {
    if (!tensor) return;
    check_like(name, *tensor, query);
    check_shape(name, *tensor, {like.size(0), like.size(1), like.size(2)});
    tensor = with_contiguous_rows(*tensor);
  };
  check_rows("grad_grad_query", grad_grad_query, query);
  check_rows("grad_grad_key", grad_grad_key, key);
  check_rows("grad_grad_value", grad_grad_value, value);
  ++double_backward_calls.calls;
  const Tensor grad_output = with_contiguous_rows(grad_output_), statistics = as_contiguous(statistics_);
  const std::optional<Tensor> grad_logsumexp = as_contiguous(grad_logsumexp_);
  const auto new_grad = [&](bool is_needed, const Tensor& like) {
    return is_needed ? new_kept(query, like.sizes()) : new_kept(query, {0});
  };
  const Tensor grad_grad_output = new_grad(needs_grad_output, grad_output), grad_query = new_grad(needs_query, query),
               grad_key = new_grad(needs_key, key), grad_value = new_grad(needs_value, value);
  const Tensor grad_grad_logsumexp =
      grad_logsumexp ? new_accumulator(query, {of.heads, of.all_queries}) : new_accumulator(query, {0});
  const Kernels& level = kernels();
  sequences.each(7 * of.head_size + 5 * of.value_size, [&](const Sequence& at, const Runtime& runtime) {
    AttentionDoubleBackward backward{};
    backward.of = sequences.part(at);
    backward.grad_output = rows_of(grad_output, at.query);
    backward.grad_grad_query = rows_of(grad_grad_query, at.query);
    backward.grad_grad_key = rows_of(grad_grad_key, at.key);
    backward.grad_grad_value = rows_of(grad_grad_value, at.key);
    backward.statistics = numbers_of(statistics, at.query);
    backward.grad_logsumexp = numbers_of(grad_logsumexp, at.query);
    backward.grad_grad_output = mutable_rows_of(grad_grad_output, at.query);
    backward.grad_query = mutable_rows_of(grad_query, at.query);
    backward.grad_key = mutable_rows_of(grad_key, at.key);
    backward.grad_value = mutable_rows_of(grad_value, at.key);
    if (grad_logsumexp) backward.grad_grad_logsumexp = mutable_numbers_of(grad_grad_logsumexp, at.query);
    level.attention_double_backward(backward, runtime);
  });
  return {grad_grad_output, grad_grad_logsumexp, grad_query, grad_key, grad_value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("varlen_attn_forward", TORCH_BOX(&varlen_attn_forward));
  m.impl("varlen_attn_backward", TORCH_BOX(&varlen_attn_backward));
  m.impl("varlen_attn_double_backward", TORCH_BOX(&varlen_attn_double_backward));
}

}  // namespace genkernels
