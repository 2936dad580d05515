// The top of the network in one pass: from the bottom MLP's output and the vectors, joined as by `cat`, through the top MLP
// to the loss, and back to all of its gradients. What is between never leaves the caches of the core that makes it.
//
// Products, packing and lanes are those of dense.cc. A lane goes through its examples slice by slice: forward, then
// backward, panel by panel; then what the slice adds to the gradients of the kernels.

#include <cmath>
#include <vector>

#include "dense_core.h"
#include "packing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int kTopScratch = 20, kTopSums = 21;  // of the uses of memory that a thread keeps

// Parts of one piece of memory, each on a line of its own.
struct Places {
  int64_t size = 0;
  int64_t Add(int64_t words) {
    const int64_t at = size;
    size += RoundUp(words, 16);
    return at;
  }
};

struct Layer {
  const float *kernel, *bias;  // [k, n], [n]
  int64_t k, n;
  // Where in a thread's memory: W^T and W, packed; h, [k, a slice]; g^T of a slice, by 64 features.
  int64_t forward, backward, h, g;
  // Where in a lane's sums: gradients of the kernel, [k, ld], and of the bias.
  int64_t gkernel, gbias, ld;
};

template <typename T>
struct Call {
  const float *bottom, *vectors, *label, *weight, *logit_kernel;  // [bottom_rows, B], [B, columns], [B], [B], [last n]
  float logit_bias, total;
  float *gbottom, *gvectors;
  int64_t bottom_rows, columns, examples, id;
  std::vector<Layer> layers;
  // Where in a thread's memory: y of the last layer, [n, a slice]; the gradient before a layer's ReLU, by panels; packed
  // panel; gradient of the vectors of a panel; what makes up the gradients of biases and logit kernel.
  int64_t y, g, packed, gz, bias_sums, logit_sums, memory;
  int64_t glogit_kernel, glogit_bias, loss, lane_size;  // where in a lane's sums
  int64_t widest;

  int64_t last() const { return layers.back().n; }
};

template <typename T>
const int64_t kRow = Stride(kSliceWords<T>) * kPerWord<T>;  // elements from one row of a slice to the next

template <typename T>
void LayOut(Call<T>& call) {
  Places memory, sums;
  int64_t words = 0;
  call.widest = 0;
  for (Layer& layer : call.layers) {
    const int64_t k_words = WordsOf<T>(layer.k), n_words = WordsOf<T>(layer.n);
    const int64_t rows = RoundUp(layer.k, Product<T>::kRowStep);
    layer.ld = RoundUp(layer.n, kPanel);
    layer.forward = memory.Add(RoundUp(layer.n, Product<T>::kRowStep) * Stride(k_words));
    layer.backward = memory.Add(rows * Stride(n_words));
    layer.h = memory.Add(rows * Stride(kSliceWords<T>));
    layer.g = memory.Add(layer.ld * kSliceWords<T>);
    layer.gkernel = sums.Add(rows * layer.ld);
    layer.gbias = sums.Add(layer.n);
    words = std::max({words, k_words, n_words});
    call.widest = std::max(call.widest, RoundUp(layer.n, 16));
  }
  call.y = memory.Add(call.last() * Stride(kSliceWords<T>));
  call.g = memory.Add(call.widest * kSliceWords<T>);
  call.packed = memory.Add(kPanel * words);
  call.gz = memory.Add(RoundUp(call.layers[0].k, 16) * kPanel);
  call.bias_sums = memory.Add(16 * call.widest * call.layers.size());
  call.logit_sums = memory.Add(16 * call.last());
  call.memory = memory.size;
  call.glogit_kernel = sums.Add(call.last());
  call.glogit_bias = sums.Add(1);
  call.loss = sums.Add(1);
  call.lane_size = sums.size;
}

// A lane at work in the memory of its thread.
template <typename T>
class Lane {
 public:
  Lane(const Call<T>& call, float* out) : call_(call), memory_(Scratch<kTopScratch>(call.memory)), out_(out) {}

  // The panels [first, last). Layer by layer, so that a layer's weights stay in the second-level cache for a slice.
  void Run(int64_t first, int64_t last) {
    if (IsFirstOf(call_.id)) PackWeights();
    std::fill_n(Floats(call_.bias_sums), 16 * call_.widest * Layers(), 0.f);
    std::fill_n(Floats(call_.logit_sums), 16 * call_.last(), 0.f);
    for (int64_t start = first; start < last; start += kSlicePanels) {
      const int64_t panels = std::min(kSlicePanels, last - start);
      auto for_panels = [&](const auto& work) {
        for (int64_t i = 0; i < panels; ++i) work(i, (start + i) * kPanel);
      };
      for_panels([&](int64_t i, int64_t example) { Join(i, example); });
      for (int64_t l = 0; l < Layers(); ++l) {
        for_panels([&](int64_t i, int64_t) { Forward(l, i); });
      }
      for_panels([&](int64_t i, int64_t example) { Loss(i, example); });
      for (int64_t l = Layers() - 1; l >= 0; --l) {
        for_panels([&](int64_t i, int64_t example) { Backward(l, i, example); });
        const Layer& layer = call_.layers[l];
        AddKernelGradient(product_, memory_ + layer.h, memory_ + layer.g, panels, layer.k, layer.n, out_ + layer.gkernel,
                          layer.ld, start > first);
      }
    }
    for (int64_t l = 0; l < Layers(); ++l) SumRows(BiasSum(l, 0), call_.layers[l].n, out_ + call_.layers[l].gbias);
    SumRows(Floats(call_.logit_sums), call_.last(), out_ + call_.glogit_kernel);
    out_[call_.glogit_bias] = glogit_bias_;
    out_[call_.loss] = loss_;
  }

