// One layer over a sequence, forward and backward, whatever its cell. A cell says how many blocks of rows its weights
// have, what it saves, and how sums become states and their gradients become those of the sums:
//
//   kGates        blocks of rows of a weight
//   kSaved        values of a unit that the backward pass reads beside the states
//   kColumns      of a unit's gradients, from which all others follow: kGates of them, from the first one on, belong to
//                 the input, and as many, from kStateColumn on, to the state. The input's last gate is the first
//                 column.
//   kSplitsLast   whether the last gate has the state's part apart from the input's
//   kPassesBy     whether a part of dh reaches the state before without a product
//   kBiases       registers of biases in a block of units
//   sum(v, of_input, of_state)                 register v of the sums that finish() takes
//   pack_biases(layer, to)                     the biases as finish() reads them
//   finish<kRows>(block, H, sum, state, output, saved)    states from sums
//   delta(dh, H, u, count, saved, state, output, to)      a unit's gradients from dh, and what of dh passes them by
//
// Everything is in an unnamed namespace: each cell is compiled by itself, and what is called once is inlined.
#pragma once

#include "gemm.h"
#include "gemv.h"
#include "math.h"
#include "parallel.h"
#include "recurrent.h"

namespace genkernels::GENKERNELS_LEVEL {
namespace {

// The geometry of a sequence, dense or packed, in the order in which it is run.
template <class Cell>
struct Sequence {
  using T = typename Cell::T;

  const Recurrent& layer;
  const int64_t* offsets;  // [T + 1] first row of each step, or null when every step has `batch` rows

  Sequence(const Recurrent& of, const Runtime& runtime) : layer(of), offsets(nullptr) {
    if (of.batch_sizes == nullptr) return;
    int64_t* sums = allocate<int64_t>(runtime, of.steps + 1);
    sums[0] = 0;
    for (int64_t t = 0; t < of.steps; ++t) sums[t + 1] = sums[t] + of.batch_sizes[t];
    offsets = sums;
  }

