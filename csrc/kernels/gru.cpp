#include "gru.h"

#include "gemm.h"
#include "gemv.h"
#include "math.h"
#include "parallel.h"

GENKERNELS_DECLARE_GRU(GENKERNELS_LEVEL)

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// The geometry of a sequence, dense or packed, in the order in which it is run.
template <class T>
struct Sequence {
  const Gru& gru;
  const int64_t* offsets;  // [T + 1] first row of each step, or null when every step has `batch` rows

  Sequence(const Gru& g, const Runtime& runtime) : gru(g), offsets(nullptr) {
    if (g.batch_sizes == nullptr) return;
    int64_t* sums = allocate<int64_t>(runtime, g.steps + 1);
    sums[0] = 0;
    for (int64_t t = 0; t < g.steps; ++t) sums[t + 1] = sums[t] + g.batch_sizes[t];
    offsets = sums;
  }

  int64_t time(int64_t s) const { return gru.reverse ? gru.steps - 1 - s : s; }
  int64_t before(int64_t t) const { return gru.reverse ? t + 1 : t - 1; }
  bool is_first(int64_t t) const { return t == time(0); }
  int64_t size(int64_t t) const { return gru.batch_sizes ? gru.batch_sizes[t] : gru.batch; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * gru.batch; }
  int64_t rows() const { return offset(gru.steps); }
  // The step that a row of all steps belongs to.
  int64_t step_of(int64_t row) const {
    if (offsets == nullptr) return row / gru.batch;
    int64_t t = 0;
    for (int64_t end = gru.steps; end - t > 1;) {
      const int64_t middle = t + (end - t) / 2;
      (offsets[middle] <= row ? t : end) = middle;
    }
    return t;
  }

  // Rows of step t from row b on.
  template <class S>
  Rows<S> at(S* data, int64_t stride_t, int64_t stride_b, int64_t t, int64_t b) const {
    return {data + (offsets ? offsets[t] * stride_b : t * stride_t) + b * stride_b, stride_b};
  }
  Rows<const T> input(int64_t t, int64_t b) const {
    return at(static_cast<const T*>(gru.input), gru.input_stride_t, gru.input_stride_b, t, b);
  }
  Rows<T> output(int64_t t, int64_t b) const {
    const int64_t H = gru.hidden_size;
    return at(static_cast<T*>(gru.output), gru.batch * H, H, t, b);
  }
  T* gates(int64_t t, int64_t b) const { return static_cast<T*>(gru.gates) + (offset(t) + b) * 4 * gru.hidden_size; }

  // The hidden state that row b enters step t with; null if it is reset to zero.
  const T* state(int64_t t, int64_t b) const {
    if (gru.resets && gru.resets[t * gru.batch + b]) return nullptr;
    // A row of a packed sequence run backwards starts at its own last step.
    if (is_first(t) || b >= size(before(t))) return static_cast<const T*>(gru.hx) + b * gru.hidden_size;
    return output(before(t), b)[0];
  }
  // Whether the states of rows [b, end) at step t are rows of one matrix.
  bool state_is_matrix(int64_t t, int64_t b, int64_t end) const {
    if (!is_first(t) && b < size(before(t)) && end > size(before(t))) return false;
    if (gru.resets)
      for (int64_t i = b; i < end; ++i)
        if (gru.resets[t * gru.batch + i]) return false;
    return true;
  }

  // The first row of a thread's share, when each thread takes neighbouring rows of about as many steps in all.
  int64_t share(int64_t thread, int64_t threads) const {
    if (offsets == nullptr) return gru.batch * thread / threads;
    int64_t b = 0, t = gru.steps;  // row b has t steps
    for (int64_t done = 0; b < gru.batch; ++b) {
      while (t > 0 && gru.batch_sizes[t - 1] <= b) --t;
      if (done * threads >= rows() * thread) break;
      done += t;
    }
    return b;
  }
};

// Fewer rows than this per thread, and the time loop is shared out by units: half a tile where each core's own cache
// holds the weights, three tiles where they come from further away.
constexpr int64_t kFewRows = kTileRows / 2, kFewRowsFarAway = 3 * kTileRows;
// So many rows in one step, or in so many steps, do not pack their weights; nor do few steps of so few units that most
// lanes of a packed register would be empty.
constexpr int64_t kDirectRows = 32, kDirectRowsOfSteps = 2, kDirectSteps = 12, kDirectUnits = kVectorBytes / 8;
// bf16 without an instruction of its own is widened anew for every four rows, so that packing pays from fewer rows on.
constexpr int64_t kWidenedRows = 6, kWidenedRowsBackward = 16;
bool is_widened(DType dtype) { return dtype == DType::bfloat16 && kGroup<Operand<bfloat16>> == 1; }

int64_t row_shares(const Gru& gru, const Runtime& runtime) { return smaller(runtime.threads, gru.batch); }

// Packing costs as much as reading the weights a few times.
bool packs_weights(const Gru& gru) {
  if (gru.steps > kDirectSteps || gru.resets != nullptr) return true;
  const int64_t rows_of_step = is_widened(gru.dtype) ? kWidenedRows : kDirectRows;
  return gru.batch > (gru.steps == 1 ? rows_of_step : kDirectRowsOfSteps) && gru.hidden_size > kDirectUnits;
}

// What is fetched while a run of rows is multiplied with a block.
struct BlockAhead {
  Ahead<Into::L2> input, state;
};

// Both weights and the biases, packed so that one tile holds the three gates of the same units: per block of units
// [ceil(I / group)][3][lanes][group] of W_ih, then as much of W_hh. A single step packs each block where it uses it,
// into a buffer that stays in the cache; otherwise all are packed at once, or were before the call.
template <class T>
struct GateWeights {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int kUnits = kLanes<A>;
  static constexpr int64_t kStep = Panel<E, 3>::kStep;

  struct Block {
    int64_t first;  // unit
    const E *input, *state;
    const A* bias;  // [4][kUnits]: b_ir + b_hr, b_iz + b_hz, b_in, b_hn
    bool streams_gates;
  };

  const Gru& gru;
  int64_t blocks, input_size, block_size;
  bool at_once, streams_gates;
  A* biases;  // [blocks][4][kUnits]
  E* packed;  // all blocks, or one for each thread, or null

  GateWeights(const Gru& g, bool packs_at_once)
      : gru(g),
        blocks(ceil_div(g.hidden_size, kUnits)),
        input_size(ceil_div(g.input_size, kGroup<E>) * kStep),
        block_size(input_size + ceil_div(g.hidden_size, kGroup<E>) * kStep),
        at_once(packs_at_once),
        streams_gates(false),
        biases(nullptr),
        packed(nullptr) {}

  // For the forward pass.
  GateWeights(const Gru& g, const Runtime& runtime) : GateWeights(g, g.steps > 1 || g.packed != nullptr) {
    streams_gates = gates_leave_cache(runtime);
    if (gru.packed != nullptr) {
      lie_at(const_cast<void*>(gru.packed));
      return;
    }
    biases = allocate<A>(runtime, blocks * 4 * kUnits);
    if (packs_weights(gru)) packed = allocate<E>(runtime, (at_once ? blocks : runtime.threads) * block_size);
    pack_biases();
    if (packed != nullptr && at_once) pack_blocks(runtime);
  }

  // Whether the saved gates are whole lines and many times what a core's own cache holds (measured: from four times on
  // training takes 1 to 2% less so).
  bool gates_leave_cache(const Runtime& runtime) const {
    const int64_t row = 4 * gru.hidden_size * int64_t(sizeof(T));
    return row % (4 * kVectorBytes) == 0 && reinterpret_cast<uintptr_t>(gru.gates) % kVectorBytes == 0 &&
           gru.steps * gru.batch * row > 4 * runtime.cache;
  }

  int64_t bytes() const { return blocks * (4 * kUnits * int64_t(sizeof(A)) + block_size * int64_t(sizeof(E))); }

  void lie_at(void* memory) {
    biases = static_cast<A*>(memory);
    packed = reinterpret_cast<E*>(biases + blocks * 4 * kUnits);
  }

