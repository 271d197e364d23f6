// Matrices of few bits as the numbers that they stand for: openelm/kernels/quantized.py.
#include "vector.h"

namespace openelm {

// The next WIDTH whole numbers of so many bits.
template <long bits> static inline vec whole_numbers(const uint8_t* p) {
    uvec numbers;
    if constexpr (bits == 8) {
        typedef uint8_t bytes_of __attribute__((vector_size(WIDTH), aligned(1)));
        numbers = __builtin_convertvector(*(const bytes_of*)p, uvec);
    } else {
        uvec words, shifts;
        for (long i = 0; i < WIDTH; i++) {
            uint32_t word;
            std::memcpy(&word, p + i / 8 * 4, 4);
            words[i] = word, shifts[i] = i % 8 * 4;
        }
        numbers = (words >> shifts) & 15;
    }
    return __builtin_convertvector((ivec)numbers, vec);
}

template <long bits, class S>
static void dequantise(
    long rows, long columns, long group, const uint8_t* numbers, const S* scales, const S* biases, S* out, long threads
) {
    long groups = columns / group;
#pragma omp parallel for num_threads(team(rows * columns, threads)) schedule(static)
    for (long place = 0; place < rows * groups; place++) {
        vec scale = splat(widen(scales[place])), bias = splat(widen(biases[place]));
        for (long i = place * group; i < (place + 1) * group; i += WIDTH)
            store(out + i, whole_numbers<bits>(numbers + i * bits / 8) * scale + bias);
    }
}

}  // namespace openelm

using namespace openelm;

extern "C" void openelm_dequantise(
    long rows, long columns, long group, long bits, long is_bf16, const uint8_t* numbers, const void* scales,
    const void* biases, void* out, long threads
) {
    by_dtype(is_bf16, [=](auto kind) {
        using S = decltype(kind);
        auto call = bits == 8 ? dequantise<8, S> : dequantise<4, S>;
        call(rows, columns, group, numbers, (const S*)scales, (const S*)biases, (S*)out, threads);
    });
}
