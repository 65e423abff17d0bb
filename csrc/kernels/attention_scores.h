// What the passes of attention share: which keys take part, and how they are packed.
#pragma once

#include "attention.h"
#include "gemm.h"
#include "math.h"
#include "parallel.h"
#include "random.h"

namespace genkernels::GENKERNELS_LEVEL {

// Keys whose scores are held at a time.
constexpr int64_t kBlockKeys = 192;
// Longest chain of products in a score (what it errs by, probabilities err by, and PyTorch adds up several lanes), and
// in a sum over keys. float64 is for gradcheck and for references: there digits count, and time does not.
template <class A>
constexpr int64_t kScoreChain = sizeof(A) == 8 ? 16 : 64;
template <class A>
constexpr int64_t kKeyChain = sizeof(A) == 8 ? 16 : kChain;
static_assert(kBlockKeys <= kChain && kBlockKeys % kRandomKeys == 0);

// The size of blocks of at most `most` that are about as large as each other, a multiple of `unit`.
inline int64_t in_blocks(int64_t count, int64_t most, int64_t unit) {
  const int64_t blocks = larger(1, ceil_div(count, most));
  return larger(1, ceil_div(ceil_div(count, blocks), unit)) * unit;
}
// Elements from one row to the next, so that rows do not share sets of the cache.
template <class E>
int64_t odd_lines(int64_t columns) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(E));
  return (ceil_div(columns, kLine) | 1) * kLine;
}

// The natural logarithm of the base that scores are exponents of: a power of 2 takes fewer operations than one of e,
// but float64 has the C library's.
template <class A>
constexpr double kLogBase = sizeof(A) == 8 ? 1 : kLog2;
template <int kCount>
GENKERNELS_INLINE Floats<kCount> power_of_base(const Floats<kCount>& x) {
  return power_of_two(x);
}
template <int kCount>
GENKERNELS_INLINE Several<Vector<double>, kCount> power_of_base(const Several<Vector<double>, kCount>& x) {
  return exponential(x);
}

template <class V, class S>
GENKERNELS_INLINE bool any_above(V x, S limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
#endif
  bool any = false;
  for (int l = 0; l < kLanes<S>; ++l) any |= x[l] > limit;
  return any;
}

// What `of` makes of all lanes, a half with the other.
template <class S, class V, class Of>
GENKERNELS_INLINE S reduce_lanes(V x, const Of& of) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) {
    x = of(x, (V)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)x, (__m512)x, 0x4e));
    x = of(x, (V)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)x, (__m512)x, 0xb1));
    x = of(x, (V)_mm512_maskz_permute_ps(0xffff, (__m512)x, 0x4e));
    x = of(x, (V)_mm512_maskz_permute_ps(0xffff, (__m512)x, 0xb1));
    return x[0];
  }
#endif
  S lanes[kLanes<S>];
  store(lanes, x);
  for (int half = kLanes<S> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = of(lanes[l], lanes[l + half]);
  return lanes[0];
}
template <class S, class V>
GENKERNELS_INLINE S max_of_lanes(V x) {
  return reduce_lanes<S>(x, [](auto a, auto b) GENKERNELS_LAMBDA { return a > b ? a : b; });
}
template <class S, class V>
GENKERNELS_INLINE S sum_of_lanes(V x) {
  return reduce_lanes<S>(x, [](auto a, auto b) GENKERNELS_LAMBDA { return a + b; });
}

// Float32 masks from here on are doubled to become exponents: no score shows beside them, and what is saved of a row of
// nothing else has to give back its exponents to the last bit, which twice a number and half of it do.
constexpr double kDoubled = 1.3e9;

// What is subtracted from a row's exponents to make them probabilities, in two parts: of its statistics.
template <class A>
struct Shift {
  A near, rest;
};
template <class A>
Shift<A> shift_of(A near, A rest) {
  if (near == -A(__builtin_inf())) return {0, 0};  // a row without keys
  if constexpr (sizeof(A) == 8) return {near, rest};
  if (near >= A(kDoubled) || near <= -A(kDoubled)) return {near * 2, A(double(rest) / kLogBase<A>)};
  const double shift = (double(near) + double(rest)) / kLogBase<A>;
  return {A(shift), A(shift - double(A(shift)))};
}