  void pack_at(void* memory, const Runtime& runtime) {
    lie_at(memory);
    pack_biases();
    pack_blocks(runtime);
  }

  void pack_blocks(const Runtime& runtime) const {
    const int64_t shares = smaller(runtime.threads, blocks);
    parallel(runtime, shares, [&](int64_t i) {
      for (int64_t j = blocks * i / shares; j < blocks * (i + 1) / shares; ++j) pack(j, packed + j * block_size);
    });
  }

  // `thread` is the index of the buffer that a block may be packed into.
  Block block(int64_t j, int64_t thread) const {
    const A* bias = biases + j * 4 * kUnits;
    if (packed == nullptr) return {j * kUnits, nullptr, nullptr, bias, streams_gates};
    E* at = packed + (at_once ? j : thread) * block_size;
    if (!at_once) pack(j, at);
    return {j * kUnits, at, at + input_size, bias, streams_gates};
  }

  // A third of what block(j) will read, for one of the first three runs before it; there is no more for later runs.
  BlockAhead ahead(int64_t j, int64_t run, const Block& now) const {
    const auto bytes = [](const auto* at) { return reinterpret_cast<const char*>(at); };
    if (run > 2 || j >= blocks) return {{bytes(now.input)}, {bytes(now.state)}};
    if (!at_once) {
      const int64_t row = run * gru.hidden_size + j * kUnits;
      return {{bytes(static_cast<const T*>(gru.weight_ih) + row * gru.input_size)},
              {bytes(static_cast<const T*>(gru.weight_hh) + row * gru.hidden_size)}};
    }
    const char* at = bytes(packed + j * block_size);
    return {{at + run * input_size / 3 * int64_t(sizeof(E))},
            {at + (input_size + run * (block_size - input_size) / 3) * int64_t(sizeof(E))}};
  }

  void pack_biases() const {
    const int64_t H = gru.hidden_size;
    const T* bias_ih = static_cast<const T*>(gru.bias_ih);
    const T* bias_hh = static_cast<const T*>(gru.bias_hh);
    for (int64_t first = 0; first < H; first += kUnits) {
      const int count = int(smaller(kUnits, H - first));
      const auto value = [&](const T* bias, int gate) {
        return bias ? load(bias + gate * H + first, count) : Vector<A>{};
      };
      A* to = biases + first * 4;
      store(to, value(bias_ih, 0) + value(bias_hh, 0));
      store(to + kUnits, value(bias_ih, 1) + value(bias_hh, 1));
      store(to + 2 * kUnits, value(bias_ih, 2));
      store(to + 3 * kUnits, value(bias_hh, 2));
    }
  }

  void pack(int64_t j, E* to) const {
    const int64_t H = gru.hidden_size, first = j * kUnits;
    const auto pack_gates = [&](const void* weight, int64_t K, E* at) {
      pack_panel_of_rows<E, T, 3>(
          K,
          [&](int64_t n) {
            const int64_t unit = first + n % kUnits;
            return unit < H ? static_cast<const T*>(weight) + (n / kUnits * H + unit) * K : nullptr;
          },
          at);
    };
    pack_gates(gru.weight_ih, gru.input_size, to);
    pack_gates(gru.weight_hh, H, to + input_size);
  }
};

// Rows that are finished in turns, so that one does not wait for its last result; more would not fit the registers.
constexpr int kFinishRows = 4;

// Turns the sums of the products of rows [0, kRows) into their gates and new states, each kept where it is asked for.
// sum(i, g) gives row i's sums of r and z (g = 0 and 1) and of n, the input's and the state's (2 and 3); state(i) its
// state.
template <class T, int kRows, class Sums, class State>
GENKERNELS_INLINE void finish_rows(const typename GateWeights<T>::Block& block, int64_t H, const Sums& sum,
                                   const State& state, T* output, T* gates) {
  using A = Accumulator<T>;
  constexpr int kUnits = kLanes<A>;
  const int count = int(smaller(kUnits, H - block.first));
  const auto gate = [&](int g) GENKERNELS_LAMBDA {
    const Vector<A> bias = load(block.bias + g * kUnits);
    return several<kRows>([&](int i) GENKERNELS_LAMBDA { return sum(i, g) + bias; });
  };
  const auto r = sigmoid(gate(0));
  const auto z = sigmoid(gate(1));
  const auto hn = gate(3);
  const auto n = tanh(gate(2) + r * hn);
  const auto h = several<kRows>([&](int i) GENKERNELS_LAMBDA { return load(state(i) + block.first, count); });
  const auto next = n + z * (h - n);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (output != nullptr) store(output + i * H + block.first, next[i], count);
    if (gates == nullptr) continue;
    T* to = gates + i * 4 * H + block.first;
    if (block.streams_gates) {
      stream(to, r[i]);
      stream(to + H, z[i]);
      stream(to + 2 * H, n[i]);
      stream(to + 3 * H, hn[i]);
      continue;
    }
    store(to, r[i], count);
    store(to + H, z[i], count);
    store(to + 2 * H, n[i], count);
    store(to + 3 * H, hn[i], count);
  }
}

// The same for a tile of rows.
template <class T, int kRows, int kFirst = 0, class Sums, class State>
GENKERNELS_INLINE void finish_tile(const typename GateWeights<T>::Block& block, int64_t H, const Sums& sum,
                                   const State& state, T* output, T* gates) {
  constexpr int kTogether = int(smaller(kFinishRows, kRows - kFirst));
  finish_rows<T, kTogether>(
      block, H, [&](int i, int g) GENKERNELS_LAMBDA { return sum(kFirst + i, g); },
      [&](int i) GENKERNELS_LAMBDA { return state(kFirst + i); }, output ? output + kFirst * H : nullptr,
      gates ? gates + kFirst * 4 * H : nullptr);
  if constexpr (kFirst + kTogether < kRows)
    finish_tile<T, kRows, kFirst + kTogether>(block, H, sum, state, output, gates);
}

// The same for any number of rows.
template <class T, class Sums, class State>
GENKERNELS_INLINE void finish_all_rows(const typename GateWeights<T>::Block& block, int64_t H, int64_t rows,
                                       const Sums& sum, const State& state, T* output, T* gates) {
  for_row_tiles<kFinishRows>(rows, [&]<int kRows>(int64_t first) {
    finish_rows<T, kRows>(
        block, H, [&](int i, int g) GENKERNELS_LAMBDA { return sum(first + i, g); },
        [&](int i) GENKERNELS_LAMBDA { return state(first + i); }, output ? output + first * H : nullptr,
        gates ? gates + first * 4 * H : nullptr);
  });
}

// One step of a block's units, for at most kRunRows rows.
template <class T>
GENKERNELS_INLINE void forward_run(const Gru& gru, const typename GateWeights<T>::Block& block,
                                   Rows<const Operand<T>> input, Rows<const Operand<T>> state, int64_t rows, T* output,
                                   T* gates, const BlockAhead& ahead) {
  using E = Operand<T>;
  const int64_t I = gru.input_size, H = gru.hidden_size;
  if (I + H <= kChain)  // one chain for both, out of which only the input's part of n has to be taken
    return for_row_tiles(rows, [&]<int kRows>(int64_t first) {
      Vector<Accumulator<T>> sum[kRows][3] = {}, n_of_input[kRows];
      multiply<E, kRows, 3>(input[first], input.stride, kGroup<E>, block.input, I, sum, ahead.input);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        n_of_input[i] = sum[i][2];
        sum[i][2] = Vector<Accumulator<T>>{};
      }
      multiply<E, kRows, 3>(state[first], state.stride, kGroup<E>, block.state, H, sum, ahead.state);
      finish_tile<T, kRows>(
          block, H, [&](int64_t i, int g) GENKERNELS_LAMBDA { return g == 2 ? n_of_input[i] : sum[i][g == 3 ? 2 : g]; },
          [&](int64_t i) GENKERNELS_LAMBDA { return state[first + i]; }, output ? output + first * H : nullptr,
          gates ? gates + first * 4 * H : nullptr);
    });
  Vector<Accumulator<T>> from_input[kRunRows][3], from_state[kRunRows][3];
  product_of_rows<E, 3>(input.first, input.stride, rows, block.input, I, from_input, ahead.input);
  product_of_rows<E, 3>(state.first, state.stride, rows, block.state, H, from_state, ahead.state);
  finish_all_rows<T>(
      block, H, rows,
      [&](int64_t i, int g) GENKERNELS_LAMBDA {
        return g < 2 ? from_input[i][g] + from_state[i][g] : g == 2 ? from_input[i][2] : from_state[i][2];
      },
      [&](int64_t i) GENKERNELS_LAMBDA { return state[i]; }, output, gates);
}

