// Products of rows of numbers with a matrix that lies in memory in the order in which it is read: generation is made of
// them, of one row at a time for a text and of many for its prompt.
//
// TILE rows of the matrix are one line of memory, in which the next column or two of all of them follow one another
// (kernels/packed.py has the layout). An element is summed up column after column: its bits are the same in any company
// of rows, for any number of threads.
#pragma once

#include "kinds.h"
#include "team.h"
#include <cfloat>

namespace openelm {

// As kernels/packed.py describes a matrix. Of few bits w = scale · q + bias, by groups of a row. Of two halves that are
// wanted together, gate and up, a tile of one stands before a tile of the other.
struct Weight {
    long kind, scales_are_bf16, group, rows, columns, halves;
    const uint8_t* tiles;
    long part() const { return rows / halves; }
    long count() const { return (part() + TILE - 1) / TILE * halves; }
    long first_row(long tile) const { return tile % halves * part() + tile / halves * TILE; }
    long rows_of(long tile) const { return std::min(TILE, part() - tile / halves * TILE); }
    long tile_of(long row) const { return row % part() / TILE * halves + row / part(); }
};

// Rows of inputs. Whole numbers stand for numbers of a row in groups: `factors` has two floats for each, the size of
// one, and the sum of all.
template <class T> struct Inputs {
    const T* numbers;
    long stride;
    const float* factors = nullptr;
    long factors_stride = 0;
    Inputs from(long row) const { return {numbers + row * stride, stride, factors + row * factors_stride, factors_stride}; }
};

// Where results go: rows of `stride` numbers, replaced or added to.
template <class T> struct Output {
    T* numbers;
    long stride;
    bool add = false;
    Output from(long row) const { return {numbers + row * stride, stride, add}; }
};

// Columns with the zeros behind them that fill a step of a product.
template <class K> long whole_columns(const Weight& weight) {
    return (weight.columns + K::step - 1) / K::step * K::step;
}

template <class K> long tile_bytes(const Weight& weight) {
    if constexpr (in_groups<K>)
        return weight.columns / weight.group * K::group_bytes(weight.group);
    else
        return whole_columns<K>(weight) / K::columns * TILE * 4;
}

// Sums of `tiles` tiles, `distance` bytes apart, for rows of inputs.
template <class K, long tiles, long inputs>
inline void add_up(
    const Weight& weight, const uint8_t* at, long distance, Inputs<typename K::Input> x, Ask ask,
    vec (&total)[tiles * VECTORS][inputs]
) {
    constexpr long rows = tiles * VECTORS;
    constexpr bool spreads = tiles > 1 || TILES == 1;  // or may do so
    if constexpr (in_groups<K>) {
        using S = typename K::Scale;
        constexpr long chains = K::bits == 4 && inputs < 3 ? 2 : 1;  // one of two products a step would be too slow
        long steps = weight.group / K::columns, half = weight.group / 2, groups = weight.columns / weight.group;
        for (long g = 0; g < groups; g++) {
            ivec sums[chains][rows][inputs] = {};
            const int16_t* numbers = x.numbers + g * weight.group;
#pragma GCC unroll 4
            for (long s = 0; s < steps; s++) {
                pairs part[rows];
#pragma GCC unroll 8
                for (long r = 0; r < rows; r++)
                    part[r] = pairs_of_bytes(at + r / VECTORS * distance + s * K::step_bytes + r % VECTORS * 2 * WIDTH);
                if (spreads && ask.stride)
                    ask.spread(g * steps + s);
                else if (ask.at)
                    ask_for(ask.at + s * K::step_bytes, K::step_bytes);
#pragma GCC unroll 8
                for (long i = 0; i < inputs; i++) {
                    const int16_t* pair = numbers + i * x.stride + 2 * s;
                    if constexpr (K::bits == 8) {
                        pairs input = spread_pair(pair);
#pragma GCC unroll 8
                        for (long r = 0; r < rows; r++) add_products(sums[0][r][i], part[r], input);
                    } else {
                        pairs first = spread_pair(pair), second = spread_pair(pair + half);
#pragma GCC unroll 8
                        for (long r = 0; r < rows; r++) {
                            add_products(sums[0][r][i], low_four(part[r]), first);
                            add_products(sums[chains - 1][r][i], high_four(part[r]), second);
                        }
                    }
                }
            }
            at += steps * K::step_bytes;
            if (ask.at && !ask.stride) ask_for(ask.at + steps * K::step_bytes, 2 * TILE * sizeof(S));
#pragma GCC unroll 8
            for (long r = 0; r < rows; r++) {
                auto* scales = (const S*)(at + r / VECTORS * distance) + r % VECTORS * WIDTH;
                vec scale = load(scales), bias = load(scales + TILE);
#pragma GCC unroll 8
                for (long i = 0; i < inputs; i++) {
                    const float* factors = x.factors + i * x.factors_stride + 2 * g;
                    ivec whole = chains == 2 ? sums[0][r][i] + sums[chains - 1][r][i] : sums[0][r][i];
                    vec sum = __builtin_convertvector(whole, vec) * factors[0];
                    total[r][i] = total[r][i] + sum * scale + bias * factors[1];
                }
            }
            at += 2 * TILE * sizeof(S);
            if (ask.at && !ask.stride) ask.at += K::group_bytes(weight.group);
        }
    } else {
        constexpr long step_bytes = TILE * 4;
        long steps = whole_columns<K>(weight) / K::columns;
        for (long s = 0; s < steps; s++) {
            typename K::Part part[rows];
#pragma GCC unroll 8
            for (long r = 0; r < rows; r++)
                part[r] = K::read(at + r / VECTORS * distance + s * step_bytes + r % VECTORS * WIDTH * 4);
            if (spreads && ask.stride)
                ask.spread(s);
            else if (ask.at)
                ask_for(ask.at + s * step_bytes, step_bytes);
#pragma GCC unroll 8
            for (long i = 0; i < inputs; i++) {
                auto input = K::spread(x.numbers + i * x.stride + s * K::columns);
#pragma GCC unroll 8
                for (long r = 0; r < rows; r++) total[r][i] = K::add(total[r][i], part[r], input);
            }
        }
    }
}

// Rows of `tiles` tiles from `tile` on, times `inputs` rows of inputs.
template <class K, long tiles, long inputs, class T>
void multiply_tiles(const Weight& weight, long tile, Inputs<typename K::Input> x, Output<T> out, Ask ask) {
    vec total[tiles * VECTORS][inputs] = {};
    long distance = tile_bytes<K>(weight);
    add_up<K, tiles, inputs>(weight, weight.tiles + tile * distance, distance, x, ask, total);
    for (long r = 0; r < tiles * VECTORS; r++) {
        long here = tile + r / VECTORS, start = r % VECTORS * WIDTH, n = std::min(WIDTH, weight.rows_of(here) - start);
        if (n <= 0) continue;
        for (long i = 0; i < inputs; i++) {
            T* to = out.numbers + i * out.stride + weight.first_row(here) + start;
            store_some(to, out.add ? total[r][i] + load_some(to, n) : total[r][i], n);
        }
    }
}

template <class K, long tiles, class T, long most = INPUTS>
void multiply_some(
    long count, const Weight& weight, long tile, Inputs<typename K::Input> x, Output<T> out, Ask ask
) {
    if constexpr (most > 1)
        if (count < most) return multiply_some<K, tiles, T, most - 1>(count, weight, tile, x, out, ask);
    multiply_tiles<K, tiles, most>(weight, tile, x, out, ask);
}

// Inputs beyond these are other pieces of the same tiles: with larger ones the last thread to end would be waited for,
// and with smaller ones units that are fast would wait for the tiles. A step of generation has fewer tokens
// (kernels/decode.py).
#if defined(__AMX_BF16__)
constexpr long BLOCK = 256;
#else
constexpr long BLOCK = 96;
#endif

// How many tiles are taken together for so many rows of inputs, and into how many pieces a product falls.
inline long tiles_of_piece(long count) { return count <= INPUTS ? 1 : TILES; }
inline long pieces(const Weight& weight, long count) {
    long together = tiles_of_piece(count);
    return (weight.count() + together - 1) / together * ((count + BLOCK - 1) / BLOCK);
}

#if defined(__AMX_BF16__)
constexpr long SQUARES_BYTES = DEEP / 2 * TILE * 4;  // of a tile, in one step of the units for squares

// A piece of a bf16 weight times `count` rows of inputs by the units for squares. One pass over a tile asks for memory a
// little ahead of it, several ask for the next tiles.
template <class T> void multiply_squares(const Weight& weight, long piece, long count, Inputs<bf16> x, Output<T> out) {
    long bytes = tile_bytes<Plain<bf16>>(weight), steps = bytes / SQUARES_BYTES, together = tiles_of_piece(count);
    long blocks = (count + BLOCK - 1) / BLOCK, start = piece % blocks * BLOCK, tile = piece / blocks * together;
    long last = std::min(tile + together, weight.count());
    x = x.from(start), out = out.from(start), count = std::min(BLOCK, count - start);
    long passes = (count + MANY - 1) / MANY;
    Ask ask{weight.tiles + (passes == 1 ? tile * bytes + AHEAD : last * bytes), SQUARES_BYTES / passes};
    Shapes shapes;
    alignas(64) float sums[MANY][TILE];
    for (long i = 0; i < count; i += MANY) {
        long inputs = std::min(MANY, count - i);
        shapes.set(inputs);
        for (long here = tile; here < last; here++, ask.at += steps * ask.stride) {
            auto add_up = inputs > SIDE ? add_up_squares<true> : add_up_squares<false>;
            add_up(weight.tiles + here * bytes, x.numbers + i * x.stride, x.stride, steps, sums[0], ask);
            for (long j = 0; j < inputs; j++) {
                T* to = out.numbers + (i + j) * out.stride + weight.first_row(here);
                by_vectors(weight.rows_of(here), [&](long r, long n) {
                    vec sum = load(sums[j] + r);
                    store_some(to + r, out.add ? sum + load_some(to + r, n) : sum, n);
                });
            }
        }
    }
}
#endif

// A piece of a weight times `count` rows of inputs.
//
// Few inputs take one tile, and ask for memory a little ahead of it. Many take TILES at a time, which come from the
// caches but for the first time, and ask for the next ones meanwhile.
template <class K, class T>
void multiply(const Weight& weight, long piece, long count, Inputs<typename K::Input> x, Output<T> out) {
    long bytes = tile_bytes<K>(weight);
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<K, Plain<bf16>>) return multiply_squares(weight, piece, count, x, out);
#endif
    if (count <= INPUTS)
        return multiply_some<K, 1>(count, weight, piece, x, out, {weight.tiles + piece * bytes + AHEAD});
    long blocks = (count + BLOCK - 1) / BLOCK, tile = piece / blocks * TILES, start = piece % blocks * BLOCK;
    x = x.from(start), out = out.from(start), count = std::min(BLOCK, count - start);
    const uint8_t* next = weight.tiles + (tile + TILES) * bytes;
    long asking = std::min((count + INPUTS - 1) / INPUTS, 8L), steps = (weight.columns + K::columns - 1) / K::columns;
    long stride = (TILES * bytes + asking * steps - 1) / (asking * steps);
    for (long i = 0, pass = 0; i < count; i += INPUTS, pass++) {
        Ask ask = pass < asking ? Ask{next + pass * steps * stride, stride} : Ask{nullptr};
        long together = std::min(INPUTS, count - i);
        if (TILES > 1 && weight.count() - tile < TILES)
            multiply_some<K, 1>(together, weight, tile, x.from(i), out.from(i), {nullptr});
        else
            multiply_some<K, TILES>(together, weight, tile, x.from(i), out.from(i), ask);
    }
}