// A row's statistics, whose exponents relative to `most` add up to `total`.
template <class A>
GENKERNELS_INLINE void set_statistics(const AttentionForward& arguments, int64_t row, A most, double total,
                                      double logarithm_of_total) {
  const Attention& of = arguments.of;
  A* const near = static_cast<A*>(arguments.statistics) + row;
  A* const rest = near + of.batch * of.heads * of.queries;
  // Between the largest exponent that is not doubled and the least that is.
  const bool is_doubled = sizeof(A) == 4 && (most > A(1.7 * kDoubled) || most < -A(1.7 * kDoubled));
  const double shift = double(most) * (is_doubled ? 0.5 : kLogBase<A>);
  *near = total == 0 ? -A(__builtin_inf()) : A(shift + logarithm_of_total);
  *rest = total == 0 ? A(0) : A(logarithm_of_total - (double(*near) - shift));
}

// body(row, vector) for all of a tile.
template <int kRows, int kVectors, class Body>
GENKERNELS_INLINE void for_tile(const Body& body) {
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) body(i, v);
}

// body(copy) for a copy of a tile, which then replaces it: what a function that is not inlined may change would be
// memory all the time, and not registers.
template <class V, int kRows, int kVectors, class Body>
GENKERNELS_INLINE void for_copy(V (&tile)[kRows][kVectors], const Body& body) {
  V copy[kRows][kVectors];
  for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { copy[i][v] = tile[i][v]; });
  body(copy);
  for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { tile[i][v] = copy[i][v]; });
}

// sum += a b for a tile of rows, in chains of at most kLongest products; `step` elements lie between one group of k and
// the next, and b_step in b.
template <int64_t kLongest, class E, int kRows, int kVectors>
GENKERNELS_INLINE void add_in_chains(const E* a, ptrdiff_t stride, ptrdiff_t step, const E* b, ptrdiff_t b_step,
                                     int64_t K, Vector<Accumulator<E>> (&sum)[kRows][kVectors]) {
  const auto add = [&](int64_t k, auto& to) GENKERNELS_LAMBDA {
    multiply<E, kRows, kVectors>(a + k / kGroup<E> * step, stride, step, b + k / kGroup<E> * b_step,
                                 smaller(kLongest, K - k), to, NothingAhead{}, b_step);
  };
  add(0, sum);
  for (int64_t k = kLongest; k < K; k += kLongest) {
    Vector<Accumulator<E>> part[kRows][kVectors] = {};
    add(k, part);
    for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] += part[i][v]; });
  }
}

// sum = a b for a tile of rows and the first kVectors of a panel.
template <int64_t kLongest, int kPanel, class E, int kRows, int kVectors>
GENKERNELS_INLINE void multiply_in_chains(const E* a, ptrdiff_t stride, const E* panel, int64_t K,
                                          Vector<Accumulator<E>> (&sum)[kRows][kVectors]) {
  for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] = Vector<Accumulator<E>>{}; });
  add_in_chains<kLongest>(a, stride, kGroup<E>, panel, Panel<E, kPanel>::kStep, K, sum);
}

// body.operator()<vectors>() for as few of a panel's kPanel vectors as hold `count` columns; of whole tiles, since each
// such body is much code.
template <class A, int kRows, int kPanel, class Body>
GENKERNELS_INLINE void with_vectors(int64_t count, const Body& body) {
  if constexpr (kRows == kTileRows && kPanel > 1)
    if (count <= (kPanel - 1) * kLanes<A>) {
      if constexpr (kPanel > 2)
        if (count > kLanes<A>) return body.template operator()<2>();
      return body.template operator()<1>();
    }
  body.template operator()<kPanel>();
}

// The rows of one head of one batch.
template <class T>
Rows<const T> rows_of(const HeadsInput& of, int64_t b, int64_t h) {
  return {static_cast<const T*>(of.data) + b * of.batch + h * of.head, of.row};
}
template <class T>
Rows<T> rows_of(const HeadsOutput& of, int64_t b, int64_t h) {
  return {static_cast<T*>(of.data) + b * of.batch + h * of.head, of.row};
}

// The passes of few queries, attention_decode.cpp. The second gives no gradient of a mask.
constexpr int64_t kFewRows = 8;
bool is_decode(const Attention& of);
void attention_decode(const AttentionForward& arguments, const Runtime& runtime);
void attention_decode_backward(const AttentionBackward& arguments, const Runtime& runtime);

