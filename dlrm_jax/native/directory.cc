// Kernels of a directory of ids: find, and find-or-claim with counting. See directory.py for what they promise.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kAhead = 16;  // lanes ahead of the one at work whose buckets are asked for
constexpr int kClaimScratch = 200;  // of the uses of memory that a thread keeps
constexpr uint32_t kFeatures = 32;  // the low bits of a stamp are the feature
constexpr uint32_t kMostFrequency = (1u << 31) - 1;
enum Field { kLow, kHigh, kFrequency, kStamp, kFields };

struct Ids {
  Ids(const ffi::Buffer<ffi::U32>& key_buffer, const ffi::Buffer<ffi::U32>& feature_buffer,
      const ffi::Buffer<ffi::S32>& place_buffer)
      : key(key_buffer.typed_data()), feature(feature_buffer.typed_data()), place(place_buffer.typed_data()),
        lanes(place_buffer.dimensions()[0]), places(place_buffer.dimensions()[1]) {}

  const uint32_t *key, *feature;
  const int32_t* place;
  int64_t lanes, places;
};

// With a number of ways that the compiler knows, matching a bucket is a few vector instructions.
using Eight = std::integral_constant<int64_t, 8>;
typedef uint32_t Words __attribute__((vector_size(32)));  // the compiler cuts it up where registers are smaller
typedef uint32_t WordsAt __attribute__((vector_size(32), aligned(4), may_alias));

inline Words Load(const uint32_t* words) { return *reinterpret_cast<const WordsAt*>(words); }

// The first of eight that is not 0, or -1.
template <typename Mask>
inline int64_t First(Mask found) {
  const Words bits = (Words)found & Words{1, 2, 4, 8, 16, 32, 64, 128};
  uint64_t pairs[4];
  std::memcpy(pairs, &bits, sizeof pairs);
  const uint64_t any = pairs[0] | pairs[1] | pairs[2] | pairs[3];
  const uint32_t mask = static_cast<uint32_t>(any | any >> 32);
  return mask ? __builtin_ctz(mask) : -1;
}

template <typename Ways>
struct Buckets {
  uint32_t* Of(int64_t bucket) const { return entry + bucket * kFields * ways; }

  template <bool kToWrite>
  void Prefetch(int64_t bucket) const {
    const char* from = reinterpret_cast<const char*>(Of(bucket));
    for (int64_t at = 0; at < kFields * ways * 4; at += 64) __builtin_prefetch(from + at, kToWrite);
  }

  // The way of an id, or -1.
  int64_t Match(const uint32_t* bucket, const Ids& ids, int64_t lane) const {
    const uint32_t low = ids.key[2 * lane], high = ids.key[2 * lane + 1], feature = ids.feature[lane];
    if constexpr (std::is_same_v<Ways, Eight>) {
      return First((Load(bucket) == low) & (Load(bucket + 8) == high) & (Load(bucket + 16) != 0) &
                   (Load(bucket + 24) % kFeatures == feature));
    }
    for (int64_t way = 0; way < ways; ++way) {
      if (bucket[way] == low && bucket[kHigh * ways + way] == high && bucket[kFrequency * ways + way] != 0 &&
          bucket[kStamp * ways + way] % kFeatures == feature) {
        return way;
      }
    }
    return -1;
  }

  // The first free way, or -1.
  int64_t Free(const uint32_t* bucket) const {
    for (int64_t way = 0; way < ways; ++way) {
      if (bucket[kFrequency * ways + way] == 0) return way;
    }
    return -1;
  }

  int32_t Find(const Ids& ids, int64_t lane) const {
    for (int64_t i = 0; i < ids.places; ++i) {
      const int64_t bucket = ids.place[lane * ids.places + i];
      const int64_t way = Match(Of(bucket), ids, lane);
      if (way >= 0) return bucket * ways + way;
    }
    return -1;
  }

  void Count(int32_t row, uint32_t times, uint32_t stamp) const {
    uint32_t* way = Of(row / ways) + row % ways;
    if (way[kFrequency * ways] < kMostFrequency) way[kFrequency * ways] += times;
    way[kStamp * ways] = stamp;
  }

  uint32_t* entry;
  Ways ways;
};

template <typename Body>
void WithWays(uint32_t* entry, int64_t ways, const Body& body) {
  if (ways == 8) return body(Buckets<Eight>{entry, {}});
  return body(Buckets<int64_t>{entry, ways});
}

// Result: the row of each id, or the number of rows.
ffi::Error Find(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> entry, ffi::Buffer<ffi::U32> key,
                ffi::Buffer<ffi::U32> feature, ffi::Buffer<ffi::S32> place, ffi::ResultBuffer<ffi::S32> row_out) {
  const Ids ids(key, feature, place);
  int32_t* row = row_out->typed_data();
  const int32_t none = entry.element_count() / kFields;
  const int64_t pieces = dlrm::PiecesOf(pool, ids.lanes);
  WithWays(entry.typed_data(), entry.dimensions()[3], [&](auto buckets) {
    dlrm::ParallelFor(pool, pieces, [&](int64_t piece) {
      const int64_t to = (piece + 1) * ids.lanes / pieces;
      for (int64_t lane = piece * ids.lanes / pieces; lane < to; ++lane) {
        const int32_t ahead = lane + kAhead < to ? ids.place[(lane + kAhead) * ids.places] : -1;
        if (ahead >= 0) buckets.template Prefetch<false>(ahead);
        const int32_t found = ids.place[lane * ids.places] < 0 ? -1 : buckets.Find(ids, lane);
        row[lane] = found < 0 ? none : found;
      }
    });
  });
  return ffi::Error::Success();
}

