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

// body(i) for each i in [0, n), in any order, on the calling thread and those of the pool that are free. The caller
// works as well and waits for nothing but what another thread has begun, so a busy pool cannot block it.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t n, const Body& body) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  // Outlives the call: a thread of the pool may come when all is done. It then finds nothing left and leaves `body` be.
  auto state = std::make_shared<State>();
  auto work = [state, n, &body] {
    for (int64_t i; (i = state->next.fetch_add(1, std::memory_order_relaxed)) < n;) {
      body(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule([work] { work(); });
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < n; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
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
