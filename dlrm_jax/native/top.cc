// The top of the network in one pass: from the bottom MLP's output and the vectors, joined as by `cat`, through the top MLP
// to the loss, and back to all of its gradients. What is between never leaves the caches of the core that makes it.
//
// Products, packing, slices and sums are those of dense.cc. A thread takes some panels of a slice through all layers forward,
// and back.

#include <cmath>
#include <utility>
#include <vector>

#include "dense_core.h"
#include "packing.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace dlrm;

constexpr int kTopWeights = 20, kTopSlice = 21, kTopSums = 22, kTopScratch = 23;  // of the uses of memory of a thread

// Parts of one piece of memory, each on a line of its own.
struct Parts {
  int64_t size = 0;
  int64_t Add(int64_t words) {
    const int64_t at = size;
    size += RoundUp(words, 16);
    return at;
  }
};

struct Layer {
  const float *kernel, *bias;  // [k, n], [n]
  float *gkernel, *gbias;
  int64_t k, n;
  Pieces pieces;              // of gkernel
  int64_t forward, backward;  // where in the packed weights: W^T and W
  int64_t h, g;               // in the memory of a slice: h, [k, its examples], and g^T, by 64 features
  int64_t waiting, sums;      // among the sums of slices; among those of a panel: gbias
};

template <typename T>
struct Call {
  const float *bottom, *vectors, *label, *weight, *logit_kernel;  // [bottom_rows, B], [B, columns], [B], [B], [last n]
  float logit_bias, total;
  float *gbottom, *gvectors;
  int64_t bottom_rows, columns, examples;
  std::vector<Layer> layers;
  Slices slices;
  int64_t weights_size, slice_size, waiting_size;
  int64_t glogit_kernel, glogit_bias, loss, sums_size;  // where in the sums that each panel has
  // Where in the memory of a thread: y of the last layer, [n, 64] by panels; the gradient before a layer's ReLU, likewise;
  // packed panel; gradient of the vectors of a panel; what makes up the gradient of a bias, and of the logit kernel.
  int64_t y, g, packed, gz, bias_sums, logit_sums, thread_size;
  int64_t widest;

  int64_t last() const { return layers.back().n; }
  int64_t slice_words() const { return slices.size * kPanelWords<T>; }
  int64_t h_stride() const { return Stride(slice_words()); }
};

template <typename T>
void LayOut(Call<T>& call) {
  Parts weights, slice, waiting, panel, memory;
  int64_t words = 0;
  call.widest = 0;
  for (Layer& layer : call.layers) {
    const int64_t k_words = WordsOf<T>(layer.k), n_words = WordsOf<T>(layer.n);
    const int64_t rows = RoundUp(layer.k, Product<T>::kRowStep);
    layer.forward = weights.Add(RoundUp(layer.n, Product<T>::kRowStep) * Stride(k_words));
    layer.backward = weights.Add(rows * Stride(n_words));
    layer.h = slice.Add(rows * call.h_stride());
    layer.g = slice.Add(RoundUp(layer.n, kPanel) * call.slice_words());
    layer.waiting = waiting.Add(call.slices.waiting() * layer.k * layer.n);
    layer.sums = panel.Add(layer.n);
    words = std::max({words, k_words, n_words});
    call.widest = std::max(call.widest, RoundUp(layer.n, 16));
  }
  call.glogit_kernel = panel.Add(call.last());
  call.glogit_bias = panel.Add(1);
  call.loss = panel.Add(1);
  call.weights_size = weights.size, call.slice_size = slice.size, call.waiting_size = waiting.size;
  call.sums_size = panel.size;
  call.y = memory.Add(call.last() * kSlicePanels * kPanelWords<T>);
  call.g = memory.Add(call.widest * kSlicePanels * kPanelWords<T>);
  call.packed = memory.Add(kPanel * words);
  call.gz = memory.Add(RoundUp(call.layers[0].k, 16) * kPanel);
  call.bias_sums = memory.Add(16 * call.widest);
  call.logit_sums = memory.Add(16 * call.last());
  call.thread_size = memory.size;
}

