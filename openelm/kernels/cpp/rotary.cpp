// Query and key normalisation with rotary positions: openelm/kernels/rotary.py has the formula.
#include "heads.h"

namespace openelm {

static thread_local Scratch weight_sums;

struct Sizes {
    long rows, length, query_heads, kv_heads, head_dim;
    long tokens() const { return rows * length; }
    long heads() const { return query_heads + 2 * kv_heads; }
    long numbers() const { return tokens() * heads() * head_dim; }
};

// Heads of every position of every row; the numbers of a head lie side by side, strides are in elements.
template <class T> struct Heads {
    T* data;
    long row, head, position;
    T* at(long i, long j, long k) const { return data + i * row + j * head + k * position; }
};

// Calls with each head of one token: call(its number, where it lies in the projection, where among q, k or v).
template <class T, class Call>
inline void each_head(Sizes sizes, long token, Heads<T> q, Heads<T> k, Heads<T> v, Call call) {
    long row = token / sizes.length, position = token % sizes.length;
    long offset = token * sizes.heads() * sizes.head_dim;
    for (long head = 0; head < sizes.heads(); head++, offset += sizes.head_dim) {
        long kv_head = head - sizes.query_heads, v_head = kv_head - sizes.kv_heads;
        call(
            head, offset,
            kv_head < 0  ? q.at(row, head, position)
            : v_head < 0 ? k.at(row, kv_head, position)
                         : v.at(row, v_head, position)
        );
    }
}

// call(i, n, numbers): the gradient before the turn, n numbers from i on.
template <class T, class Call>
void each_turned_back(Turn turn, const T* gradient, Call call) {
    long half = turn.half;
    by_vectors(half, [=](long i, long n) {
        vec first = load_some(gradient + i, n), second = load_some(gradient + half + i, n);
        vec cos = load_some(turn.cos + i, n), sin = load_some(turn.sin + i, n);
        call(i, n, first * cos + second * sin);
        call(half + i, n, second * cos - first * sin);
    });
}

// The gradient turned back is the one of the normalised head; the rest is as for rms_norm. Without a weight it is the
// result, and x is not read.
template <class T, class W>
void turn_back(
    const T* x, const W* weight, Turn turn, float eps, const T* gradient, T* x_gradient, float* weight_sum
) {
    if (!weight)
        return each_turned_back(turn, gradient, [=](long i, long n, vec back) { store_some(x_gradient + i, back, n); });
    vec inverse = splat(inverse_rms(x, 2 * turn.half, eps)), total = {};
    each_turned_back(turn, gradient, [&](long i, long n, vec back) {
        vec product = load_some(x + i, n) * inverse * back;
        store_some(weight_sum + i, load_some(weight_sum + i, n) + product, n);
        total += product * load_some(weight + i, n);
    });
    vec mean = splat(sum(total) / (2 * turn.half));
    each_turned_back(turn, gradient, [&](long i, long n, vec back) {
        vec normed = load_some(x + i, n) * inverse;
        store_some(x_gradient + i, inverse * (back * load_some(weight + i, n) - normed * mean), n);
    });
}

template <class T, class W>
static void qk_norm_rope(
    Sizes sizes, float eps, const T* qkv, const W* q_weight, const W* k_weight, Turn turns, Heads<T> q, Heads<T> k,
    Heads<T> v, long threads
) {
#pragma omp parallel for num_threads(team(sizes.numbers(), threads)) schedule(static)
    for (long token = 0; token < sizes.tokens(); token++) {
        Turn turn = turns.at(token % sizes.length);
        each_head(sizes, token, q, k, v, [=](long head, long offset, T* out) {
            if (head < sizes.query_heads + sizes.kv_heads)
                normalise_and_turn(qkv + offset, head < sizes.query_heads ? q_weight : k_weight, turn, eps, out);
            else
                std::memcpy(out, qkv + offset, sizes.head_dim * sizeof(T));
        });
    }
}

// weight_gradients: of q_weight, then of k_weight. Without weights they are zeros, and qkv is not read.
template <class T, class W>
static void qk_norm_rope_backward(
    Sizes sizes, float eps, const T* qkv, const W* q_weight, const W* k_weight, Turn turns, Heads<T> q, Heads<T> k,
    Heads<T> v, T* qkv_gradient, float* weight_gradients, long threads
) {
    long dim = sizes.head_dim, count = stretches(sizes.tokens());
    float* sums = weight_sums.floats(count * 2 * dim);
#pragma omp parallel for num_threads(team(sizes.numbers(), threads)) schedule(static)
    for (long stretch = 0; stretch < count; stretch++) {
        float* sum_here = sums + stretch * 2 * dim;
        std::memset(sum_here, 0, 2 * dim * sizeof(float));
        for (long token = stretch * STRETCH; token < std::min(sizes.tokens(), (stretch + 1) * STRETCH); token++) {
            Turn turn = turns.at(token % sizes.length);
            each_head(sizes, token, q, k, v, [=](long head, long offset, T* gradient) {
                bool is_query = head < sizes.query_heads;
                if (head < sizes.query_heads + sizes.kv_heads)
                    turn_back(
                        qkv + offset, is_query ? q_weight : k_weight, turn, eps, gradient, qkv_gradient + offset,
                        is_query ? sum_here : sum_here + dim
                    );
                else
                    std::memcpy(qkv_gradient + offset, gradient, dim * sizeof(T));
            });
        }
    }
    add_stretches(count, 2 * dim, sums, weight_gradients);
}

}  // namespace openelm