  int64_t time(int64_t s) const { return layer.reverse ? layer.steps - 1 - s : s; }
  int64_t before(int64_t t) const { return layer.reverse ? t + 1 : t - 1; }
  bool is_first(int64_t t) const { return t == time(0); }
  int64_t size(int64_t t) const { return layer.batch_sizes ? layer.batch_sizes[t] : layer.batch; }
  int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * layer.batch; }
  int64_t rows() const { return offset(layer.steps); }
  // The step that a row of all steps belongs to.
  int64_t step_of(int64_t row) const {
    if (offsets == nullptr) return row / layer.batch;
    int64_t t = 0;
    for (int64_t end = layer.steps; end - t > 1;) {
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
    return at(static_cast<const T*>(layer.input), layer.input_stride_t, layer.input_stride_b, t, b);
  }
  Rows<T> output(int64_t t, int64_t b) const {
    const int64_t H = layer.hidden_size;
    return at(static_cast<T*>(layer.output), layer.batch * H, H, t, b);
  }
  T* gates(int64_t t, int64_t b) const {
    return static_cast<T*>(layer.gates) + (offset(t) + b) * Cell::kSaved * layer.hidden_size;
  }

  // The hidden state that row b enters step t with; null if it is reset to zero.
  const T* state(int64_t t, int64_t b) const {
    if (layer.resets && layer.resets[t * layer.batch + b]) return nullptr;
    // A row of a packed sequence run backwards starts at its own last step.
    if (is_first(t) || b >= size(before(t))) return static_cast<const T*>(layer.hx) + b * layer.hidden_size;
    return output(before(t), b)[0];
  }
  // Whether the states of rows [b, end) at step t are rows of one matrix.
  bool state_is_matrix(int64_t t, int64_t b, int64_t end) const {
    if (!is_first(t) && b < size(before(t)) && end > size(before(t))) return false;
    if (layer.resets)
      for (int64_t i = b; i < end; ++i)
        if (layer.resets[t * layer.batch + i]) return false;
    return true;
  }

  // The first row of a thread's share, when each thread takes neighbouring rows of about as many steps in all.
  int64_t share(int64_t thread, int64_t threads) const {
    if (offsets == nullptr) return layer.batch * thread / threads;
    int64_t b = 0, t = layer.steps;  // row b has t steps
    for (int64_t done = 0; b < layer.batch; ++b) {
      while (t > 0 && layer.batch_sizes[t - 1] <= b) --t;
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

int64_t row_shares(const Recurrent& layer, const Runtime& runtime) { return smaller(runtime.threads, layer.batch); }

// Packing costs as much as reading the weights a few times.
bool packs_weights(const Recurrent& layer) {
  if (layer.steps > kDirectSteps || layer.resets != nullptr) return true;
  const int64_t rows_of_step = is_widened(layer.dtype) ? kWidenedRows : kDirectRows;
  return layer.batch > (layer.steps == 1 ? rows_of_step : kDirectRowsOfSteps) && layer.hidden_size > kDirectUnits;
}

// What is fetched while a run of rows is multiplied with a block.
struct BlockAhead {
  Ahead<Into::L2> input, state;
};

// A tile of a block of units has kBlockVectors registers: all gates of one register of units, or of several.
constexpr int kBlockVectors = 3;
static_assert(kBlockVectors == kPanelVectors);

template <class T>
struct Block {
  int64_t first;  // unit
  const Operand<T>*input, *state;
  const Accumulator<T>* bias;  // [kBiases][lanes]
  bool streams_gates;
};

// Both weights and the biases, packed so that one tile holds the gates of the same units: per block of units
// [ceil(I / group)][kBlockVectors][lanes][group] of W_ih, then as much of W_hh. A single step packs each block where it
// uses it, into a buffer that stays in the cache; otherwise all are packed at once, or were before the call.
template <class Cell>
struct GateWeights {
  using T = typename Cell::T;
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int kUnitVectors = kBlockVectors / Cell::kGates, kUnits = kUnitVectors * kLanes<A>;
  static constexpr int64_t kStep = Panel<E, kBlockVectors>::kStep, kBiasSize = Cell::kBiases * kLanes<A>;
  static_assert(kBlockVectors % Cell::kGates == 0);

  const Recurrent& layer;
  int64_t blocks, input_size, block_size;
  bool at_once, streams_gates;
  A* biases;  // [blocks][kBiases][lanes]
  E* packed;  // all blocks, or one for each thread, or null

  GateWeights(const Recurrent& of, bool packs_at_once)
      : layer(of),
        blocks(ceil_div(of.hidden_size, kUnits)),
        input_size(ceil_div(of.input_size, kGroup<E>) * kStep),
        block_size(input_size + ceil_div(of.hidden_size, kGroup<E>) * kStep),
        at_once(packs_at_once),
        streams_gates(false),
        biases(nullptr),
        packed(nullptr) {}

  // For the forward pass.
  GateWeights(const Recurrent& of, const Runtime& runtime) : GateWeights(of, of.steps > 1 || of.packed != nullptr) {
    streams_gates = Cell::kSaved > 0 && gates_leave_cache(runtime);
    if (layer.packed != nullptr) {
      lie_at(const_cast<void*>(layer.packed));
      return;
    }
    biases = allocate<A>(runtime, blocks * kBiasSize);
    if (packs_weights(layer)) packed = allocate<E>(runtime, (at_once ? blocks : runtime.threads) * block_size);
    Cell::pack_biases(layer, biases);
    if (packed != nullptr && at_once) pack_blocks(runtime);
  }

  // Whether the saved gates are whole lines and many times what a core's own cache holds (measured: from four times on
  // training takes 1 to 2% less so).
  bool gates_leave_cache(const Runtime& runtime) const {
    const int64_t gate = layer.hidden_size * int64_t(sizeof(T));
    return gate % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(layer.gates) % kVectorBytes == 0 &&
           layer.steps * layer.batch * Cell::kSaved * gate > 4 * runtime.cache;
  }

  int64_t bytes() const { return blocks * (kBiasSize * int64_t(sizeof(A)) + block_size * int64_t(sizeof(E))); }

  void lie_at(void* memory) {
    biases = static_cast<A*>(memory);
    packed = reinterpret_cast<E*>(biases + blocks * kBiasSize);
  }

  void pack_at(void* memory, const Runtime& runtime) {
    lie_at(memory);
    Cell::pack_biases(layer, biases);
    pack_blocks(runtime);
  }

  void pack_blocks(const Runtime& runtime) const {
    const int64_t shares = smaller(runtime.threads, blocks);
    parallel(runtime, shares, [&](int64_t i) {
      for (int64_t j = blocks * i / shares; j < blocks * (i + 1) / shares; ++j) pack(j, packed + j * block_size);
    });
  }

  // `thread` is the index of the buffer that a block may be packed into.
  Block<T> block(int64_t j, int64_t thread) const {
    const A* bias = biases + j * kBiasSize;
    if (packed == nullptr) return {j * kUnits, nullptr, nullptr, bias, streams_gates};
    E* at = packed + (at_once ? j : thread) * block_size;
    if (!at_once) pack(j, at);
    return {j * kUnits, at, at + input_size, bias, streams_gates};
  }

  // A third of what block(j) will read, for one of the first three runs before it; there is no more for later runs.
  BlockAhead ahead(int64_t j, int64_t run, const Block<T>& now) const {
    const auto bytes = [](const auto* at) { return reinterpret_cast<const char*>(at); };
    if (run > 2 || j >= blocks) return {{bytes(now.input)}, {bytes(now.state)}};
    if (!at_once) {
      const int64_t row = gate_of(int(run)) * layer.hidden_size + unit_of(j * kUnits, int(run));
      return {{bytes(static_cast<const T*>(layer.weight_ih) + row * layer.input_size)},
              {bytes(static_cast<const T*>(layer.weight_hh) + row * layer.hidden_size)}};
    }
    const char* at = bytes(packed + j * block_size);
    return {{at + run * input_size / 3 * int64_t(sizeof(E))},
            {at + (input_size + run * (block_size - input_size) / 3) * int64_t(sizeof(E))}};
  }

  // Calls body.operator()<vectors>(), of the registers of block j that hold units. They are the first ones where there
  // is one gate.
  template <class Body>
  GENKERNELS_INLINE void with_width(int64_t j, const Body& body) const {
    const int64_t units = layer.hidden_size - j * kUnits;
    if constexpr (Cell::kGates == 1) {
      if (units <= kLanes<A>) return body.template operator()<1>();
      if (units <= 2 * kLanes<A>) return body.template operator()<2>();
    }
    body.template operator()<kBlockVectors>();
  }

  // What register v of a block's tile holds: the gate, and the first unit.
  static constexpr int64_t gate_of(int v) { return v / kUnitVectors; }
  static constexpr int64_t unit_of(int64_t first, int v) { return first + v % kUnitVectors * kLanes<A>; }

  void pack(int64_t j, E* to) const {
    const int64_t H = layer.hidden_size, first = j * kUnits;
    const auto pack_gates = [&](const void* weight, int64_t K, E* at) {
      pack_panel_of_rows<E, T, kBlockVectors>(
          K,
          [&](int64_t n) {
            const int64_t unit = first + n % kUnits;
            return unit < H ? static_cast<const T*>(weight) + (n / kUnits * H + unit) * K : nullptr;
          },
          at);
    };
    pack_gates(layer.weight_ih, layer.input_size, to);
    pack_gates(layer.weight_hh, H, to + input_size);
  }
};

// Rows that are finished in turns, so that one does not wait for its last result; more would not fit the registers.
constexpr int kFinishRows = 4;

// Turns the sums of a tile of rows into their new states and gates, each kept where it is asked for. sum(i, g) gives
// row i's sums as the cell's sum() makes them; state(i) its state.
template <class Cell, int kRows, int kFirst = 0, class Sums, class State>
GENKERNELS_INLINE void finish_tile(const Block<typename Cell::T>& block, int64_t H, const Sums& sum, const State& state,
                                   typename Cell::T* output, typename Cell::T* gates) {
  constexpr int kTogether = int(smaller(kFinishRows, kRows - kFirst));
  Cell::template finish<kTogether>(
      block, H, [&](int i, int g) GENKERNELS_LAMBDA { return sum(kFirst + i, g); },
      [&](int i) GENKERNELS_LAMBDA { return state(kFirst + i); }, output ? output + kFirst * H : nullptr,
      gates ? gates + kFirst * Cell::kSaved * H : nullptr);
  if constexpr (kFirst + kTogether < kRows)
    finish_tile<Cell, kRows, kFirst + kTogether>(block, H, sum, state, output, gates);
}

// The same for any number of rows.
template <class Cell, class Sums, class State>
GENKERNELS_INLINE void finish_all_rows(const Block<typename Cell::T>& block, int64_t H, int64_t rows, const Sums& sum,
                                       const State& state, typename Cell::T* output, typename Cell::T* gates) {
  for_row_tiles<kFinishRows>(rows, [&]<int kRows>(int64_t first) {
    Cell::template finish<kRows>(
        block, H, [&](int i, int g) GENKERNELS_LAMBDA { return sum(first + i, g); },
        [&](int i) GENKERNELS_LAMBDA { return state(first + i); }, output ? output + first * H : nullptr,
        gates ? gates + first * Cell::kSaved * H : nullptr);
  });
}

// One step of a block's units, for at most kRunRows rows. Of a last block that is not full, only the kVectors registers
// that hold units are computed.
template <class Cell, int kVectors = kBlockVectors, class T = typename Cell::T>
GENKERNELS_INLINE void forward_run(const Recurrent& layer, const Block<T>& block, Rows<const Operand<T>> input,
                                   Rows<const Operand<T>> state, int64_t rows, T* output, T* gates,
                                   const BlockAhead& ahead) {
  using E = Operand<T>;
  constexpr int kLast = kVectors - 1;
  constexpr ptrdiff_t kStep = GateWeights<Cell>::kStep;
  static_assert(kVectors == kBlockVectors || !Cell::kSplitsLast);
  const int64_t I = layer.input_size, H = layer.hidden_size;
  if (I + H <= kChain)  // one chain for both, out of which only the input's part of a last gate apart has to be taken
    return for_row_tiles(rows, [&]<int kRows>(int64_t first) {
      Vector<Accumulator<T>> sum[kRows][kVectors] = {}, apart[kRows];
      // States are small, inputs may not be: a small product that is added to a large sum is rounded as that is.
      if constexpr (!Cell::kSplitsLast)
        multiply<E, kRows, kVectors>(state[first], state.stride, kGroup<E>, block.state, H, sum, ahead.state, kStep);
      multiply<E, kRows, kVectors>(input[first], input.stride, kGroup<E>, block.input, I, sum, ahead.input, kStep);
      if constexpr (Cell::kSplitsLast) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          apart[i] = sum[i][kLast];
          sum[i][kLast] = Vector<Accumulator<T>>{};
        }
        multiply<E, kRows, kVectors>(state[first], state.stride, kGroup<E>, block.state, H, sum, ahead.state, kStep);
      }
      finish_tile<Cell, kRows>(
          block, H,
          [&](int64_t i, int g)
              GENKERNELS_LAMBDA { return Cell::kSplitsLast && g == kLast ? apart[i] : sum[i][g > kLast ? kLast : g]; },
          [&](int64_t i) GENKERNELS_LAMBDA { return state[first + i]; }, output ? output + first * H : nullptr,
          gates ? gates + first * Cell::kSaved * H : nullptr);
    });
  Vector<Accumulator<T>> from_input[kRunRows][kVectors], from_state[kRunRows][kVectors];
  product_of_rows<E, kVectors>(input.first, input.stride, rows, block.input, I, from_input, ahead.input, kStep);
  product_of_rows<E, kVectors>(state.first, state.stride, rows, block.state, H, from_state, ahead.state, kStep);
  finish_all_rows<Cell>(
      block, H, rows,
      [&](int64_t i, int g) GENKERNELS_LAMBDA {
        return Cell::sum(
            g, [&](int v) GENKERNELS_LAMBDA { return from_input[i][v > kLast ? kLast : v]; },
            [&](int v) GENKERNELS_LAMBDA { return from_state[i][v > kLast ? kLast : v]; });
      },
      [&](int64_t i) GENKERNELS_LAMBDA { return state[i]; }, output, gates);
}

// What the inputs or the states contribute to a row's registers of a block of units.
template <class T>
using BlockSums = Accumulator<T>[kBlockVectors][kLanes<Accumulator<T>>];

// Few rows: reading the weights, as they lie, is most of what they cost. The inputs of several steps are multiplied
// together, so that their weight is read once, where there is memory for them: [blocks][steps of rows begin to end].
template <class Cell, class T = typename Cell::T, class Finish>
void forward_few_rows(const Sequence<Cell>& sequence, const GateWeights<Cell>& weights, int64_t begin, int64_t end,
                      int64_t first_block, int64_t last_block, BlockSums<T>* from_inputs, const Finish& finish) {
  using A = Accumulator<T>;
  using Sums = BlockSums<T>;
  const Recurrent& layer = sequence.layer;
  const int64_t H = layer.hidden_size, most = layer.steps * (end - begin);
  const bool together = from_inputs != nullptr;
  const auto multiply = [&](const T* weight, int64_t K, const auto& block, const T* const* x, int64_t rows, Sums* to) {
    for (int v = 0; v < kBlockVectors; ++v) {
      const int64_t unit = weights.unit_of(block.first, v), units = smaller(kLanes<A>, H - unit);
      if (units > 0)
        multiply_units_of_rows(weight + (weights.gate_of(v) * H + unit) * K, K, K, units, x, rows, to[0][v],
                               kBlockVectors * kLanes<A>);
    }
  };
  const T* weight_ih = static_cast<const T*>(layer.weight_ih);
  const T *input[kDirectRows], *state[kDirectRows];
  if (together) {
    int64_t rows = 0;
    for (int64_t s = 0; s < layer.steps; ++s)
      for (int64_t t = sequence.time(s), b = begin; b < smaller(end, sequence.size(t)); ++b)
        input[rows++] = sequence.input(t, b)[0];
    for (int64_t j = first_block; j < last_block; ++j)
      multiply(weight_ih, layer.input_size, weights.block(j, 0), input, rows, from_inputs + (j - first_block) * most);
  }
  for (int64_t s = 0, done = 0; s < layer.steps; ++s) {
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
        if (!together) multiply(weight_ih, layer.input_size, block, input, rows, from_input);
        multiply(static_cast<const T*>(layer.weight_hh), H, block, state, rows, from_state);
        finish_all_rows<Cell>(
            block, H, rows,
            [&](int64_t b, int g) GENKERNELS_LAMBDA {
              return Cell::sum(
                  g, [&](int v) GENKERNELS_LAMBDA { return load(from_input[b][v]); },
                  [&](int v) GENKERNELS_LAMBDA { return load(from_state[b][v]); });
            },
            [&](int64_t b) GENKERNELS_LAMBDA { return state[b]; }, sequence.output(t, first)[0],
            layer.gates ? sequence.gates(t, first) : nullptr);
      }
      done += rows;
    }
    finish(s);
  }
  finish_streams();
}

// Whether `columns` columns of the weights stay in the cache that each core has to itself.
template <class Cell>
bool weights_stay(const Recurrent& layer, const Runtime& runtime, int64_t columns) {
  const int64_t bytes = Cell::kGates * layer.hidden_size * columns * int64_t(sizeof(Operand<typename Cell::T>));
  return bytes <= runtime.cache / 4 * 3;
}

// How the time loop is shared out: by rows, which do not depend on each other, so that threads never wait; or by units,
// all threads meeting after every step, where a thread would have too few rows to make use of a weight it has read. A
// step reads `columns` columns of the weights.
template <class Cell>
bool splits_units(const Recurrent& layer, const Runtime& runtime, int64_t blocks, int64_t columns) {
  if (layer.steps == 1) return true;  // each weight is packed by the thread that uses it, and nobody waits
  const int64_t few = weights_stay<Cell>(layer, runtime, columns) ? kFewRows : kFewRowsFarAway;
  return blocks >= runtime.threads && layer.batch < few * runtime.threads && runtime.threads > 1;
}

// Runs rows [begin, end) of the units of blocks [first_block, last_block) through the whole sequence, and calls
// finish(s) after step s.
template <class Cell, class T = typename Cell::T, class Finish>
void forward_steps(const Sequence<Cell>& sequence, const GateWeights<Cell>& weights, int64_t begin, int64_t end,
                   int64_t first_block, int64_t last_block, int64_t thread, Operand<T>* scratch, const Finish& finish) {
  using E = Operand<T>;
  const Recurrent& layer = sequence.layer;
  const int64_t I = layer.input_size, H = layer.hidden_size;
  const int64_t input_stride = staged_stride<E>(I), state_stride = staged_stride<E>(H);
  E* staged_state = scratch + (end - begin) * input_stride;
  for (int64_t s = 0; s < layer.steps; ++s) {
    const int64_t at_next_step = s + 1 < layer.steps ? first_block : weights.blocks;
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
      T* gates = layer.gates ? sequence.gates(t, begin) : nullptr;
      for (int64_t j = first_block; j < last_block; ++j) {
        const auto block = weights.block(j, thread);
        weights.with_width(j, [&]<int kVectors>() {
          for (int64_t i = 0; i < rows; i += kRunRows)
            forward_run<Cell, kVectors>(layer, block, {input[i], input.stride}, {state[i], state.stride},
                                        smaller(kRunRows, rows - i), output + i * H,
                                        gates ? gates + i * Cell::kSaved * H : nullptr,
                                        weights.ahead(j + 1 < last_block ? j + 1 : at_next_step, i / kRunRows, block));
        });
      }
    }
    finish(s);
  }
  finish_streams();
}