// Some panels of a slice, at most kSlicePanels, at work in the memory of a thread.
template <typename T>
class Lane {
 public:
  Lane(const Call<T>& call, const Word* weights, Word* slice, float* sums, int64_t in_slice)
      : call_(call), weights_(weights), slice_(slice), memory_(Scratch<kTopScratch>(call.thread_size)), sums_(sums),
        in_slice_(in_slice) {}

  // The panels from `first` on. Layer by layer, so that a layer's weights stay in the second-level cache.
  void Run(int64_t first, int64_t panels) {
    auto for_panels = [&](const auto& work) {
      for (int64_t i = 0; i < panels; ++i) work(i, (first + i) * kPanel);
    };
    for_panels([&](int64_t i, int64_t example) { Join(i, example); });
    for (int64_t l = 0; l < Layers(); ++l) {
      for_panels([&](int64_t i, int64_t) { Forward(l, i); });
    }
    for_panels([&](int64_t i, int64_t example) { Loss(i, example); });
    for (int64_t l = Layers() - 1; l >= 0; --l) {
      for_panels([&](int64_t i, int64_t example) { Backward(l, i, example); });
    }
  }

 private:
  int64_t Layers() const { return call_.layers.size(); }
  float* Floats(int64_t at) { return reinterpret_cast<float*>(memory_ + at); }
  float* OfPanel(int64_t i, int64_t at) { return sums_ + i * call_.sums_size + at; }
  // A row of a panel of what enters a layer or, with the number of layers, of the last one's y.
  T* Activations(int64_t l, int64_t i, int64_t row) {
    if (l == Layers()) return reinterpret_cast<T*>(memory_ + call_.y) + (i * call_.last() + row) * kPanel;
    return reinterpret_cast<T*>(slice_ + call_.layers[l].h + row * call_.h_stride()) + (in_slice_ + i) * kPanel;
  }
  T* Gradient(int64_t i) { return reinterpret_cast<T*>(memory_ + call_.g) + i * call_.widest * kPanel; }

  // Bottom and vectors under each other.
  void Join(int64_t i, int64_t example) {
    int64_t z = 0;
    for (; z < call_.bottom_rows; ++z) ConvertRow(call_.bottom + z * call_.examples + example, Activations(0, i, z));
    const float* vectors = call_.vectors + example * call_.columns;
    int64_t column = 0;
    for (; column + 16 <= call_.columns; column += 16) {
      alignas(64) Word turned[16 * kPanel];
      for (int64_t e = 0; e < kPanel; e += 16) {
        Transpose16(reinterpret_cast<const Word*>(vectors) + e * call_.columns + column, call_.columns, turned + e, kPanel);
      }
      for (int64_t c = 0; c < 16; ++c) {
        ConvertRow(reinterpret_cast<const float*>(turned) + c * kPanel, Activations(0, i, z++));
      }
    }
    for (; column < call_.columns; ++column, ++z) {
      for (int64_t e = 0; e < kPanel; ++e) Activations(0, i, z)[e] = Round<T>(vectors[e * call_.columns + column]);
    }
  }

  void Forward(int64_t l, int64_t i) {
    const Layer& layer = call_.layers[l];
    PackPanel<T>(Activations(l, i, 0), call_.h_stride() * kPerWord<T>, layer.k, WordsOf<T>(layer.k), memory_ + call_.packed);
    ForRowsOfProduct(product_, weights_ + layer.forward, WordsOf<T>(layer.k), memory_ + call_.packed, layer.n,
                     [&](int64_t row, const float* c) {
                       Activate<T, false>(c, layer.bias[row], nullptr, Activations(l + 1, i, row), nullptr, nullptr);
                     });
  }

