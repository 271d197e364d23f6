// Causal attention with grouped heads, forward and backward, without a matrix of all scores.
//
// After FlashAttention-2 (Dao, arXiv 2307.08691): a block of queries meets one tile of keys after the other, with a
// running maximum and sum. The queries of all heads that share a key head are one block. Scores lie with the queries
// side by side, so that keys and values are multiplied as they are and a softmax runs down the lanes of a vector.
//
// A query's numbers depend on its position, the keys and the documents alone: tiles start at multiples of KEYS, and
// each lane is on its own. Gradients of keys and values are added up over the blocks in one order, in which the
// threads take turns; so every result has the same bits for any number of threads and of rows.
#include <atomic>
#include <memory>
#include <sched.h>

#include "attention.h"

namespace openelm {
namespace {

static thread_local Scratch scratch;
static constexpr long FEW_PRODUCTS = 1 << 17;  // below it, waking threads costs more than they save

// The first query of a block that may see a key.
static long first_seeing(const Shape& shape, const Block& block, long key) {
    long position = key - (shape.keys - shape.length);
    return std::max(0L, position * shape.groups() - block.first);
}

// Products of keys, or values, with the queries of a block: to[key][query], where some query of a vector sees the key.
static void meet(
    const Shape& shape, const Block& block, const Tile& tile, const float* keys, const float* turned, float* to
) {
    long wide = shape.wide();
    long i = 0;
    if (block.width == WIDTH)  // more keys at a time for a few queries
        for (; i + 2 * STRIP_M <= tile.count; i += 2 * STRIP_M)
            panel<2 * STRIP_M, 1, false, Sum::alone>(
                shape.head_dim, keys + i * wide, wide, turned, QUERIES, to + i * QUERIES, QUERIES, nullptr
            );
    for (; i < tile.count; i += STRIP_M) {
        long from = first_seeing(shape, block, tile.first + i) / WIDTH * WIDTH;
        panels<false, Sum::alone>(
            std::min(STRIP_M, tile.count - i), block.width - from, shape.head_dim, keys + i * wide, wide,
            turned + from, QUERIES, to + i * QUERIES + from, QUERIES
        );
    }
}

// Puts `hidden` where the query of a lane does not see the key; j is the first lane of a vector.
static void hide(const Block& block, const Tile& tile, long j, float hidden, float* scores) {
    ivec position = *(const ivec*)(block.position + j), document = *(const ivec*)(block.document + j);
    long seen = tile.seen_by(block, j + WIDTH - 1);
    for (long i = tile.documents ? 0 : tile.seen_by(block, j); i < seen; i++) {
        ivec sees = position >= int32_t(tile.first + i);
        if (tile.documents) sees &= document == tile.documents[i];
        float* to = scores + i * QUERIES + j;
        store(to, sees ? load(to) : splat(hidden));
    }
}

// Turns scores into e^(scale · (score - maximum)) and updates what is kept of each query: the largest score, the sum
// of exponentials, and by how much those of earlier tiles have to shrink.
static void soften(
    const Block& block, const Tile& tile, float scale, float* scores, float* best, float* total, float* shrink
) {
    const vec factor = splat(scale * 1.44269504f);
    long end = tile.seen_by(block, block.count - 1);
    for (long j = 0; j < block.width; j += WIDTH) {
        if (tile.hides_some(block)) hide(block, tile, j, -INFINITY, scores);
        long seen = tile.seen_by(block, j + WIDTH - 1);
        vec before = load(best + j), now = before, sums = {};
        for (long i = 0; i < seen; i++) now = larger(load(scores + i * QUERIES + j), now);
        vec least = now > -INFINITY ? now : vec{};  // 0 where nothing has been seen yet, so that -inf stays -inf
        for (long i = 0; i < seen; i++) {
            vec p = exp2_falling((load(scores + i * QUERIES + j) - least) * factor);
            sums += p;
            store(scores + i * QUERIES + j, p);
        }
        for (long i = seen; i < end; i++) store(scores + i * QUERIES + j, vec{});
        vec less = exp2_falling((before - least) * factor);
        store(shrink + j, less);
        store(best + j, now);
        store(total + j, load(total + j) * less + sums);
    }
}

template <class T> struct Inputs {
    Shape shape;
    Heads<const T> q, k, v;
    const int32_t* documents;  // (rows, keys) or null
    float scale;
    float* best;     // of each query, its largest score and 1 / its sum of exponentials, (rows, kv_heads, queries);
    float* inverse;  // null where no gradients are wanted

    Inputs(
        const Shape& shape, Heads<const T> q, Heads<const T> k, Heads<const T> v, const int32_t* documents,
        float* statistics
    )
        : shape(shape), q(q), k(k), v(v), documents(documents), scale(1 / std::sqrt(float(shape.head_dim))),
          best(statistics),
          inverse(statistics ? statistics + shape.rows * shape.query_heads * shape.length : nullptr) {}
    const int32_t* documents_of(long row) const { return documents ? documents + row * shape.keys : nullptr; }
};

template <class T> static void forward_block(const Inputs<T>& in, Heads<T> result, const Block& block) {
    const Shape& shape = in.shape;
    long wide = shape.wide();
    float* queries = scratch.floats((2 * QUERIES + 2 * KEYS + QUERIES) * wide + SMALL + 16);
    float *out = queries + QUERIES * wide, *keys = out + QUERIES * wide, *values = keys + KEYS * wide;
    float *turned = values + KEYS * wide, *scores = turned + QUERIES * wide;
    alignas(64) float best[QUERIES], total[QUERIES] = {}, shrink[QUERIES];
    std::fill(best, best + QUERIES, -INFINITY);
    std::fill(out, out + block.count * wide, 0.f);
    gather(shape, block, in.q, nullptr, queries);
    turn(queries, wide, shape.head_dim, block.count, turned);
    for (long first = 0; first <= block.position[block.count - 1]; first += KEYS) {
        Tile tile(block, first, in.documents_of(block.row));
        if (!tile.count) continue;
        auto *k_rows = in.k.at(block.row, block.head, first), *v_rows = in.v.at(block.row, block.head, first);
        const float* k = dense(k_rows, in.k.position, tile.count, shape.head_dim, keys);
        const float* v = dense(v_rows, in.v.position, tile.count, shape.head_dim, values);
        meet(shape, block, tile, k, turned, scores);
        soften(block, tile, in.scale, scores, best, total, shrink);
        auto add = tile.hides_some(block) && !finite(v, tile.count * wide) ? panels_seen<true, Sum::to_scaled>
                                                                          : panels<true, Sum::to_scaled>;
        for (long i = 0; i < block.count; i += STRIP_M) {
            long rows = std::min(STRIP_M, block.count - i), depth = tile.seen_by(block, i + rows - 1);
            add(rows, wide, depth, scores + i, QUERIES, v, wide, out + i * wide, wide, shrink + i);
        }
    }
    for (long j = 0; j < block.width; j += WIDTH) store(total + j, 1.f / load(total + j));
    scatter(shape, block, out, total, result);
    if (!in.best) return;
    long place = (block.row * shape.kv_heads + block.head) * shape.queries() + block.first;
    std::copy(best, best + block.count, in.best + place);
    std::copy(total, total + block.count, in.inverse + place);
}

// The blocks of one key head take turns at each tile of its gradients.
class Turns {
  public:
    Turns(long tiles) : next_(new std::atomic<long>[tiles]) {
        for (long i = 0; i < tiles; i++) next_[i].store(0, std::memory_order_relaxed);
    }
    void wait(long tile, long turn) {
        while (next_[tile].load(std::memory_order_acquire) != turn) sched_yield();
    }
    void pass(long tile, long turn) { next_[tile].store(turn + 1, std::memory_order_release); }

