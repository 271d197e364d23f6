// A few queries of one token and a chunk of the keys and values that they see: generation's attention.
#pragma once

#include "packed.h"
#include <utility>

namespace openelm {

constexpr long CHUNK = 128;   // keys of one sequence that a thread attends to at a time
constexpr long TOGETHER = 4;  // query heads and keys whose products are taken at a time

// Queries as they are multiplied with keys: vectors of fp32, or whole vectors of bf16 for units that add up pairs.
template <class T> struct Factors {
    static constexpr long width = WIDTH;
    using Part = vec;
    static void put(const float* query, long dim, float scale, Part* to) {
        by_vectors(dim, [=](long k, long n) { to[k / WIDTH] = load_some(query + k, n) * scale; });
    }
    static inline Part key(const T* p, long n) { return load_some(p, n); }
    static inline vec add(vec total, Part query, Part key) { return total + query * key; }
};
#if defined(__AVX512BF16__)
struct Pairs {
    static constexpr long width = 2 * WIDTH;
    using Part = __m512bh;
    static bool suit(long dim) { return dim % width == 0; }
    static void put(const float* query, long dim, float scale, Part* to) {
        for (long k = 0; k < dim; k += WIDTH) store((bf16*)to + k, load(query + k) * scale);
    }
    static inline Part key(const bf16* p, long) { return (Part)_mm512_loadu_si512(p); }
    static inline vec add(vec total, Part query, Part key) { return (vec)_mm512_dpbf16_ps((__m512)total, query, key); }
};
#endif

// Scores of TOGETHER queries with `count` keys: scores[query][key].
template <class F, class T>
void score(
    const typename F::Part* queries, const T* keys, long dim, long count, float (*scores)[CHUNK], Ahead& ahead
) {
    constexpr long at_once = WIDTH / TOGETHER;  // keys
    long parts = (dim + F::width - 1) / F::width;
    for (long first = 0; first < count; first += at_once) {
        const T* key[at_once];
        for (long j = 0; j < at_once; j++) key[j] = keys + std::min(first + j, count - 1) * dim;
        vec total[WIDTH] = {};
        auto add = [&](long part, long n) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (long j = 0; j < at_once; j++) {
                auto numbers = F::key(key[j] + part * F::width, n);
#pragma GCC unroll 4
                for (long g = 0; g < TOGETHER; g++)
                    total[g * at_once + j] = F::add(total[g * at_once + j], queries[g * parts + part], numbers);
            }
        };
        for (long part = 0; part < dim / F::width; part++) add(part, WIDTH);
        if (dim % F::width) add(parts - 1, dim % F::width);
        ahead.ask(8);
        float found[WIDTH];
        sums<WIDTH>(total, found);
        for (long g = 0; g < TOGETHER; g++) std::memcpy(scores[g] + first, found + g * at_once, at_once * sizeof(float));
    }
}

// Scores become weights e^(score - largest), zero beyond `count`; returns the largest score and their sum.
inline std::pair<float, float> weigh(float* scores, long count) {
    for (long k = count; k % WIDTH; k++) scores[k] = -INFINITY;
    vec largest_ones = splat(-INFINITY), total = {};
    for (long j = 0; j < count; j += WIDTH) largest_ones = larger(load(scores + j), largest_ones);
    float most = largest(largest_ones);
    for (long j = 0; j < count; j += WIDTH) {
        vec weights = exp(load(scores + j) - most);
        store(scores + j, weights);
        total += weights;
    }
    return {most, sum(total)};
}

// out[query] = sum over the keys of weight · value, for TOGETHER queries.
template <class T>
void mix(
    const float (*weights)[CHUNK], const T* values, long dim, long count, float* const (&out)[TOGETHER], Ahead& ahead
) {
    constexpr long wide = WIDTH == 16 ? 4 : 2;  // vectors of columns at a time
    long column = 0;
    for (; column + wide * WIDTH <= dim; column += wide * WIDTH) {
        vec total[TOGETHER][wide] = {};
        for (long j = 0; j < count; j++) {
#pragma GCC unroll 4
            for (long c = 0; c < wide; c++) {
                vec value = load(values + j * dim + column + c * WIDTH);
#pragma GCC unroll 4
                for (long g = 0; g < TOGETHER; g++) total[g][c] += weights[g][j] * value;
            }
            ahead.ask(4);
        }
        for (long g = 0; g < TOGETHER; g++)
            for (long c = 0; c < wide; c++) store(out[g] + column + c * WIDTH, total[g][c]);
    }
    by_vectors(dim - column, [&](long k, long n) {
        vec total[TOGETHER] = {};
        for (long j = 0; j < count; j++)
            for (long g = 0; g < TOGETHER; g++) total[g] += weights[g][j] * load_some(values + j * dim + column + k, n);
        for (long g = 0; g < TOGETHER; g++) store_some(out[g] + column + k, total[g], n);
    });
}

}  // namespace openelm