// A head's scores: which keys take part for a query, and what is added to them.
template <class T>
struct Scores {
  using A = Accumulator<T>;
  typedef LaneOf<sizeof(A)> Lane;
  typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));

  const Attention& of;
  const char* mask;  // of the head
  int64_t element;   // bytes of one of the mask
  uint32_t index;    // of the head among all
  A scale;           // of scores as exponents of the base

  Scores(const Attention& attention, int64_t b, int64_t h)
      : of(attention), index(uint32_t(b * of.heads + h)), scale(A(of.scale / kLogBase<A>)) {
    element = of.mask.type == MaskType::boolean    ? 1
              : of.mask.type == MaskType::of_dtype ? int64_t(sizeof(T))
                                                   : int64_t(sizeof(A));
    mask = static_cast<const char*>(of.mask.data) + (b * of.mask.batch + h * of.mask.head) * element;
  }

  // Keys [0, visible(i)) take part for query i as far as the diagonal goes.
  int64_t visible(int64_t query) const { return larger(0, smaller(of.keys, query + of.diagonal + 1)); }

  // Whether scores of these queries and of keys up to `last_key` are not all scale q k.
  bool needs_mask(int64_t first_query, int64_t last_key) const {
    return of.mask.type != MaskType::none || last_key > visible(first_query);
  }

  // sum = scale sum + mask, as exponents of the base, of queries from `query` and keys from `key` on; -inf where a key
  // takes no part.
  template <int kRows, int kVectors>
  GENKERNELS_INLINE void apply_mask(int64_t query, int64_t key, Vector<A> (&tile)[kRows][kVectors]) const {
    for_copy(tile, [&](auto& sum) { apply_mask_to(query, key, sum); });
  }

 private:
  template <int kRows, int kVectors>
  __attribute__((noinline)) void apply_mask_to(int64_t query, int64_t key, Vector<A> (&sum)[kRows][kVectors]) const {
    switch (of.mask.type) {
      case MaskType::none:
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kVectors; ++v) sum[i][v] *= scale;
        break;
      case MaskType::boolean: add_mask<bool>(query, key, sum); break;
      case MaskType::of_dtype: add_mask<T>(query, key, sum); break;
      case MaskType::of_accumulator: add_mask<A>(query, key, sum); break;
    }
    if (key + kVectors * kLanes<A> <= visible(query)) return;
    Lanes lanes{};
    for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane(l);
    for (int i = 0; i < kRows; ++i) {
      const Lanes end = Lanes{} + Lane(larger(0, smaller(kVectors * kLanes<A>, visible(query + i) - key)));
      for (int v = 0; v < kVectors; ++v)
        sum[i][v] = lanes + Lane(v * kLanes<A>) < end ? sum[i][v] : broadcast(-A(__builtin_inf()));
    }
  }

 public:
  // A product and its mask as an exponent, the same in every pass: rounded twice, as PyTorch's.
  GENKERNELS_INLINE Vector<A> with_mask(Vector<A> product, Vector<A> masks) const {
    return rounded(product * scale) + masks;
  }

  // A finite mask remains finite: a row of nothing but the least number has keys.
  static GENKERNELS_INLINE Vector<A> as_exponents(Vector<A> x) {
    if constexpr (sizeof(A) == 8) {
      return x;
    } else {
      constexpr A kMost = A(3.40282347e38) / 2;
      const Vector<A> bounded = x > kMost ? broadcast(kMost) : x < -kMost ? broadcast(-kMost) : x;
      const Vector<A> size = x < A(0) ? -x : x;
      const Vector<A> doubled = size - size == A(0) ? bounded + bounded : x;
      return size >= A(kDoubled) ? doubled : x * A(1 / kLogBase<A>);
    }
  }

  // What is added to the scores of a query and of `count` keys, of which a register holds the first. There is a mask.
  Vector<A> load_mask(int64_t query, int64_t key, int64_t count) const {
    switch (of.mask.type) {
      case MaskType::boolean: return load_mask<bool>(query, key, count);
      case MaskType::of_dtype: return load_mask<T>(query, key, count);
      default: return load_mask<A>(query, key, count);
    }
  }

  // Where the mask's next part lies the processor does not look for it: a page further with each query.
  GENKERNELS_INLINE void fetch_mask(int64_t query, int64_t key) const {
    __builtin_prefetch(mask + (query * of.mask.query + key * of.mask.key) * element);
  }

  // Sets what dropout does not keep to zero: of queries [query, query + run) and keys [key, key + count).
  template <class E>
  void drop(int64_t query, int64_t run, int64_t key, int64_t count, Rows<E> probabilities) const {
    where_dropped<E>(query, run, key, count, probabilities, [](E) GENKERNELS_LAMBDA { return E{}; });
  }
  // Marks it with a minus sign.
  template <class E>
  void mark_dropped(int64_t query, int64_t run, int64_t key, int64_t count, Rows<E> probabilities) const {
    where_dropped<E>(query, run, key, count, probabilities, [](E p) GENKERNELS_LAMBDA { return -p; });
  }

 private:
  template <class M, int kRows, int kVectors>
  void add_mask(int64_t query, int64_t key, Vector<A> (&sum)[kRows][kVectors]) const {
    for (int64_t i = 0; i < smaller(kRows, of.queries - query); ++i)
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t first = key + v * kLanes<A>;
        // The next keys' part lies a page further with each query, where the processor does not look for it.
        __builtin_prefetch(row_of_mask<M>(query + i) + (first + kVectors * kLanes<A>)*of.mask.key);
        const Vector<A> masks =
            first < of.keys ? as_exponents(load_mask<M>(query + i, first, of.keys - first)) : Vector<A>{};
        sum[i][v] = with_mask(sum[i][v], masks);
      }
  }

  template <class M>
  const M* row_of_mask(int64_t query) const {
    return static_cast<const M*>(static_cast<const void*>(mask)) + query * of.mask.query;
  }
  template <class M>
  Vector<A> load_mask(int64_t query, int64_t key, int64_t count) const {
    const M* const at =
        static_cast<const M*>(static_cast<const void*>(mask)) + query * of.mask.query + key * of.mask.key;
    if (of.mask.key == 1 && count >= kLanes<A>) return load_whole(at);
    Vector<A> x{};
    for (int64_t l = 0; l < smaller(kLanes<A>, count); ++l) x[l] = mask_of(at[l * of.mask.key]);
    return x;
  }
  static Vector<A> load_whole(const A* from) { return load(from); }
  static Vector<A> load_whole(const bfloat16* from) { return load(from); }
  static Vector<A> load_whole(const bool* from) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
    Bytes bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Lanes) != Lane(0) ? Vector<A>{} : broadcast(-A(__builtin_inf()));
  }
  template <class M>
  static A mask_of(M x) {
    if constexpr (__is_same(M, bool))
      return x ? A(0) : -A(__builtin_inf());
    else
      return as<A>(x);
  }

  template <class E, class Of>
  void where_dropped(int64_t query, int64_t run, int64_t key, int64_t most, Rows<E> probabilities,
                     const Of& of_p) const {
    uint32_t numbers[kRandomKeys];
    for (int64_t i = 0; i < run; ++i) {
      const int64_t count = smaller(most, visible(query + i) - key);
      for (int64_t first = key; first < key + count; first += kRandomKeys) {
        random_keys(of.dropout.seed, index, uint32_t(query + i), uint32_t(first / kRandomKeys), numbers);
        E* const to = probabilities[i] + first - key;
        for (int64_t k = 0; k < smaller(kRandomKeys, key + count - first); ++k)
          to[k] = numbers[k] >= of.dropout.threshold ? to[k] : of_p(to[k]);
      }
    }
  }
};

