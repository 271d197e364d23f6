// Products of a few rows of numbers with a weight that is read once, row after row: generation is made of them.
//
// An element is the sum over its row of the weight in an order that depends on the row's length alone: its bits are
// the same in any company of rows, for any number of threads.
#pragma once

#include "vector.h"
#include <immintrin.h>
#include <utility>

namespace openelm {

constexpr long STEP = 64;  // numbers of a row that are multiplied at a time, and those that share a scale
constexpr long TILE = 4;   // rows of a weight at a time
#if defined(__AVX512F__)
constexpr long INPUTS = 4;  // rows of inputs at a time: the sums stay in registers
#else
constexpr long INPUTS = 2;
#endif
constexpr long GROUPS = 64;  // whose scales are widened at a time

enum Kind : long { FLOAT32, BFLOAT16, EIGHT_BITS, FOUR_BITS };

// A matrix (rows, columns), row after row; of few bits w = scale · q + bias, by groups of STEP (model/quantized.py).
struct Weight {
    long kind, scales_are_bf16;
    const uint8_t* numbers;
    const void *scales, *biases;
};

template <class Input> struct Inputs {
    Input* numbers;   // rows of `stride` numbers, zero beyond the last one
    float* sums;      // of each STEP of them
    long stride;
    long groups() const { return stride / STEP; }
};

#if defined(__AVX512BF16__)
typedef bf16 narrow;  // what bf16 and quantised weights are multiplied with: the units add up pairs in fp32
#else
typedef float narrow;
#endif

// STEP numbers of a row of a weight, as operands.
template <class Input> struct Operands {
    vec part[STEP / WIDTH];
    template <class T> static inline Operands of(const T* p) {
        Operands result;
        for (long i = 0; i < STEP / WIDTH; i++) result.part[i] = load(p + i * WIDTH);
        return result;
    }
    inline vec times(const float* x, vec total) const {
        for (long i = 0; i < STEP / WIDTH; i++) total += part[i] * load(x + i * WIDTH);
        return total;
    }
};

#if defined(__AVX512BF16__)
template <> struct Operands<bf16> {
    __m512bh part[2];
    static inline Operands of(const bf16* p) {
        return {{(__m512bh)_mm512_loadu_si512(p), (__m512bh)_mm512_loadu_si512(p + 32)}};
    }
    inline vec times(const bf16* x, vec total) const {
        __m512 sum = (__m512)total;
        for (long i = 0; i < 2; i++) sum = _mm512_dpbf16_ps(sum, part[i], (__m512bh)_mm512_loadu_si512(x + i * 32));
        return (vec)sum;
    }
};
#endif

template <class T> struct Plain {
    using Input = std::conditional_t<std::is_same_v<T, bf16>, narrow, float>;
    static constexpr bool in_groups = false;
    static constexpr long bytes = STEP * sizeof(T);
    static inline Operands<Input> read(const uint8_t* p) { return Operands<Input>::of((const T*)p); }
};

template <class S, long bits> struct Grouped {
    using Input = narrow;
    using Scale = S;
    static constexpr bool in_groups = true;
    static constexpr long bytes = STEP * bits / 8;
    static inline Operands<Input> read(const uint8_t* p);
};

#if defined(__AVX512BF16__)
// Whole numbers below 256 are exact in bf16. Of four bits those at even places come first, then those at odd ones.
template <class S, long bits> inline Operands<narrow> Grouped<S, bits>::read(const uint8_t* p) {
    Operands<narrow> result;
    if constexpr (bits == 8) {
        for (long i = 0; i < 2; i++) {
            auto wide = [=](long j) {
                return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 32 * i + 16 * j))));
            };
            result.part[i] = _mm512_cvtne2ps_pbh(wide(1), wide(0));
        }
    } else {
        // 0 to 15 twice: vpermw looks at five bits, of which the fifth belongs to the next number.
        const __m512i whole = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
            0x4160, 0x4170
        ));
        __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        result.part[0] = (__m512bh)_mm512_permutexvar_epi16(pairs, whole);
        result.part[1] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), whole);
    }
    return result;
}
#else
template <class S, long bits> inline Operands<narrow> Grouped<S, bits>::read(const uint8_t* p) {
    Operands<narrow> result;
    for (long i = 0; i < STEP / WIDTH; i++) {
        uvec numbers;
        if constexpr (bits == 8) {
            typedef uint8_t bytes_of __attribute__((vector_size(WIDTH), aligned(1)));
            numbers = __builtin_convertvector(*(const bytes_of*)(p + i * WIDTH), uvec);
        } else {
            uvec words, shifts;
            for (long j = 0; j < WIDTH; j++) {
                uint32_t word;
                std::memcpy(&word, p + (i * WIDTH + j) / 8 * 4, 4);
                words[j] = word, shifts[j] = j % 8 * 4;
            }
            numbers = (words >> shifts) & 15;
        }
        result.part[i] = __builtin_convertvector((ivec)numbers, vec);
    }
    return result;
}
#endif

