// Matrices of few bits as the numbers that they stand for: openelm/kernels/quantized.py.
#include "few_rows.h"

namespace openelm {

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