// Puts a part of a row of inputs where `multiply` wants it.
template <class T> inline void place(const float* x, long columns, T* to) {
    by_vectors(columns, [=](long i, long n) { store_some(to + i, load_some(x + i, n), n); });
}

// The same for a group of whole numbers: the largest becomes ±32767. What is not finite makes the group NaN.
inline void place_group(const float* x, long columns, int16_t* to, float* factors) {
    vec most = {}, total = {};
    for (long i = 0; i < columns; i += WIDTH) {
        vec size = load(x + i);
        size = size < 0.f ? -size : size;
        most = larger(most, size), total += size;
    }
    float largest_one = largest(most), inverse = largest_one > 0 ? 32767 / largest_one : 0;
    const vec shift = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to a whole number, in the lowest bits
    ivec sums = {};
    typedef int16_t narrow __attribute__((vector_size(WIDTH * 2), aligned(2)));
    for (long i = 0; i < columns; i += WIDTH) {
        ivec numbers = (ivec)(load(x + i) * inverse + shift) - 0x4b400000;
        sums += numbers;
        *(narrow*)(to + i) = __builtin_convertvector(numbers, narrow);
    }
    int32_t sum = 0;
    for (long lane = 0; lane < WIDTH; lane++) sum += sums[lane];
    factors[0] = openelm::sum(total) <= FLT_MAX ? largest_one / 32767 : NAN;
    factors[1] = factors[0] * sum;
}

