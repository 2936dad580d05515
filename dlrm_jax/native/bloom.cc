// Kernel of a counting Bloom filter. See bloom.py for what it promises.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kAhead = 8;  // lanes

template <typename T>
void Add(ffi::ThreadPool& pool, T* counters, int64_t regions, int64_t size, const uint32_t* word,
         const int32_t* region, const uint32_t* times, int64_t lanes, int64_t hashes, uint32_t limit, uint32_t* least) {
  auto position = [=](int64_t lane, int64_t i) -> int64_t {
    const uint32_t mixed = word[2 * lane] + static_cast<uint32_t>(i) * word[2 * lane + 1];
    return region[lane] * size + static_cast<int64_t>(mixed * static_cast<uint64_t>(size) >> 32);
  };
  auto for_lanes = [=](int64_t from, int64_t to, const auto& body) {
    for (int64_t lane = from; lane < to; ++lane) {
      const int64_t ahead = lane + kAhead;
      if (ahead < to && region[ahead] >= 0) {
        for (int64_t i = 0; i < hashes; ++i) __builtin_prefetch(counters + position(ahead, i), 1);
      }
      body(lane);
    }
  };
  const int64_t pieces = dlrm::PartsOf(pool, lanes);
  dlrm::ParallelFor(pool, pieces, [&](int64_t piece) {
    const int64_t low = piece * regions * size / pieces, high = (piece + 1) * regions * size / pieces;  // no other piece writes these
    for_lanes(0, lanes, [&](int64_t lane) {
      if (region[lane] < 0) return;
      for (int64_t i = 0; i < hashes; ++i) {
        const int64_t at = position(lane, i);
        if (at >= low && at < high) counters[at] = std::min<uint64_t>(uint64_t{counters[at]} + times[lane], limit);
      }
    });
  });
  dlrm::ParallelFor(pool, pieces, [&](int64_t piece) {
    for_lanes(piece * lanes / pieces, (piece + 1) * lanes / pieces, [&](int64_t lane) {
      uint32_t smallest = region[lane] >= 0 ? std::numeric_limits<uint32_t>::max() : 0;
      for (int64_t i = 0; region[lane] >= 0 && i < hashes; ++i) {
        smallest = std::min<uint32_t>(smallest, counters[position(lane, i)]);
      }
      least[lane] = smallest;
    });
  });
}

// Results: the counters, in place; the least of each lane's.
ffi::Error BloomAdd(ffi::ThreadPool pool, ffi::AnyBuffer counters_in, ffi::Buffer<ffi::U32> word,
                    ffi::Buffer<ffi::S32> region, ffi::Buffer<ffi::U32> times,
                    ffi::Result<ffi::AnyBuffer> counters,
                    ffi::ResultBuffer<ffi::U32> least, int64_t hashes, int64_t limit) {
  void* data = counters->untyped_data();
  if (counters_in.untyped_data() != data) return ffi::Error::Internal("the counters were not given in place");
  auto add = [&](auto* typed) {
    Add(pool, typed, counters->dimensions()[0], counters->dimensions()[1], word.typed_data(), region.typed_data(),
        times.typed_data(), static_cast<int64_t>(region.element_count()), hashes, static_cast<uint32_t>(limit), least->typed_data());
    return ffi::Error::Success();
  };
  switch (counters->element_type()) {
    case ffi::U8: return add(static_cast<uint8_t*>(data));
    case ffi::U16: return add(static_cast<uint16_t*>(data));
    case ffi::U32: return add(static_cast<uint32_t*>(data));
    default: return ffi::Error::InvalidArgument("counters must be u8, u16 or u32");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmBloomAdd, BloomAdd,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::U32>>().Ret<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::U32>>()
                                  .Attr<int64_t>("hashes").Attr<int64_t>("limit"));