// The lanes of one part: no other part has a bucket of theirs. Marks the lanes that claimed a row in `fresh`.
template <typename B>
void ClaimPart(const B& buckets, const Ids& ids, const uint32_t* times, uint32_t step, int32_t* list, int64_t count,
               int32_t none, int32_t* row, int32_t* fresh) {
  int64_t open = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) buckets.template Prefetch<true>(ids.place[list[i + kAhead] * ids.places]);
    const int32_t lane = list[i], found = buckets.Find(ids, lane);
    row[lane] = found < 0 ? none : found;
    if (found >= 0) {
      buckets.Count(found, times[lane], step * kFeatures + ids.feature[lane]);
    } else {
      list[open++] = lane;
    }
  }
  // All lanes try their first place before any tries its second, so that XLA's rounds come to the same.
  for (int64_t place = 0; place < ids.places && open; ++place) {
    const int64_t tried = open;
    open = 0;
    for (int64_t i = 0; i < tried; ++i) {
      const int32_t lane = list[i], bucket_number = ids.place[lane * ids.places + place];
      uint32_t* bucket = buckets.Of(bucket_number);
      const uint32_t stamp = step * kFeatures + ids.feature[lane];
      int64_t way = buckets.Match(bucket, ids, lane);
      if (way >= 0) {
        buckets.Count(bucket_number * buckets.ways + way, times[lane], stamp);
      } else if ((way = buckets.Free(bucket)) >= 0) {
        bucket[way] = ids.key[2 * lane];
        bucket[kHigh * buckets.ways + way] = ids.key[2 * lane + 1];
        bucket[kFrequency * buckets.ways + way] = times[lane];
        bucket[kStamp * buckets.ways + way] = stamp;
        fresh[lane] = 1;
      } else {
        list[open++] = lane;
        continue;
      }
      row[lane] = bucket_number * buckets.ways + way;
    }
  }
}

// Results: the entries, in place; the row of each id, or the number of rows; the lanes that claimed a row, then the
// number of lanes; how many there are.
ffi::Error Claim(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> entry_in, ffi::Buffer<ffi::U32> key,
                 ffi::Buffer<ffi::U32> feature, ffi::Buffer<ffi::S32> place, ffi::Buffer<ffi::U32> times,
                 ffi::Buffer<ffi::S32> step, ffi::ResultBuffer<ffi::U32> entry, ffi::ResultBuffer<ffi::S32> row_out,
                 ffi::ResultBuffer<ffi::S32> fresh_out, ffi::ResultBuffer<ffi::S32> count_out) {
  if (entry_in.typed_data() != entry->typed_data()) return ffi::Error::Internal("the entries were not given in place");
  const Ids ids(key, feature, place);
  int32_t *row = row_out->typed_data(), *fresh = fresh_out->typed_data();
  const int32_t none = entry->element_count() / kFields;
  const int64_t page = entry->dimensions()[1], parts = dlrm::PartsOf(pool, ids.lanes);
  std::fill(fresh, fresh + ids.lanes, 0);
  WithWays(entry->typed_data(), entry->dimensions()[3], [&](auto buckets) {
    dlrm::ParallelFor(pool, parts, [&](int64_t part) {
      int32_t* list = reinterpret_cast<int32_t*>(dlrm::Scratch<kClaimScratch>(ids.lanes + 1));
      int64_t count = 0;
      for (int64_t lane = 0; lane < ids.lanes; ++lane) {
        // All places of an id are in one page.
        const int32_t first = ids.place[lane * ids.places];
        if (first < 0 && part == 0) row[lane] = none;
        list[count] = lane;
        count += first >= 0 && static_cast<uint32_t>(first / page) % parts == static_cast<uint32_t>(part);
      }
      ClaimPart(buckets, ids, times.typed_data(), *step.typed_data(), list, count, none, row, fresh);
    });
  });
  int32_t count = 0;
  for (int64_t lane = 0; lane < ids.lanes; ++lane) {
    const int32_t is_fresh = fresh[lane];
    fresh[count] = lane;
    count += is_fresh;
  }
  std::fill(fresh + count, fresh + ids.lanes, static_cast<int32_t>(ids.lanes));
  *count_out->typed_data() = count;
  return ffi::Error::Success();
}

using U32 = ffi::Buffer<ffi::U32>;
using S32 = ffi::Buffer<ffi::S32>;

auto IdsBinding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<U32>().Arg<U32>().Arg<U32>().Arg<S32>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmDirectoryFind, Find, IdsBinding().Ret<S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(DlrmDirectoryClaim, Claim,
                              IdsBinding().Arg<U32>().Arg<S32>().Ret<U32>().Ret<S32>().Ret<S32>().Ret<S32>());