  // The loss, and the gradient by the last layer.
  void Loss(int64_t i, int64_t example) {
    Vector logits[kVectors], x[kVectors];
    for (Vector& logit : logits) logit = Vector{} + call_.logit_bias;
    for (int64_t row = 0; row < call_.last(); ++row) {
      LoadRow(Activations(Layers(), i, row), x);
      for (int v = 0; v < kVectors; ++v) logits[v] += call_.logit_kernel[row] * x[v];
    }
    alignas(64) float logit[kPanel];
    float loss = 0, glogit_bias = 0;
    StoreRow(logits, logit);
    for (int64_t e = 0; e < kPanel; ++e) {
      const float share = call_.weight[example + e] / call_.total, tail = std::exp(-std::abs(logit[e]));
      const float clicked = (logit[e] < 0 ? tail : 1) / (1 + tail);
      loss += share * (std::max(logit[e], 0.f) + std::log1p(tail) - call_.label[example + e] * logit[e]);
      logit[e] = share * (clicked - call_.label[example + e]);
      glogit_bias += logit[e];
    }
    *OfPanel(i, call_.loss) = loss;
    *OfPanel(i, call_.glogit_bias) = glogit_bias;
    Vector glogit[kVectors];
    LoadRow(logit, glogit);
    for (int64_t row = 0; row < call_.last(); ++row) {
      Vector total = {};
      LoadRow(Activations(Layers(), i, row), x);
      for (int v = 0; v < kVectors; ++v) {
        total += glogit[v] * x[v];
        x[v] = call_.logit_kernel[row] * glogit[v];
      }
      Store16(total, Floats(call_.logit_sums) + 16 * row);
      ThroughRelu(Layers() - 1, row, i, x);
    }
    SumRows(Floats(call_.logit_sums), call_.last(), OfPanel(i, call_.glogit_kernel));
    SumBias(Layers() - 1, i);
  }

  // Once all rows of a layer's gradient have gone through its ReLU.
  void SumBias(int64_t l, int64_t i) {
    SumRows(Floats(call_.bias_sums), call_.layers[l].n, OfPanel(i, call_.layers[l].sums));
  }

  // A row of the gradient by a layer's y, which becomes that before the ReLU.
  void ThroughRelu(int64_t l, int64_t row, int64_t i, Vector* g) {
    Vector y[kVectors], total = {};
    LoadRow(Activations(l + 1, i, row), y);
    for (int v = 0; v < kVectors; ++v) {
      g[v] = y[v] > 0 ? g[v] : Vector{};
      total += g[v];
    }
    StoreRow(g, Gradient(i) + row * kPanel);
    Store16(total, Floats(call_.bias_sums) + 16 * row);
  }

