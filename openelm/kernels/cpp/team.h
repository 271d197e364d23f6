// A team of threads that meets many times in a millisecond.
#pragma once

#include <atomic>
#include <cstdint>
#include <omp.h>
#include <sched.h>
#include <vector>

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

// Pieces of work that all threads share: each takes its own from the front, and, when it has none left, those of others
// from the back. Which of them is late is memory's mood.
class Pieces {
  public:
    // Before anybody takes one: each thread sets its own.
    void set(long first, long last) { range_[omp_get_thread_num()].both = pair(first, last); }

    // Calls with every piece that falls to this thread. It takes an eighth of what is left at a time: to take one, the
    // CPU ends all that it has begun.
    template <class Call> void each(Call call) {
        long me = omp_get_thread_num(), threads = omp_get_num_threads();
        for (long turn = 0; turn < threads; turn++) {
            auto& both = range_[(me + turn) % threads].both;
            uint64_t found = both.load(std::memory_order_relaxed);
            for (;;) {
                long first = found >> 32, last = found & 0xffffffff, some = (last - first + 7) / 8;
                if (some <= 0) break;
                uint64_t rest = turn == 0 ? pair(first + some, last) : pair(first, last - some);
                if (!both.compare_exchange_weak(found, rest, std::memory_order_relaxed)) continue;
                long start = turn == 0 ? first : last - some;
                for (long piece = start; piece < start + some; piece++) call(piece);
                found = both.load(std::memory_order_relaxed);
            }
        }
    }

    explicit Pieces(long threads) : range_(threads) {}

  private:
    static uint64_t pair(long first, long last) { return uint64_t(first) << 32 | uint64_t(last); }
    struct alignas(64) Range {
        std::atomic<uint64_t> both{0};
    };
    std::vector<Range> range_;
};

// Calls with every task that falls to this thread: they are dealt out one after the other.
template <class Call> void for_my_share(long tasks, Call call) {
    for (long task = omp_get_thread_num(); task < tasks; task += omp_get_num_threads()) call(task);
}

}  // namespace openelm
