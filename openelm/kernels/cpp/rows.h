// Shared by the kernels that normalise rows.
#pragma once

#include "vector.h"

namespace openelm {

// 1 / sqrt(mean(x²) + eps), in an order that depends on the row's length alone.
template <class T> inline float inverse_rms(const T* x, long dim, float eps) {
    vec totals[4] = {};
    long i = 0;
    for (; i + 4 * WIDTH <= dim; i += 4 * WIDTH)
        for (long j = 0; j < 4; j++) {
            vec part = load(x + i + j * WIDTH);
            totals[j] += part * part;
        }
    by_vectors(dim - i, [&](long j, long n) {
        vec part = load_some(x + i + j, n);
        totals[0] += part * part;
    });
    return 1 / std::sqrt(sum((totals[0] + totals[1]) + (totals[2] + totals[3])) / dim + eps);
}

// The gradient of a weight is added up over stretches of rows, whoever takes them, and the stretches in order.
constexpr long STRETCH = 32;
inline long stretches(long rows) { return (rows + STRETCH - 1) / STRETCH; }

inline void add_stretches(long count, long dim, const float* sums, float* total) {
    std::memset(total, 0, dim * sizeof(float));
    for (long stretch = 0; stretch < count; stretch++)
        for (long i = 0; i < dim; i++) total[i] += sums[stretch * dim + i];
}

}  // namespace openelm
