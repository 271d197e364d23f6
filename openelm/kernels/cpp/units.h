// Products of bf16 on CPUs that have registers of 16 rows and multiply two of them in one instruction: Intel's AMX.
#pragma once

#include "ask.h"
#include "vector.h"
#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace openelm {

constexpr long SIDE = 16;        // rows of a register, each of 64 bytes
constexpr long DEEP = 32;        // bf16 numbers in such a row: columns that one instruction adds up
constexpr long MANY = 2 * SIDE;  // rows of inputs at a time

// Gives this thread's registers their shapes for `inputs` rows, MANY at most, and takes them back. 0 to 3 are sums, 4 and
// 5 inputs, 6 and 7 of the matrix.
class Shapes {
  public:
    ~Shapes() { _tile_release(); }
    void set(long inputs) {
        if (inputs == inputs_) return;
        inputs_ = inputs;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        long first = std::min(inputs, SIDE), second = std::max(inputs - SIDE, 1L);
        const long rows[] = {first, first, second, second, first, second, SIDE, SIDE};
        for (long i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = rows[i];
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }

  private:
    long inputs_ = 0;
};

// sums[input][row] of two registers' rows of a matrix, whose pairs of columns follow one another at `at`, for up to SIDE
// rows of inputs or up to MANY.
template <bool many>
void add_up_squares(const uint8_t* at, const bf16* x, long stride, long steps, float* sums, Ask ask) {
    constexpr long row = 2 * SIDE * 4;  // bytes: a pair of columns of all rows
    asm volatile("" ::: "memory");      // the compiler does not know that the instructions read what was written
    _tile_zero(0);
    _tile_zero(1);
    if (many) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long s = 0; s < steps; s++, at += SIDE * row, x += DEEP) {
        _tile_loadd(6, at, row);
        _tile_loadd(4, x, stride * 2);
        _tile_loadd(7, at + row / 2, row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (many) {
            _tile_loadd(5, x + SIDE * stride, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        ask.spread(s);
    }
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + SIDE, row);
    if (many) {
        _tile_stored(2, sums + SIDE * 2 * SIDE, row);
        _tile_stored(3, sums + SIDE * 2 * SIDE + SIDE, row);
    }
}

}  // namespace openelm
#endif
