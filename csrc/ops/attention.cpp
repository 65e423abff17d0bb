// genkernels::attention_forward, attention_backward and attention_double_backward. Schema and meaning:
// genkernels/ops/attention.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include "../dispatch.h"
#include "checks.h"
#include "runtime.h"
#include "stats.h"
#include "tensors.h"

namespace genkernels {
namespace {

CallCounter forward_calls("attention_forward"), backward_calls("attention_backward"),
    double_backward_calls("attention_double_backward");

void check_heads(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, ": expected 4 dimensions, got ", tensor.dim());
}

HeadsInput heads_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

HeadsOutput mutable_heads_of(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// [B, H, rows, columns], which lies in memory as [B, rows, H, columns].
Tensor new_heads(const Tensor& input, int64_t B, int64_t H, int64_t rows, int64_t columns) {
  return torch::stable::transpose(new_kept(input, {B, rows, H, columns}), 1, 2);
}

AttentionMask mask_of(const char* name, const Tensor& mask, const Tensor& query,
                      std::initializer_list<int64_t> scores) {
  check_heads(name, mask);
  AttentionMask result{};
  result.data = mask.const_data_ptr();
  int64_t* const strides[] = {&result.batch, &result.head, &result.query, &result.key};
  for (int i = 0; i < 4; ++i) {
    const int64_t full = scores.begin()[i];
    STD_TORCH_CHECK(mask.size(i) == full || mask.size(i) == 1, name, ": expected a shape that is broadcast to ",
                    shape_string(scores), ", got ", shape_string(mask.sizes()));
    *strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  const ScalarType dtype = mask.scalar_type();
  STD_TORCH_CHECK(
      mask.is_cpu() && (dtype == ScalarType::Bool || dtype == query.scalar_type() || dtype == accumulator_dtype(query)),
      name, ": expected a CPU tensor of bool, of query's dtype, or of float32 beside 16 bits");
  result.type = dtype == ScalarType::Bool           ? MaskType::boolean
                : dtype == accumulator_dtype(query) ? MaskType::of_accumulator
                                                    : MaskType::of_dtype;
  return result;
}

// What few calls have, each absent or as it was called.
struct Features {
  std::optional<Tensor> key_lengths, alibi_slopes;
  int64_t window_left, window_right;
  double softcap;
};

// All arguments but the gradients', with rows that are contiguous.
struct Arguments {
  Tensor query, key, value;
  std::optional<Tensor> key_lengths;
  Attention of{};

  Arguments(const Tensor& query_, const Tensor& key_, const Tensor& value_, const std::optional<Tensor>& attn_mask,
            const std::optional<Tensor>& seed, double dropout_p, int64_t causal, double scale, const Features& features)
      : query(query_), key(key_), value(value_), key_lengths(as_contiguous(features.key_lengths)) {
    check_heads("query", query);
    check_heads("key", key);
    check_heads("value", value);
    const int64_t B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3);
    const int64_t Hk = key.size(1), S = key.size(2);
    STD_TORCH_CHECK(H == Hk || (Hk > 0 && H % Hk == 0), "key: expected a number of heads that divides query's ", H,
                    ", got ", Hk);
    check_like("key", key, query);
    check_like("value", value, query);
    check_shape("key", key, {B, Hk, S, D});
    check_shape("value", value, {B, Hk, S, value.size(3)});
    STD_TORCH_CHECK(causal >= 0 && causal <= 2, "causal: expected 0, 1 or 2, got ", causal);
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected a number in [0, 1], got ", dropout_p);
    STD_TORCH_CHECK(seed.has_value() == (dropout_p > 0), "seed: expected a tensor with dropout, and none without");
    query = with_contiguous_rows(query);
    key = with_contiguous_rows(key);
    value = with_contiguous_rows(value);
    of.dtype = dtype_of(query, true);
    of.batch = B;
    of.heads = H;
    of.kv_heads = Hk;
    of.queries = of.all_queries = L;
    of.keys = S;
    of.head_size = D;
    of.value_size = value.size(3);
    of.query = heads_of(query);
    of.key = heads_of(key);
    of.value = heads_of(value);
    if (attn_mask) of.mask = mask_of("attn_mask", *attn_mask, query, {B, H, L, S});
    of.dropout.scale = 1;
    if (seed) {
      of.dropout = dropout_of(dropout_p, *seed);
      if (of.dropout.threshold == 0) of.dropout.scale = 1;  // below 2^-32 nothing is dropped
    }
    of.scale = scale;
    set_keys(features, causal);
    if (features.alibi_slopes) set_slopes(*features.alibi_slopes);
    STD_TORCH_CHECK(features.softcap >= 0 && std::isfinite(features.softcap), "softcap: expected 0 or more, got ",
                    features.softcap);
    of.softcap = features.softcap;
  }

  double products() const {
    return double(of.batch * of.heads) * double(of.queries) *
           double(std::min(of.keys, of.diagonal - of.first_diagonal + 1));
  }

 private:
  // Which keys take part.
  void set_keys(const Features& features, int64_t causal) {
    const int64_t left = features.window_left, right = features.window_right, reach = of.queries + of.keys;
    STD_TORCH_CHECK(left >= -1 && right >= -1, "window_size: expected numbers of keys, or -1, got (", left, ", ", right,
                    ")");
    of.alibi.offset = causal == 1 ? 0 : of.keys - of.queries;
    of.diagonal = causal == 0 ? of.keys : of.alibi.offset;
    if (right >= 0) of.diagonal = std::min(of.diagonal, of.alibi.offset + std::min(right, reach));
    if (left >= 0) of.first_diagonal = of.alibi.offset - std::min(left, reach);
    of.follows_lengths = causal != 1;
    if (!key_lengths) return;
    STD_TORCH_CHECK(key_lengths->is_cpu() && key_lengths->scalar_type() == ScalarType::Long,
                    "key_lengths: expected a CPU tensor of int64");
    check_shape("key_lengths", *key_lengths, {of.batch});
    of.key_lengths = static_cast<const int64_t*>(key_lengths->const_data_ptr());
    for (int64_t b = 0; b < of.batch; ++b)
      STD_TORCH_CHECK(of.key_lengths[b] >= 0 && of.key_lengths[b] <= of.keys, "key_lengths: expected numbers in [0, ",
                      of.keys, "], got ", of.key_lengths[b]);
  }

  void set_slopes(const Tensor& slopes) {
    STD_TORCH_CHECK(slopes.is_cpu() && slopes.scalar_type() == accumulator_dtype(query),
                    "alibi_slopes: expected a CPU tensor of query's dtype, or of float32 beside 16 bits");
    STD_TORCH_CHECK(
        slopes.dim() == 2 && (slopes.size(0) == 1 || slopes.size(0) == of.batch) && slopes.size(1) == of.heads,
        "alibi_slopes: expected shape ", shape_string(std::initializer_list<int64_t>{of.batch, of.heads}), " or [1, ",
        of.heads, "], got ", shape_string(slopes.sizes()));
    of.alibi.slopes = slopes.const_data_ptr();
    of.alibi.batch = slopes.size(0) == 1 ? 0 : slopes.stride(0);
    of.alibi.head = slopes.stride(1);
  }
};

std::tuple<Tensor, Tensor> attention_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> attn_mask,
                                             std::optional<Tensor> seed, double dropout_p, int64_t causal, double scale,
                                             std::optional<Tensor> key_lengths, std::optional<Tensor> alibi_slopes,
                                             int64_t window_left, int64_t window_right, double softcap) {
  const Arguments arguments(query, key, value, attn_mask, seed, dropout_p, causal, scale,
                            {key_lengths, alibi_slopes, window_left, window_right, softcap});
  const Attention& of = arguments.of;
  ++forward_calls.calls;
  const Tensor output = new_heads(query, of.batch, of.heads, of.queries, of.value_size);
  const Tensor statistics = new_accumulator(query, {2, of.batch, of.heads, of.queries});
  if (statistics.numel() > 0) {
    const AttentionForward forward{of, mutable_heads_of(output), statistics.mutable_data_ptr()};
    CallRuntime runtime(2 * arguments.products() * double(of.head_size + of.value_size));
    kernels().attention_forward(forward, runtime.get());
  }
  return {output, statistics};
}

// What the backward passes are given beside the forward pass's arguments.
void check_saved(const Arguments& arguments, const Tensor& grad_output, const std::optional<Tensor>& grad_logsumexp,
                 const Tensor& output, const Tensor& statistics, bool needs_mask) {
  const Attention& of = arguments.of;
  const Tensor& query = arguments.query;
  const auto check_sums = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == accumulator_dtype(query), name,
                    ": expected a CPU tensor of query's dtype, or of float32 beside 16 bits");
  };
  for (const auto& [name, tensor] : {std::pair("grad_output", &grad_output), std::pair("output", &output)}) {
    check_like(name, *tensor, query);
    check_shape(name, *tensor, {of.batch, of.heads, of.queries, of.value_size});
  }
  check_sums("statistics", statistics);
  check_shape("statistics", statistics, {2, of.batch, of.heads, of.queries});
  if (grad_logsumexp) {
    check_sums("grad_logsumexp", *grad_logsumexp);
    check_shape("grad_logsumexp", *grad_logsumexp, {of.batch, of.heads, of.queries});
  }
  STD_TORCH_CHECK(!needs_mask || (of.mask.type != MaskType::none && of.mask.type != MaskType::boolean),
                  "needs_mask: there is no floating-point attn_mask");
}

