// What the passes of attention share: which keys take part, and what is added to their scores.
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

// Where a query's numbers stand in what has one for each, [B, H, all_queries], and how many that has.
inline int64_t row_index(const Attention& of, int64_t b, int64_t h, int64_t query) {
  return (b * of.heads + h) * of.all_queries + query;
}
inline int64_t all_rows(const Attention& of) { return of.batch * of.heads * of.all_queries; }

// A row's statistics, whose exponents relative to `most` add up to `total`.
template <class A>
GENKERNELS_INLINE void set_statistics(const AttentionForward& arguments, int64_t row, A most, double total,
                                      double logarithm_of_total) {
  const Attention& of = arguments.of;
  A* const near = static_cast<A*>(arguments.statistics) + row;
  A* const rest = near + all_rows(of);
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

// sum = a b for a tile of rows and kVectors of a panel's kPanel, from `panel` on.
template <int64_t kLongest, int kPanel, class E, int kRows, int kVectors>
GENKERNELS_INLINE void multiply_in_chains(const E* a, ptrdiff_t stride, const E* panel, int64_t K,
                                          Vector<Accumulator<E>> (&sum)[kRows][kVectors]) {
  for_tile<kRows, kVectors>([&](int i, int v) GENKERNELS_LAMBDA { sum[i][v] = Vector<Accumulator<E>>{}; });
  add_in_chains<kLongest>(a, stride, kGroup<E>, panel, Panel<E, kPanel>::kStep, K, sum);
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

// Keys [begin, end).
struct KeySpan {
  int64_t begin, end;
};

// The keys that take part for each query of a batch: [first_visible(query), visible(query)).
struct VisibleKeys {
  int64_t keys, missing;  // of the batch, and what they are less than others'
  int64_t diagonal, first_diagonal;

  VisibleKeys(const Attention& of, int64_t b)
      : keys(of.key_lengths == nullptr ? of.keys : of.key_lengths[b]),
        missing(of.follows_lengths ? of.keys - keys : 0),
        diagonal(of.diagonal - missing),
        first_diagonal(of.first_diagonal - missing) {}

  int64_t visible(int64_t query) const { return larger(0, smaller(keys, query + diagonal + 1)); }
  int64_t first_visible(int64_t query) const { return larger(0, smaller(keys, query + first_diagonal)); }
  // What queries [query, query + rows) see, together.
  KeySpan span(int64_t query, int64_t rows) const {
    if (rows <= 0) return {0, 0};
    return {first_visible(query), visible(query + rows - 1)};
  }
};

// Whether anything is added to scores.
inline bool adds_mask(const Attention& of) { return of.mask.type != MaskType::none || of.alibi.slopes != nullptr; }

// body.operator()<T>() for a dtype's type.
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32: return body.template operator()<float>();
    case DType::float64: return body.template operator()<double>();
    case DType::bfloat16: return body.template operator()<bfloat16>();
    case DType::float16: return body.template operator()<float16>();
  }
}

// The passes of few queries, attention_decode.cpp. The second gives no gradient of a mask.
constexpr int64_t kFewRows = 8;
bool is_decode(const Attention& of);
void attention_decode(const AttentionForward& arguments, const Runtime& runtime);
void attention_decode_backward(const AttentionBackward& arguments, const Runtime& runtime);

// A head's scores: which keys take part for a query, and what is added to them.
template <class T>
struct Scores : VisibleKeys {
  using A = Accumulator<T>;
  typedef LaneOf<sizeof(A)> Lane;
  typedef Lane Lanes __attribute__((vector_size(kVectorBytes)));

  const Attention& of;
  const char* mask;  // of the head
  int64_t element;   // bytes of one of the mask
  uint32_t index;    // of the head among all
  A scale;           // of products, or of their tanh with a softcap, as exponents of the base
  A slope, rest;     // ALiBi's, negative and as exponents, in two parts
  int64_t offset;

  Scores(const Attention& attention, int64_t b, int64_t h)
      : VisibleKeys(attention, b),
        of(attention),
        index(uint32_t(b * of.heads + h)),
        scale(A((of.softcap != 0 ? of.softcap : of.scale) / kLogBase<A>)),
        slope(0),
        rest(0),
        offset(of.alibi.offset - missing) {
    element = of.mask.type == MaskType::boolean    ? 1
              : of.mask.type == MaskType::of_dtype ? int64_t(sizeof(T))
                                                   : int64_t(sizeof(A));
    mask = static_cast<const char*>(of.mask.data) + (b * of.mask.batch + h * of.mask.head) * element;
    if (of.alibi.slopes == nullptr) return;
    const double exact =
        -double(static_cast<const A*>(of.alibi.slopes)[b * of.alibi.batch + h * of.alibi.head]) / kLogBase<A>;
    slope = A(exact);
    rest = sizeof(A) == 8 ? A(0) : A(exact - double(slope));
  }

