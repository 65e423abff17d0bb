// Scaled dot-product attention (torch.nn.functional.scaled_dot_product_attention), whose scores exist for one block of
// queries and keys at a time.
// Plain pointers and structs only: this header is what crosses from one SIMD level's code to another's.
#pragma once

#include "dropout.h"
#include "runtime.h"

namespace genkernels {

// A tensor [B, H, rows, columns]: elements between one batch, head and row and the next; a row is contiguous.
struct HeadsInput {
  const void* data;
  int64_t batch, head, row;
};
struct HeadsOutput {
  void* data;
  int64_t batch, head, row;
};

enum class MaskType { none, boolean, of_dtype, of_accumulator };

// [B, H, L, S], or broadcast where a stride is 0.
struct AttentionMask {
  MaskType type;
  const void* data;
  int64_t batch, head, query, key;
};

// ALiBi (Press et al. 2022, https://arxiv.org/abs/2108.12409): -slope |i + offset - j| is added to the score of query i
// and key j. Slopes are of the type that sums are kept in, [B, H], or shared where a stride is 0; null: none.
struct Alibi {
  const void* slopes;
  int64_t batch, head, offset;
};

struct Attention {
  DType dtype;
  int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
  int64_t all_queries;  // of a row of statistics: as `queries`, or those of all sequences that lie one after another
  HeadsInput query, key, value;
  AttentionMask mask;
  Dropout dropout;
  Alibi alibi;
  double softcap;  // scores become softcap tanh(score / softcap), before anything is added to them; 0: as they are
  double scale;
  const int64_t* key_lengths;  // [B], how many keys, the first, take part; null: all
  // Key j takes part for query i where i + first_diagonal <= j <= i + diagonal. Where these follow the lengths they are
  // those of a batch of all keys, and they and the offset are as much less in another as that has keys less.
  int64_t diagonal, first_diagonal = -(int64_t(1) << 40);  // that: no first one
  bool follows_lengths;
};

// Of each row of scores its logsumexp in two parts, [2, B, H, all_queries], a number near it and the rest: one number
// alone would leave probabilities no digits where scores are large. A row without keys has -inf and 0. They and the
// sums of gradients are of the type that sums are kept in: float32 for bfloat16 and float16.
struct AttentionForward {
  Attention of;
  HeadsOutput output;
  void* statistics;
};

struct AttentionBackward {
  Attention of;
  HeadsInput output, grad_output;
  const void* statistics;
  const void* grad_logsumexp;  // [B, H, all_queries], contiguous, or null
  HeadsOutput grad_query, grad_key, grad_value;
  // Of the mask's shape and dtype, contiguous; null if not wanted. Its strides are 0 where the mask is broadcast.
  void* grad_mask;
  int64_t grad_mask_batch, grad_mask_head, grad_mask_query, grad_mask_key, grad_mask_size;
};

// The backward pass of the backward pass: what it is given are the gradients of its results, each perhaps absent (null,
// and a mask of no type), and what it gives are those of its arguments, null where not wanted.
struct AttentionDoubleBackward {
  Attention of;
  HeadsInput grad_output, grad_grad_query, grad_grad_key, grad_grad_value;
  AttentionMask grad_grad_mask;
  const void* statistics;
  const void* grad_logsumexp;  // [B, H, all_queries], contiguous, or null
  HeadsOutput grad_grad_output, grad_query, grad_key, grad_value;
  void* grad_grad_logsumexp;  // as grad_logsumexp
  void* grad_mask;            // as in the backward pass
  int64_t grad_mask_batch, grad_mask_head, grad_mask_query, grad_mask_key, grad_mask_size;
};

}  // namespace genkernels

#define GENKERNELS_DECLARE_ATTENTION(level)                                                         \
  namespace genkernels::level {                                                                     \
  void attention_forward(const AttentionForward& arguments, const Runtime& runtime);                \
  void attention_backward(const AttentionBackward& arguments, const Runtime& runtime);              \
  void attention_double_backward(const AttentionDoubleBackward& arguments, const Runtime& runtime); \
  }