  void Backward(int64_t l, int64_t i, int64_t example) {
    const Layer& layer = call_.layers[l];
    const int64_t words = WordsOf<T>(layer.n);
    TransposePanel(Gradient(i), layer.n, in_slice_ + i, slice_ + layer.g, call_.slice_words());
    PackPanel<T>(Gradient(i), kPanel, layer.n, words, memory_ + call_.packed);
    Vector x[kVectors];
    auto use = [&](int64_t row, const float* c) {
      LoadRow(c, x);
      if (l > 0) {
        ThroughRelu(l - 1, row, i, x);
      } else if (row < call_.bottom_rows) {
        StoreRow(x, call_.gbottom + row * call_.examples + example);
      } else {
        StoreRow(x, Floats(call_.gz) + (row - call_.bottom_rows) * kPanel);
      }
    };
    ForRowsOfProduct(product_, weights_ + layer.backward, words, memory_ + call_.packed, layer.k, use);
    if (l > 0) {
      SumBias(l - 1, i);
    } else {
      PutVectors(call_.gvectors + example * call_.columns);
    }
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
  const Word* weights_;
  Word *slice_, *memory_;
  float* sums_;             // of its first panel
  const int64_t in_slice_;  // its first panel
  const Product<T> product_{};
};

// body(layer, i) for each i below count(layer), of all layers.
template <typename Count, typename Body>
void ForLayers(ffi::ThreadPool& pool, const std::vector<Layer>& layers, const Count& count, const Body& body) {
  std::vector<std::pair<const Layer*, int64_t>> pieces;
  for (const Layer& layer : layers) {
    for (int64_t i = 0; i < count(layer); ++i) pieces.emplace_back(&layer, i);
  }
  ParallelFor(pool, pieces.size(), [&](int64_t i) { body(*pieces[i].first, pieces[i].second); });
}

// Arguments: the bottom's output [K, B], vectors [B, ...], label, weight, total, logit kernel and bias, then kernel and
// bias of each layer. Results: the loss, then gradients in the same order, but of label, weight and total. B is whole panels.
template <typename T>
ffi::Error Top(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results) {
  auto in = [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); };
  auto out = [&](size_t i) { return Data<float>(*results.get<ffi::AnyBuffer>(i).value()); };
  const int64_t examples = in(0).dimensions()[1], vectors_size = in(1).element_count();
  const Slices slices(examples / kPanel, pool.num_threads());
  Call<T> call{Data<float>(in(0)), Data<float>(in(1)), Data<float>(in(2)), Data<float>(in(3)), Data<float>(in(5)),
               *Data<float>(in(6)), *Data<float>(in(4)), out(1), out(2), in(0).dimensions()[0],
               vectors_size / examples, examples, {}, slices};
  for (size_t i = 7; i < args.size(); i += 2) {
    const int64_t k = in(i).dimensions()[0], n = in(i).dimensions()[1];
    call.layers.push_back({Data<float>(in(i)), Data<float>(in(i + 1)), out(i - 2), out(i - 1), k, n, {k, n, slices.threads}});
  }
  LayOut(call);
  Word *weights = Scratch<kTopWeights>(call.weights_size), *memory = Scratch<kTopSlice>(call.slice_size);
  float* sums = reinterpret_cast<float*>(Scratch<kTopSums>(slices.panels * call.sums_size + call.waiting_size));
  float* waiting = sums + slices.panels * call.sums_size;
  auto of_rows = [](const Layer& layer) { return Ceil(layer.k, kPanel); };
  ForLayers(pool, call.layers, of_rows, [&](const Layer& layer, int64_t i) {
    const int64_t from = i * kPanel, to = std::min(layer.k, from + kPanel);
    PackRows<T>(layer.kernel, layer.n, from, to, weights + layer.backward);  // both at once: what was just read is read fast
    PackTransposed<T>(layer.kernel, layer.k, layer.n, from, to, weights + layer.forward);
  });
  auto lane = [&](const Slice& slice, int64_t first, int64_t last) {
    Lane<T>(call, weights, memory, sums + first * call.sums_size, first - slice.first).Run(first, last - first);
  };
  ForSlices(pool, slices, lane, [&](const Slice& slice) {
    const int64_t words = (slice.last - slice.first) * kPanelWords<T>;
    auto pieces = [](const Layer& layer) { return layer.pieces.count(); };
    ForLayers(pool, call.layers, pieces, [&](const Layer& layer, int64_t i) {
      KernelGradient(Product<T>(), memory + layer.h, memory + layer.g, call.slice_words(), words, layer.pieces, i, slice,
                     layer.gkernel, waiting + layer.waiting);
    });
  });
  auto sum = [&](int64_t at, int64_t n, float* to) { SumTerms(sums + at, slices.panels, call.sums_size, n, to); };
  sum(call.loss, 1, out(0));
  sum(call.glogit_kernel, call.last(), out(3));
  sum(call.glogit_bias, 1, out(4));
  for (const Layer& layer : call.layers) sum(layer.sums, layer.n, layer.gbias);
  return ffi::Error::Success();
}

auto TopBinding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTopFloat, Top<float>, TopBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmTopBFloat16, Top<dlrm::Operand<dlrm::BFloat16>>, TopBinding());
