// Reads memory and does nothing with it: what a step of generation can reach at most (benchmarks/decode.py).
#include "vector.h"

using namespace openelm;

// `buffers` buffers one after the other, each shared out among the threads as a weight is; sizes in bytes.
extern "C" void openelm_read(long buffers, const long* addresses, const long* sizes, long threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < buffers; i++) {
        long lines = sizes[i] / 64, first = lines * omp_get_thread_num() / omp_get_num_threads();
        long last = lines * (omp_get_thread_num() + 1) / omp_get_num_threads();
        const char* from = (const char*)addresses[i];
        for (long line = first; line < last; line++) {
            __builtin_prefetch(from + (line + 64) * 64);
            asm volatile("" : : "r"(*(volatile const long*)(from + line * 64)));
        }
    }
}