// The keys of a head, packed as the columns of a right operand, a block of keys after the other; and rows of values (or
// keys) as they are multiplied with probabilities.
template <class T, class E>
struct PackedHead {
  const int64_t keys, head_size;
  const Columns<E> values;

  PackedHead(int64_t key_count, int64_t size, int64_t value_size)
      : keys(key_count), head_size(size), values(value_size) {}

  Columns<E> columns(int64_t first_key) const { return Columns<E>(smaller(kBlockKeys, keys - first_key)); }
  int64_t depth() const { return ceil_div(head_size, kGroup<E>) * kGroup<E>; }
  int64_t transposed_size() const { return ceil_div(keys, kLanes<E>) * kLanes<E> * depth(); }
  int64_t rows_size() const { return values.packed_size(keys); }

  // Keys from first_key on as columns: [D, keys].
  void pack_transposed(Rows<const T> rows, int64_t first_key, E* to) const {
    const Columns<E> block = columns(first_key);
    for (int64_t p = 0; p < block.panels; ++p)
      block.with_width(p, [&]<int kVectors>() {
        const int64_t first = block.first_column(p);
        pack_panel_of_rows<E, T, kVectors>(
            head_size, [&](int64_t n) { return first + n < block.count ? rows[first_key + first + n] : nullptr; },
            to + first_key * depth() + block.offset(p, head_size));
      });
  }
  const E* transposed_panel(const E* packed, int64_t first_key, int64_t p) const {
    return packed + first_key * depth() + columns(first_key).offset(p, head_size);
  }

  // Values from first_key on as rows: [keys, Dv].
  void pack_rows(Rows<const T> rows, int64_t first_key, int64_t count, E* to) const {
    for (int64_t p = 0; p < values.panels; ++p)
      pack_panel<E, T>(
          values, p, count, [&](int64_t k) { return rows[first_key + k]; },
          to + values.offset(p, keys) + first_key * values.width(p) * kLanes<E>);
  }
  const E* rows_panel(const E* packed, int64_t first_key, int64_t p) const {
    return packed + values.offset(p, keys) + first_key * values.width(p) * kLanes<E>;
  }
};

}  // namespace genkernels::GENKERNELS_LEVEL