// What the inputs or the states contribute to a row's gates r, z and n of a block of units.
template <class T>
using GateSums = Accumulator<T>[3][kLanes<Accumulator<T>>];

// Few rows: reading the weights, as they lie, is most of what they cost. The inputs of several steps are multiplied
// together, so that their weight is read once, where there is memory for them: [blocks][steps of rows begin to end].
template <class T, class Finish>
void forward_few_rows(const Sequence<T>& sequence, const GateWeights<T>& weights, int64_t begin, int64_t end,
                      int64_t first_block, int64_t last_block, GateSums<T>* from_inputs, const Finish& finish) {
  using A = Accumulator<T>;
  using Sums = GateSums<T>;
  constexpr int kUnits = kLanes<A>;
  const Gru& gru = sequence.gru;
  const int64_t H = gru.hidden_size, most = gru.steps * (end - begin);
  const bool together = from_inputs != nullptr;
  const auto multiply = [&](const T* weight, int64_t K, const auto& block, const T* const* x, int64_t rows, Sums* to) {
    for (int gate = 0; gate < 3; ++gate)
      multiply_units_of_rows(weight + (gate * H + block.first) * K, K, K, smaller(kUnits, H - block.first), x, rows,
                             to[0][gate], 3 * kUnits);
  };
  const T* weight_ih = static_cast<const T*>(gru.weight_ih);
  const T *input[kDirectRows], *state[kDirectRows];
  if (together) {
    int64_t rows = 0;
    for (int64_t s = 0; s < gru.steps; ++s)
      for (int64_t t = sequence.time(s), b = begin; b < smaller(end, sequence.size(t)); ++b)
        input[rows++] = sequence.input(t, b)[0];
    for (int64_t j = first_block; j < last_block; ++j)
      multiply(weight_ih, gru.input_size, weights.block(j, 0), input, rows, from_inputs + (j - first_block) * most);
  }
  for (int64_t s = 0, done = 0; s < gru.steps; ++s) {
    const int64_t t = sequence.time(s), size = smaller(end, sequence.size(t));
    for (int64_t first = begin; first < size; first += kDirectRows) {
      const int64_t rows = smaller(kDirectRows, size - first);
      for (int64_t b = 0; b < rows; ++b) {
        input[b] = sequence.input(t, first + b)[0];
        state[b] = sequence.state(t, first + b);
      }
      for (int64_t j = first_block; j < last_block; ++j) {
        const auto block = weights.block(j, 0);
        Sums of_step[kDirectRows], from_state[kDirectRows];
        Sums* from_input = together ? from_inputs + (j - first_block) * most + done : of_step;
        if (!together) multiply(weight_ih, gru.input_size, block, input, rows, from_input);
        multiply(static_cast<const T*>(gru.weight_hh), H, block, state, rows, from_state);
        finish_all_rows<T>(
            block, H, rows,
            [&](int64_t b, int g) GENKERNELS_LAMBDA {
              return g < 2    ? load(from_input[b][g]) + load(from_state[b][g])
                     : g == 2 ? load(from_input[b][2])
                              : load(from_state[b][2]);
            },
            [&](int64_t b) GENKERNELS_LAMBDA { return state[b]; }, sequence.output(t, first)[0],
            gru.gates ? sequence.gates(t, first) : nullptr);
      }
      done += rows;
    }
    finish(s);
  }
  finish_streams();
}

// Whether `columns` columns of the weights stay in the cache that each core has to itself.
template <class T>
bool weights_stay(const Gru& gru, const Runtime& runtime, int64_t columns) {
  return 3 * gru.hidden_size * columns * int64_t(sizeof(Operand<T>)) <= runtime.cache / 4 * 3;
}

// How the time loop is shared out: by rows, which do not depend on each other, so that threads never wait; or by units,
// all threads meeting after every step, where a thread would have too few rows to make use of a weight it has read. A
// step reads `columns` columns of the weights.
template <class T>
bool splits_units(const Gru& gru, const Runtime& runtime, int64_t blocks, int64_t columns) {
  if (gru.steps == 1) return true;  // each weight is packed by the thread that uses it, and nobody waits
  const int64_t few = weights_stay<T>(gru, runtime, columns) ? kFewRows : kFewRowsFarAway;
  return blocks >= runtime.threads && gru.batch < few * runtime.threads && runtime.threads > 1;
}

// Runs rows [begin, end) of the units of blocks [first_block, last_block) through the whole sequence, and calls
// finish(s) after step s.
template <class T, class Finish>
void forward_steps(const Sequence<T>& sequence, const GateWeights<T>& weights, int64_t begin, int64_t end,
                   int64_t first_block, int64_t last_block, int64_t thread, Operand<T>* scratch, const Finish& finish) {
  using E = Operand<T>;
  const Gru& gru = sequence.gru;
  const int64_t I = gru.input_size, H = gru.hidden_size;
  const int64_t input_stride = staged_stride<E>(I), state_stride = staged_stride<E>(H);
  E* staged_state = scratch + (end - begin) * input_stride;
  for (int64_t s = 0; s < gru.steps; ++s) {
    const int64_t at_next_step = s + 1 < gru.steps ? first_block : weights.blocks;
    const int64_t t = sequence.time(s), rows = smaller(end, sequence.size(t)) - begin;
    if (rows > 0) {
      Rows<const E> input, state;
      const Rows<const T> input_rows = sequence.input(t, begin);
      const auto stage_input = [&] {
        return stage<E, T>(scratch, input_stride, rows, I, [&](int64_t i) { return input_rows[i]; });
      };
      const auto stage_state = [&] {
        return stage<E, T>(staged_state, state_stride, rows, H,
                           [&](int64_t i) { return sequence.state(t, begin + i); });
      };
      if constexpr (__is_same(T, E)) {
        input = collides<E>(input_rows.stride) ? stage_input() : input_rows;
        state = collides<E>(H) || !sequence.state_is_matrix(t, begin, begin + rows)
                    ? stage_state()
                    : Rows<const E>{sequence.state(t, begin), H};
      } else {
        input = stage_input();
        state = stage_state();
      }
      T* output = sequence.output(t, begin)[0];
      T* gates = gru.gates ? sequence.gates(t, begin) : nullptr;
      for (int64_t j = first_block; j < last_block; ++j) {
        const auto block = weights.block(j, thread);
        for (int64_t i = 0; i < rows; i += kRunRows)
          forward_run(gru, block, {input[i], input.stride}, {state[i], state.stride}, smaller(kRunRows, rows - i),
                      output + i * H, gates ? gates + i * 4 * H : nullptr,
                      weights.ahead(j + 1 < last_block ? j + 1 : at_next_step, i / kRunRows, block));
      }
    }
    finish(s);
  }
  finish_streams();
}

// Whether there are several steps of fewer rows than a tile.
bool is_narrow(const Gru& gru) { return packs_weights(gru) && gru.steps > 1 && gru.batch < kTileRows; }

// Whether two directions share the threads, half for each, instead of all running one direction and then the other, in
// steps too short to meet after (measured: 1.03 to 1.5 times as fast). With two threads a core then reads all of a
// direction's weight at each step.
template <class T>
bool runs_side_by_side(const Gru& gru, int64_t directions, const Runtime& runtime) {
  return directions == 2 && runtime.threads >= 2 && is_narrow(gru) && weights_stay<T>(gru, runtime, gru.hidden_size);
}

