// A head is normalised or not, then turned to its position: openelm/kernels/rotary.py has the formula.
#pragma once

#include "rows.h"

namespace openelm {

// What turns a head to its position and back.
struct Turn {
    const float *cos, *sin;
    long half;
    Turn at(long position) const { return {cos + position * half, sin + position * half, half}; }
};

// value(i, n): n numbers of the head from i on.
template <class Out, class Value>
void turn_values(Turn turn, Out* out, Value value) {
    long half = turn.half;
    by_vectors(half, [=](long i, long n) {
        vec first = value(i, n), second = value(half + i, n);
        vec cos = load_some(turn.cos + i, n), sin = load_some(turn.sin + i, n);
        store_some(out + i, first * cos - second * sin, n);
        store_some(out + half + i, second * cos + first * sin, n);
    });
}

// `out` may be where x is. A head without a weight is turned alone.
template <class T, class W, class Out>
void normalise_and_turn(const T* x, const W* weight, Turn turn, float eps, Out* out) {
    if (!weight) return turn_values(turn, out, [=](long i, long n) { return load_some(x + i, n); });
    vec inverse = splat(inverse_rms(x, 2 * turn.half, eps));
    turn_values(turn, out, [=](long i, long n) { return load_some(x + i, n) * inverse * load_some(weight + i, n); });
}

}  // namespace openelm