// Asks for what a thread will read next, while something else keeps the thread busy: memory would rest otherwise. First
// for what is near, then for the beginning of its share of the next weight, as much as stays in its own cache.
class Ahead {
  public:
    void aim(const uint8_t* first, const uint8_t* last) {
        waiting_ = 0;
        now_ = {first, std::min(last, first + MOST)};
    }
    void aim_near(const void* one, const void* other, long bytes) {
        if (waiting_ == 0) next_[waiting_++] = now_;
        next_[1] = {(const uint8_t*)other, (const uint8_t*)other + bytes};
        now_ = {(const uint8_t*)one, (const uint8_t*)one + bytes};
        waiting_ = 2;
    }
    // A few lines at a time: CPUs drop what they are asked for faster than memory answers.
    inline void ask(long lines) {
        for (auto* stop = std::min(now_.end, now_.at + 64 * lines); now_.at < stop; now_.at += 64)
            __builtin_prefetch(now_.at);
        if (now_.at >= now_.end && waiting_ > 0) now_ = next_[--waiting_];
    }

  private:
    static constexpr long MOST = 512 * 1024;
    struct Range {
        const uint8_t *at, *end;
    };
    Range now_ = {}, next_[2] = {};
    long waiting_ = 0;
};

// Memory for rows of inputs as a weight wants them, and rows put there.
template <class K> class Rows {
  public:
    using Input = typename K::Input;
    Rows(Scratch& numbers, Scratch& factors, const Weight& weight, long count) : weight_(weight) {
        stride_ = (weight.columns + 31) / 32 * 32;
        numbers_ = (Input*)numbers.floats(count * stride_);
        if constexpr (in_groups<K>) factors_ = factors.floats(count * 2 * (weight.columns / weight.group));
    }
    void put(long row, const float* x, Ahead& ahead) {
        Input* to = numbers_ + row * stride_;
        if constexpr (in_groups<K>) {
            long group = weight_.group, groups = weight_.columns / group;
            for (long g = 0; g < groups; g++) {
                place_group(x + g * group, group, to + g * group, factors_ + 2 * (row * groups + g));
                ahead.ask(4);
            }
        } else {
            for (long i = 0; i < weight_.columns; i += PART) {
                place(x + i, std::min(PART, weight_.columns - i), to + i);
                ahead.ask(4);
            }
            std::fill(to + weight_.columns, to + whole_columns<K>(weight_), Input{});
        }
    }
    Inputs<Input> all() const {
        return {numbers_, stride_, factors_, in_groups<K> ? 2 * (weight_.columns / weight_.group) : 0};
    }

  private:
    static constexpr long PART = 128;  // columns
    const Weight& weight_;
    Input* numbers_;
    float* factors_ = nullptr;
    long stride_;
};

