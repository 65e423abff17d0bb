// oneDNN's lbr_gru ("linear before reset", the definition of torch.nn.GRU) behind a few C functions.
//
// Arrays are float32. Weights are [I, 3, H] and [H, 3, H], biases [4, H], gates in oneDNN's order:
// update, reset, candidate, and for biases the candidate's recurrent part.
#include <cstring>
#include <map>
#include <memory>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using dnnl::memory;
using tag = memory::format_tag;
using type = memory::data_type;

namespace {

std::string failure;
bool unimplemented = false;

struct Gru {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::vector<std::pair<dnnl::primitive, std::unordered_map<int, memory>>> program;
  std::map<std::string, memory> results;
  std::map<std::string, memory::desc> plain;  // their layout when read

  memory allocate(const memory::desc& desc) {
    memory result(desc, engine);
    std::memset(result.get_data_handle(), 0, desc.get_size());
    return result;
  }

  memory load(const float* values, const memory::desc& from, const memory::desc& to) {
    memory source(from, engine, const_cast<float*>(values));
    memory result = allocate(to);
    dnnl::reorder(source, result).execute(stream, source, result);
    stream.wait();
    return result;
  }

  // Part of the program: the reorder is paid for at every step.
  memory reordered(const memory& source, const memory::desc& to) {
    if (source.get_desc() == to) return source;
    memory result = allocate(to);
    program.push_back({dnnl::reorder(source, result), {{DNNL_ARG_FROM, source}, {DNNL_ARG_TO, result}}});
    return result;
  }

  void result(const char* name, const memory& value, const memory::desc& layout) {
    results.emplace(name, value);
    plain.emplace(name, layout);
  }

  void run() {
    for (auto& [primitive, arguments] : program) primitive.execute(stream, arguments);
    stream.wait();
  }
};

template <typename Function>
auto guarded(Function function) -> decltype(function()) {
  try {
    return function();
  } catch (const dnnl::error& error) {
    failure = std::string(error.what()) + " (status " + std::to_string(error.status) + ")";
    unimplemented = error.status == dnnl_unimplemented;
  } catch (const std::exception& error) {
    failure = error.what();
    unimplemented = false;
  }
  return {};
}

}  // namespace