  private:
    std::unique_ptr<std::atomic<long>[]> next_;
};

template <class T> struct Gradients {
    Heads<T> out, d_out, dq;
    float *dk, *dv;  // (rows, kv_heads, keys, wide), zeros at first
};

// What the gradients of a block are made of; the rows of d_out are divided by the query's sum of exponentials.
struct Pieces {
    float *queries, *turned, *d_out, *d_turned, *dq, *keys, *values, *scores, *slopes;
    alignas(64) float best[QUERIES], inverse[QUERIES], mean[QUERIES];
    bool finite;

    template <class T> Pieces(const Inputs<T>& in, const Gradients<T>& to, const Block& block) {
        const Shape& shape = in.shape;
        long wide = shape.wide(), size = QUERIES * wide;
        queries = scratch.floats(5 * size + 2 * KEYS * wide + 2 * SMALL + 16);
        turned = queries + size, d_out = turned + size, d_turned = d_out + size, dq = d_turned + size;
        keys = dq + size, values = keys + KEYS * wide, scores = values + KEYS * wide, slopes = scores + SMALL;
        long place = (block.row * shape.kv_heads + block.head) * shape.queries() + block.first;
        for (long i = 0; i < block.width; i++) {
            best[i] = in.best[place + std::min(i, block.count - 1)];
            inverse[i] = in.inverse[place + std::min(i, block.count - 1)];
            mean[i] = 0.f;
        }
        gather(shape, block, to.d_out, inverse, d_out);
        each_query(shape, block, to.out, [&](long i, T* out) {
            vec products = {};
            long k = 0;
            for (; k + WIDTH <= shape.head_dim; k += WIDTH) products += load(out + k) * load(d_out + i * wide + k);
            if (k < shape.head_dim) products += load_first(out + k, shape.head_dim - k) * load(d_out + i * wide + k);
            mean[i] = sum(products);
        });
        std::fill(dq, dq + size, 0.f);
        gather(shape, block, in.q, nullptr, queries);
        turn(queries, wide, shape.head_dim, block.count, turned);
        turn(d_out, wide, shape.head_dim, block.count, d_turned);
        for (long i = 0; i < block.count * wide; i += WIDTH) store(queries + i, load(queries + i) * in.scale);
        finite = openelm::finite(queries, block.count * wide) && openelm::finite(d_out, block.count * wide);
    }
};

// Scores to exponentials; products of values and d_out to the slopes of the loss along the scores.
static void slope(const Block& block, const Tile& tile, float scale, Pieces& p) {
    const vec factor = splat(scale * 1.44269504f);
    long end = tile.seen_by(block, block.count - 1);
    for (long j = 0; j < block.width; j += WIDTH) {
        long seen = tile.seen_by(block, j + WIDTH - 1);
        vec best = load(p.best + j), mean = load(p.mean + j);
        float *score = p.scores + j, *slope = p.slopes + j;
        for (long i = 0; i < seen; i++, score += QUERIES, slope += QUERIES) {
            vec exponential = exp2_falling((load(score) - best) * factor);
            store(score, exponential);
            store(slope, exponential * (load(slope) - mean));
        }
        for (long i = seen; i < end; i++, score += QUERIES, slope += QUERIES) store(score, vec{}), store(slope, vec{});
        if (!tile.hides_some(block)) continue;
        hide(block, tile, j, 0.f, p.scores);
        hide(block, tile, j, 0.f, p.slopes);
    }
}

// turn: of the block among those of its key head, the last one first.
template <class T>
static void backward_block(const Inputs<T>& in, const Gradients<T>& to, const Block& block, Turns& turns, long turn) {
    const Shape& shape = in.shape;
    long wide = shape.wide(), head = block.row * shape.kv_heads + block.head;
    Pieces p(in, to, block);
    for (long first = 0; first <= block.position[block.count - 1]; first += KEYS) {
        Tile tile(block, first, in.documents_of(block.row));
        long place = head * shape.tiles() + first / KEYS;
        if (tile.count) {
            auto *k_rows = in.k.at(block.row, block.head, first), *v_rows = in.v.at(block.row, block.head, first);
            const float* k = dense(k_rows, in.k.position, tile.count, shape.head_dim, p.keys);
            const float* v = dense(v_rows, in.v.position, tile.count, shape.head_dim, p.values);
            meet(shape, block, tile, k, p.turned, p.scores);
            meet(shape, block, tile, v, p.d_turned, p.slopes);
            slope(block, tile, in.scale, p);
            bool hides = tile.hides_some(block);
            bool exact_q = hides && !finite(k, tile.count * wide);
            auto add_q = exact_q ? panels_seen<true, Sum::added> : panels<true, Sum::added>;
            auto add_kv = hides && !p.finite ? panels_seen<false, Sum::added> : panels<false, Sum::added>;
            for (long i = 0; i < block.count; i += STRIP_M) {
                long rows = std::min(STRIP_M, block.count - i), depth = tile.seen_by(block, i + rows - 1);
                add_q(rows, wide, depth, p.slopes + i, QUERIES, k, wide, p.dq + i * wide, wide, nullptr);
            }
            turns.wait(place, turn);
            for (long i = 0; i < tile.count; i += STRIP_M) {
                long rows = std::min(STRIP_M, tile.count - i), at = (head * shape.keys + first + i) * wide;
                long from = first_seeing(shape, block, first + i), a = i * QUERIES + from, b = from * wide;
                long depth = block.count - from;
                add_kv(rows, wide, depth, p.scores + a, QUERIES, p.d_out + b, wide, to.dv + at, wide, nullptr);
                add_kv(rows, wide, depth, p.slopes + a, QUERIES, p.queries + b, wide, to.dk + at, wide, nullptr);
            }
        } else {
            turns.wait(place, turn);
        }
        turns.pass(place, turn);
    }
    std::fill(p.mean, p.mean + QUERIES, in.scale);
    scatter(shape, block, p.dq, p.mean, to.dq);
}

// Calls `work` with the blocks of all key heads and their turn; the last blocks, with the most keys, first. As many
// heads as threads are worked on side by side, so that what belongs to a head stays in a thread's cache.
template <class Work> static void each_block(const Shape& shape, const int32_t* documents, long threads, Work work) {
    long heads = shape.rows * shape.kv_heads, tasks = heads * shape.blocks();
    if (tasks * std::min(QUERIES, shape.queries()) * shape.keys * shape.head_dim < FEW_PRODUCTS) threads = 1;
    threads = std::max(1L, std::min(threads, tasks));
    std::atomic<long> next{0};  // not a loop of OpenMP: no block may start before those whose turn is earlier
#pragma omp parallel num_threads(threads)
    for (long task; (task = next++) < tasks;) {
        long first = task / (threads * shape.blocks()) * threads, together = std::min(threads, heads - first);
        long rest = task - first * shape.blocks(), turn = rest / together, head = first + rest % together;
        long row = head / shape.kv_heads;
        work(Block(shape, row, head % shape.kv_heads, shape.blocks() - 1 - turn, documents), turn);
    }
}

// A tensor as torch holds it: the address, and the strides of its first three dimensions.
struct Strided {
    const void* data;
    long row, head, position;
    template <class T> operator Heads<const T>() const { return {(const T*)data, row, head, position}; }
};

// A dense tensor (rows, length, heads, head_dim).
template <class T> static Heads<T> by_position(const Shape& shape, void* data) {
    long position = shape.query_heads * shape.head_dim;
    return {(T*)data, shape.length * position, shape.head_dim, position};
}

template <class T>
static void forward(
    const Shape& shape, Strided q, Strided k, Strided v, const int32_t* documents, void* out, float* statistics,
    long threads
) {
    Inputs<T> in(shape, q, k, v, documents, statistics);
    each_block(shape, documents, threads, [&](const Block& block, long) {
        forward_block(in, by_position<T>(shape, out), block);
    });
}

template <class T>
static void backward(
    const Shape& shape, Strided q, Strided k, Strided v, const int32_t* documents, void* out, float* statistics,
    void* d_out, void* dq, float* dk, float* dv, long threads
) {
    Inputs<T> in(shape, q, k, v, documents, statistics);
    Heads<T> out_rows = by_position<T>(shape, out), d_out_rows = by_position<T>(shape, d_out);
    Gradients<T> to{out_rows, d_out_rows, by_position<T>(shape, dq), dk, dv};
    Turns turns(shape.rows * shape.kv_heads * shape.tiles());
    each_block(shape, documents, threads, [&](const Block& block, long turn) {
        backward_block(in, to, block, turns, turn);
    });
}

}  // namespace
}  // namespace openelm

