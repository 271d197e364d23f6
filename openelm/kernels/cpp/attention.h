// The pieces of attention.cpp: tensors by strides, blocks of queries, tiles of keys, and products of such tiles.
#pragma once

#include "gemm.h"

namespace openelm {

constexpr long KEYS = 96;                   // keys of a tile; tiles start at multiples of it, whatever the queries are
constexpr long QUERIES = 96;                // most queries of a block
constexpr long LINE = 16;                    // components of a head are padded to whole cache lines
constexpr long LANES = 2 * WIDTH;           // queries or components that a register tile is wide
constexpr long SMALL = KEYS * QUERIES;      // floats of one tile of scores

// A tensor (rows, heads, positions, head_dim); the components of a head lie side by side.
template <class T> struct Heads {
    T* data;
    long row, head, position;  // strides in elements
    T* at(long r, long h, long p) const { return data + r * row + h * head + p * position; }
};

struct Shape {
    long rows, query_heads, kv_heads, length, keys, head_dim;
    long groups() const { return query_heads / kv_heads; }
    long queries() const { return groups() * length; }  // that share a key head
    long blocks() const { return strips(queries(), QUERIES); }
    long tiles() const { return strips(keys, KEYS); }
    long wide() const { return strips(head_dim, LINE) * LINE; }
};

// Consecutive queries that share a key head: query i is at position i / groups, in head i % groups of the group.
struct Block {
    long row, head, first, count, width;  // width: count in whole vectors; lanes beyond count repeat the last query
    alignas(64) int32_t position[QUERIES], document[QUERIES];
    int32_t least, most;  // documents

    Block(const Shape& shape, long row, long head, long index, const int32_t* documents)
        : row(row), head(head), first(index * QUERIES), count(std::min(QUERIES, shape.queries() - first)),
          width(strips(count, WIDTH) * WIDTH) {
        for (long i = 0; i < width; i++) {
            position[i] = shape.keys - shape.length + (first + std::min(i, count - 1)) / shape.groups();
            document[i] = documents ? documents[row * shape.keys + position[i]] : 0;
        }
        least = *std::min_element(document, document + count);
        most = *std::max_element(document, document + count);
    }
};

// The keys from a multiple of KEYS on that some query of a block may see.
struct Tile {
    long first, count;         // no query of the block sees keys beyond count
    const int32_t* documents;  // of the keys; null where all keys and queries are of one document

