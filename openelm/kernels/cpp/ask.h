// What memory is asked for before it is read, so that a product never waits for it.
#pragma once

#include <cstdint>

namespace openelm {

// Beside a product, from `at` on, or nothing where that is null: the same stream further on, as fast as it is read; or,
// spread over several passes, `stride` bytes a step, since CPUs drop what they are asked for faster than memory answers.
struct Ask {
    const uint8_t* at;
    long stride = 0;
    inline void spread(long step) const {
        long end = (step + 1) * stride;
        for (long line = (end - stride + 63) / 64 * 64; line < end; line += 64) __builtin_prefetch(at + line);
    }
};

inline void ask_for(const uint8_t* p, long bytes) {
#pragma GCC unroll 4
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

}  // namespace openelm