// Puts n <= STEP numbers where `Operands` wants them; returns the sum of what they are there.
template <class Kind> inline float place(const float* values, long n, typename Kind::Input* to) {
    float padded[STEP] = {};
    std::memcpy(padded, values, n * sizeof(float));
    vec total = {};
    for (long i = 0; i < STEP; i += WIDTH) total += rounded<typename Kind::Input>(load(padded + i));
    if constexpr (std::is_same_v<typename Kind::Input, bf16> && Kind::bytes == STEP / 2) {
        float split[STEP];
        for (long i = 0; i < STEP; i++) split[i % 2 * (STEP / 2) + i / 2] = padded[i];
        std::memcpy(padded, split, sizeof padded);
    }
    for (long i = 0; i < STEP; i += WIDTH) store(to + i, load(padded + i));
    return sum(total);
}

// Each block of `span` lanes of a and b holds one sum in parts: its halves are added, a's in front of b's.
template <long span, std::size_t... lanes> inline vec halves_added(vec a, vec b, std::index_sequence<lanes...>) {
    constexpr long half = span / 2;
    constexpr auto from = [](long lane, long offset) {
        long start = lane / span * span, inside = lane % span;
        return start + (inside < half ? inside : WIDTH + inside - half) + offset;
    };
    return __builtin_shufflevector(a, b, from(lanes, 0)...) + __builtin_shufflevector(a, b, from(lanes, half)...);
}

// The sums of up to WIDTH vectors, each as `sum` takes it: that of vector i is in out[i · WIDTH / count].
template <long count, long span = WIDTH> inline void sums(vec* vectors, float* out) {
    constexpr auto lanes = std::make_index_sequence<WIDTH>();
    if constexpr (span == 1) {
        static_assert(count == 1);
        store(out, vectors[0]);
    } else {
        constexpr long fewer = std::max(1L, count / 2);
        for (long i = 0; i < fewer; i++) vectors[i] = halves_added<span>(vectors[i], vectors[i + count / 2], lanes);
        sums<fewer, span / 2>(vectors, out);
    }
}