    Tile(const Block& block, long first, const int32_t* row_documents)
        : first(first), count(std::min(KEYS, block.position[block.width - 1] + 1 - first)), documents(nullptr) {
        if (!row_documents) return;
        auto [least, most] = std::minmax_element(row_documents + first, row_documents + first + count);
        if (*most < block.least || *least > block.most) count = 0;
        if (*least != block.most || *most != block.least) documents = row_documents + first;
    }
    long seen_by(const Block& block, long query) const {  // at most
        return std::max(0L, std::min(count, block.position[query] + 1 - first));
    }
    bool hides_some(const Block& block) const { return documents || block.position[0] + 1 - first < count; }
};

// Row-major fp32 numbers: those of the tensor itself where they lie close together, otherwise a copy.
template <class T> const float* dense(const T* from, long stride, long count, long head_dim, float* copy) {
    long wide = strips(head_dim, LINE) * LINE;
    if constexpr (sizeof(T) == 4)
        if (stride == wide && head_dim == wide) return from;
    for (long i = 0; i < count; i++, from += stride) {
        float* to = copy + i * wide;
        long k = 0;
        for (; k + WIDTH <= head_dim; k += WIDTH) store(to + k, load(from + k));
        if (k < head_dim) store(to + k, load_first(from + k, head_dim - k)), k += WIDTH;
        for (; k < wide; k += WIDTH) store(to + k, vec{});
    }
    return copy;
}

// Calls visit(i, row) for the queries of a block, one head after the other: rows of a head lie close together. The
// strides between heads are beyond what a CPU foresees, so rows are asked for ahead of time.
template <class T, class Visit>
void each_query(const Shape& shape, const Block& block, const Heads<T>& from, Visit visit) {
    long groups = shape.groups();
    for (long head = 0; head < groups; head++) {
        long i = (head + groups - block.first % groups) % groups;
        T* row = from.at(block.row, block.head * groups + head, (block.first + i) / groups);
        for (; i < block.count; i += groups, row += from.position) {
            for (long k = 0; k < shape.head_dim; k += LINE) __builtin_prefetch(row + 6 * from.position + k);
            visit(i, row);
        }
    }
}

// The queries of a block, or what belongs to them, as rows of `wide` floats, times their scale.
template <class T>
void gather(const Shape& shape, const Block& block, const Heads<T>& from, const float* scale, float* rows) {
    each_query(shape, block, from, [&](long i, T* row) {
        float* to = rows + i * shape.wide();
        vec factor = splat(scale ? scale[i] : 1.f);
        long k = 0;
        for (; k + WIDTH <= shape.head_dim; k += WIDTH) store(to + k, load(row + k) * factor);
        if (k < shape.head_dim) store(to + k, load_first(row + k, shape.head_dim - k) * factor), k += WIDTH;
        for (; k < shape.wide(); k += WIDTH) store(to + k, vec{});
    });
}

// Writes the queries of a block back, each row times its scale.
template <class T>
void scatter(const Shape& shape, const Block& block, const float* rows, const float* scale, const Heads<T>& to) {
    each_query(shape, block, to, [&](long i, T* row) {
        const float* from = rows + i * shape.wide();
        vec factor = splat(scale[i]);
        long k = 0;
        for (; k + WIDTH <= shape.head_dim; k += WIDTH) store(row + k, load(from + k) * factor);
        if (k < shape.head_dim) store_first(row + k, load(from + k) * factor, shape.head_dim - k);
    });
}

// (count, wide) to (head_dim, QUERIES) with zeros in the lanes from count to width.
inline void turn(const float* rows, long wide, long head_dim, long count, float* turned) {
    for (long i = 0; i < count; i += 8)
        for (long k = 0; k < head_dim; k += 8) {
            eight square[8];
            for (long j = 0; j < 8; j++) square[j] = i + j < count ? load_eight(rows + (i + j) * wide + k) : eight{};
            transpose(square);
            for (long j = 0; j < std::min(8L, head_dim - k); j++)
                *(eight_unaligned*)(turned + (k + j) * QUERIES + i) = square[j];
        }
    for (long i = strips(count, 8) * 8; i < strips(count, WIDTH) * WIDTH; i++)
        for (long k = 0; k < head_dim; k++) turned[k * QUERIES + i] = 0.f;
}

enum class Sum { alone, added, to_scaled };  // C = A·B, C + A·B or diag(scale) C + A·B

// `rows` × `parts` vectors of C. A is read along its rows, or with `turned` along its columns.
template <long rows, long parts, bool turned, Sum kind>
void panel(
    long depth, const float* a, long a_stride, const float* b, long b_row, float* c, long c_row, const float* scale
) {
    if constexpr (kind != Sum::alone)
        for (long i = 0; i < rows; i++) __builtin_prefetch(c + i * c_row, 1);
    vec total[rows][parts] = {};
#pragma GCC unroll 4
    for (long k = 0; k < depth; k++) {
        vec right[parts];
        for (long j = 0; j < parts; j++) right[j] = load(b + k * b_row + j * WIDTH);
#pragma GCC unroll 24
        for (long i = 0; i < rows; i++) {
            vec left = splat(turned ? a[k * a_stride + i] : a[i * a_stride + k]);
            for (long j = 0; j < parts; j++) total[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 24
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < parts; j++) {
            float* to = c + i * c_row + j * WIDTH;
            if constexpr (kind == Sum::added) total[i][j] += load(to);
            if constexpr (kind == Sum::to_scaled) total[i][j] += load(to) * splat(scale[i]);
            store(to, total[i][j]);
        }
}

// C (at most STRIP_M rows, `width` columns in whole vectors) and A (rows, depth), `turned` or not, times B.
template <bool turned, Sum kind, long rows = STRIP_M>
void panels(
    long wanted, long width, long depth, const float* a, long a_stride, const float* b, long b_row, float* c,
    long c_row, const float* scale = nullptr
) {
    if constexpr (rows > 1)
        if (wanted < rows)
            return panels<turned, kind, rows - 1>(wanted, width, depth, a, a_stride, b, b_row, c, c_row, scale);
    long j = 0;
    constexpr long many = rows == 1 ? 8 : 4;  // a few rows: enough sums to hide that one takes four cycles
    if constexpr (rows <= 2)
        for (; j + many * WIDTH <= width; j += many * WIDTH)
            panel<rows, many, turned, kind>(depth, a, a_stride, b + j, b_row, c + j, c_row, scale);
    for (; j + LANES <= width; j += LANES)
        panel<rows, 2, turned, kind>(depth, a, a_stride, b + j, b_row, c + j, c_row, scale);
    if (j < width) panel<rows, 1, turned, kind>(depth, a, a_stride, b + j, b_row, c + j, c_row, scale);
}

// The same where a number of B may be infinite or NaN, and must not reach those that do not see it: A is 0 there.
template <bool turned, Sum kind>
void panels_seen(
    long rows, long width, long depth, const float* a, long a_stride, const float* b, long b_row, float* c,
    long c_row, const float* scale = nullptr
) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < width; j += WIDTH) {
            vec total = {};
            for (long k = 0; k < depth; k++) {
                float left = turned ? a[k * a_stride + i] : a[i * a_stride + k];
                if (left != 0.f) total += splat(left) * load(b + k * b_row + j);
            }
            float* to = c + i * c_row + j;
            if (kind == Sum::added) total += load(to);
            if (kind == Sum::to_scaled) total += load(to) * splat(scale[i]);
            store(to, total);
        }
}

// `count` is a multiple of LINE.
inline bool finite(const float* numbers, long count) {
    vec rest[LINE / WIDTH] = {};
    for (long i = 0; i < count; i += LINE)
        for (long j = 0; j < LINE / WIDTH; j++) rest[j] += load(numbers + i + j * WIDTH) * 0.f;
    for (long j = 1; j < LINE / WIDTH; j++) rest[0] += rest[j];
    return sum(rest[0]) == 0.f;
}

// 2^x to 1 unit in the last place for x <= 0; below -126.5 it is 0.
inline vec exp2_falling(vec x) {
    const vec shift = splat(12582912.f + 127.f);  // adding it leaves the exponent's bits, rounded, at the end
    x = larger(splat(-127.f), x);                 // a NaN stays one
    vec shifted = x + shift, r = x - (shifted - shift);
    vec p = splat(1.5353361947e-4f);
    p = p * r + 1.3398874404e-3f;
    p = p * r + 9.6184373574e-3f;
    p = p * r + 5.5503324712e-2f;
    p = p * r + 2.4022647914e-1f;
    p = p * r + 6.9314720286e-1f;
    p = p * r + 1.f;
    return p * (vec)((ivec)shifted << 23);
}

}  // namespace openelm