// Whether there are several steps of fewer rows than a tile.
bool is_narrow(const Recurrent& layer) { return packs_weights(layer) && layer.steps > 1 && layer.batch < kTileRows; }

// Whether two directions share the threads, half for each, instead of all running one direction and then the other, in
// steps too short to meet after (measured: 1.03 to 1.5 times as fast). With two threads a core then reads all of a
// direction's weight at each step.
template <class Cell>
bool runs_side_by_side(const Recurrent& layer, int64_t directions, const Runtime& runtime) {
  return directions == 2 && runtime.threads >= 2 && is_narrow(layer) &&
         weights_stay<Cell>(layer, runtime, layer.hidden_size);
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
template <class Cell>
struct NarrowForward {
  using T = typename Cell::T;
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kRows = 64;  // of steps taken together
  static constexpr int kSums = kBlockVectors * kLanes<A>;

  const Recurrent& layer;
  const Sequence<Cell> sequence;
  const GateWeights<Cell> weights;
  int64_t shares;
  Barrier barrier;
  int64_t input_stride, state_stride;
  E* inputs;       // [shares][kRows][input_stride]
  E* states;       // [shares][kTileRows][state_stride]
  A* from_inputs;  // [blocks][kRows][kBlockVectors][lanes]

  NarrowForward(const Recurrent& of, int64_t directions, const Runtime& runtime)
      : layer(of),
        sequence(of, runtime),
        weights(of, runtime),
        shares(smaller(runtime.threads / directions, weights.blocks)),
        barrier(runtime, shares),
        input_stride(staged_stride<E>(layer.input_size)),
        state_stride(staged_stride<E>(layer.hidden_size)),
        inputs(allocate<E>(runtime, shares * kRows * input_stride)),
        states(allocate<E>(runtime, shares * kTileRows * state_stride)),
        from_inputs(allocate<A>(runtime, weights.blocks * kRows * kSums)) {}

  // Shares [first_share, last_share) of the blocks.
  void steps(int64_t first_share, int64_t last_share) const {
    const int64_t first_block = weights.blocks * first_share / shares,
                  last_block = weights.blocks * last_share / shares;
    for (int64_t first = 0; first < layer.steps;) {
      int64_t last = first, rows = 0;
      E* staged = inputs + first_share * kRows * input_stride;
      do {
        const int64_t t = sequence.time(last++), count = sequence.size(t);
        const Rows<const T> input = sequence.input(t, 0);
        stage<E, T>(staged + rows * input_stride, input_stride, count, layer.input_size,
                    [&](int64_t i) { return input[i]; });
        rows += count;
      } while (last < layer.steps && rows + sequence.size(sequence.time(last)) <= kRows);
      for (int64_t j = first_block; j < last_block; ++j) multiply_inputs(j, first_share, staged, rows);
      rows = 0;
      for (int64_t s = first; s < last; ++s) {
        const int64_t t = sequence.time(s), count = sequence.size(t);
        E* staged_state = states + first_share * kTileRows * state_stride;
        stage<E, T>(staged_state, state_stride, count, layer.hidden_size,
                    [&](int64_t i) { return sequence.state(t, i); });
        for (int64_t j = first_block; j < last_block; ++j)
          for_last_rows<kTileRows - 1>(count, 0, [&]<int kCount>(int64_t) {
            finish_step<kCount>(t, weights.block(j, first_share), staged_state,
                                from_inputs + (j * kRows + rows) * kSums);
          });
        rows += count;
        if (s + 1 < layer.steps) barrier.wait(last_share - first_share, s + 1);
      }
      first = last;
    }
    finish_streams();
  }

  void multiply_inputs(int64_t j, int64_t share, const E* input, int64_t rows) const {
    const Block<T> block = weights.block(j, share);
    A* to = from_inputs + j * kRows * kSums;
    for (int64_t first = 0; first < rows; first += kRunRows) {
      const int64_t run = smaller(kRunRows, rows - first);
      Vector<A> sum[kRunRows][kBlockVectors];
      product_of_rows<E, kBlockVectors>(input + first * input_stride, input_stride, run, block.input, layer.input_size,
                                        sum, weights.ahead(j + 1, first / kRunRows, block).input);
      for (int64_t i = 0; i < run; ++i)
        for (int v = 0; v < kBlockVectors; ++v) store(to + (first + i) * kSums + v * kLanes<A>, sum[i][v]);
    }
  }

  template <int kCount>
  void finish_step(int64_t t, const Block<T>& block, const E* state, const A* from_input) const {
    const int64_t H = layer.hidden_size;
    Vector<A> sum[kCount][kBlockVectors];
    product_of_few_rows<E, kCount, kBlockVectors>(state, state_stride, block.state, H, sum);
    T* output = sequence.output(t, 0)[0];
    T* gates = layer.gates ? sequence.gates(t, 0) : nullptr;
    finish_tile<Cell, kCount>(
        block, H,
        [&](int64_t i, int g) GENKERNELS_LAMBDA {
          return Cell::sum(
              g, [&](int v) GENKERNELS_LAMBDA { return load(from_input + i * kSums + v * kLanes<A>); },
              [&](int v) GENKERNELS_LAMBDA { return sum[i][v]; });
        },
        [&](int64_t i) GENKERNELS_LAMBDA { return state + i * state_stride; }, output, gates);
  }
};

// Each row's state after its last step.
template <class Cell>
void copy_last_states(const Sequence<Cell>& sequence) {
  using T = typename Cell::T;
  const Recurrent& layer = sequence.layer;
  if (layer.h_n == nullptr) return;
  const int64_t H = layer.hidden_size;
  for (int64_t b = 0, t = layer.steps - 1; b < layer.batch; ++b) {
    while (!layer.reverse && sequence.size(t) <= b) --t;
    __builtin_memcpy(static_cast<T*>(layer.h_n) + b * H, sequence.output(layer.reverse ? 0 : t, b)[0],
                     size_t(H) * sizeof(T));
  }
}

template <class Cell, size_t kDirections>
void forward_side_by_side(const NarrowForward<Cell> (&directions)[kDirections], const Runtime& runtime) {
  side_by_side(runtime, directions[0].shares, directions,
               [](const NarrowForward<Cell>& direction, int64_t first, int64_t last) { direction.steps(first, last); });
  for (const NarrowForward<Cell>& direction : directions) copy_last_states(direction.sequence);
}

template <class Cell>
void forward(const Recurrent& layer, const Runtime& runtime) {
  using T = typename Cell::T;
  using E = Operand<T>;
  const Sequence<Cell> sequence(layer, runtime);
  const GateWeights<Cell> weights(layer, runtime);
  const int64_t H = layer.hidden_size, B = layer.batch;
  const int64_t row_scratch = staged_stride<E>(layer.input_size) + staged_stride<E>(H);
  const bool together = !packs_weights(layer) && layer.steps > 1 && layer.steps * B <= kDirectRows;
  BlockSums<T>* from_inputs = together ? allocate<BlockSums<T>>(runtime, weights.blocks * layer.steps * B) : nullptr;
  if (!packs_weights(layer) && weights.blocks < runtime.threads) {
    const int64_t shares = row_shares(layer, runtime);
    parallel(runtime, shares, [&](int64_t i) {
      const int64_t begin = sequence.share(i, shares), end = sequence.share(i + 1, shares);
      forward_few_rows(sequence, weights, begin, end, 0, weights.blocks,
                       from_inputs ? from_inputs + weights.blocks * layer.steps * begin : nullptr, [](int64_t) {});
    });
  } else if (!packs_weights(layer) || splits_units<Cell>(layer, runtime, weights.blocks, layer.input_size + H)) {
    const int64_t shares = smaller(runtime.threads, weights.blocks);
    const Barrier barrier(runtime, shares);
    E* scratch = allocate<E>(runtime, shares * B * row_scratch);
    parallel_ranges(runtime, shares, [&](int64_t first, int64_t last) {
      const int64_t first_block = weights.blocks * first / shares, last_block = weights.blocks * last / shares;
      const auto finish = [&](int64_t s) {
        if (s + 1 < layer.steps) barrier.wait(last - first, s + 1);
      };
      if (!packs_weights(layer))
        return forward_few_rows(sequence, weights, 0, B, first_block, last_block,
                                from_inputs ? from_inputs + first_block * layer.steps * B : nullptr, finish);
      forward_steps(sequence, weights, 0, B, first_block, last_block, first, scratch + first * B * row_scratch, finish);
    });
  } else {
    const int64_t shares = row_shares(layer, runtime);
    E* scratch = allocate<E>(runtime, B * row_scratch);
    parallel(runtime, shares, [&](int64_t i) {
      const int64_t begin = sequence.share(i, shares), end = sequence.share(i + 1, shares);
      forward_steps(sequence, weights, begin, end, 0, weights.blocks, i, scratch + begin * row_scratch, [](int64_t) {});
    });
  }
  copy_last_states(sequence);
}

// One direction, or two of the same sizes.
template <class Cell>
void forward(const Recurrent* layer, int64_t directions, const Runtime& runtime) {
  if (runs_side_by_side<Cell>(layer[0], directions, runtime))
    return forward_side_by_side<Cell, 2>({{layer[0], 2, runtime}, {layer[1], 2, runtime}}, runtime);
  for (int64_t d = 0; d < directions; ++d) {
    if (is_narrow(layer[d]))
      forward_side_by_side<Cell, 1>({{layer[d], 1, runtime}}, runtime);
    else
      forward<Cell>(layer[d], runtime);
    runtime.release(runtime.owner);
  }
}

// A weight [gates H, N] as the right operand of a product with K = gates H, its rows taken in the order of the
// gradient's columns. As of the forward pass, a single step packs each panel where it uses it.
template <class Cell>
struct BackwardWeight {
  using T = typename Cell::T;
  using E = Operand<T>;
  const T* weight;
  int64_t K, N, first_row;  // row k of the operand is row (k + first_row) % K of the weight
  Columns<E> columns;
  bool at_once;
  E* packed;  // all panels, or one for each thread

  // `last_first`: the order of the columns that belong to the input. `panel_shares`: among how many threads the panels
  // of a product are shared out.
  BackwardWeight(const Recurrent& layer, const void* w, int64_t n, bool last_first, int64_t panel_shares,
                 const Runtime& runtime)
      : weight(static_cast<const T*>(w)),
        K(Cell::kGates * layer.hidden_size),
        N(n),
        first_row(last_first ? (Cell::kGates - 1) * layer.hidden_size : 0),
        columns(n, panel_shares),
        at_once(layer.steps > 1),
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
template <class Cell, class T = typename Cell::T, class Store>
void multiply_rows(const BackwardWeight<Cell>& weight, int64_t thread, Rows<const Operand<T>> a, int64_t rows,
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
// A row of `delta` is [kColumns, H], ordered so that both right operands are matrices of neighbouring columns: the
// first kGates go with x and W_ih, those from kStateColumn on with h and W_hh.
template <class Cell>
struct Backward {
  using T = typename Cell::T;
  using E = Operand<T>;
  using A = Accumulator<T>;
  static constexpr int64_t kBlockRows = 512;
  static constexpr int64_t kTileGroup = 16;  // tiles that stay in the L2 cache while the panels pass by

  // Where no gates were saved: the block's inputs and states side by side, and its gates from them.
  struct Recomputed {
    GateWeights<Cell> weights;
    E *inputs, *states;  // [block_rows, stride]
    T* gates;            // [block_rows, kSaved, H]
  };

  const Recurrent& layer;
  const RecurrentGradients& grad;
  const Runtime& runtime;
  const Sequence<Cell> sequence;
  const int64_t I, H, delta_stride;
  int64_t block_rows;
  E* delta;
  A* step_delta;  // the same of a single step of few rows
  A* carry;       // gradient of the hidden state, carried from step to step: [B, H]
  Recomputed recomputed;

  Backward(const Recurrent& of, const RecurrentGradients& gradients, const Runtime& r)
      : layer(of),
        grad(gradients),
        runtime(r),
        sequence(of, r),
        I(of.input_size),
        H(of.hidden_size),
        delta_stride(staged_stride<E>(Cell::kColumns * of.hidden_size)),
        block_rows(is_step(of) ? of.batch : larger(kBlockRows, of.batch)),
        delta(is_step(of) ? nullptr : allocate<E>(r, block_rows * delta_stride)),
        step_delta(is_step(of) ? allocate<A>(r, of.batch * delta_stride) : nullptr),
        carry(allocate<A>(r, of.batch * of.hidden_size)),
        recomputed{{of, true}, nullptr, nullptr, nullptr} {
    if (Cell::kSaved == 0 || layer.gates != nullptr) return;
    recomputed.weights.pack_at(allocate<char>(r, recomputed.weights.bytes()), r);
    recomputed.inputs = allocate<E>(r, block_rows * staged_stride<E>(I));
    recomputed.states = allocate<E>(r, block_rows * staged_stride<E>(H));
    recomputed.gates = allocate<T>(r, block_rows * Cell::kSaved * H);
  }

  // The gradients of units [first, last) of one row at one step, and what of dh passes them by.
  template <class D>
  void delta_row(int64_t t, int64_t b, int64_t base, int64_t first, int64_t last, D* to) const {
    const T* saved =
        recomputed.gates ? recomputed.gates + (sequence.offset(t) + b - base) * Cell::kSaved * H : sequence.gates(t, b);
    const T* output = sequence.output(t, b)[0];
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
      const Vector<A> passed = Cell::delta(dh, H, u, count, saved, state, output, to);
      // A single step adds its product to this; others put theirs in its place where nothing passes by.
      if (Cell::kPassesBy || step_delta != nullptr) store(carry + b * H + u, passed, count);
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
          forward_run<Cell>(layer, block, {inputs + row * input_stride, input_stride},
                            {states + row * state_stride, state_stride}, smaller(kRunRows, end - row),
                            static_cast<T*>(nullptr), recomputed.gates + row * Cell::kSaved * H,
                            recomputed.weights.ahead(j + 1, (row - begin) / kRunRows, block));
      }
    });
  }

  // delta's column of a gate's rows of the weights.
  static constexpr int64_t input_column(int64_t gate) { return (gate + 1) % Cell::kGates; }
  static constexpr int64_t state_column(int64_t gate) { return gate + Cell::kStateColumn; }

  static bool is_step(const Recurrent& layer) {
    const int64_t most = is_widened(layer.dtype) ? kWidenedRowsBackward : kDirectRows;
    return layer.steps == 1 && layer.batch <= most && layer.resets == nullptr;
  }

  // Steps [first, last), the last one first, of rows [begin, end) and the units of panels [first_panel, last_panel) of
  // `weight_hh`. The product reads delta of all units: meet(s) returns when step s has them all.
  template <class Meet>
  void steps(int64_t first, int64_t last, int64_t base, const BackwardWeight<Cell>& weight_hh, int64_t begin,
             int64_t end, int64_t first_panel, int64_t last_panel, int64_t thread, const Meet& meet) const {
    const Columns<E>& columns = weight_hh.columns;
    const int64_t first_unit = columns.first_column(first_panel);
    const int64_t last_unit = smaller(H, columns.first_column(last_panel));
    if (last == layer.steps) begin_carry(begin, end, first_unit, last_unit);
    for (int64_t s = last; s-- > first;) {
      const int64_t t = sequence.time(s), rows = smaller(end, sequence.size(t)) - begin;
      E* rows_delta = delta + (sequence.offset(t) + begin - base) * delta_stride;
      for (int64_t i = 0; i < rows; ++i)
        delta_row(t, begin + i, base, first_unit, last_unit, rows_delta + i * delta_stride);
      meet(s);
      multiply_rows(weight_hh, thread, {rows_delta + Cell::kStateColumn * H, delta_stride}, rows, first_panel,
                    last_panel, layer.batch < kTileRows, [&](int64_t i, int64_t column, int count, Vector<A> sum) {
                      A* to = carry + (begin + i) * H + column;
                      store(to, Cell::kPassesBy ? load(to, count) + sum : sum, count);
                    });
      for (int64_t i = 0; layer.resets && i < rows; ++i)
        if (layer.resets[t * layer.batch + begin + i])
          for (int64_t u = first_unit; u < last_unit; ++u) carry[(begin + i) * H + u] = A(0);
    }
    if (first == 0) end_carry(begin, end, first_unit, last_unit);
  }

  // One step of few rows: all gradients follow from delta at once, and nothing is packed.
  void run_step() const {
    constexpr int64_t kUnits = kLanes<A>;
    if (recomputed.gates != nullptr) compute_gates(0, layer.batch);
    begin_carry(0, layer.batch, 0, H);
    for (int64_t b = 0; b < layer.batch; ++b) delta_row(0, b, 0, 0, H, step_delta + b * delta_stride);
    const T *input[kDirectRows], *state[kDirectRows];
    for (int64_t b = 0; b < layer.batch; ++b) {
      input[b] = sequence.input(0, b)[0];
      state[b] = sequence.state(0, b);
    }
    A* input_sums = allocate<A>(runtime, grad.grad_input ? layer.batch * I : 0);
    const T* weight_ih = static_cast<const T*>(layer.weight_ih);
    const T* weight_hh = static_cast<const T*>(layer.weight_hh);
    const int64_t shares = runtime.threads;
    parallel(runtime, shares, [&](int64_t i) {
      const auto share = [&](int64_t count, int64_t part) { return count * (i + part) / shares; };
      // A thread's columns of a weight, in whole registers.
      const auto columns = [&](int64_t N, int64_t part) {
        return smaller(N, share(ceil_div(N, kUnits), part) * kUnits);
      };
      const auto multiply = [&](int64_t column, const T* weight, int64_t N, int64_t K, A* to) {
        const int64_t first = columns(N, 0), count = columns(N, 1) - first;
        multiply_as_it_lies(step_delta + column * H, delta_stride, layer.batch, weight + first, N, K, count, to + first,
                            N);
      };
      multiply(Cell::kStateColumn, weight_hh, H, Cell::kGates * H, carry);
      end_carry(0, layer.batch, columns(H, 0), columns(H, 1));
      if (grad.grad_input) {
        const int64_t first = columns(I, 0), last = columns(I, 1);
        for (int64_t b = 0; b < layer.batch; ++b)
          __builtin_memset(input_sums + b * I + first, 0, size_t(last - first) * sizeof(A));
        multiply(0, weight_ih + (Cell::kGates - 1) * H * I, I, H, input_sums);
        multiply(1, weight_ih, I, (Cell::kGates - 1) * H, input_sums);
        T* to = static_cast<T*>(grad.grad_input);
        for (int64_t b = 0; b < layer.batch; ++b)
          for (int64_t n = first; n < last; n += kUnits) {
            const int count = int(smaller(kUnits, last - n));
            store(to + b * I + n, load(input_sums + b * I + n, count), count);
          }
      }
      if (!grad.needs_weights) return;
      for (int64_t gate = 0; gate < Cell::kGates; ++gate) {
        const int64_t first = share(H, 0), last = share(H, 1);
        step_weight_rows(gate * H + first, last - first, input_column(gate) * H + first, input, I, grad.grad_weight_ih);
        step_weight_rows(gate * H + first, last - first, state_column(gate) * H + first, state, H, grad.grad_weight_hh);
      }
    });
    if (grad.grad_bias_ih == nullptr) return;
    for (int64_t gate = 0; gate < Cell::kGates; ++gate)
      for (int64_t u = 0; u < H; u += kUnits) {
        const int count = int(smaller(kUnits, H - u));
        const auto write = [&](void* to, int64_t column) {
          Vector<A> sum = {};
          for (int64_t b = 0; b < layer.batch; ++b) sum += load(step_delta + b * delta_stride + column * H + u, count);
          store(static_cast<T*>(to) + gate * H + u, sum, count);
        };
        write(grad.grad_bias_ih, input_column(gate));
        write(grad.grad_bias_hh, state_column(gate));
      }
  }

  // Rows [row, row + count) of a weight's gradient [gates H, N]: sums over the batch of delta's columns from `column`
  // on times the rows of `operand`. A run of neighbouring columns is written at a time.
  void step_weight_rows(int64_t row, int64_t count, int64_t column, const T* const* operand, int64_t N,
                        void* gradient) const {
    T* to = static_cast<T*>(gradient) + row * N;
    const auto tile = [&]<int kRows, int kVectors>(int64_t r, int64_t n, int lanes) {
      Vector<A> sum[kRows][kVectors] = {};
      for (int64_t b = 0; b < layer.batch; ++b) {
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
    E* transposed;             // the block's delta as tiles: [kColumns][gate_tiles][K][kTileRows]
    A *weight_ih, *weight_hh;  // [gates H, I], [gates H, H]
    double* bias;              // [kColumns H]. Sums over all rows of all steps, at last in double
  };

  // Shared out by rows, or by panels where there are few rows.
  void input_gradient(int64_t base, int64_t rows, const BackwardWeight<Cell>& weight_ih) const {
    const int64_t shares = input_shares(rows, weight_ih);
    parallel(runtime, shares, [&](int64_t i) { input_gradient_share(base, rows, weight_ih, i, shares); });
  }

  static bool shares_rows(int64_t tiles, const BackwardWeight<Cell>& weight_ih, const Runtime& runtime) {
    return weight_ih.at_once && tiles >= runtime.threads;
  }

  int64_t input_shares(int64_t rows, const BackwardWeight<Cell>& weight_ih) const {
    const int64_t tiles = ceil_div(rows, kTileRows);
    return smaller(runtime.threads, shares_rows(tiles, weight_ih, runtime) ? tiles : weight_ih.columns.panels);
  }

  void input_gradient_share(int64_t base, int64_t rows, const BackwardWeight<Cell>& weight_ih, int64_t i,
                            int64_t shares) const {
    const int64_t tiles = ceil_div(rows, kTileRows), panels = weight_ih.columns.panels;
    const bool by_rows = shares_rows(tiles, weight_ih, runtime);
    T* to = static_cast<T*>(grad.grad_input) + base * I;
    const int64_t begin = by_rows ? tiles * i / shares * kTileRows : 0;
    const int64_t end = by_rows ? smaller(rows, tiles * (i + 1) / shares * kTileRows) : rows;
    multiply_rows(weight_ih, i, {delta + begin * delta_stride, delta_stride}, end - begin,
                  by_rows ? 0 : panels * i / shares, by_rows ? panels : panels * (i + 1) / shares, false,
                  [&](int64_t row, int64_t column, int count, Vector<A> sum) {
                    store(to + (begin + row) * I + column, sum, count);
                  });
  }

  // Whether the weights' gradients read inputs, states and delta where they lie: as matrices, whose columns are whole
  // registers and whose rows neither share the cache's sets nor, delta's, lie far apart.
  bool reads_in_place() const {
    if constexpr (!__is_same(T, E)) return false;
    return layer.batch > 0 && layer.batch_sizes == nullptr && layer.resets == nullptr &&
           layer.input_stride_t == layer.batch * layer.input_stride_b && H % kTileRows == 0 &&
           delta_stride * int64_t(sizeof(E)) <= kFarApart && are_panels(Columns<E>(I), layer.input_stride_b) &&
           are_panels(Columns<E>(H), H);
  }

  WeightGradients prepare_weight_gradients() const {
    const bool needed = grad.needs_weights;
    const Columns<E> input_columns(needed ? I : 0), state_columns(needed ? H : 0);
    const int64_t gate_tiles = needed ? ceil_div(H, kTileRows) : 0;
    const int64_t K = reads_in_place() ? 0 : ceil_div(block_rows, kGroup<E>) * kGroup<E>;
    const auto sums = [&](void* gradient, int64_t columns) {
      if constexpr (__is_same(T, A)) return static_cast<A*>(gradient);
      return allocate<A>(runtime, needed ? Cell::kGates * H * columns : 0);
    };
    return {input_columns,
            state_columns,
            gate_tiles,
            allocate<E>(runtime, input_columns.packed_size(K)),
            allocate<E>(runtime, state_columns.packed_size(K)),
            allocate<E>(runtime, Cell::kColumns * gate_tiles * kTileRows * K),
            sums(grad.grad_weight_ih, I),
            sums(grad.grad_weight_hh, H),
            allocate<double>(runtime, Cell::kColumns * H)};
  }

  // The rows of delta^T that belong to a tile of units.
  const E* delta_tile(const WeightGradients& of, int64_t gate, int64_t unit, int64_t K) const {
    return of.transposed + (gate * of.gate_tiles * kTileRows + unit) * K;
  }

  // Neighbouring rows of a matrix, which are rows first to first + count of a block.
  struct Part {
    Rows<const T> rows;
    int64_t first, count;
  };

  // All gradients that follow from a block's delta. Nobody waits in between.
  void gradients_in_place(const WeightGradients& to, int64_t base, int64_t rows, bool is_first_block,
                          const BackwardWeight<Cell>& weight_ih) const {
    const int64_t B = layer.batch, shares = runtime.threads, tiles = Cell::kGates * to.gate_tiles;
    const T *input = static_cast<const T*>(layer.input), *hx = static_cast<const T*>(layer.hx);
    const T* states = static_cast<const T*>(layer.output) + (layer.reverse ? base + B : base - B) * H;
    const bool has_start = layer.reverse ? base + rows == sequence.rows() : base == 0;
    const int64_t start = has_start ? B : 0;  // rows whose states are hx
    const Part of_input[] = {{{input + base * layer.input_stride_b, layer.input_stride_b}, 0, rows}, {}};
    const Part of_start = {{hx, H}, layer.reverse ? rows - start : 0, start};
    const int64_t first = layer.reverse ? 0 : start;
    const Part of_states[] = {of_start, {{states + first * H, H}, first, rows - start}};
    const int64_t shares_of_input = grad.grad_input ? input_shares(rows, weight_ih) : 0;
    parallel(runtime, shares, [&](int64_t i) {
      if (i < shares_of_input) input_gradient_share(base, rows, weight_ih, i, shares_of_input);
      const int64_t last = tiles * (i + 1) / shares;
      const auto accumulate = [&](const Columns<E>& columns, const Part(&parts)[2], int64_t column0, A* sums,
                                  int64_t N) {
        bool is_first = is_first_block;
        for (const Part& part : parts)
          for (int64_t k = 0; k < part.count; k += kBlockRows, is_first = false)
            for (int64_t group = tiles * i / shares; group < last; group += kTileGroup)
              for (int64_t p = 0; p < columns.panels; ++p)
                columns.with_width(p, [&]<int kVectors>() {
                  for (int64_t tile = group; tile < smaller(group + kTileGroup, last); ++tile) {
                    const int64_t column = column0 + tile / to.gate_tiles, unit = tile % to.gate_tiles * kTileRows;
                    A* rows_to = sums + ((column + Cell::kGates - 1) % Cell::kGates * H + unit) * N;
                    const E* of_tile = delta + (part.first + k) * delta_stride + column * H + unit;
                    const E* panel = reinterpret_cast<const E*>(part.rows[k]) + columns.first_column(p);
                    add_tile<kVectors, E>(columns, p, {panel, part.rows.stride}, {of_tile, delta_stride},
                                          smaller(kBlockRows, part.count - k), kTileRows, rows_to, N, is_first);
                  }
                });
      };
      accumulate(to.input_columns, of_input, 0, to.weight_ih, I);
      accumulate(to.state_columns, of_states, Cell::kStateColumn, to.weight_hh, H);
      const int64_t vectors = ceil_div(Cell::kColumns * H, kLanes<A>);
      add_columns<A>(
          rows, vectors * i / shares * kLanes<A>, smaller(Cell::kColumns * H, vectors * (i + 1) / shares * kLanes<A>),
          [&](int64_t row, int64_t n) GENKERNELS_LAMBDA { return load(delta + row * delta_stride + n, kLanes<A>); },
          to.bias, is_first_block);
    });
  }

  void weight_gradients(const WeightGradients& to, int64_t base, int64_t rows, bool is_first_block) const {
    const int64_t panels = to.input_columns.panels + to.state_columns.panels;
    const int64_t tiles = Cell::kColumns * to.gate_tiles, K = ceil_div(rows, kGroup<E>) * kGroup<E>;
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
      const auto accumulate = [&](const Columns<E>& columns, const E* packed, int64_t column0, A* sums, int64_t N) {
        const int64_t tiles = Cell::kGates * to.gate_tiles, last = tiles * (i + 1) / shares;
        for (int64_t k = 0; k < rows || k == 0; k += kBlockRows)
          for (int64_t group = tiles * i / shares; group < last; group += kTileGroup)
            for (int64_t p = 0; p < columns.panels; ++p)
              columns.with_width(p, [&]<int kVectors>() {
                const E* panel = packed + columns.offset(p, rows) + k / kGroup<E> * Panel<E, kVectors>::kStep;
                for (int64_t tile = group; tile < smaller(group + kTileGroup, last); ++tile) {
                  const int64_t column = column0 + tile / to.gate_tiles, unit = tile % to.gate_tiles * kTileRows;
                  // The input's last gate is delta's first column; the rows of both gradients are in the gates' order.
                  A* rows_to = sums + ((column + Cell::kGates - 1) % Cell::kGates * H + unit) * N;
                  const E* of_tile = delta_tile(to, column, unit, K) + k / kGroup<E> * kTileStep<E>;
                  add_tile<kVectors, E>(columns, p, {panel, Panel<E, kVectors>::kStep}, {of_tile, kTileStep<E>},
                                        smaller(kBlockRows, rows - k), int(smaller(kTileRows, H - unit)), rows_to, N,
                                        is_first_block && k == 0);
                }
              });
      };
      accumulate(to.input_columns, to.input, 0, to.weight_ih, I);
      accumulate(to.state_columns, to.state, Cell::kStateColumn, to.weight_hh, H);
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
        narrow_share(grad.grad_weight_ih, from.weight_ih, Cell::kGates * H * I);
        narrow_share(grad.grad_weight_hh, from.weight_hh, Cell::kGates * H * H);
      });
    }
    if (grad.grad_bias_ih == nullptr) return;
    for (int64_t gate = 0; gate < Cell::kGates; ++gate)
      for (int64_t u = 0; u < H; ++u) {
        const auto write = [&](void* to, int64_t column) {
          narrow(static_cast<T*>(to) + gate * H + u, A(from.bias[column * H + u]));
        };
        write(grad.grad_bias_ih, input_column(gate));
        write(grad.grad_bias_hh, state_column(gate));
      }
  }

  static void narrow(T* to, A value) { store(to, broadcast(value), 1); }
};

