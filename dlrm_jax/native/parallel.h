// Loops over the threads that XLA lends to a call, and memory that each thread keeps.

#ifndef DLRM_JAX_NATIVE_PARALLEL_H_
#define DLRM_JAX_NATIVE_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace dlrm {

// body(i) for each i in [0, n), on the calling thread and those of the pool that are free. Each thread has a stretch of
// its own, the same from call to call, so that what one call leaves in a core's cache is there for the next; who is done
// helps the others. The caller works as well and waits for nothing but what another thread has begun, so a busy pool
// cannot block it.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t n, const Body& body) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct State {
    std::unique_ptr<Stretch[]> stretches;
    alignas(64) std::atomic<int64_t> done{0};
  };
  // Outlives the call: a thread of the pool may come when all is done. It then finds nothing left and leaves `body` be.
  auto state = std::make_shared<State>();
  state->stretches.reset(new Stretch[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    state->stretches[t].next = t * n / threads;
    state->stretches[t].end = (t + 1) * n / threads;
  }
  auto work = [state, threads, &body](int64_t own) {
    for (int64_t t = 0; t < threads; ++t) {
      Stretch& stretch = state->stretches[(own + t) % threads];
      for (int64_t i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) {
        body(i);
        state->done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([work, t] { work(t); });
  work(0);
  for (int spins = 0; state->done.load(std::memory_order_acquire) < n; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

constexpr int64_t kLanesPerPiece = 1024;  // fewer are not worth a thread of their own
constexpr int64_t kMostParts = 8;

// Pieces into which lanes are cut for the threads of a pool.
inline int64_t PiecesOf(const xla::ffi::ThreadPool& pool, int64_t lanes) {
  return std::clamp<int64_t>(lanes / kLanesPerPiece, 1, std::max<int64_t>(1, pool.num_threads()));
}

// The same where each thread looks at all of the lanes, to find those that are its own.
inline int64_t PartsOf(const xla::ffi::ThreadPool& pool, int64_t lanes) {
  return std::min(PiecesOf(pool, lanes), kMostParts);
}

// At least `words` words that belong to this thread and to `Use`, until the thread asks for more of them. Kept from call
// to call, since fresh memory costs a page fault every four kilobytes.
template <int Use>
uint32_t* Scratch(int64_t words) {
  struct Buffer {
    uint32_t* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < words) {
    std::free(buffer.data);
    buffer.size = (words + 1023) / 1024 * 1024;
    buffer.data = static_cast<uint32_t*>(std::aligned_alloc(64, buffer.size * sizeof(uint32_t)));
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace dlrm

#endif  // DLRM_JAX_NATIVE_PARALLEL_H_