// Calls body(direction, first, last) for shares [first, last) of each direction's `shares`, all at the same time.
template <class Direction, size_t kDirections, class Body>
void side_by_side(const Runtime& runtime, int64_t shares, Direction (&directions)[kDirections], const Body& body) {
  parallel_ranges(runtime, int64_t(kDirections) * shares, [&](int64_t first, int64_t last) {
    for (int64_t d = 0; d < int64_t(kDirections); ++d) {
      const int64_t begin = larger(first - d * shares, 0), end = smaller(last - d * shares, shares);
      if (begin < end) body(directions[d], begin, end);
    }
  });
}

// One direction of such a sequence: what its inputs contribute to the gates is computed for several steps together, in
// full tiles, so that a step reads the states' weights alone.
template <class T>
struct NarrowForward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  using Block = typename GateWeights<T>::Block;
  static constexpr int64_t kRows = 64;  // of steps taken together
  static constexpr int kUnits = kLanes<A>;

  const Gru& gru;
  const Sequence<T> sequence;
  const GateWeights<T> weights;
  int64_t shares;
  Barrier barrier;
  int64_t input_stride, state_stride;
  E* inputs;       // [shares][kRows][input_stride]
  E* states;       // [shares][kTileRows][state_stride]
  A* from_inputs;  // [blocks][kRows][3][kUnits]

  NarrowForward(const Gru& g, int64_t directions, const Runtime& runtime)
      : gru(g),
        sequence(g, runtime),
        weights(g, runtime),
        shares(smaller(runtime.threads / directions, weights.blocks)),
        barrier(runtime, shares),
        input_stride(staged_stride<E>(gru.input_size)),
        state_stride(staged_stride<E>(gru.hidden_size)),
        inputs(allocate<E>(runtime, shares * kRows * input_stride)),
        states(allocate<E>(runtime, shares * kTileRows * state_stride)),
        from_inputs(allocate<A>(runtime, weights.blocks * kRows * 3 * kUnits)) {}

  // Shares [first_share, last_share) of the blocks.
  void steps(int64_t first_share, int64_t last_share) const {
    const int64_t first_block = weights.blocks * first_share / shares,
                  last_block = weights.blocks * last_share / shares;
    for (int64_t first = 0; first < gru.steps;) {
      int64_t last = first, rows = 0;
      E* staged = inputs + first_share * kRows * input_stride;
      do {
        const int64_t t = sequence.time(last++), count = sequence.size(t);
        const Rows<const T> input = sequence.input(t, 0);
        stage<E, T>(staged + rows * input_stride, input_stride, count, gru.input_size,
                    [&](int64_t i) { return input[i]; });
        rows += count;
      } while (last < gru.steps && rows + sequence.size(sequence.time(last)) <= kRows);
      for (int64_t j = first_block; j < last_block; ++j) multiply_inputs(j, first_share, staged, rows);
      rows = 0;
      for (int64_t s = first; s < last; ++s) {
        const int64_t t = sequence.time(s), count = sequence.size(t);
        E* staged_state = states + first_share * kTileRows * state_stride;
        stage<E, T>(staged_state, state_stride, count, gru.hidden_size,
                    [&](int64_t i) { return sequence.state(t, i); });
        for (int64_t j = first_block; j < last_block; ++j)
          for_last_rows<kTileRows - 1>(count, 0, [&]<int kCount>(int64_t) {
            finish_step<kCount>(t, weights.block(j, first_share), staged_state,
                                from_inputs + (j * kRows + rows) * 3 * kUnits);
          });
        rows += count;
        if (s + 1 < gru.steps) barrier.wait(last_share - first_share, s + 1);
      }
      first = last;
    }
    finish_streams();
  }

  void multiply_inputs(int64_t j, int64_t share, const E* input, int64_t rows) const {
    const Block block = weights.block(j, share);
    A* to = from_inputs + j * kRows * 3 * kUnits;
    for (int64_t first = 0; first < rows; first += kRunRows) {
      const int64_t run = smaller(kRunRows, rows - first);
      Vector<A> sum[kRunRows][3];
      product_of_rows<E, 3>(input + first * input_stride, input_stride, run, block.input, gru.input_size, sum,
                            weights.ahead(j + 1, first / kRunRows, block).input);
      for (int64_t i = 0; i < run; ++i)
        for (int gate = 0; gate < 3; ++gate) store(to + ((first + i) * 3 + gate) * kUnits, sum[i][gate]);
    }
  }

  template <int kCount>
  void finish_step(int64_t t, const Block& block, const E* state, const A* from_input) const {
    const int64_t H = gru.hidden_size;
    Vector<A> sum[kCount][3];
    product_of_few_rows<E, kCount, 3>(state, state_stride, block.state, H, sum);
    T* output = sequence.output(t, 0)[0];
    T* gates = gru.gates ? sequence.gates(t, 0) : nullptr;
    const auto of_input = [&](int64_t i, int g) GENKERNELS_LAMBDA { return load(from_input + (i * 3 + g) * kUnits); };
    finish_tile<T, kCount>(
        block, H,
        [&](int64_t i, int g) GENKERNELS_LAMBDA {
          return g < 2 ? of_input(i, g) + sum[i][g] : g == 2 ? of_input(i, 2) : sum[i][2];
        },
        [&](int64_t i) GENKERNELS_LAMBDA { return state + i * state_stride; }, output, gates);
  }
};

// Each row's state after its last step.
template <class T>
void copy_last_states(const Sequence<T>& sequence) {
  const Gru& gru = sequence.gru;
  if (gru.h_n == nullptr) return;
  const int64_t H = gru.hidden_size;
  for (int64_t b = 0, t = gru.steps - 1; b < gru.batch; ++b) {
    while (!gru.reverse && sequence.size(t) <= b) --t;
    __builtin_memcpy(static_cast<T*>(gru.h_n) + b * H, sequence.output(gru.reverse ? 0 : t, b)[0],
                     size_t(H) * sizeof(T));
  }
}

template <class T, size_t kDirections>
void forward_side_by_side(const NarrowForward<T> (&directions)[kDirections], const Runtime& runtime) {
  side_by_side(runtime, directions[0].shares, directions,
               [](const NarrowForward<T>& direction, int64_t first, int64_t last) { direction.steps(first, last); });
  for (const NarrowForward<T>& direction : directions) copy_last_states(direction.sequence);
}

template <class T>
void forward(const Gru& gru, const Runtime& runtime) {
  using E = Operand<T>;
  const Sequence<T> sequence(gru, runtime);
  const GateWeights<T> weights(gru, runtime);
  const int64_t H = gru.hidden_size, B = gru.batch;
  const int64_t row_scratch = staged_stride<E>(gru.input_size) + staged_stride<E>(H);
  const bool together = !packs_weights(gru) && gru.steps > 1 && gru.steps * B <= kDirectRows;
  GateSums<T>* from_inputs = together ? allocate<GateSums<T>>(runtime, weights.blocks * gru.steps * B) : nullptr;
  if (!packs_weights(gru) && weights.blocks < runtime.threads) {
    const int64_t shares = row_shares(gru, runtime);
    parallel(runtime, shares, [&](int64_t i) {
      const int64_t begin = sequence.share(i, shares), end = sequence.share(i + 1, shares);
      forward_few_rows(sequence, weights, begin, end, 0, weights.blocks,
                       from_inputs ? from_inputs + weights.blocks * gru.steps * begin : nullptr, [](int64_t) {});
    });
  } else if (!packs_weights(gru) || splits_units<T>(gru, runtime, weights.blocks, gru.input_size + H)) {
    const int64_t shares = smaller(runtime.threads, weights.blocks);
    const Barrier barrier(runtime, shares);
    E* scratch = allocate<E>(runtime, shares * B * row_scratch);
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      const int64_t first_block = weights.blocks * first / shares, last_block = weights.blocks * last / shares;
      const auto finish = [&](int64_t s) {
        if (s + 1 < gru.steps) barrier.wait(last - first, s + 1);
      };
      if (!packs_weights(gru))
        return forward_few_rows(sequence, weights, 0, B, first_block, last_block,
                                from_inputs ? from_inputs + first_block * gru.steps * B : nullptr, finish);
      forward_steps(sequence, weights, 0, B, first_block, last_block, first, scratch + first * B * row_scratch, finish);
    });
  } else {
    const int64_t shares = row_shares(gru, runtime);
    E* scratch = allocate<E>(runtime, B * row_scratch);
    parallel(runtime, shares, [&](int64_t i) {
      const int64_t begin = sequence.share(i, shares), end = sequence.share(i + 1, shares);
      forward_steps(sequence, weights, begin, end, 0, weights.blocks, i, scratch + begin * row_scratch, [](int64_t) {});
    });
  }
  copy_last_states(sequence);
}

