// What a packed matrix is made of, and how its numbers are multiplied: packed.h has the products.
#pragma once

#include "units.h"
#include <immintrin.h>

namespace openelm {

constexpr long VECTORS = 2;  // of rows in a tile: two sums for one row of inputs, which hide each other's latency
constexpr long TILE = VECTORS * WIDTH;
#if defined(__AVX512F__)
constexpr long TILES = 2, INPUTS = 6;  // tiles and rows of inputs at a time: their sums stay in registers
#else
constexpr long TILES = 1, INPUTS = 4;
#endif
constexpr long AHEAD = 6144;  // bytes from what is read to what memory is asked for

enum Kind : long { FLOAT32, BFLOAT16, EIGHT_BITS, FOUR_BITS };

// Numbers as they are. `Part`: what a vector of rows is multiplied with at a time, `columns` of them. `step`: columns that
// a product takes at a time; zeros stand behind the last ones.
template <class T> struct Plain;

template <> struct Plain<float> {
    using Input = float;
    using Part = vec;
    static constexpr long columns = 1, step = 1;
    static inline vec read(const uint8_t* p) { return load((const float*)p); }
    static inline vec spread(const float* x) { return splat(*x); }
    static inline vec add(vec total, vec part, vec x) { return total + part * x; }
};

#if defined(__AVX512BF16__)
template <> struct Plain<bf16> {  // the units add up pairs in fp32
    using Input = bf16;
    using Part = __m512bh;
    static constexpr long columns = 2;
#if defined(__AMX_BF16__)
    static constexpr long step = DEEP;
#else
    static constexpr long step = 2;
#endif
    static inline Part read(const uint8_t* p) { return (Part)_mm512_loadu_si512(p); }
    static inline Part spread(const bf16* x) {
        int pair;
        std::memcpy(&pair, x, sizeof pair);
        return (Part)_mm512_set1_epi32(pair);
    }
    static inline vec add(vec total, Part part, Part x) { return (vec)_mm512_dpbf16_ps((__m512)total, part, x); }
};
#else
template <> struct Plain<bf16> {
    using Input = float;
    struct Part {
        vec first, second;
    };
    static constexpr long columns = 2, step = 2;
    static inline Part read(const uint8_t* p) {
        uvec pairs = *(const uvec_unaligned*)p;
        return {(vec)(pairs << 16), (vec)(pairs & 0xffff0000)};
    }
    static inline Part spread(const float* x) { return {splat(x[0]), splat(x[1])}; }
    static inline vec add(vec total, Part part, Part x) { return total + part.first * x.first + part.second * x.second; }
};
#endif

// Pairs of 16-bit whole numbers: of WIDTH rows, or one pair WIDTH times.
#if defined(__AVX512F__)
typedef __m512i pairs;
inline pairs pairs_of_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline pairs low_four(pairs x) { return _mm512_and_si512(x, _mm512_set1_epi16(15)); }
inline pairs high_four(pairs x) { return _mm512_srli_epi16(x, 4); }
inline void add_products(ivec& total, pairs a, pairs b) {
#if defined(__AVX512VNNI__)
    total = (ivec)_mm512_dpwssd_epi32((__m512i)total, a, b);
#else
    total += (ivec)_mm512_madd_epi16(a, b);
#endif
}
#else
typedef __m256i pairs;
inline pairs pairs_of_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline pairs low_four(pairs x) { return _mm256_and_si256(x, _mm256_set1_epi16(15)); }
inline pairs high_four(pairs x) { return _mm256_srli_epi16(x, 4); }
inline void add_products(ivec& total, pairs a, pairs b) { total += (ivec)_mm256_madd_epi16(a, b); }
#endif
inline pairs spread_pair(const int16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (pairs)(ivec{} + pair);
}

// Whole numbers of few bits. Inputs are whole numbers of 16 bits too, so that the sums of a group are exact; bf16 inputs
// would be rounded 128 times as coarsely as the largest of a group is.
template <class S, long bits_of_number> struct Grouped {
    using Input = int16_t;
    using Scale = S;
    static constexpr long bits = bits_of_number;
    static constexpr long columns = 16 / bits;  // of 4 bits another pair lies half a group further on
    static constexpr long step = 1;             // groups are whole
    static constexpr long step_bytes = 2 * TILE;
    static long group_bytes(long group) { return group / columns * step_bytes + 2 * TILE * sizeof(S); }
};

template <class T> constexpr bool in_groups = false;
template <class S, long bits> constexpr bool in_groups<Grouped<S, bits>> = true;

}  // namespace openelm
