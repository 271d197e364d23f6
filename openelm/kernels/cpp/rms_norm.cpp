// Root-mean-square normalisation of rows: openelm/kernels/rms_norm.py has the formula.
#include "rows.h"

namespace openelm {

static thread_local Scratch weight_sums;

template <class X, class W, class O>
static void rms_norm(long rows, long dim, float eps, const X* x, const W* weight, O* out, long threads) {
#pragma omp parallel for num_threads(team(rows * dim, threads)) schedule(static)
    for (long row = 0; row < rows; row++) {
        const X* from = x + row * dim;
        O* to = out + row * dim;
        vec inverse = splat(inverse_rms(from, dim, eps));
        by_vectors(dim, [&](long i, long n) {
            vec normed = rounded<X>(load_some(from + i, n) * inverse);
            store_some(to + i, rounded<promoted<X, W>>(normed * load_some(weight + i, n)), n);
        });
    }
}

// d x = (g·w − x̂ · mean(x̂·g·w)) / rms, d w = Σ x̂·g; roundings pass gradients on as they are.
template <class X, class W, class O>
static void rms_norm_backward(
    long rows, long dim, float eps, const X* x, const W* weight, const O* gradient, X* x_gradient,
    float* weight_gradient, long threads
) {
    float* sums = weight_sums.floats(stretches(rows) * dim);
#pragma omp parallel for num_threads(team(rows * dim, threads)) schedule(static)
    for (long stretch = 0; stretch < stretches(rows); stretch++) {
        float* sum_here = sums + stretch * dim;
        std::memset(sum_here, 0, dim * sizeof(float));
        for (long row = stretch * STRETCH; row < std::min(rows, (stretch + 1) * STRETCH); row++) {
            const X* from = x + row * dim;
            const O* given = gradient + row * dim;
            X* to = x_gradient + row * dim;
            vec inverse = splat(inverse_rms(from, dim, eps)), total = {};
            by_vectors(dim, [&](long i, long n) {
                vec product = load_some(from + i, n) * inverse * load_some(given + i, n);
                store_some(sum_here + i, load_some(sum_here + i, n) + product, n);
                total += product * load_some(weight + i, n);
            });
            vec mean = splat(sum(total) / dim);
            by_vectors(dim, [&](long i, long n) {
                vec scaled = load_some(given + i, n) * load_some(weight + i, n);
                store_some(to + i, inverse * (scaled - load_some(from + i, n) * inverse * mean), n);
            });
        }
    }
    add_stretches(stretches(rows), dim, sums, weight_gradient);
}

}  // namespace openelm

using namespace openelm;

extern "C" void openelm_rms_norm(
    long rows, long dim, float eps, const void* x, long x_is_bf16, const void* weight, long weight_is_bf16, void* out,
    long out_is_bf16, long threads
) {
    by_dtype(x_is_bf16, [=](auto x_kind) {
        by_dtype(weight_is_bf16, [=](auto weight_kind) {
            by_dtype(out_is_bf16, [=](auto out_kind) {
                using X = decltype(x_kind);
                using W = decltype(weight_kind);
                rms_norm(rows, dim, eps, (const X*)x, (const W*)weight, (decltype(out_kind)*)out, threads);
            });
        });
    });
}

extern "C" void openelm_rms_norm_backward(
    long rows, long dim, float eps, const void* x, long x_is_bf16, const void* weight, long weight_is_bf16,
    const void* gradient, long gradient_is_bf16, void* x_gradient, float* weight_gradient, long threads
) {
    by_dtype(x_is_bf16, [=](auto x_kind) {
        by_dtype(weight_is_bf16, [=](auto weight_kind) {
            by_dtype(gradient_is_bf16, [=](auto gradient_kind) {
                using X = decltype(x_kind);
                using W = decltype(weight_kind);
                using O = decltype(gradient_kind);
                rms_norm_backward(
                    rows, dim, eps, (const X*)x, (const W*)weight, (const O*)gradient, (X*)x_gradient,
                    weight_gradient, threads
                );
            });
        });
    });
}