// One direction, or two of the same sizes.
template <class T>
void forward(const Gru* gru, int64_t directions, const Runtime& runtime) {
  if (runs_side_by_side<T>(gru[0], directions, runtime))
    return forward_side_by_side<T, 2>({{gru[0], 2, runtime}, {gru[1], 2, runtime}}, runtime);
  for (int64_t d = 0; d < directions; ++d) {
    if (is_narrow(gru[d]))
      forward_side_by_side<T, 1>({{gru[d], 1, runtime}}, runtime);
    else
      forward<T>(gru[d], runtime);
    runtime.release(runtime.owner);
  }
}

// A weight [3H, N] as the right operand of a product with K = 3H, its rows taken in the order of the gradient's
// columns. As of the forward pass, a single step packs each panel where it uses it.
template <class T>
struct BackwardWeight {
  using E = Operand<T>;
  const T* weight;
  int64_t K, N, first_row;  // row k of the operand is row (k + first_row) % K of the weight
  Columns<E> columns;
  bool at_once;
  E* packed;  // all panels, or one for each thread

  // `panel_shares`: among how many threads the panels of a product are shared out.
  BackwardWeight(const Gru& gru, const void* w, int64_t n, bool n_first, int64_t panel_shares, const Runtime& runtime)
      : weight(static_cast<const T*>(w)),
        K(3 * gru.hidden_size),
        N(n),
        first_row(n_first ? 2 * gru.hidden_size : 0),
        columns(n, panel_shares),
        at_once(gru.steps > 1),
        packed(allocate<E>(runtime, at_once ? columns.packed_size(K) : runtime.threads * panel_size())) {
    if (!at_once) return;
    const int64_t shares = smaller(runtime.threads, columns.panels);
    parallel(runtime, shares, [&](int64_t i) {
      for (int64_t p = columns.panels * i / shares; p < columns.panels * (i + 1) / shares; ++p)
        pack(p, packed + columns.offset(p, K));
    });
  }

  int64_t panel_size() const { return ceil_div(K, kGroup<E>) * Panel<E, kPanelVectors>::kStep; }

  // `thread` is the index of the buffer that a panel may be packed into.
  const E* panel(int64_t p, int64_t thread) const {
    if (at_once) return packed + columns.offset(p, K);
    E* at = packed + thread * panel_size();
    pack(p, at);
    return at;
  }

  void pack(int64_t p, E* to) const {
    pack_panel<E, T>(
        columns, p, K, [&](int64_t k) { return weight + (k + first_row < K ? k + first_row : k + first_row - K) * N; },
        to);
  }
};

// The product of `rows` rows with panels [first_panel, last_panel), given to store_vector(row, column, count, sum).
// `is_narrow`: all rows there are, fewer than a tile. Shares of them would be added up in another order.
template <class T, class Store>
void multiply_rows(const BackwardWeight<T>& weight, int64_t thread, Rows<const Operand<T>> a, int64_t rows,
                   int64_t first_panel, int64_t last_panel, bool is_narrow, const Store& store_vector) {
  using E = Operand<T>;
  using A = Accumulator<T>;
  const Columns<E>& columns = weight.columns;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const E* panel = weight.panel(p, thread);
    const auto ahead = [&](int64_t run) -> Ahead<Into::L2> {
      const bool is_packed = weight.at_once && run < 3 && p + 1 < last_panel;
      const E* at = is_packed ? weight.panel(p + 1, thread) + run * weight.panel_size() / 3 : panel;
      return {reinterpret_cast<const char*>(at)};
    };
    const auto store_row = [&]<int kVectors>(int64_t row, const Vector<A>(&sum)[kVectors]) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t column = columns.first_column(p) + v * kLanes<A>;
        store_vector(row, column, int(smaller(kLanes<A>, columns.count - column)), sum[v]);
      }
    };
    columns.with_width(p, [&]<int kVectors>() {
      if (is_narrow)
        return for_last_rows<kTileRows - 1>(rows, 0, [&]<int kRows>(int64_t) {
          Vector<A> sum[kRows][kVectors];
          product_of_few_rows<E, kRows, kVectors>(a.first, a.stride, panel, weight.K, sum);
          for (int i = 0; i < kRows; ++i) store_row(i, sum[i]);
        });
      for (int64_t first = 0; first < rows; first += kRunRows) {
        const int64_t run = smaller(kRunRows, rows - first);
        Vector<A> sum[kRunRows][kVectors];
        product_of_rows<E, kVectors>(a[first], a.stride, run, panel, weight.K, sum, ahead(first / kRunRows));
        for (int64_t i = 0; i < run; ++i) store_row(first + i, sum[i]);
      }
    });
  }
}

// Backpropagation through time in blocks of steps. Per block: the time loop writes the gradients of the gates of all
// its rows (`delta`), then products that read them while they are in the cache add to the weights' gradients and form
// the input's.
//
// A row of `delta` is [n | r | z | hn], so that both right operands are matrices of neighbouring columns: [n r z] goes
// with x and W_ih, [r z hn] with h and W_hh.
template <class T>
struct Backward {
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kBlockRows = 512;
  static constexpr int64_t kTileGroup = 16;  // tiles that stay in the L2 cache while the panels pass by

  // Where no gates were saved: the block's inputs and states side by side, and its gates from them.
  struct Recomputed {
    GateWeights<T> weights;
    E *inputs, *states;  // [block_rows, stride]
    T* gates;            // [block_rows, 4, H]
  };

  const Gru& gru;
  const GruGradients& grad;
  const Runtime& runtime;
  const Sequence<T> sequence;
  const int64_t I, H, delta_stride;
  int64_t block_rows;
  E* delta;
  A* step_delta;  // the same of a single step of few rows
  A* carry;       // gradient of the hidden state, carried from step to step: [B, H]
  Recomputed recomputed;

  Backward(const Gru& g, const GruGradients& gradients, const Runtime& r)
      : gru(g),
        grad(gradients),
        runtime(r),
        sequence(g, r),
        I(g.input_size),
        H(g.hidden_size),
        delta_stride(staged_stride<E>(4 * g.hidden_size)),
        block_rows(is_step(g) ? g.batch : larger(kBlockRows, g.batch)),
        delta(is_step(g) ? nullptr : allocate<E>(r, block_rows * delta_stride)),
        step_delta(is_step(g) ? allocate<A>(r, g.batch * delta_stride) : nullptr),
        carry(allocate<A>(r, g.batch * g.hidden_size)),
        recomputed{{g, true}, nullptr, nullptr, nullptr} {
    if (gru.gates != nullptr) return;
    recomputed.weights.pack_at(allocate<char>(r, recomputed.weights.bytes()), r);
    recomputed.inputs = allocate<E>(r, block_rows * staged_stride<E>(I));
    recomputed.states = allocate<E>(r, block_rows * staged_stride<E>(H));
    recomputed.gates = allocate<T>(r, block_rows * 4 * H);
  }