 private:
  int64_t Layers() const { return call_.layers.size(); }
  float* Floats(int64_t at) { return reinterpret_cast<float*>(memory_ + at); }
  float* BiasSum(int64_t l, int64_t row) { return Floats(call_.bias_sums) + 16 * (l * call_.widest + row); }
  // A panel of what enters a layer or, with the number of layers, of the last one's y: a row for each feature.
  T* Activations(int64_t l, int64_t i) {
    return reinterpret_cast<T*>(memory_ + (l < Layers() ? call_.layers[l].h : call_.y)) + i * kPanel;
  }
  T* Gradient(int64_t i) { return reinterpret_cast<T*>(memory_ + call_.g + i * call_.widest * kPanelWords<T>); }

  void PackWeights() {
    for (const Layer& layer : call_.layers) {
      PackTransposed<T>(layer.kernel, layer.k, layer.n, WordsOf<T>(layer.k), memory_ + layer.forward);
      PackRows<T>(layer.kernel, layer.k, layer.n, WordsOf<T>(layer.n), memory_ + layer.backward);
    }
  }

  // Bottom and vectors under each other.
  void Join(int64_t i, int64_t example) {
    T* z = Activations(0, i);
    for (int64_t row = 0; row < call_.bottom_rows; ++row, z += kRow<T>) {
      ConvertRow(call_.bottom + row * call_.examples + example, z);
    }
    const float* vectors = call_.vectors + example * call_.columns;
    int64_t column = 0;
    for (; column + 16 <= call_.columns; column += 16) {
      alignas(64) Word turned[16 * kPanel];
      for (int64_t e = 0; e < kPanel; e += 16) {
        Transpose16(reinterpret_cast<const Word*>(vectors) + e * call_.columns + column, call_.columns, turned + e, kPanel);
      }
      for (int64_t c = 0; c < 16; ++c, z += kRow<T>) ConvertRow(reinterpret_cast<const float*>(turned) + c * kPanel, z);
    }
    for (; column < call_.columns; ++column, z += kRow<T>) {
      for (int64_t e = 0; e < kPanel; ++e) z[e] = Round<T>(vectors[e * call_.columns + column]);
    }
  }

  void Forward(int64_t l, int64_t i) {
    const Layer& layer = call_.layers[l];
    T* y = Activations(l + 1, i);
    Multiply(Activations(l, i), kRow<T>, layer.k, layer.forward, layer.n, [&](int64_t row, const float* c) {
      Activate<T, false>(c, layer.bias[row], nullptr, y + row * kRow<T>, nullptr, nullptr);
    });
  }

  // The product of packed weights, [rows, k], and a panel, [k, 64] of `ld`, row by row.
  template <typename Use>
  void Multiply(const T* panel, int64_t ld, int64_t k, int64_t weights, int64_t rows, const Use& use) {
    const int64_t words = WordsOf<T>(k);
    PackPanel(panel, ld, k, words, memory_ + call_.packed);
    ForRowsOfProduct(product_, memory_ + weights, words, memory_ + call_.packed, rows, use);
  }

  // The loss, and the gradient by the last layer.
  void Loss(int64_t i, int64_t example) {
    const T* y = Activations(Layers(), i);
    Vector logits[kVectors], x[kVectors];
    for (Vector& logit : logits) logit = Vector{} + call_.logit_bias;
    for (int64_t row = 0; row < call_.last(); ++row) {
      LoadRow(y + row * kRow<T>, x);
      for (int v = 0; v < kVectors; ++v) logits[v] += call_.logit_kernel[row] * x[v];
    }
    alignas(64) float logit[kPanel];
    StoreRow(logits, logit);
    for (int64_t e = 0; e < kPanel; ++e) {
      const float share = call_.weight[example + e] / call_.total, tail = std::exp(-std::abs(logit[e]));
      const float clicked = (logit[e] < 0 ? tail : 1) / (1 + tail);
      loss_ += share * (std::max(logit[e], 0.f) + std::log1p(tail) - call_.label[example + e] * logit[e]);
      logit[e] = share * (clicked - call_.label[example + e]);
      glogit_bias_ += logit[e];
    }
    Vector glogit[kVectors];
    LoadRow(logit, glogit);
    for (int64_t row = 0; row < call_.last(); ++row) {
      Vector total = {};
      LoadRow(y + row * kRow<T>, x);
      for (int v = 0; v < kVectors; ++v) {
        total += glogit[v] * x[v];
        x[v] = call_.logit_kernel[row] * glogit[v];
      }
      float* sum = Floats(call_.logit_sums) + 16 * row;
      StoreVector(LoadVector(sum) + total, sum);
      ThroughRelu(Layers() - 1, row, i, x);
    }
  }