// Rows first … first + TILE - 1 of a weight (the last one again beyond the end) times `count` inputs.
template <class Kind, long count>
void tile(
    const Weight& weight, long first, long rows, long columns, Inputs<typename Kind::Input> x, float* out, long out_row,
    bool add
) {
    constexpr long places = count == 3 ? 4 : count;  // a power of two
    long steps = columns / STEP, bytes = Kind::in_groups ? steps * Kind::bytes : columns * Kind::bytes / STEP;
    const uint8_t* from[TILE];
    for (long r = 0; r < TILE; r++) from[r] = weight.numbers + std::min(first + r, rows - 1) * bytes;
    // Four rows at a time confuse what a CPU foresees: memory is asked for in one line, two tiles ahead.
    const uint8_t* ahead = from[0] + 2 * TILE * bytes;
    vec total[TILE * places] = {};
    auto add_step = [&](long k, const uint8_t* const (&at)[TILE], const float (*scales)[GROUPS]) {
#pragma GCC unroll 4
        for (long r = 0; r < TILE; r++) {
            auto numbers = Kind::read(at[r]);
#pragma GCC unroll 4
            for (long i = 0; i < count; i++) {
                vec& sum = total[r * places + i];
                const auto* input = x.numbers + i * x.stride + k * STEP;
                if constexpr (Kind::in_groups)
                    sum += numbers.times(input, vec{}) * splat(scales[r][k % GROUPS]);
                else
                    sum = numbers.times(input, sum);
            }
        }
    };
    for (long start = 0; start < steps; start += GROUPS) {
        long end = std::min(steps, start + GROUPS);
        float scales[TILE][GROUPS];
        if constexpr (Kind::in_groups)
            for (long r = 0; r < TILE; r++) {
                long group = std::min(first + r, rows - 1) * steps + start;
                auto *factors = (const typename Kind::Scale*)weight.scales + group;
                auto *biases = (const typename Kind::Scale*)weight.biases + group;
                by_vectors(end - start, [&](long g, long n) {
                    store_some(scales[r] + g, load_some(factors + g, n), n);
                    __builtin_prefetch(factors + 2 * TILE * steps + g);
                    __builtin_prefetch(biases + 2 * TILE * steps + g);
                    vec bias = load_some(biases + g, n);
                    for (long i = 0; i < count; i++)
                        total[r * places + i] += bias * load_some(x.sums + i * x.groups() + start + g, n);
                });
            }
        for (long k = start; k < end; k++) {
            const uint8_t* at[TILE];
            for (long r = 0; r < TILE; r++) at[r] = from[r] + k * Kind::bytes;
#pragma GCC unroll 16
            for (long i = 0; i < TILE * Kind::bytes; i += 64) __builtin_prefetch(ahead + k * TILE * Kind::bytes + i);
            add_step(k, at, scales);
        }
    }
    if constexpr (!Kind::in_groups)
        if (columns % STEP) {
            uint8_t last[TILE][Kind::bytes] = {};
            for (long r = 0; r < TILE; r++)
                std::memcpy(last[r], from[r] + steps * Kind::bytes, bytes - steps * Kind::bytes);
            const uint8_t* at[TILE];
            for (long r = 0; r < TILE; r++) at[r] = last[r];
            add_step(steps, at, nullptr);
        }
    float results[WIDTH];
    sums<TILE * places>(total, results);
    for (long i = 0; i < count; i++)
        for (long r = 0; r < std::min(TILE, rows - first); r++) {
            float& to = out[i * out_row + first + r];
            to = (add ? to : 0.f) + results[(r * places + i) * (WIDTH / (TILE * places))];
        }
}

template <class Kind, long most = INPUTS>
void tile_of(
    long wanted, const Weight& weight, long first, long rows, long columns, Inputs<typename Kind::Input> x, float* out,
    long out_row, bool add
) {
    if constexpr (most > 1)
        if (wanted < most) return tile_of<Kind, most - 1>(wanted, weight, first, rows, columns, x, out, out_row, add);
    tile<Kind, most>(weight, first, rows, columns, x, out, out_row, add);
}

// Rows first … last - 1 of a weight times `count` inputs: out[input][row], replaced or added to.
template <class Kind>
void multiply_rows(
    const Weight& weight, long first, long last, long columns, Inputs<typename Kind::Input> x, long count, float* out,
    long out_row, bool add
) {
    for (long row = first; row < last; row += TILE)
        for (long i = 0; i < count; i += INPUTS) {
            Inputs<typename Kind::Input> here{x.numbers + i * x.stride, x.sums + i * x.groups(), x.stride};
            long together = std::min(INPUTS, count - i);
            tile_of<Kind>(together, weight, row, last, columns, here, out + i * out_row, out_row, add);
        }
}

// Calls with a value of the weight's kind.
template <class Call> void by_kind(const Weight& weight, Call call) {
    if (weight.kind == FLOAT32) return call(Plain<float>());
    if (weight.kind == BFLOAT16) return call(Plain<bf16>());
    by_dtype(weight.scales_are_bf16, [&](auto scale) {
        weight.kind == EIGHT_BITS ? call(Grouped<decltype(scale), 8>()) : call(Grouped<decltype(scale), 4>());
    });
}

}  // namespace openelm