// The way back through a sequence, block by block.
template <class Cell>
struct BackwardBlocks {
  using T = typename Cell::T;
  using E = Operand<T>;

  Backward<Cell> pass;
  bool is_split_by_units;
  const BackwardWeight<Cell> weight_hh, weight_ih;
  typename Backward<Cell>::WeightGradients sums;
  int64_t panels, shares;
  Barrier barrier;
  int64_t first, last;         // steps of the block
  int64_t base = 0, rows = 0;  // and its rows

  BackwardBlocks(const Recurrent& layer, const RecurrentGradients& grad, int64_t directions, const Runtime& runtime)
      : pass(layer, grad, runtime),
        is_split_by_units(layer.batch < kTileRows ||
                          splits_units<Cell>(layer, runtime, Columns<E>(layer.hidden_size).panels, layer.hidden_size)),
        weight_hh(layer, layer.weight_hh, layer.hidden_size, false,
                  is_split_by_units ? runtime.threads / directions : 1, runtime),
        // A layer whose input needs no gradient packs nothing for it.
        weight_ih(layer, layer.weight_ih, grad.grad_input ? layer.input_size : 0, true,
                  layer.steps == 1 ? runtime.threads : 1, runtime),
        sums(pass.prepare_weight_gradients()),
        panels(weight_hh.columns.panels),
        shares(is_split_by_units ? smaller(runtime.threads / directions, panels) : row_shares(layer, runtime)),
        barrier(runtime, shares),
        first(layer.steps),
        last(layer.steps) {}

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
      return pass.steps(first, last, base, weight_hh, 0, pass.layer.batch, panels * begin / shares,
                        panels * end / shares, begin, [&](int64_t s) { barrier.wait(end - begin, last - s); });
    for (int64_t i = begin; i < end; ++i)
      pass.steps(first, last, base, weight_hh, pass.sequence.share(i, shares), pass.sequence.share(i + 1, shares), 0,
                 panels, i, [](int64_t) {});
  }

  void finish_block() const {
    if (pass.grad.needs_weights && pass.reads_in_place())
      return pass.gradients_in_place(sums, base, rows, last == pass.layer.steps, weight_ih);
    if (pass.grad.grad_input) pass.input_gradient(base, rows, weight_ih);
    if (pass.grad.needs_weights) pass.weight_gradients(sums, base, rows, last == pass.layer.steps);
  }

  void finish() const {
    if (pass.grad.needs_weights) pass.finish_weight_gradients(sums);
  }
};

