// Vectors as wide as the target's registers, in the GCC and Clang notation, so that one source serves every CPU.
//
// A library is compiled once for each instruction set and chosen at run time (openelm/kernels/native.py). Sums that
// decide a result are taken in an order that depends on the shapes alone, never on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <omp.h>
#include <type_traits>
#include <utility>

namespace openelm {

#if defined(__AVX512F__)
constexpr long WIDTH = 16;
#elif defined(__AVX2__)
constexpr long WIDTH = 8;
#else
constexpr long WIDTH = 4;
#endif

typedef float vec __attribute__((vector_size(WIDTH * 4)));
typedef float vec_unaligned __attribute__((vector_size(WIDTH * 4), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t uvec __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t halves __attribute__((vector_size(WIDTH * 2)));
typedef uint32_t uvec_unaligned __attribute__((vector_size(WIDTH * 4), aligned(4)));
typedef uint16_t halves_unaligned __attribute__((vector_size(WIDTH * 2), aligned(2)));

struct bf16 {
    uint16_t bits;
};

inline vec splat(float x) { return x - vec{}; }

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
inline uvec rounded_bits(vec x) {
    uvec bits = (uvec)x;
    uvec up = bits + 0x7fff + ((bits >> 16) & 1);
    return x == x ? up : uvec{} + 0x7fc00000;
}

inline bf16 narrowed(float x) { return {uint16_t(rounded_bits(splat(x))[0] >> 16)}; }

inline vec load(const float* p) { return *(const vec_unaligned*)p; }
inline vec load(const bf16* p) {  // of two halves the compiler would make whole words one by one
    halves bits = *(const halves_unaligned*)p;
#if defined(__AVX512F__)
    return (vec)((uvec)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#elif defined(__AVX2__)
    return (vec)((uvec)_mm256_cvtepu16_epi32((__m128i)bits) << 16);
#else
    return (vec)(__builtin_convertvector(bits, uvec) << 16);
#endif
}
inline void store(float* p, vec x) { *(vec_unaligned*)p = x; }
inline void store(bf16* p, vec x) { *(halves_unaligned*)p = __builtin_convertvector(rounded_bits(x) >> 16, halves); }

// What is read again of a vector stored as T.
template <class T> inline vec rounded(vec x) {
    if constexpr (std::is_same_v<T, bf16>)
        return (vec)(rounded_bits(x) & 0xffff0000);
    else
        return x;
}

// The dtype of a product of the two.
template <class A, class B>
using promoted = std::conditional_t<std::is_same_v<A, bf16> && std::is_same_v<B, bf16>, bf16, float>;

// Calls with a value of the dtype: by_dtype(is_bf16, [&](auto x) { using X = decltype(x); ... }).
template <class Call> inline void by_dtype(bool is_bf16, Call call) { is_bf16 ? call(bf16{}) : call(float{}); }

// The first n elements of a vector; the others are zero.
#if defined(__AVX512F__)
inline vec load_first(const float* p, long n) { return (vec)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline vec load_first(const bf16* p, long n) {
    return (vec)((uvec)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((1u << n) - 1, p)) << 16);
}
inline void store_first(float* p, vec x, long n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x); }
inline void store_first(bf16* p, vec x, long n) {
    halves bits = __builtin_convertvector(rounded_bits(x) >> 16, halves);
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)bits);
}
#else
template <class T> inline vec load_first(const T* p, long n) {
    T part[WIDTH] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load(part);
}
template <class T> inline void store_first(T* p, vec x, long n) {
    T part[WIDTH];
    store(part, x);
    std::memcpy(p, part, n * sizeof(T));
}
#endif

// The same for n from 1 to WIDTH; where the compiler knows that n is WIDTH nothing is left of the choice.
template <class T> inline vec load_some(const T* p, long n) { return n == WIDTH ? load(p) : load_first(p, n); }
template <class T> inline void store_some(T* p, vec x, long n) { n == WIDTH ? store(p, x) : store_first(p, x, n); }

// Calls body(start, n) for one vector after the other; n is less than WIDTH for the last one alone.
template <class Body> inline __attribute__((always_inline)) void by_vectors(long count, Body body) {
    long i = 0;
    for (; i + WIDTH <= count; i += WIDTH) body(i, WIDTH);
    if (i < count) body(i, count - i);
}

inline float sum(vec x) {
    float parts[WIDTH];
    store(parts, x);
    for (long half = WIDTH / 2; half > 0; half /= 2)
        for (long i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
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

inline float largest(vec x) {
    float best = x[0];
    for (long i = 1; i < WIDTH; i++) best = std::max(best, x[i]);
    return best;
}
inline vec larger(vec a, vec b) { return a > b ? a : b; }

// e^x to 1.5 units in the last place; below -87.3 it is 0, above 88.3 infinite. By Cephes' reduction x = n ln 2 + r,
// |r| <= ln 2 / 2.
inline vec exp(vec x) {
    vec clamped = larger(x, splat(-87.3f));
    clamped = clamped < 88.3f ? clamped : splat(88.3f);
    const vec shift = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to a whole number
    vec n = (clamped * 1.44269504f + shift) - shift;
    vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.f);
    vec power = (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
    vec result = x > 88.3f ? splat(INFINITY) : p * power;
    result = x < -87.3f ? vec{} : result;
    return x == x ? result : x;
}

// How many threads are worth waking for so many numbers.
inline int team(long numbers, long threads) { return numbers < 16384 ? 1 : threads; }

// A block of memory that grows and is kept: fresh pages cost more than most kernels.
class Scratch {
  public:
    float* floats(long count) {
        if (count > count_) {
            std::free(data_);
            count_ = (count + 1023) / 1024 * 1024;
            data_ = (float*)std::aligned_alloc(4096, count_ * sizeof(float));
        }
        return data_;
    }
    ~Scratch() { std::free(data_); }

  private:
    float* data_ = nullptr;
    long count_ = 0;
};

}  // namespace openelm
