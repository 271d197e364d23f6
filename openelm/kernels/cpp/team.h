// A team of threads that meets many times in a millisecond.
#pragma once

#include <atomic>
#include <omp.h>
#include <sched.h>

namespace openelm {

// Waits awake: a sleeping thread takes longer to wake than a product of a small matrix takes. When somebody is late by
// a fraction of a millisecond, another program has its core, and may need this one too.
class Barrier {
  public:
    // `meanwhile` is called again and again.
    template <class Call> void wait(long threads, Call meanwhile) {
        long round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (long turns = 0; round_.load(std::memory_order_acquire) == round; turns++) {
            meanwhile();
            turns < 10000 ? __builtin_ia32_pause() : (void)sched_yield();
        }
    }

  private:
    std::atomic<long> arrived_{0}, round_{0};
};

// Calls with every task that falls to this thread: they are dealt out one after the other.
template <class Call> void for_my_share(long tasks, Call call) {
    for (long task = omp_get_thread_num(); task < tasks; task += omp_get_num_threads()) call(task);
}

}  // namespace openelm