// However a sequence is cut into as few blocks as hold it, from its start or from its end, there are as many.
template <class Cell, size_t kDirections>
void backward_side_by_side(BackwardBlocks<Cell> (&&directions)[kDirections], const Runtime& runtime) {
  while (directions[0].has_more()) {
    for (auto& each : directions) each.take_block();
    side_by_side(runtime, directions[0].shares, directions,
                 [](const BackwardBlocks<Cell>& each, int64_t begin, int64_t end) { each.run_steps(begin, end); });
    for (const auto& each : directions) each.finish_block();
  }
  for (const auto& each : directions) each.finish();
}

// One direction, or two of the same sizes.
template <class Cell>
void backward(const Recurrent* layer, const RecurrentGradients* grad, int64_t directions, const Runtime& runtime) {
  if (runs_side_by_side<Cell>(layer[0], directions, runtime))
    return backward_side_by_side<Cell, 2>({{layer[0], grad[0], 2, runtime}, {layer[1], grad[1], 2, runtime}}, runtime);
  for (int64_t d = 0; d < directions; ++d) {
    if (Backward<Cell>::is_step(layer[d]))
      Backward<Cell>(layer[d], grad[d], runtime).run_step();
    else
      backward_side_by_side<Cell, 1>({{layer[d], grad[d], 1, runtime}}, runtime);
    runtime.release(runtime.owner);
  }
}

// The passes of a cell for the dtype of a call.
template <template <class> class Cell>
void run_forward(const Recurrent* layer, int64_t directions, const Runtime& runtime) {
  switch (layer->dtype) {
    case DType::float32: return forward<Cell<float>>(layer, directions, runtime);
    case DType::float64: return forward<Cell<double>>(layer, directions, runtime);
    case DType::bfloat16: return forward<Cell<bfloat16>>(layer, directions, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

template <template <class> class Cell>
void run_backward(const Recurrent* layer, const RecurrentGradients* grad, int64_t directions, const Runtime& runtime) {
  switch (layer->dtype) {
    case DType::float32: return backward<Cell<float>>(layer, grad, directions, runtime);
    case DType::float64: return backward<Cell<double>>(layer, grad, directions, runtime);
    case DType::bfloat16: return backward<Cell<bfloat16>>(layer, grad, directions, runtime);
    case DType::float16: break;  // attention and dropout alone have it
  }
}

}  // namespace
}  // namespace genkernels::GENKERNELS_LEVEL
