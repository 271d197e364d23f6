// One token more for each of several sequences, through all layers in one team of threads: openelm/kernels/decode.py.
//
// Sums and the residual stream are fp32. Every element is computed in an order that does not depend on the other
// sequences or on the number of threads.
#include "chunks.h"
#include "heads.h"
#include "team.h"

namespace openelm {
namespace {

// As kernels/decode.py lays them out: whole numbers and addresses of 8 bytes.
struct Block {
    long query_heads, kv_heads, ffn_dim;
    const float *attn_norm, *q_norm, *k_norm, *ffn_norm;  // q_norm and k_norm may be null: no such norms
    Weight qkv, out, gate_up, down;
    void *keys, *values;  // (slots, kv_heads, positions, head_dim)
    long heads() const { return query_heads + 2 * kv_heads; }
};

struct Model {
    long layers, dim, head_dim, length, cache_is_bf16;  // length: positions that fit in a slot
    const float *norm, *cos, *sin;
    Weight embedding, head;
    Block blocks[];
};

// The tokens of a step: the last one of a slot may see those before it.
struct Tokens {
    long count;
    const long *ids, *slots, *positions;
    long chunks(long i) const { return positions[i] / CHUNK + 1; }
};

// What the threads share during a step.
struct State {
    float* x;         // the residual stream
    float* wide;      // heads, then gate and up, of each token
    float* attended;  // of each token, query head and chunk: the head_dim sums of the values and two numbers more
    long wide_row, chunks;
    float* partial(const Model& model, const Block& block, long token, long head, long chunk) const {
        return attended + ((token * block.query_heads + head) * chunks + chunk) * (model.head_dim + 2);
    }
};

static thread_local Scratch shared, own_values, own_numbers, own_factors;

// Rows of inputs, as this thread wants them for a product with a weight; row(i, to) writes row i.
template <class K, class Row>
static Inputs<typename K::Input> placed(const Weight& weight, long count, Row row, Ahead& ahead) {
    float* values = own_values.floats(weight.columns);
    Rows<K> rows(own_numbers, own_factors, weight, count);
    for (long i = 0; i < count; i++) {
        row(i, values);
        rows.put(i, values, ahead);
    }
    return rows.all();
}

static void normalise(const float* x, const float* weight, long dim, float eps, float* to) {
    vec inverse = splat(inverse_rms(x, dim, eps));
    by_vectors(dim, [=](long i, long n) {
        store_some(to + i, load_some(x + i, n) * inverse * load_some(weight + i, n), n);
    });
}

// to[i] = silu(to[i]) · up[i]
static void gate(float* to, const float* up, long count) {
    by_vectors(count, [=](long i, long n) {
        vec x = load_some(to + i, n);
        store_some(to + i, x / (1.f + exp(-x)) * load_some(up + i, n), n);
    });
}


// Queries are normalised and turned where they are, keys too on their way to the cache.
template <class T>
static void place_heads(
    const Model& model, const Block& block, const Tokens& tokens, const State& state, float eps, Ahead& ahead
) {
    long dim = model.head_dim;
    for_my_share(tokens.count * block.heads(), [&](long task) {
            ahead.ask(4);
            long i = task / block.heads(), head = task % block.heads();
            float* x = state.wide + i * state.wide_row + head * dim;
            Turn turn = Turn{model.cos, model.sin, dim / 2}.at(tokens.positions[i]);
            long kv_head = head - block.query_heads, v_head = kv_head - block.kv_heads;
            long slot = tokens.slots[i] * block.kv_heads, position = tokens.positions[i];
            if (kv_head < 0) {
                normalise_and_turn(x, block.q_norm, turn, eps, x);
            } else if (v_head < 0) {
                normalise_and_turn(x, block.k_norm, turn, eps, (T*)block.keys + ((slot + kv_head) * model.length + position) * dim);
            } else {
                T* to = (T*)block.values + ((slot + v_head) * model.length + position) * dim;
                by_vectors(dim, [=](long k, long n) { store_some(to + k, load_some(x + k, n), n); });
            }
    });
}

// One token's queries that share a key head, and one chunk of its keys.
struct Chunk {
    long token, kv_head, first, count;  // keys; none beyond the token's own
    long offset;                        // of the first one in the cache
};

// Chunk by chunk, so that those with fewer keys fall to all threads alike.
static Chunk chunk_of(const Model& model, const Block& block, const Tokens& tokens, long task) {
    long pairs = tokens.count * block.kv_heads, first = task / pairs * CHUNK;
    long token = task % pairs / block.kv_heads, kv_head = task % block.kv_heads;
    long row = (tokens.slots[token] * block.kv_heads + kv_head) * model.length + first;
    return {token, kv_head, first, std::min(CHUNK, tokens.positions[token] + 1 - first), row * model.head_dim};
}

template <class F, class T>
static void attend_to_chunk(const Model& model, const Block& block, const State& state, Chunk chunk, Ahead& ahead) {
    long dim = model.head_dim, groups = block.query_heads / block.kv_heads, parts = (dim + F::width - 1) / F::width;
    auto [token, kv_head, start, count, offset] = chunk;
    const float* queries = state.wide + token * state.wide_row + kv_head * groups * dim;
    const T *keys = (const T*)block.keys + offset, *values = (const T*)block.values + offset;
    auto* placed_queries = (typename F::Part*)own_values.floats(TOGETHER * parts * WIDTH);
    float scores[TOGETHER][CHUNK];
    float scale = 1 / std::sqrt(float(dim));
    for (long first = 0; first < groups; first += TOGETHER) {
        float* out[TOGETHER];
        for (long g = 0; g < TOGETHER; g++) {
            long head = std::min(first + g, groups - 1);
            out[g] = state.partial(model, block, token, kv_head * groups + head, start / CHUNK);
            F::put(queries + head * dim, dim, scale, placed_queries + g * parts);
        }
        score<F>(placed_queries, keys, dim, count, scores, ahead);
        for (long g = 0; g < TOGETHER; g++) {
            auto [most, total] = weigh(scores[g], count);
            out[g][dim] = most, out[g][dim + 1] = total;
        }
        mix(scores, values, dim, count, out, ahead);
    }
}

// Asks for the keys and values of this thread's next chunk from `task` on, and returns which one that is.
template <class T>
static long next_chunk(
    const Model& model, const Block& block, const Tokens& tokens, const State& state, long task, Ahead& ahead
) {
    for (; task < tokens.count * block.kv_heads * state.chunks; task += omp_get_num_threads()) {
        auto chunk = chunk_of(model, block, tokens, task);
        if (chunk.count <= 0) continue;
        long bytes = chunk.count * model.head_dim * sizeof(T);
        ahead.aim_near((const T*)block.keys + chunk.offset, (const T*)block.values + chunk.offset, bytes);
        return task;
    }
    return -1;
}

template <class T>
static void attend(
    const Model& model, const Block& block, const Tokens& tokens, const State& state, long task, Ahead& ahead
) {
    while (task >= 0) {
        auto chunk = chunk_of(model, block, tokens, task);
        task = next_chunk<T>(model, block, tokens, state, task + omp_get_num_threads(), ahead);
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<T, bf16>)
            if (Pairs::suit(model.head_dim)) {
                attend_to_chunk<Pairs, T>(model, block, state, chunk, ahead);
                continue;
            }
#endif
        attend_to_chunk<Factors<T>, T>(model, block, state, chunk, ahead);
    }
}

// The heads of a token, each put together from its chunks in order.
static void gather(const Model& model, const Block& block, const Tokens& tokens, const State& state, long token, float* to) {
    long dim = model.head_dim, chunks = tokens.chunks(token), heads = block.query_heads;
    // Other threads have written most of it: all is asked for before any of it is waited for.
    for (long head = 0; head < heads; head++)
        ask_for((const uint8_t*)state.partial(model, block, token, head, 0), chunks * (dim + 2) * sizeof(float));
    for (long head = 0; head < heads; head++, to += dim) {
        auto part = [&](long chunk) { return state.partial(model, block, token, head, chunk); };
        float most = part(0)[dim], total = 0;
        for (long c = 1; c < chunks; c++) most = std::max(most, part(c)[dim]);
        for (long first = 0; first < chunks; first += WIDTH) {
            long here = std::min(WIDTH, chunks - first);
            float shares[WIDTH] = {};
            for (long c = 0; c < here; c++) shares[c] = part(first + c)[dim] - most;
            store(shares, exp(load(shares)));
            for (long c = 0; c < here; c++) total += shares[c] * part(first + c)[dim + 1];
            by_vectors(dim, [&](long k, long n) {
                vec sum = first ? load_some(to + k, n) : vec{};
                for (long c = 0; c < here; c++) sum += shares[c] * load_some(part(first + c) + k, n);
                store_some(to + k, sum, n);
            });
        }
        by_vectors(dim, [&](long k, long n) { store_some(to + k, load_some(to + k, n) / total, n); });
    }
}

// This thread's part of a product with a weight: out[token][row], replaced or added to.
template <class Row>
static void project(const Weight& weight, long count, Row row, Output<float> out, Pieces& work, Ahead& ahead) {
    by_kind(weight, [&](auto kind) {
        using K = decltype(kind);
        auto inputs = placed<K>(weight, count, row, ahead);
        work.each([&](long piece) { multiply<K>(weight, piece, count, inputs, out); });
    });
}

// Gate and up of this thread's part of the columns, then their product in the place of gate.
static void project_gated(
    const Model& model, const Block& block, const Tokens& tokens, const State& state, float eps, Pieces& work, Ahead& ahead
) {
    by_kind(block.gate_up, [&](auto kind) {
        using K = decltype(kind);
        long count = tokens.count, together = tiles_of_piece(count);
        auto normalised = [&](long i, float* to) {
            normalise(state.x + i * model.dim, block.ffn_norm, model.dim, eps, to);
        };
        auto inputs = placed<K>(block.gate_up, count, normalised, ahead);
        work.each([&](long pair) {
            for (long tile = 2 * pair; tile < 2 * pair + 2; tile += together)
                multiply<K>(block.gate_up, tile / together, count, inputs, Output<float>{state.wide, state.wide_row});
            long start = pair * TILE, end = std::min(block.ffn_dim, start + TILE);
            for (long i = 0; i < count; i++) {
                float* to = state.wide + i * state.wide_row + start;
                gate(to, to + block.ffn_dim, end - start);
            }
        });
    });
}

static void embed(const Model& model, const Tokens& tokens, float* x) {
    for_my_share(tokens.count, [&](long i) {
        by_kind(model.embedding, [&](auto kind) {
            read_row<decltype(kind)>(model.embedding, tokens.ids[i], x + i * model.dim);
        });
    });
}

template <class T>
static void compute(
    const Model& model, const Tokens& tokens, const State& state, Barrier& barrier, Pieces (&pieces_of)[2], float eps,
    float* logits
) {
    Ahead ahead;
    long product = 0;
    auto work = [&]() -> Pieces& { return pieces_of[product % 2]; };
    auto wait = [&] { barrier.wait(omp_get_num_threads(), [&] { ahead.ask(1); }); };
    auto wait_before = [&](const Weight& next) {
        product++;  // nobody takes pieces of the one before the last
        long together = std::max(next.halves, tiles_of_piece(tokens.count));
        long tile = set_pieces(work(), (next.count() + together - 1) / together) * together;
        by_kind(next, [&](auto kind) {
            long bytes = tile_bytes<decltype(kind)>(next);
            ahead.aim(next.tiles + tile * bytes, next.tiles + next.count() * bytes);
        });
        ahead.ask(AHEAD / 64);
        wait();
    };
    auto wait_before_layer = [&](long layer) {
        wait_before(layer == model.layers ? model.head : model.blocks[layer].qkv);
    };
    embed(model, tokens, state.x);
    wait_before_layer(0);
    long dim = model.dim, count = tokens.count;
    Output<float> stream{state.x, dim, true}, wide{state.wide, state.wide_row};
    for (long layer = 0; layer < model.layers; layer++) {
        const Block& block = model.blocks[layer];
        auto normalised = [&](long i, float* to) { normalise(state.x + i * dim, block.attn_norm, dim, eps, to); };
        project(block.qkv, count, normalised, wide, work(), ahead);
        wait_before(block.out);
        long first = next_chunk<T>(model, block, tokens, state, omp_get_thread_num(), ahead);
        place_heads<T>(model, block, tokens, state, eps, ahead);
        wait();
        attend<T>(model, block, tokens, state, first, ahead);
        wait();
        auto attended = [&](long i, float* to) { gather(model, block, tokens, state, i, to); };
        project(block.out, count, attended, stream, work(), ahead);
        wait_before(block.gate_up);
        project_gated(model, block, tokens, state, eps, work(), ahead);
        wait_before(block.down);
        auto gated = [&](long i, float* to) {
            std::memcpy(to, state.wide + i * state.wide_row, block.ffn_dim * sizeof(float));
        };
        project(block.down, count, gated, stream, work(), ahead);
        wait_before_layer(layer + 1);
    }
    auto normalised = [&](long i, float* to) { normalise(state.x + i * dim, model.norm, dim, eps, to); };
    project(model.head, count, normalised, {logits, model.head.rows}, work(), ahead);
}

}  // namespace
}  // namespace openelm

