// The gate of the feed-forward layers: openelm/kernels/swiglu.py has the formula.
#include "vector.h"

namespace openelm {

// A row of gate_up is the gate, then what it gates. silu(gate) is rounded before the product, as published.
template <class T> static void swiglu(long rows, long dim, const T* gate_up, T* out, long threads) {
#pragma omp parallel for num_threads(team(rows * dim, threads)) schedule(static)
    for (long row = 0; row < rows; row++) {
        const T* from = gate_up + row * 2 * dim;
        T* to = out + row * dim;
        by_vectors(dim, [&](long i, long n) {
            vec gate = load_some(from + i, n);
            vec silu = rounded<T>(gate / (1.f + exp(-gate)));
            store_some(to + i, silu * load_some(from + dim + i, n), n);
        });
    }
}

// d gate = g · up · s · (1 + gate · (1 − s)) with s the sigmoid of the gate, d up = g · silu(gate).
template <class T>
static void swiglu_backward(long rows, long dim, const T* gate_up, const T* gradient, T* result, long threads) {
#pragma omp parallel for num_threads(team(rows * dim, threads)) schedule(static)
    for (long row = 0; row < rows; row++) {
        const T* from = gate_up + row * 2 * dim;
        const T* given = gradient + row * dim;
        T* to = result + row * 2 * dim;
        by_vectors(dim, [&](long i, long n) {
            vec gate = load_some(from + i, n), up = load_some(from + dim + i, n), g = load_some(given + i, n);
            vec s = 1.f / (1.f + exp(-gate));
            store_some(to + i, g * up * (s * (1.f + gate * (1.f - s))), n);
            store_some(to + dim + i, g * rounded<T>(gate * s), n);
        });
    }
}

}  // namespace openelm

using namespace openelm;

extern "C" void openelm_swiglu(long rows, long dim, const void* gate_up, void* out, long is_bf16, long threads) {
    by_dtype(is_bf16, [=](auto kind) {
        using T = decltype(kind);
        swiglu(rows, dim, (const T*)gate_up, (T*)out, threads);
    });
}

extern "C" void openelm_swiglu_backward(
    long rows, long dim, const void* gate_up, const void* gradient, void* result, long is_bf16, long threads
) {
    by_dtype(is_bf16, [=](auto kind) {
        using T = decltype(kind);
        swiglu_backward(rows, dim, (const T*)gate_up, (const T*)gradient, (T*)result, threads);
    });
}
