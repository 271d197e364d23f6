// Matrix products in fp32: C (M, N) = A (M, K) · B (K, N), or added to C; A and B with any strides, fp32 or bf16.
//
// The blocking is that of Goto and van de Geijn (Anatomy of High-Performance Matrix Multiplication, 2008): a tile of
// C stays in registers while K goes by, strips of A and B are copied to where they are read one after the other.
// Each element is a chain of fused multiply-adds over up to DEPTH steps of K, and the chains are added up in order:
// the same bits for any M, N, strides and number of threads.
#pragma once

#include "vector.h"

namespace openelm {

constexpr long STRIP_M = WIDTH == 16 ? 12 : 6;   // rows of a tile
constexpr long STRIP_N = WIDTH == 16 ? 32 : 16;  // columns of a tile
constexpr long DEPTH = 512;                      // of K at a time
constexpr long ROWS = 20 * STRIP_M;              // rows that a thread copies at a time: they fit in its cache

template <class T> struct Matrix {
    const T* data;
    long row, column;  // strides in elements
    const T* at(long i, long j) const { return data + i * row + j * column; }
};

typedef float eight __attribute__((vector_size(32)));
typedef float eight_unaligned __attribute__((vector_size(32), aligned(4)));
typedef uint16_t eight_halves __attribute__((vector_size(16), aligned(2)));
typedef uint32_t eight_words __attribute__((vector_size(32)));

inline eight load_eight(const float* p) { return *(const eight_unaligned*)p; }
inline eight load_eight(const bf16* p) {
    return (eight)(__builtin_convertvector(*(const eight_halves*)p, eight_words) << 16);
}

inline void transpose(eight (&r)[8]) {
    eight t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; j++) {
            r[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int j = 0; j < 4; j++) {
        t[j] = __builtin_shufflevector(r[j], r[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        t[j + 4] = __builtin_shufflevector(r[j], r[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int j = 0; j < 8; j++) r[j] = t[j];
}

// The first `count` of eight numbers.
template <long count> void store_part(float* p, eight x) {
    typedef float four __attribute__((vector_size(16)));
    typedef float two __attribute__((vector_size(8)));
    if constexpr (count == 8) {
        std::memcpy(p, &x, 32);
    } else {
        four low = __builtin_shufflevector(x, x, 0, 1, 2, 3);
        std::memcpy(p, &low, 16);
        if constexpr (count == 6) {
            two high = __builtin_shufflevector(x, x, 4, 5);
            std::memcpy(p + 4, &high, 8);
        }
    }
}

// Eight steps of K from line `first` on: strip[k][first ...].
template <long STRIP, long first, class T>
void copy_eight_steps(float* strip, const T* lines_data, long line, long lines) {
    eight block[8];
    for (long i = 0; i < 8; i++) block[i] = first + i < lines ? load_eight(lines_data + (first + i) * line) : eight{};
    transpose(block);
    for (long i = 0; i < 8; i++) store_part<std::min(8L, STRIP - first)>(strip + i * STRIP + first, block[i]);
    if constexpr (first + 8 < STRIP) copy_eight_steps<STRIP, first + 8>(strip, lines_data, line, lines);
}

// Copies `lines` lines of `depth` elements to strip[k][line]; lines beyond `lines` are zero. A line lies along K.
template <long STRIP, class T>
void copy_strip(float* strip, const T* lines_data, long line, long along, long lines, long depth) {
    if (line == 1 && lines == STRIP) {
        for (long k = 0; k < depth; k++)
            for (long i = 0; i < STRIP; i++) strip[k * STRIP + i] = widen(lines_data[k * along + i]);
        return;
    }
    long k = 0;
    if (along == 1)
        for (; k + 8 <= depth; k += 8) copy_eight_steps<STRIP, 0>(strip + k * STRIP, lines_data + k, line, lines);
    for (; k < depth; k++)
        for (long i = 0; i < STRIP; i++)
            strip[k * STRIP + i] = i < lines ? widen(lines_data[i * line + k * along]) : 0.f;
}

// One tile: `rows` rows of a (depth × STRIP_M) times b (depth × STRIP_N).
template <long rows> void tile(long depth, const float* a, const float* b, float* c, long c_row, bool add) {
    constexpr long parts = STRIP_N / WIDTH;
    vec total[rows][parts] = {};
#pragma GCC unroll 4
    for (long k = 0; k < depth; k++) {
        vec right[parts];
        for (long j = 0; j < parts; j++) right[j] = *(const vec*)(b + k * STRIP_N + j * WIDTH);
#pragma GCC unroll 16
        for (long i = 0; i < rows; i++) {
            vec left = splat(a[k * STRIP_M + i]);
            for (long j = 0; j < parts; j++) total[i][j] += left * right[j];
        }
    }
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < parts; j++) {
            float* to = c + i * c_row + j * WIDTH;
            store(to, add ? load(to) + total[i][j] : total[i][j]);
        }
}

template <long rows = STRIP_M>
void tile_of(long wanted, long depth, const float* a, const float* b, float* c, long c_row, bool add) {
    if constexpr (rows > 1)
        if (wanted < rows) return tile_of<rows - 1>(wanted, depth, a, b, c, c_row, add);
    tile<rows>(depth, a, b, c, c_row, add);
}

// A strip of A times a strip of B; `columns` of the tile exist in C.
inline void multiply_strips(
    long rows, long columns, long depth, const float* a, const float* b, float* c, long c_row, bool add
) {
    if (columns == STRIP_N) return tile_of(rows, depth, a, b, c, c_row, add);
    alignas(64) float part[STRIP_M * STRIP_N];
    tile_of(rows, depth, a, b, part, STRIP_N, false);
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++)
            c[i * c_row + j] = (add ? c[i * c_row + j] : 0.f) + part[i * STRIP_N + j];
}

inline long strips(long count, long strip) { return (count + strip - 1) / strip; }

template <class A, class B>
void multiply(long m, long n, long k, Matrix<A> a, Matrix<B> b, float* c, long c_row, bool add, int threads);

}  // namespace openelm