using namespace openelm;

// where (3, count): ids, slots and positions; logits (count, vocabulary)
extern "C" void openelm_decode(
    const void* description, float eps, long count, const long* where, float* logits, long threads
) {
    const Model& model = *(const Model*)description;
    Tokens tokens{count, where, where + count, where + 2 * count};
    State state{};
    long most_heads = 0;
    for (long i = 0; i < model.layers; i++) {
        const Block& block = model.blocks[i];
        state.wide_row = std::max({state.wide_row, block.heads() * model.head_dim, 2 * block.ffn_dim});
        most_heads = std::max(most_heads, block.query_heads);
    }
    for (long i = 0; i < count; i++) state.chunks = std::max(state.chunks, tokens.chunks(i));
    auto whole_lines = [](long floats) { return (floats + 15) / 16 * 16; };
    long stream = whole_lines(count * model.dim), wide = whole_lines(count * state.wide_row);
    state.x = shared.floats(stream + wide + count * most_heads * state.chunks * (model.head_dim + 2));
    state.wide = state.x + stream;
    state.attended = state.wide + wide;
    Barrier barrier;
    Pieces pieces_of[2] = {Pieces(threads), Pieces(threads)};
#pragma omp parallel num_threads(threads)
    by_dtype(model.cache_is_bf16, [&](auto kind) {
        compute<decltype(kind)>(model, tokens, state, barrier, pieces_of, eps, logits);
    });
}
