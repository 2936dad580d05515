// Kernels of the exchange of lookups between devices: equal ids meet, values of equal places are added. See exchange.py for
// what they promise.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "merging.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kMeetPlaces = 300, kMeetScratch = 301, kAddLists = 302;  // of the uses of memory that a thread keeps

inline uint32_t Hash(const uint32_t* key, int64_t words, uint32_t feature) {
  uint32_t h = feature * 0x85ebca77u;
  for (int64_t i = 0; i < words; ++i) h = (h ^ key[i]) * 0x9e3779b1u;
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}

// Results: the place of each lane's id among the distinct ones, or the number of lanes; where those of each owner begin;
// then of each place its owner, its first lane, and how many lanes it has.
ffi::Error Meet(ffi::Buffer<ffi::U32> key_in, ffi::Buffer<ffi::U32> feature_in, ffi::Buffer<ffi::S32> owner_in,
                ffi::ResultBuffer<ffi::S32> place_out, ffi::ResultBuffer<ffi::S32> start_out,
                ffi::ResultBuffer<ffi::S32> owner_out, ffi::ResultBuffer<ffi::S32> lane_out,
                ffi::ResultBuffer<ffi::U32> times_out) {
  const uint32_t *key = key_in.typed_data(), *feature = feature_in.typed_data();
  const int32_t* wanted_of = owner_in.typed_data();
  const int64_t lanes = owner_in.element_count(), words = key_in.dimensions()[1];
  const int64_t nobody = start_out->element_count() - 1;
  int32_t *place = place_out->typed_data(), *start = start_out->typed_data(), *owner = owner_out->typed_data();
  int32_t* lane_of = lane_out->typed_data();
  uint32_t* times = times_out->typed_data();

  // Of each distinct id, in the order in which they come, its first lane and its place.
  int32_t* first = reinterpret_cast<int32_t*>(dlrm::Scratch<kMeetScratch>(2 * lanes));
  int32_t* sorted = first + lanes;
  dlrm::Places<kMeetPlaces> places(lanes);
  std::vector<int32_t> next(nobody + 1);  // of each owner, shifted by one, how many; then where its next id goes
  int32_t count = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (wanted_of[lane] >= nobody) {
      place[lane] = -1;
      continue;
    }
    const uint32_t* own = key + lane * words;
    int32_t& at = places.At(Hash(own, words, feature[lane]), [&](int32_t other) {
      const int64_t their = first[other];
      const uint32_t* theirs = key + their * words;
      return *own == *theirs && feature[lane] == feature[their] && std::equal(own + 1, own + words, theirs + 1);
    });
    if (at < 0) {
      at = count;
      first[count++] = lane;
      ++next[wanted_of[lane] + 1];
    }
    place[lane] = at;
  }
  for (int64_t device = 0; device < nobody; ++device) next[device + 1] += next[device];
  std::copy(next.begin(), next.end(), start);
  for (int32_t i = 0; i < count; ++i) {
    const int32_t device = wanted_of[first[i]], at = sorted[i] = next[device]++;
    owner[at] = device;
    lane_of[at] = first[i];
  }
  std::fill(owner + count, owner + lanes, static_cast<int32_t>(nobody));
  std::fill(lane_of + count, lane_of + lanes, 0);
  std::fill_n(times, lanes, 0);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (place[lane] < 0) {
      place[lane] = lanes;
    } else {
      ++times[place[lane] = sorted[place[lane]]];
    }
  }
  return ffi::Error::Success();
}

// Result: of each place the sum of the values of its lanes, as merging.h says.
ffi::Error Add(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> place_in, ffi::Buffer<ffi::F32> values,
               ffi::ResultBuffer<ffi::F32> out, int64_t leaf) {
  const int32_t* place = place_in.typed_data();
  const int64_t lanes = place_in.element_count(), places = out->dimensions()[0], dim = out->dimensions()[1];
  const int64_t parts = dlrm::PartsOf(pool, lanes);
  std::memset(out->typed_data(), 0, out->size_bytes());
  dlrm::ParallelFor(pool, parts, [&](int64_t i) {
    const int64_t from = i * places / parts, to = (i + 1) * places / parts, most = std::max(lanes, to - from);
    dlrm::Part part(dlrm::Scratch<kAddLists>(dlrm::Part::Words(most)), most);
    for (int64_t at = from; at < to; ++at) part.row[part.rows++] = {static_cast<int32_t>(at), -1, -1};
    int32_t number = 0;
    int64_t end = leaf;  // of the leaf with that number
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (; lane >= end; end += leaf) ++number;
      if (place[lane] < from || place[lane] >= to) continue;
      part.lane[part.lanes] = lane;
      part.sum[part.lanes++] = part.SumOf(part.row[place[lane] - from], number);
    }
    dlrm::ForSums(part, values.typed_data(), dim, [&](int64_t at, const float* sum, auto n) {
      std::copy_n(sum, +n, out->typed_data() + (from + at) * n);
    });
  });
  return ffi::Error::Success();
}

using U32 = ffi::Buffer<ffi::U32>;
using S32 = ffi::Buffer<ffi::S32>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmExchangeMeet, Meet,
                              ffi::Ffi::Bind().Arg<U32>().Arg<U32>().Arg<S32>().Ret<S32>().Ret<S32>().Ret<S32>()
                                  .Ret<S32>().Ret<U32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DlrmExchangeAdd, Add,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<S32>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
        .Attr<int64_t>("leaf"));