using namespace openelm;

extern "C" void openelm_qk_norm_rope(
    long rows, long length, long query_heads, long kv_heads, long head_dim, float eps, long is_bf16,
    long weights_are_bf16, const void* qkv, const void* q_weight, const void* k_weight, const float* cos,
    const float* sin, void* q, long q_row, long q_head, long q_position, void* k, long k_row, long k_head,
    long k_position, void* v, long v_row, long v_head, long v_position, long threads
) {
    by_dtype(is_bf16, [=](auto kind) {
        by_dtype(weights_are_bf16, [=](auto weight_kind) {
            using T = decltype(kind);
            using W = decltype(weight_kind);
            qk_norm_rope(
                {rows, length, query_heads, kv_heads, head_dim}, eps, (const T*)qkv, (const W*)q_weight,
                (const W*)k_weight, {cos, sin, head_dim / 2}, Heads<T>{(T*)q, q_row, q_head, q_position},
                {(T*)k, k_row, k_head, k_position}, {(T*)v, v_row, v_head, v_position}, threads
            );
        });
    });
}

extern "C" void openelm_qk_norm_rope_backward(
    long rows, long length, long query_heads, long kv_heads, long head_dim, float eps, long is_bf16,
    long weights_are_bf16, const void* qkv, const void* q_weight, const void* k_weight, const float* cos,
    const float* sin, void* q, long q_row, long q_head, long q_position, void* k, long k_row, long k_head,
    long k_position, void* v, long v_row, long v_head, long v_position, void* qkv_gradient, float* weight_gradients, long threads
) {
    by_dtype(is_bf16, [=](auto kind) {
        by_dtype(weights_are_bf16, [=](auto weight_kind) {
            using T = decltype(kind);
            using W = decltype(weight_kind);
            qk_norm_rope_backward(
                {rows, length, query_heads, kv_heads, head_dim}, eps, (const T*)qkv, (const W*)q_weight,
                (const W*)k_weight, {cos, sin, head_dim / 2}, Heads<T>{(T*)q, q_row, q_head, q_position},
                {(T*)k, k_row, k_head, k_position}, {(T*)v, v_row, v_head, v_position}, (T*)qkv_gradient,
                weight_gradients, threads
            );
        });
    });
}