using namespace openelm;

// out (rows, length, query_heads, head_dim); statistics (2, rows, query_heads, length) or null.
extern "C" void openelm_attention(
    long is_bf16, long rows, long query_heads, long kv_heads, long length, long keys, long head_dim, const void* q,
    long q_row, long q_head, long q_position, const void* k, long k_row, long k_head, long k_position, const void* v,
    long v_row, long v_head, long v_position, const int32_t* documents, void* out, float* statistics, long threads
) {
    (is_bf16 ? forward<bf16> : forward<float>)(
        {rows, query_heads, kv_heads, length, keys, head_dim}, {q, q_row, q_head, q_position},
        {k, k_row, k_head, k_position}, {v, v_row, v_head, v_position}, documents, out, statistics, threads
    );
}

// d_out and dq are laid out like out; dk and dv (rows, kv_heads, keys, head_dim in whole lines) are zeros at first.
extern "C" void openelm_attention_gradients(
    long is_bf16, long rows, long query_heads, long kv_heads, long length, long keys, long head_dim, const void* q,
    long q_row, long q_head, long q_position, const void* k, long k_row, long k_head, long k_position, const void* v,
    long v_row, long v_head, long v_position, const int32_t* documents, void* out, float* statistics, void* d_out,
    void* dq, float* dk, float* dv, long threads
) {
    (is_bf16 ? backward<bf16> : backward<float>)(
        {rows, query_heads, kv_heads, length, keys, head_dim}, {q, q_row, q_head, q_position},
        {k, k_row, k_head, k_position}, {v, v_row, v_head, v_position}, documents, out, statistics, d_out, dq, dk, dv,
        threads
    );
}
