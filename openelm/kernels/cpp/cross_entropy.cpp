// The losses of rows of logits, and their gradients in the place of the logits.

#include "vector.h"

namespace openelm {

template <class T> static float largest_of(const T* row, long columns) {
    vec top = splat(-INFINITY);
    long i = 0;
    for (; i + WIDTH <= columns; i += WIDTH) top = larger(load(row + i), top);
    float best = largest(top);
    for (; i < columns; i++) best = std::max(best, widen(row[i]));
    return best;
}

// In four chains of vectors, then across: an order that depends on `columns` alone.
template <class T> static float sum_of_exponentials(const T* row, long columns, float top) {
    vec total[4] = {};
    long i = 0;
    for (; i + 4 * WIDTH <= columns; i += 4 * WIDTH)
        for (long j = 0; j < 4; j++) total[j] += exp(load(row + i + j * WIDTH) - top);
    for (; i < columns; i += WIDTH) {
        long count = std::min(WIDTH, columns - i);
        vec power = exp(load_first(row + i, count) - top);
        for (long j = count; j < WIDTH; j++) power[j] = 0;
        total[0] += power;
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// l = logsumexp, nll = l − logit of the target, s = 1 + 2 · z_loss · l; the row becomes softmax − onehot / s.
template <class T>
static void softmax_loss(
    long rows, long columns, T* logits, const int64_t* targets, float z_loss, float* nll, float* log_sums,
    float* scales, bool gradients, long threads
) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        T* row = logits + r * columns;
        float top = largest_of(row, columns);
        float total = sum_of_exponentials(row, columns, top);
        float log_total = std::log(total);
        nll[r] = log_total + (top - widen(row[targets[r]]));
        log_sums[r] = top + log_total;
        scales[r] = 1 + 2 * z_loss * log_sums[r];
        if (!gradients) continue;
        float onehot = std::exp(widen(row[targets[r]]) - top) / total - 1 / scales[r];
        float share = 1 / total;
        long i = 0;
        for (; i + WIDTH <= columns; i += WIDTH) store(row + i, exp(load(row + i) - top) * share);
        if (i < columns) store_first(row + i, exp(load_first(row + i, columns - i) - top) * share, columns - i);
        store_first(row + targets[r], splat(onehot), 1);
    }
}

}  // namespace openelm

extern "C" void openelm_softmax_loss(
    long rows, long columns, void* logits, long logits_are_bf16, const int64_t* targets, float z_loss, float* nll,
    float* log_sums, float* scales, long gradients, long threads
) {
    using namespace openelm;
    by_dtype(logits_are_bf16, [=](auto kind) {
        using T = decltype(kind);
        softmax_loss(rows, columns, (T*)logits, targets, z_loss, nll, log_sums, scales, bool(gradients), threads);
    });
}
