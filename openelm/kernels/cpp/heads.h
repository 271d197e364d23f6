// A head is normalised, then turned to its position: openelm/kernels/rotary.py has the formula.
#pragma once

#include "rows.h"

namespace openelm {

// What turns a head to its position and back.
struct Turn {
    const float *cos, *sin;
    long half;
    Turn at(long position) const { return {cos + position * half, sin + position * half, half}; }
};

// `out` may be where x is.
template <class T, class W, class Out>
void normalise_and_turn(const T* x, const W* weight, Turn turn, float eps, Out* out) {
    long half = turn.half;
    vec inverse = splat(inverse_rms(x, 2 * half, eps));
    auto normalised = [=](long i, long n) { return load_some(x + i, n) * inverse * load_some(weight + i, n); };
    by_vectors(half, [=](long i, long n) {
        vec first = normalised(i, n), second = normalised(half + i, n);
        vec cos = load_some(turn.cos + i, n), sin = load_some(turn.sin + i, n);
        store_some(out + i, first * cos - second * sin, n);
        store_some(out + half + i, second * cos + first * sin, n);
    });
}

}  // namespace openelm