  // The gradients of the gates of units [first, last) of one row at one step, and what of dh passes by the gates.
  template <class D>
  void delta_row(int64_t t, int64_t b, int64_t base, int64_t first, int64_t last, D* to) const {
    const T* saved =
        recomputed.gates ? recomputed.gates + (sequence.offset(t) + b - base) * 4 * H : sequence.gates(t, b);
    const T* state = sequence.state(t, b);
    const T* from_output = grad.grad_output ? sequence.at(static_cast<const T*>(grad.grad_output),
                                                          grad.grad_output_stride_t, grad.grad_output_stride_b, t, b)[0]
                                            : nullptr;
    T* states = grad.grad_states ? static_cast<T*>(grad.grad_states) + (sequence.offset(t) + b) * H : nullptr;
    for (int64_t u = first; u < last; u += kLanes<A>) {
      const int count = int(smaller(kLanes<A>, last - u));
      Vector<A> dh = load(carry + b * H + u, count);
      if (from_output) dh += load(from_output + u, count);
      if (states) store(states + u, dh, count);
      const Vector<A> r = load(saved + u, count), z = load(saved + H + u, count);
      const Vector<A> n = load(saved + 2 * H + u, count), hn = load(saved + 3 * H + u, count);
      const Vector<A> h = state ? load(state + u, count) : Vector<A>{};
      const Vector<A> dn = dh * (A(1) - z) * (A(1) - n * n);
      const Vector<A> dz = dh * (h - n) * z * (A(1) - z);
      const Vector<A> dr = dn * hn * r * (A(1) - r);
      store(to + u, dn, count);
      store(to + H + u, dr, count);
      store(to + 2 * H + u, dz, count);
      store(to + 3 * H + u, dn * r, count);
      store(carry + b * H + u, dh * z, count);
    }
  }