extern "C" {

// The message of the last call that returned null or false.
const char* gru_failure() { return failure.c_str(); }

// Whether that call asked for what oneDNN does not have on this CPU.
bool gru_unimplemented() { return unimplemented; }

// major * 10000 + minor * 100 + patch of the library that was loaded.
int gru_library_version() {
  const dnnl_version_t* version = dnnl_version();
  return version->major * 10000 + version->minor * 100 + version->patch;
}

void gru_destroy(Gru* gru) { delete gru; }

bool gru_step(Gru* gru) {
  return guarded([&] {
    gru->run();
    return true;
  });
}

// Copies a result of the last step to `values`.
bool gru_read(Gru* gru, const char* name, float* values) {
  return guarded([&] {
    memory& source = gru->results.at(name);
    memory target(gru->plain.at(name), gru->engine, values);
    dnnl::reorder(source, target).execute(gru->stream, source, target);
    gru->stream.wait();
    return true;
  });
}

Gru* gru_create(long T, long B, long I, long H, bool training, bool bf16, const float* input, const float* hx,
                const float* weight_ih, const float* weight_hh, const float* bias, const float* cotangent,
                const float* cotangent_h) {
  return guarded([&]() -> Gru* {
    auto owned = std::make_unique<Gru>();
    Gru& gru = *owned;
    const type number = bf16 ? type::bf16 : type::f32;
    const memory::dims x_size{T, B, I}, y_size{T, B, H}, h_size{1, 1, B, H};
    const memory::dims ih_size{1, 1, I, 3, H}, hh_size{1, 1, H, 3, H}, bias_size{1, 1, 4, H};
    const memory::desc x_plain(x_size, type::f32, tag::tnc), y_plain(y_size, type::f32, tag::tnc),
        h_plain(h_size, type::f32, tag::ldnc), ih_plain(ih_size, type::f32, tag::ldigo),
        hh_plain(hh_size, type::f32, tag::ldigo), bias_plain(bias_size, type::f32, tag::ldgo);
    const memory::desc x_desc(x_size, number, tag::tnc), y_desc(y_size, number, tag::tnc),
        h_desc(h_size, number, tag::ldnc), ih_any(ih_size, number, tag::any), hh_any(hh_size, number, tag::any);

    const dnnl::lbr_gru_forward::primitive_desc forward(
        gru.engine, training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference,
        dnnl::rnn_direction::unidirectional_left2right, x_desc, h_desc, ih_any, hh_any, bias_plain, y_desc, h_desc);

    std::unordered_map<int, memory> arguments{
        {DNNL_ARG_SRC_LAYER, gru.load(input, x_plain, x_desc)},
        {DNNL_ARG_SRC_ITER, gru.load(hx, h_plain, h_desc)},
        {DNNL_ARG_BIAS, gru.load(bias, bias_plain, bias_plain)},
        {DNNL_ARG_DST_LAYER, gru.allocate(y_desc)},
        {DNNL_ARG_DST_ITER, gru.allocate(h_desc)},
    };
    gru.result("output", arguments.at(DNNL_ARG_DST_LAYER), y_plain);
    gru.result("h_n", arguments.at(DNNL_ARG_DST_ITER), h_plain);
    if (!training) {  // constant weights are packed once
      arguments[DNNL_ARG_WEIGHTS_LAYER] = gru.load(weight_ih, ih_plain, forward.weights_layer_desc());
      arguments[DNNL_ARG_WEIGHTS_ITER] = gru.load(weight_hh, hh_plain, forward.weights_iter_desc());
      gru.program.push_back({dnnl::lbr_gru_forward(forward), arguments});
      return owned.release();
    }

    // An optimizer changes the weights between steps, so every step packs them anew.
    const memory ih = gru.load(weight_ih, ih_plain, ih_plain), hh = gru.load(weight_hh, hh_plain, hh_plain);
    arguments[DNNL_ARG_WORKSPACE] = gru.allocate(forward.workspace_desc());
    arguments[DNNL_ARG_WEIGHTS_LAYER] = gru.reordered(ih, forward.weights_layer_desc());
    arguments[DNNL_ARG_WEIGHTS_ITER] = gru.reordered(hh, forward.weights_iter_desc());
    gru.program.push_back({dnnl::lbr_gru_forward(forward), arguments});

    // Through the C function, since the C++ constructor does not take the flag: without it the
    // gradients of the weights are added to what the step before left.
    dnnl_primitive_desc_t handle = nullptr;
    dnnl::error::wrap_c_api(dnnl_lbr_gru_backward_primitive_desc_create(
                                &handle, gru.engine.get(), dnnl_backward, dnnl_unidirectional_left2right, x_desc.get(),
                                h_desc.get(), ih_any.get(), hh_any.get(), bias_plain.get(), y_desc.get(), h_desc.get(),
                                x_desc.get(), h_desc.get(), ih_any.get(), hh_any.get(), bias_plain.get(), y_desc.get(),
                                h_desc.get(), dnnl_rnn_flags_diff_weights_overwrite, forward.get(), nullptr),
                            "lbr_gru has no such backward pass");
    const dnnl::lbr_gru_backward::primitive_desc backward(handle);

    arguments[DNNL_ARG_WEIGHTS_LAYER] = gru.reordered(ih, backward.weights_layer_desc());
    arguments[DNNL_ARG_WEIGHTS_ITER] = gru.reordered(hh, backward.weights_iter_desc());
    arguments[DNNL_ARG_DIFF_DST_LAYER] = gru.load(cotangent, y_plain, y_desc);
    arguments[DNNL_ARG_DIFF_DST_ITER] = gru.load(cotangent_h, h_plain, h_desc);
    arguments[DNNL_ARG_DIFF_SRC_LAYER] = gru.allocate(x_desc);
    arguments[DNNL_ARG_DIFF_SRC_ITER] = gru.allocate(h_desc);
    arguments[DNNL_ARG_DIFF_BIAS] = gru.allocate(bias_plain);
    const memory diff_ih = gru.allocate(backward.diff_weights_layer_desc());
    const memory diff_hh = gru.allocate(backward.diff_weights_iter_desc());
    arguments[DNNL_ARG_DIFF_WEIGHTS_LAYER] = diff_ih;
    arguments[DNNL_ARG_DIFF_WEIGHTS_ITER] = diff_hh;
    gru.program.push_back({dnnl::lbr_gru_backward(backward), arguments});

    gru.result("grad of input", arguments.at(DNNL_ARG_DIFF_SRC_LAYER), x_plain);
    gru.result("grad of hx", arguments.at(DNNL_ARG_DIFF_SRC_ITER), h_plain);
    gru.result("grad of bias", arguments.at(DNNL_ARG_DIFF_BIAS), bias_plain);
    gru.result("grad of weight_ih", gru.reordered(diff_ih, ih_plain), ih_plain);
    gru.result("grad of weight_hh", gru.reordered(diff_hh, hh_plain), hh_plain);
    return owned.release();
  });
}

}  // extern "C"