  // A row of the gradient by a layer's y, which becomes that before the ReLU.
  void ThroughRelu(int64_t l, int64_t row, int64_t i, Vector* g) {
    Vector y[kVectors], total = {};
    LoadRow(Activations(l + 1, i) + row * kRow<T>, y);
    for (int v = 0; v < kVectors; ++v) {
      g[v] = y[v] > 0 ? g[v] : Vector{};
      total += g[v];
    }
    StoreRow(g, Gradient(i) + row * kPanel);
    StoreVector(LoadVector(BiasSum(l, row)) + total, BiasSum(l, row));
  }

  void Backward(int64_t l, int64_t i, int64_t example) {
    const Layer& layer = call_.layers[l];
    TransposePanel(Gradient(i), layer.n, i, memory_ + layer.g);
    Vector x[kVectors];
    Multiply(Gradient(i), kPanel, layer.n, layer.backward, layer.k, [&](int64_t row, const float* c) {
      LoadRow(c, x);
      if (l > 0) {
        ThroughRelu(l - 1, row, i, x);
      } else if (row < call_.bottom_rows) {
        StoreRow(x, call_.gbottom + row * call_.examples + example);
      } else {
        StoreRow(x, Floats(call_.gz) + (row - call_.bottom_rows) * kPanel);
      }
    });
    if (l == 0) PutVectors(call_.gvectors + example * call_.columns);
  }

  // The gradient of the vectors of a panel, example by example.
  void PutVectors(float* out) {
    const float* gz = Floats(call_.gz);
    int64_t column = 0;
    for (; column + 16 <= call_.columns; column += 16) {
      for (int64_t e = 0; e < kPanel; e += 16) {
        Transpose16(reinterpret_cast<const Word*>(gz) + column * kPanel + e, kPanel,
                    reinterpret_cast<Word*>(out) + e * call_.columns + column, call_.columns);
      }
    }
    for (; column < call_.columns; ++column) {
      for (int64_t e = 0; e < kPanel; ++e) out[e * call_.columns + column] = gz[column * kPanel + e];
    }
  }

  const Call<T>& call_;
  Word* memory_;
  float* out_;
  const Product<T> product_{};
  float loss_ = 0, glogit_bias_ = 0;
};

// Arguments: the bottom's output [K, B], vectors [B, ...], label, weight, total, logit kernel and bias, then kernel and
// bias of each layer. Results: the loss, then gradients in the same order, but of label, weight and total. B is whole panels.
template <typename T>
ffi::Error Top(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results) {
  auto in = [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); };
  auto out = [&](size_t i) { return Data<float>(*results.get<ffi::AnyBuffer>(i).value()); };
  Call<T> call{Data<float>(in(0)), Data<float>(in(1)), Data<float>(in(2)), Data<float>(in(3)), Data<float>(in(5)),
               *Data<float>(in(6)), *Data<float>(in(4)), out(1), out(2)};
  call.bottom_rows = in(0).dimensions()[0], call.examples = in(0).dimensions()[1];
  call.columns = in(1).element_count() / call.examples, call.id = NewCall();
  for (size_t i = 7; i < args.size(); i += 2) {
    call.layers.push_back({Data<float>(in(i)), Data<float>(in(i + 1)), in(i).dimensions()[0], in(i).dimensions()[1]});
  }
  LayOut(call);
  const int64_t panels = call.examples / kPanel, lanes = GradientLanes(call.examples, pool.num_threads());
  float* sums = reinterpret_cast<float*>(Scratch<kTopSums>(lanes * call.lane_size));
  ParallelFor(pool, lanes, [&](int64_t lane) {
    Lane<T>(call, sums + lane * call.lane_size).Run(LaneStart(lane, lanes, panels), LaneStart(lane + 1, lanes, panels));
  });
  auto sum = [&](int64_t at, int64_t n, float* out) { SumLanes(sums + at, lanes, call.lane_size, n, out); };
  sum(call.loss, 1, out(0));
  sum(call.glogit_kernel, call.last(), out(3));
  sum(call.glogit_bias, 1, out(4));
  for (size_t l = 0; l < call.layers.size(); ++l) {
    const Layer& layer = call.layers[l];
    SumKernelGradients(pool, sums + layer.gkernel, lanes, call.lane_size, layer.k, layer.n, layer.ld, out(5 + 2 * l));
    sum(layer.gbias, layer.n, out(6 + 2 * l));
  }
  return ffi::Error::Success();
}

auto TopBinding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTopFloat, Top<float>, TopBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTopBFloat16, Top<dlrm::BFloat16>, TopBinding());