  // The carry of units [first, last) of rows [begin, end) before the last step, and grad_hx after the first.
  void begin_carry(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    const T* from = static_cast<const T*>(grad.grad_h_n);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t u = first; u < last; u += kLanes<A>) {
        const int count = int(smaller(kLanes<A>, last - u));
        store(carry + b * H + u, from ? load(from + b * H + u, count) : Vector<A>{}, count);
      }
  }
  void end_carry(int64_t begin, int64_t end, int64_t first, int64_t last) const {
    T* to = static_cast<T*>(grad.grad_hx);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t u = first; u < last; u += kLanes<A>) {
        const int count = int(smaller(kLanes<A>, last - u));
        store(to + b * H + u, load(carry + b * H + u, count), count);
      }
  }

  // The gates of rows [base, base + rows), from the states that the forward pass left.
  void compute_gates(int64_t base, int64_t rows) const {
    const int64_t tiles = ceil_div(rows, kTileRows), shares = smaller(runtime.threads, tiles);
    const int64_t input_stride = staged_stride<E>(I), state_stride = staged_stride<E>(H);
    E *inputs = recomputed.inputs, *states = recomputed.states;
    parallel(runtime, shares, [&](int64_t i) {
      const int64_t begin = tiles * i / shares * kTileRows, end = smaller(rows, tiles * (i + 1) / shares * kTileRows);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t t = sequence.step_of(base + row), b = base + row - sequence.offset(t);
        stage<E, T>(inputs + row * input_stride, input_stride, 1, I, [&](int64_t) { return sequence.input(t, b)[0]; });
        stage<E, T>(states + row * state_stride, state_stride, 1, H, [&](int64_t) { return sequence.state(t, b); });
      }
      for (int64_t j = 0; j < recomputed.weights.blocks; ++j) {
        const auto block = recomputed.weights.block(j, i);
        for (int64_t row = begin; row < end; row += kRunRows)
          forward_run<T>(gru, block, {inputs + row * input_stride, input_stride},
                         {states + row * state_stride, state_stride}, smaller(kRunRows, end - row), nullptr,
                         recomputed.gates + row * 4 * H,
                         recomputed.weights.ahead(j + 1, (row - begin) / kRunRows, block));
      }
    });
  }

  static bool is_step(const Gru& gru) {
    const int64_t most = is_widened(gru.dtype) ? kWidenedRowsBackward : kDirectRows;
    return gru.steps == 1 && gru.batch <= most && gru.resets == nullptr;
  }

  // Steps [first, last), the last one first, of rows [begin, end) and the units of panels [first_panel, last_panel) of
  // `weight_hh`. The product reads delta of all units: meet(s) returns when step s has them all.
  template <class Meet>
  void steps(int64_t first, int64_t last, int64_t base, const BackwardWeight<T>& weight_hh, int64_t begin, int64_t end,
             int64_t first_panel, int64_t last_panel, int64_t thread, const Meet& meet) const {
    const Columns<E>& columns = weight_hh.columns;
    const int64_t first_unit = columns.first_column(first_panel);
    const int64_t last_unit = smaller(H, columns.first_column(last_panel));
    if (last == gru.steps) begin_carry(begin, end, first_unit, last_unit);
    for (int64_t s = last; s-- > first;) {
      const int64_t t = sequence.time(s), rows = smaller(end, sequence.size(t)) - begin;
      E* rows_delta = delta + (sequence.offset(t) + begin - base) * delta_stride;
      for (int64_t i = 0; i < rows; ++i)
        delta_row(t, begin + i, base, first_unit, last_unit, rows_delta + i * delta_stride);
      meet(s);
      multiply_rows(weight_hh, thread, {rows_delta + H, delta_stride}, rows, first_panel, last_panel,
                    gru.batch < kTileRows, [&](int64_t i, int64_t column, int count, Vector<A> sum) {
                      A* to = carry + (begin + i) * H + column;
                      store(to, load(to, count) + sum, count);
                    });
      for (int64_t i = 0; gru.resets && i < rows; ++i)
        if (gru.resets[t * gru.batch + begin + i])
          for (int64_t u = first_unit; u < last_unit; ++u) carry[(begin + i) * H + u] = A(0);
    }
    if (first == 0) end_carry(begin, end, first_unit, last_unit);
  }

  // One step of few rows: all gradients follow from delta at once, and nothing is packed.
  void run_step() const {
    constexpr int64_t kUnits = kLanes<A>;
    if (recomputed.gates != nullptr) compute_gates(0, gru.batch);
    begin_carry(0, gru.batch, 0, H);
    for (int64_t b = 0; b < gru.batch; ++b) delta_row(0, b, 0, 0, H, step_delta + b * delta_stride);
    const T *input[kDirectRows], *state[kDirectRows];
    for (int64_t b = 0; b < gru.batch; ++b) {
      input[b] = sequence.input(0, b)[0];
      state[b] = sequence.state(0, b);
    }
    A* input_sums = allocate<A>(runtime, grad.grad_input ? gru.batch * I : 0);
    const T* weight_ih = static_cast<const T*>(gru.weight_ih);
    const T* weight_hh = static_cast<const T*>(gru.weight_hh);
    const int64_t shares = runtime.threads;
    parallel(runtime, shares, [&](int64_t i) {
      const auto share = [&](int64_t count, int64_t part) { return count * (i + part) / shares; };
      // A thread's columns of a weight, in whole registers.
      const auto columns = [&](int64_t N, int64_t part) {
        return smaller(N, share(ceil_div(N, kUnits), part) * kUnits);
      };
      const auto multiply = [&](int64_t gate, const T* weight, int64_t N, int64_t K, A* to) {
        const int64_t first = columns(N, 0), count = columns(N, 1) - first;
        multiply_as_it_lies(step_delta + gate * H, delta_stride, gru.batch, weight + first, N, K, count, to + first, N);
      };
      multiply(1, weight_hh, H, 3 * H, carry);
      end_carry(0, gru.batch, columns(H, 0), columns(H, 1));
      if (grad.grad_input) {
        const int64_t first = columns(I, 0), last = columns(I, 1);
        for (int64_t b = 0; b < gru.batch; ++b)
          __builtin_memset(input_sums + b * I + first, 0, size_t(last - first) * sizeof(A));
        multiply(0, weight_ih + 2 * H * I, I, H, input_sums);
        multiply(1, weight_ih, I, 2 * H, input_sums);
        T* to = static_cast<T*>(grad.grad_input);
        for (int64_t b = 0; b < gru.batch; ++b)
          for (int64_t n = first; n < last; n += kUnits) {
            const int count = int(smaller(kUnits, last - n));
            store(to + b * I + n, load(input_sums + b * I + n, count), count);
          }
      }
      if (!grad.needs_weights) return;
      for (int64_t gate = 0; gate < 3; ++gate) {
        const int64_t first = share(H, 0), last = share(H, 1);
        step_weight_rows(gate * H + first, last - first, (gate + 1) % 3 * H + first, input, I, grad.grad_weight_ih);
        step_weight_rows(gate * H + first, last - first, (gate + 1) * H + first, state, H, grad.grad_weight_hh);
      }
    });
    if (grad.grad_bias_ih == nullptr) return;
    for (int64_t gate = 0; gate < 3; ++gate)
      for (int64_t u = 0; u < H; u += kUnits) {
        const int count = int(smaller(kUnits, H - u));
        const auto write = [&](void* to, int64_t column) {
          Vector<A> sum = {};
          for (int64_t b = 0; b < gru.batch; ++b) sum += load(step_delta + b * delta_stride + column * H + u, count);
          store(static_cast<T*>(to) + gate * H + u, sum, count);
        };
        write(grad.grad_bias_ih, (gate + 1) % 3);
        write(grad.grad_bias_hh, gate + 1);
      }
  }

  // Rows [row, row + count) of a weight's gradient [3H, N]: sums over the batch of delta's columns from `column` on
  // times the rows of `operand`. A run of neighbouring columns is written at a time.
  void step_weight_rows(int64_t row, int64_t count, int64_t column, const T* const* operand, int64_t N,
                        void* gradient) const {
    T* to = static_cast<T*>(gradient) + row * N;
    const auto tile = [&]<int kRows, int kVectors>(int64_t r, int64_t n, int lanes) {
      Vector<A> sum[kRows][kVectors] = {};
      for (int64_t b = 0; b < gru.batch; ++b) {
        const A* factors = step_delta + b * delta_stride + column + r;
        Vector<A> values[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) values[v] = load(operand[b] + n + v * kLanes<A>, lanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          const Vector<A> factor = broadcast(factors[i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[i][v] += factor * values[v];
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(to + (r + i) * N + n + v * kLanes<A>, sum[i][v], lanes);
    };
    constexpr int kRows = kVectorBytes == 64 ? 4 : 2, kVectors = 4;
    const auto rows = [&]<int kTile>(int64_t r) {
      int64_t n = 0;
      for (; n + kVectors * kLanes<A> <= N; n += kVectors * kLanes<A>)
        tile.template operator()<kTile, kVectors>(r, n, kLanes<A>);
      for (; n < N; n += kLanes<A>) tile.template operator()<kTile, 1>(r, n, int(smaller(kLanes<A>, N - n)));
    };
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) rows.template operator()<kRows>(r);
    for (; r < count; ++r) rows.template operator()<1>(r);
  }

  // grad_weight += delta^T operand, for both weights, over the rows of one block of steps; the bias with it.
  struct WeightGradients {
    Columns<E> input_columns, state_columns;
    int64_t gate_tiles;        // row tiles of a gate
    E *input, *state;          // the block's x and h, packed
    E* transposed;             // the block's delta as tiles: [4][gate_tiles][K][kTileRows]
    A *weight_ih, *weight_hh;  // [3H, I], [3H, H]
    double* bias;              // [4H]: n, r, z, hn. Sums over all rows of all steps: double costs one add in I + H
  };

  // Shared out by rows, or by panels where there are few rows.
  void input_gradient(int64_t base, int64_t rows, const BackwardWeight<T>& weight_ih) const {
    const int64_t tiles = ceil_div(rows, kTileRows), panels = weight_ih.columns.panels;
    const bool by_rows = weight_ih.at_once && tiles >= runtime.threads;
    const int64_t shares = smaller(runtime.threads, by_rows ? tiles : panels);
    T* to = static_cast<T*>(grad.grad_input) + base * I;
    parallel(runtime, shares, [&](int64_t i) {
      const int64_t begin = by_rows ? tiles * i / shares * kTileRows : 0;
      const int64_t end = by_rows ? smaller(rows, tiles * (i + 1) / shares * kTileRows) : rows;
      multiply_rows(weight_ih, i, {delta + begin * delta_stride, delta_stride}, end - begin,
                    by_rows ? 0 : panels * i / shares, by_rows ? panels : panels * (i + 1) / shares, false,
                    [&](int64_t row, int64_t column, int count, Vector<A> sum) {
                      store(to + (begin + row) * I + column, sum, count);
                    });
    });
  }

  WeightGradients prepare_weight_gradients() const {
    const bool needed = grad.needs_weights;
    const Columns<E> input_columns(needed ? I : 0), state_columns(needed ? H : 0);
    const int64_t gate_tiles = needed ? ceil_div(H, kTileRows) : 0;
    const int64_t K = ceil_div(block_rows, kGroup<E>) * kGroup<E>;
    const auto sums = [&](void* gradient, int64_t columns) {
      if constexpr (__is_same(T, A)) return static_cast<A*>(gradient);
      return allocate<A>(runtime, needed ? 3 * H * columns : 0);
    };
    return {input_columns,
            state_columns,
            gate_tiles,
            allocate<E>(runtime, input_columns.packed_size(K)),
            allocate<E>(runtime, state_columns.packed_size(K)),
            allocate<E>(runtime, 4 * gate_tiles * kTileRows * K),
            sums(grad.grad_weight_ih, I),
            sums(grad.grad_weight_hh, H),
            allocate<double>(runtime, 4 * H)};
  }

  // The rows of delta^T that belong to a tile of units.
  const E* delta_tile(const WeightGradients& of, int64_t gate, int64_t unit, int64_t K) const {
    return of.transposed + (gate * of.gate_tiles * kTileRows + unit) * K;
  }

  void weight_gradients(const WeightGradients& to, int64_t base, int64_t rows, bool is_first_block) const {
    const int64_t panels = to.input_columns.panels + to.state_columns.panels;
    const int64_t tiles = 4 * to.gate_tiles, K = ceil_div(rows, kGroup<E>) * kGroup<E>;
    const auto row_of = [&](int64_t k, auto&& address) -> const T* {
      const int64_t t = sequence.step_of(base + k);
      return address(t, base + k - sequence.offset(t));
    };
    const int64_t shares = runtime.threads;
    parallel(runtime, shares, [&](int64_t i) {
      for (int64_t p = panels * i / shares; p < panels * (i + 1) / shares; ++p)
        if (p < to.input_columns.panels)
          pack_panel<E, T>(
              to.input_columns, p, rows,
              [&](int64_t k) {
                return row_of(k, [&](int64_t t, int64_t b) -> const T* { return sequence.input(t, b)[0]; });
              },
              to.input + to.input_columns.offset(p, rows));
        else
          pack_panel<E, T>(
              to.state_columns, p - to.input_columns.panels, rows,
              [&](int64_t k) { return row_of(k, [&](int64_t t, int64_t b) { return sequence.state(t, b); }); },
              to.state + to.state_columns.offset(p - to.input_columns.panels, rows));
      for (int64_t tile = tiles * i / shares; tile < tiles * (i + 1) / shares; ++tile) {
        const int64_t gate = tile / to.gate_tiles, unit = tile % to.gate_tiles * kTileRows;
        const int64_t units = smaller(kTileRows, H - unit);
        pack_transposed<E>(delta + gate * H + unit, delta_stride, rows, units, to.transposed + tile * kTileRows * K);
        double sum[kTileRows] = {};
        sum_tile_rows(delta_tile(to, gate, unit, K), rows, sum);
        for (int64_t u = 0; u < units; ++u) {
          double& total = to.bias[gate * H + unit + u];
          total = is_first_block ? sum[u] : total + sum[u];
        }
      }
    });
    // Each thread keeps the rows of the gradients that are its own, so that no order of adding depends on the threads.
    parallel(runtime, shares, [&](int64_t i) {
      const auto accumulate = [&](const Columns<E>& columns, const E* packed, int64_t gate0, A* sums, int64_t N) {
        const int64_t tiles = 3 * to.gate_tiles, last = tiles * (i + 1) / shares;
        for (int64_t k = 0; k < rows || k == 0; k += kBlockRows)
          for (int64_t group = tiles * i / shares; group < last; group += kTileGroup)
            for (int64_t p = 0; p < columns.panels; ++p)
              columns.with_width(p, [&]<int kVectors>() {
                const E* panel = packed + columns.offset(p, rows) + k / kGroup<E> * Panel<E, kVectors>::kStep;
                for (int64_t tile = group; tile < smaller(group + kTileGroup, last); ++tile) {
                  const int64_t gate = gate0 + tile / to.gate_tiles, unit = tile % to.gate_tiles * kTileRows;
                  // Columns of delta are n, r, z, hn; rows of both gradients r, z, n.
                  A* rows_to = sums + ((gate + 2) % 3 * H + unit) * N;
                  const E* of_tile = delta_tile(to, gate, unit, K) + k / kGroup<E> * kTileStep<E>;
                  add_tile<kVectors, E>(columns, p, {panel, Panel<E, kVectors>::kStep}, {of_tile, kTileStep<E>},
                                        smaller(kBlockRows, rows - k), int(smaller(kTileRows, H - unit)), rows_to, N,
                                        is_first_block && k == 0);
                }
              });
      };
      accumulate(to.input_columns, to.input, 0, to.weight_ih, I);
      accumulate(to.state_columns, to.state, 1, to.weight_hh, H);
    });
  }

  void finish_weight_gradients(const WeightGradients& from) const {
    if constexpr (!__is_same(T, A)) {
      const int64_t shares = runtime.threads;
      parallel(runtime, shares, [&](int64_t i) {
        const auto narrow_share = [&](void* to, const A* sums, int64_t count) {
          const int64_t last = count * (i + 1) / shares;
          for (int64_t k = count * i / shares; k < last; k += kLanes<A>) {
            const int lanes = int(smaller(kLanes<A>, last - k));
            store(static_cast<T*>(to) + k, load(sums + k, lanes), lanes);
          }
        };
        narrow_share(grad.grad_weight_ih, from.weight_ih, 3 * H * I);
        narrow_share(grad.grad_weight_hh, from.weight_hh, 3 * H * H);
      });
    }
    if (grad.grad_bias_ih == nullptr) return;
    for (int64_t gate = 0; gate < 3; ++gate)
      for (int64_t u = 0; u < H; ++u) {
        const auto write = [&](void* to, int64_t column) {
          narrow(static_cast<T*>(to) + gate * H + u, A(from.bias[column * H + u]));
        };
        write(grad.grad_bias_ih, (gate + 1) % 3);
        write(grad.grad_bias_hh, gate + 1);
      }
  }

  static void narrow(T* to, A value) { store(to, broadcast(value), 1); }
};

// The way back through a sequence, block by block.
template <class T>
struct BackwardBlocks {
  using E = Operand<T>;

  Backward<T> pass;
  bool is_split_by_units;
  const BackwardWeight<T> weight_hh, weight_ih;
  typename Backward<T>::WeightGradients sums;
  int64_t panels, shares;
  Barrier barrier;
  int64_t first, last;         // steps of the block
  int64_t base = 0, rows = 0;  // and its rows

  BackwardBlocks(const Gru& gru, const GruGradients& grad, int64_t directions, const Runtime& runtime)
      : pass(gru, grad, runtime),
        is_split_by_units(gru.batch < kTileRows ||
                          splits_units<T>(gru, runtime, Columns<E>(gru.hidden_size).panels, gru.hidden_size)),
        weight_hh(gru, gru.weight_hh, gru.hidden_size, false, is_split_by_units ? runtime.threads / directions : 1,
                  runtime),
        // A GRU whose input needs no gradient packs nothing for it.
        weight_ih(gru, gru.weight_ih, grad.grad_input ? gru.input_size : 0, true, gru.steps == 1 ? runtime.threads : 1,
                  runtime),
        sums(pass.prepare_weight_gradients()),
        panels(weight_hh.columns.panels),
        shares(is_split_by_units ? smaller(runtime.threads / directions, panels) : row_shares(gru, runtime)),
        barrier(runtime, shares),
        first(gru.steps),
        last(gru.steps) {}

  bool has_more() const { return first > 0; }

  void take_block() {
    last = first;
    rows = 0;
    barrier.restart();
    while (first > 0 && (first == last || rows + pass.sequence.size(pass.sequence.time(first - 1)) <= pass.block_rows))
      rows += pass.sequence.size(pass.sequence.time(--first));
    base = smaller(pass.sequence.offset(pass.sequence.time(first)), pass.sequence.offset(pass.sequence.time(last - 1)));
    if (pass.recomputed.gates != nullptr) pass.compute_gates(base, rows);
  }

  // Shares [begin, end) of the block's time loop.
  void run_steps(int64_t begin, int64_t end) const {
    if (is_split_by_units)
      return pass.steps(first, last, base, weight_hh, 0, pass.gru.batch, panels * begin / shares, panels * end / shares,
                        begin, [&](int64_t s) { barrier.wait(end - begin, last - s); });
    for (int64_t i = begin; i < end; ++i)
      pass.steps(first, last, base, weight_hh, pass.sequence.share(i, shares), pass.sequence.share(i + 1, shares), 0,
                 panels, i, [](int64_t) {});
  }

  void finish_block() const {
    if (pass.grad.grad_input) pass.input_gradient(base, rows, weight_ih);
    if (pass.grad.needs_weights) pass.weight_gradients(sums, base, rows, last == pass.gru.steps);
  }

  void finish() const {
    if (pass.grad.needs_weights) pass.finish_weight_gradients(sums);
  }
};

// However a sequence is cut into as few blocks as hold it, from its start or from its end, there are as many.
template <class T, size_t kDirections>
void backward_side_by_side(BackwardBlocks<T> (&&directions)[kDirections], const Runtime& runtime) {
  while (directions[0].has_more()) {
    for (auto& each : directions) each.take_block();
    side_by_side(runtime, directions[0].shares, directions,
                 [](const BackwardBlocks<T>& each, int64_t begin, int64_t end) { each.run_steps(begin, end); });
    for (const auto& each : directions) each.finish_block();
  }
  for (const auto& each : directions) each.finish();
}

// One direction, or two of the same sizes.
template <class T>
void backward(const Gru* gru, const GruGradients* grad, int64_t directions, const Runtime& runtime) {
  if (runs_side_by_side<T>(gru[0], directions, runtime))
    return backward_side_by_side<T, 2>({{gru[0], grad[0], 2, runtime}, {gru[1], grad[1], 2, runtime}}, runtime);
  for (int64_t d = 0; d < directions; ++d) {
    if (Backward<T>::is_step(gru[d]))
      Backward<T>(gru[d], grad[d], runtime).run_step();
    else
      backward_side_by_side<T, 1>({{gru[d], grad[d], 1, runtime}}, runtime);
    runtime.release(runtime.owner);
  }
}

}  // namespace

int64_t gru_packed_size(const Gru& gru) {
  switch (gru.dtype) {
    case DType::float32: return GateWeights<float>(gru, true).bytes();
    case DType::float64: return GateWeights<double>(gru, true).bytes();
    case DType::bfloat16: return GateWeights<bfloat16>(gru, true).bytes();
    case DType::float16: break;  // attention and dropout alone have it
  }
  return 0;
}

void gru_pack(const Gru& gru, void* packed, const Runtime& runtime) {
  switch (gru.dtype) {
    case DType::float32: return GateWeights<float>(gru, true).pack_at(packed, runtime);
    case DType::float64: return GateWeights<double>(gru, true).pack_at(packed, runtime);
    case DType::bfloat16: return GateWeights<bfloat16>(gru, true).pack_at(packed, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

void gru_forward(const Gru* gru, int64_t directions, const Runtime& runtime) {
  switch (gru->dtype) {
    case DType::float32: return forward<float>(gru, directions, runtime);
    case DType::float64: return forward<double>(gru, directions, runtime);
    case DType::bfloat16: return forward<bfloat16>(gru, directions, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

void gru_backward(const Gru* gru, const GruGradients* grad, int64_t directions, const Runtime& runtime) {
  switch (gru->dtype) {
    case DType::float32: return backward<float>(gru, grad, directions, runtime);
    case DType::float64: return backward<double>(gru, grad, directions, runtime);
    case DType::bfloat16: return backward<bfloat16>(gru, grad, directions, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

}  // namespace genkernels::GENKERNELS_LEVEL