// One row of a weight as numbers.
template <class K, class T> void read_row(const Weight& weight, long row, T* to) {
    long lane = row % weight.part() % TILE;
    const uint8_t* at = weight.tiles + weight.tile_of(row) * tile_bytes<K>(weight);
    auto put = [=](long i, float x) {
        if constexpr (std::is_same_v<T, bf16>)
            to[i] = narrowed(x);
        else
            to[i] = x;
    };
    if constexpr (in_groups<K>) {
        using S = typename K::Scale;
        long group = weight.group, half = group / 2;
        for (long start = 0; start < weight.columns; start += group, at += K::group_bytes(group)) {
            auto* scales = (const S*)(at + group / K::columns * K::step_bytes);
            float scale = widen(scales[lane]), bias = widen(scales[TILE + lane]);
            for (long i = 0; i < group; i++) {
                long within = K::bits == 8 ? i : i % half;
                uint8_t byte = at[within / 2 * K::step_bytes + lane * 2 + within % 2];
                long number = K::bits == 8 ? byte : i < half ? byte & 15 : byte >> 4;
                put(start + i, number * scale + bias);
            }
        }
    } else {
        constexpr long size = 4 / K::columns;
        for (long i = 0; i < weight.columns; i++) {
            const uint8_t* p = at + (i / K::columns * TILE + lane) * 4 + i % K::columns * size;
            put(i, size == 4 ? *(const float*)p : widen(*(const bf16*)p));
        }
    }
}

// Sets a thread's own pieces, neighbours, of `number` in all, and returns the first one.
inline long set_pieces(Pieces& all, long number) {
    long threads = omp_get_num_threads(), thread = omp_get_thread_num(), first = number * thread / threads;
    all.set(first, number * (thread + 1) / threads);
    return first;
}

// Calls with a value of the weight's kind.
template <class Call> void by_kind(const Weight& weight, Call call) {
    if (weight.kind == FLOAT32) return call(Plain<float>());
    if (weight.kind == BFLOAT16) return call(Plain<bf16>());
    by_dtype(weight.scales_are_bf16, [&](auto scale) {
        weight.kind == EIGHT_BITS ? call(Grouped<decltype(scale), 8>()) : call(Grouped<decltype(scale), 4>());
    });
}

}  // namespace openelm