// The mask's gradient, which `to` learns of; without elements where it is not needed.
template <class Backward>
Tensor new_grad_mask(const Tensor& query, const std::optional<Tensor>& attn_mask, bool needs_mask, Backward& to) {
  if (!needs_mask) return new_kept(query, {0});
  const Tensor& mask = *attn_mask;
  const Tensor grad_mask = new_kept(mask, {mask.size(0), mask.size(1), mask.size(2), mask.size(3)});
  const auto stride = [&](int64_t i) { return grad_mask.size(i) == 1 ? 0 : grad_mask.stride(i); };
  to.grad_mask = grad_mask.mutable_data_ptr();
  to.grad_mask_size = grad_mask.numel();
  to.grad_mask_batch = stride(0);
  to.grad_mask_head = stride(1);
  to.grad_mask_query = stride(2);
  to.grad_mask_key = stride(3);
  return grad_mask;
}

// Of how many of the last tensors the gradients are formed side by side: 0, 2 or 3.
void check_side_by_side(const std::array<const Tensor*, 3>& tensors, int64_t count) {
  STD_TORCH_CHECK(count == 0 || count == 2 || count == 3, "side_by_side: expected 0, 2 or 3, got ", count);
  for (size_t i = 3 - size_t(count); i < 3; ++i)
    STD_TORCH_CHECK(std::ranges::equal(tensors[i]->sizes(), tensors[2]->sizes()),
                    "side_by_side: expected tensors of one shape");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output_, std::optional<Tensor> grad_logsumexp_, Tensor query, Tensor key, Tensor value,
    std::optional<Tensor> attn_mask, std::optional<Tensor> seed, Tensor output_, Tensor statistics_, double dropout_p,
    int64_t causal, double scale, bool needs_mask, std::optional<Tensor> key_lengths,
    std::optional<Tensor> alibi_slopes, int64_t window_left, int64_t window_right, double softcap,
    int64_t side_by_side) {
  const Arguments arguments(query, key, value, attn_mask, seed, dropout_p, causal, scale,
                            {key_lengths, alibi_slopes, window_left, window_right, softcap});
  const Attention& of = arguments.of;
  check_saved(arguments, grad_output_, grad_logsumexp_, output_, statistics_, needs_mask);
  ++backward_calls.calls;
  const Tensor output = with_contiguous_rows(output_), grad_output = with_contiguous_rows(grad_output_);
  const Tensor statistics = as_contiguous(statistics_);
  const std::optional<Tensor> grad_logsumexp = as_contiguous(grad_logsumexp_);

  AttentionBackward backward{};
  backward.of = of;
  backward.output = heads_of(output);
  backward.grad_output = heads_of(grad_output);
  backward.statistics = statistics.const_data_ptr();
  backward.grad_logsumexp = data(grad_logsumexp);
  // The last ones may be parts of one tensor, [B, rows, parts, H, D], which stands for the first of them.
  const std::array<const Tensor*, 3> like = {&query, &key, &value};
  const std::array<HeadsOutput*, 3> to = {&backward.grad_query, &backward.grad_key, &backward.grad_value};
  check_side_by_side(like, side_by_side);
  const size_t apart = 3 - size_t(side_by_side);
  std::array<Tensor, 3> gradients;
  for (size_t i = 0; i < 3; ++i) {
    const int64_t B = like[i]->size(0), H = like[i]->size(1), rows = like[i]->size(2), D = like[i]->size(3);
    if (i < apart) {
      gradients[i] = new_heads(query, B, H, rows, D);
      *to[i] = mutable_heads_of(gradients[i]);
    } else {
      gradients[i] = i == apart ? new_kept(query, {B, rows, side_by_side, H, D}) : new_kept(query, {0});
      const Tensor part = torch::stable::select(gradients[apart], 2, int64_t(i - apart));
      *to[i] = mutable_heads_of(torch::stable::transpose(part, 1, 2));
    }
  }
  const Tensor grad_mask = new_grad_mask(query, attn_mask, needs_mask, backward);
  CallRuntime runtime(2 * arguments.products() * double(3 * of.head_size + 2 * of.value_size));
  kernels().attention_backward(backward, runtime.get());
  return {gradients[0], gradients[1], gradients[2], grad_mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_double_backward(
    std::optional<Tensor> grad_grad_query, std::optional<Tensor> grad_grad_key, std::optional<Tensor> grad_grad_value,
    std::optional<Tensor> grad_grad_mask, Tensor grad_output_, std::optional<Tensor> grad_logsumexp_, Tensor query,
    Tensor key, Tensor value, std::optional<Tensor> attn_mask, std::optional<Tensor> seed, Tensor output,
    Tensor statistics_, double dropout_p, int64_t causal, double scale, bool needs_mask, bool needs_grad_output,
    bool needs_query, bool needs_key, bool needs_value, std::optional<Tensor> key_lengths,
    std::optional<Tensor> alibi_slopes, int64_t window_left, int64_t window_right, double softcap) {
  const Arguments arguments(query, key, value, attn_mask, seed, dropout_p, causal, scale,
                            {key_lengths, alibi_slopes, window_left, window_right, softcap});
  const Attention& of = arguments.of;
  const int64_t B = of.batch, H = of.heads, Hk = of.kv_heads, L = of.queries, S = of.keys;
  check_saved(arguments, grad_output_, grad_logsumexp_, output, statistics_, needs_mask);
  AttentionDoubleBackward backward{};
  backward.of = of;
  const auto set_heads = [&](const char* name, std::optional<Tensor>& tensor, int64_t heads, int64_t rows,
                             int64_t columns, HeadsInput& to) {
    if (!tensor) return;
    check_like(name, *tensor, query);
    check_shape(name, *tensor, {B, heads, rows, columns});
    tensor = with_contiguous_rows(*tensor);
    to = heads_of(*tensor);
  };
  set_heads("grad_grad_query", grad_grad_query, H, L, of.head_size, backward.grad_grad_query);
  set_heads("grad_grad_key", grad_grad_key, Hk, S, of.head_size, backward.grad_grad_key);
  set_heads("grad_grad_value", grad_grad_value, Hk, S, of.value_size, backward.grad_grad_value);
  if (grad_grad_mask) {
    STD_TORCH_CHECK(
        attn_mask && of.mask.type != MaskType::boolean && grad_grad_mask->scalar_type() == attn_mask->scalar_type(),
        "grad_grad_mask: expected attn_mask's dtype, which is a floating-point one");
    check_shape("grad_grad_mask", *grad_grad_mask,
                {attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)});
    backward.grad_grad_mask = mask_of("grad_grad_mask", *grad_grad_mask, query, {B, H, L, S});
  }
  ++double_backward_calls.calls;
  const Tensor grad_output = with_contiguous_rows(grad_output_), statistics = as_contiguous(statistics_);
  const std::optional<Tensor> grad_logsumexp = as_contiguous(grad_logsumexp_);
  backward.grad_output = heads_of(grad_output);
  backward.statistics = statistics.const_data_ptr();
  backward.grad_logsumexp = data(grad_logsumexp);

  const auto new_grad = [&](bool is_needed, int64_t heads, int64_t rows, int64_t columns, HeadsOutput& to) {
    if (!is_needed) return new_kept(query, {0});
    const Tensor grad = new_heads(query, B, heads, rows, columns);
    to = mutable_heads_of(grad);
    return grad;
  };
  const Tensor grad_grad_output = new_grad(needs_grad_output, H, L, of.value_size, backward.grad_grad_output);
  const Tensor grad_query = new_grad(needs_query, H, L, of.head_size, backward.grad_query);
  const Tensor grad_key = new_grad(needs_key, Hk, S, of.head_size, backward.grad_key);
  const Tensor grad_value = new_grad(needs_value, Hk, S, of.value_size, backward.grad_value);
  const Tensor grad_grad_logsumexp = grad_logsumexp ? new_accumulator(query, {B, H, L}) : new_accumulator(query, {0});
  if (grad_logsumexp) backward.grad_grad_logsumexp = grad_grad_logsumexp.mutable_data_ptr();
  const Tensor grad_mask = new_grad_mask(query, attn_mask, needs_mask, backward);
  CallRuntime runtime(2 * arguments.products() * double(7 * of.head_size + 5 * of.value_size));
  kernels().attention_double_backward(backward, runtime.get());
  return {grad_grad_output, grad_grad_logsumexp, grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genkernels, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_double_backward", TORCH_BOX(&attention_double_backward));
}

}  // namespace genkernels