  // Products as the scores that a softcap leaves, over the softcap. Out of line: who does without is not slowed down.
  __attribute__((noinline)) void cap(Vector<A>* products, int64_t count) const {
    const A factor = A(of.scale / of.softcap);
    for (int64_t n = 0; n < count; ++n) products[n] = tanh(several<1>([&](int) { return products[n] * factor; }))[0];
  }
  // Their derivative.
  static GENKERNELS_INLINE Vector<A> derivative(Vector<A> capped) { return A(1) - capped * capped; }

  // A product and its mask as an exponent, the same in every pass: rounded twice, as PyTorch's.
  GENKERNELS_INLINE Vector<A> with_mask(Vector<A> product, Vector<A> masks) const {
    return rounded(product * scale) + masks;
  }
  // The same of a query and the keys that a register holds, -inf where one takes no part.
  Vector<A> exponents_of(int64_t query, int64_t key, Vector<A> product) const {
    Vector<A> x;
    if (!adds_mask(of)) {
      x = product * scale;
    } else {
      Vector<A> masks{};
      if (of.mask.type != MaskType::none) masks = as_exponents(load_mask(query, key, of.keys - key));
      if (of.alibi.slopes != nullptr) masks += of_distance(key - query - offset);
      x = with_mask(product, masks);
    }
    const int64_t seen = visible(query) - key, unseen = first_visible(query) - key;
    return seen >= kLanes<A> && unseen <= 0 ? x : in_span(x, unseen, seen);
  }
  // -inf in all lanes but [begin, end).
  static GENKERNELS_INLINE Vector<A> in_span(Vector<A> x, int64_t begin, int64_t end) {
    Lanes lanes{};
    for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane(l);
    const auto lane = [](int64_t i) { return Lane(larger(0, smaller(kLanes<A>, i))); };
    return (lanes >= lane(begin)) & (lanes < lane(end)) ? x : broadcast(-A(__builtin_inf()));
  }
  // -inf in a tile of keys by registers of queries for all but the first `end` queries, one more for each next key.
  __attribute__((noinline)) static void hide_left(Vector<A>* tile, int64_t rows, int64_t vectors, int64_t end) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < vectors; ++v, ++tile) *tile = in_span(*tile, 0, end + i - v * kLanes<A>);
  }
  // What ALiBi adds, as exponents, at distances of which the first lane's is `first` and each other's is 1 more.
  GENKERNELS_INLINE Vector<A> of_distance(int64_t first) const {
    Vector<A> distance{};
    for (int l = 0; l < kLanes<A>; ++l) distance[l] = A(l);
    distance += A(first);
    distance = distance < A(0) ? -distance : distance;
    return rounded(distance * rest) + distance * slope;
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

  GENKERNELS_INLINE void fetch_mask(int64_t query, int64_t key) const {
    __builtin_prefetch(mask + (query * of.mask.query + key * of.mask.key) * element, 0, 2);
  }

  // to[k][i] = of_keys(i, k, count)[..] for `rows` queries and `count` keys, a register of a query's keys at a time;
  // zeros up to the end of a register of queries.
  template <class Of>
  static void transpose(int64_t rows, int64_t count, A* to, int64_t stride, const Of& of_keys) {
    for (int64_t i = 0; i < rows; i += kLanes<A>)
      for (int64_t k = 0; k < count; k += kLanes<A>) {
        const int64_t some = smaller(kLanes<A>, count - k);
        Square<LaneOf<sizeof(A)>> square;
        for (int64_t n = 0; n < kLanes<A>; ++n) {
          const Vector<A> row = i + n < rows ? of_keys(i + n, k, some) : Vector<A>{};
          __builtin_memcpy(&square.rows[n], &row, sizeof row);
        }
        square.transpose();
        for (int64_t n = 0; n < some; ++n) __builtin_memcpy(to + (k + n) * stride + i, &square.rows[n], kVectorBytes);
      }
  }
  // What is added to scores as exponents, transposed. Where a diagonal hides a key this may be anything. The same of
  // keys `ahead` later is fetched; 0 for none.
  void form_mask(int64_t query, int64_t rows, int64_t key, int64_t count, int64_t ahead, A* to, int64_t stride) const {
    const bool has_mask = of.mask.type != MaskType::none;
    if (has_mask) load_masks(query, rows, key, count, ahead, to, stride);
    if (of.alibi.slopes == nullptr) return;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t i = 0; i < rows; i += kLanes<A>) {
        A* const at = to + k * stride + i;
        const Vector<A> added = of_distance(query + i + offset - key - k);
        store(at, has_mask ? load(at) + added : added);
      }
  }
  // The mask's part of that.
  void load_masks(int64_t query, int64_t rows, int64_t key, int64_t count, int64_t ahead, A* to, int64_t stride) const {
    if (of.mask.query == 0) {
      for (int64_t k = 0; k < count; k += kLanes<A>) {
        const int64_t some = smaller(kLanes<A>, count - k);
        const Vector<A> x = as_exponents(load_mask(query, key + k, some));
        for (int64_t n = 0; n < some; ++n)
          for (int64_t i = 0; i < rows; i += kLanes<A>) store(to + (k + n) * stride + i, broadcast(A(x[n])));
      }
      return;
    }
    transpose(rows, count, to, stride, [&](int64_t i, int64_t k, int64_t some) {
      if (ahead > 0) fetch_mask(query + i, key + k + ahead);
      return as_exponents(load_mask(query + i, key + k, some));
    });
  }

  // Sets what dropout does not keep to zero: of queries [query, query + run) and keys [key, key + most).
  template <class E>
  void drop(int64_t query, int64_t run, int64_t key, int64_t most, Rows<E> probabilities) const {
    uint32_t numbers[kRandomKeys];
    for (int64_t i = 0; i < run; ++i) {
      const int64_t count = smaller(most, visible(query + i) - key);
      for (int64_t first = key; first < key + count; first += kRandomKeys) {
        random_keys(of.dropout.seed, index, uint32_t(query + i), uint32_t(first / kRandomKeys), numbers);
        E* const to = probabilities[i] + first - key;
        for (int64_t k = 0; k < smaller(kRandomKeys, key + count - first); ++k)
          to[k] = numbers[k] >= of.dropout.threshold ? to[k] : E{};
      }
    }
  }
  // body(k, i, is_kept), the same of key `key + k` and of the register of queries from `query + i` on: all bits of a
  // lane or none. Goes on to a multiple of kRandomQueries.
  template <class Body>
  void each_kept(int64_t query, int64_t rows, int64_t key, int64_t count, const Body& body) const {
    constexpr int64_t kTogether = kRandomKeys / 4;
    const Lane least = Lane(of.dropout.threshold), all = of.dropout.threshold >> 32 ? 0 : ~Lane(0);
    uint32_t numbers[4][kRandomQueries];
    for (int64_t group = 0; group < count; group += kRandomKeys)
      for (int64_t i = 0; i < rows; i += kRandomQueries)
        for (int64_t k = group; k < smaller(count, group + kTogether); ++k) {
          random_queries(of.dropout.seed, index, uint32_t(query + i), uint32_t((key + group) / kRandomKeys),
                         uint32_t(k - group), numbers);
          for (int64_t word = 0; word < 4 && k + word * kTogether < count; ++word)
            for (int64_t n = 0; n < kRandomQueries; n += kLanes<A>) {
              const Lanes x = load_numbers<A>(numbers[word] + n);
              body(k + word * kTogether, i + n, (Lanes)(x >= least) & all);
            }
        }
  }

 private:
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
  static Vector<A> load_whole(const float16* from) { return load(from); }
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
};

// Whether rows are operands as they lie: as many of them as are read again and again have room in half of an L1 cache
// of 48 KB, whose 64 sets they fill the more unevenly the more often 2 divides their distance.
template <class T, class E>
bool lie_well(const HeadsInput& from, int64_t rows) {
  const int64_t bytes = from.row * int64_t(sizeof(E)), apart = larger(64, bytes & -bytes);
  return __is_same(T, E) && bytes > 0 && rows * apart <= 64 * 384;
}
// Those that are read from the right also have to fill registers.
template <class T, class E>
bool lie_well(const HeadsInput& from, int64_t rows, int64_t size) {
  return size % kLanes<E> == 0 && lie_well<T, E>(from, rows);
}

}  // namespace genkernels::GENKERNELS_LEVEL
