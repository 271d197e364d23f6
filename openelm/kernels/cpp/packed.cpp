// Products with packed matrices, and rows of them: openelm/kernels/packed.py.
#include "packed.h"
#include <sys/mman.h>

namespace openelm {

static thread_local Scratch shared_numbers, shared_factors, own_row;

// Rows of x as the weight wants them: those that are that already, or others put beside.
template <class K, class X>
static Inputs<typename K::Input> inputs_of(const Weight& weight, long count, const X* x, long stride, long threads) {
    if constexpr (std::is_same_v<typename K::Input, X>) {
        if (weight.columns % K::step == 0) return {x, stride};
    }
    Rows<K> rows(shared_numbers, shared_factors, weight, count);
#pragma omp parallel for num_threads(team(count * weight.columns, threads)) schedule(static)
    for (long i = 0; i < count; i++) {
        float* wide = own_row.floats(weight.columns);
        by_vectors(weight.columns, [=](long k, long n) { store_some(wide + k, load_some(x + i * stride + k, n), n); });
        Ahead nothing;
        rows.put(i, wide, nothing);
    }
    return rows.all();
}

// One tile of a matrix (rows, columns); rows beyond the last one are zero.
template <class K>
static void pack_tile(const Weight& weight, long tile, const uint8_t* numbers, const void* scales, const void* biases) {
    uint8_t* to = (uint8_t*)weight.tiles + tile * tile_bytes<K>(weight);
    long lanes = weight.rows_of(tile), first = weight.first_row(tile), columns = weight.columns;
    std::memset(to, 0, tile_bytes<K>(weight));
    if constexpr (in_groups<K>) {
        using S = typename K::Scale;
        long group = weight.group, groups = columns / group, half = group / 2;
        for (long g = 0; g < groups; g++, to += K::group_bytes(group)) {
            auto* factors = (S*)(to + group / K::columns * K::step_bytes);
            for (long lane = 0; lane < lanes; lane++) {
                long row = first + lane;
                factors[lane] = ((const S*)scales)[row * groups + g];
                factors[TILE + lane] = ((const S*)biases)[row * groups + g];
                for (long i = 0; i < group; i++) {
                    long place = row * columns + g * group + i;
                    if (K::bits == 8) {
                        to[i / 2 * K::step_bytes + lane * 2 + i % 2] = numbers[place];
                    } else {
                        long number = numbers[place / 2] >> place % 2 * 4 & 15, pair = i % half;
                        to[pair / 2 * K::step_bytes + lane * 2 + pair % 2] |= number << i / half * 4;
                    }
                }
            }
        }
    } else {
        constexpr long size = 4 / K::columns;
        for (long i = 0; i < columns; i++)
            for (long lane = 0; lane < lanes; lane++) {
                const uint8_t* from = numbers + ((first + lane) * columns + i) * size;
                std::memcpy(to + (i / K::columns * TILE + lane) * 4 + i % K::columns * size, from, size);
            }
    }
}

}  // namespace openelm

using namespace openelm;

// How many bytes a weight takes.
extern "C" void openelm_packed_bytes(const void* description, long* bytes, long) {
    const Weight& weight = *(const Weight*)description;
    by_kind(weight, [&](auto kind) { *bytes = weight.count() * tile_bytes<decltype(kind)>(weight); });
}

// Fills a weight from rows of numbers, or of words with scales and biases.
extern "C" void openelm_pack(
    const void* description, const uint8_t* numbers, const void* scales, const void* biases, long threads
) {
    const Weight& weight = *(const Weight*)description;
    by_kind(weight, [&](auto kind) {
#pragma omp parallel for num_threads(team(weight.rows * weight.columns, threads)) schedule(static)
        for (long tile = 0; tile < weight.count(); tile++)
            pack_tile<decltype(kind)>(weight, tile, numbers, scales, biases);
    });
}

// Asks for large pages for memory that nothing was written to yet: a stream of it meets fewer page tables.
extern "C" void openelm_large_pages(void* memory, long bytes, long) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    uintptr_t first = ((uintptr_t)memory + page - 1) / page * page, last = ((uintptr_t)memory + bytes) / page * page;
    if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);  // refused is as well
#endif
}

// out (count, rows) = x (count, columns) · weight, of fp32 or bf16 each; strides are those of rows.
extern "C" void openelm_packed_linear(
    const void* description, long count, const void* x, long x_stride, long x_is_bf16, void* out, long out_stride,
    long out_is_bf16, long threads
) {
    const Weight& weight = *(const Weight*)description;
    by_kind(weight, [&](auto kind) {
        using K = decltype(kind);
        by_dtype(x_is_bf16, [&](auto x_kind) {
            auto inputs = inputs_of<K>(weight, count, (const decltype(x_kind)*)x, x_stride, threads);
            by_dtype(out_is_bf16, [&](auto out_kind) {
                Output<decltype(out_kind)> output{(decltype(out_kind)*)out, out_stride};
                Pieces work(threads);
#pragma omp parallel num_threads(team(count * weight.rows * weight.columns, threads))
                {
                    set_pieces(work, pieces(weight, count));
#pragma omp barrier
                    work.each([&](long piece) { multiply<K>(weight, piece, count, inputs, output); });
                }
            });
        });
    });
}

// out (count, columns): rows of the weight.
extern "C" void openelm_packed_rows(
    const void* description, long count, const long* rows, void* out, long out_is_bf16, long threads
) {
    const Weight& weight = *(const Weight*)description;
    by_kind(weight, [&](auto kind) {
        by_dtype(out_is_bf16, [&](auto out_kind) {
            auto* to = (decltype(out_kind)*)out;
#pragma omp parallel for num_threads(team(count * weight.columns, threads)) schedule(static)
            for (long i = 0; i < count; i++) read_row<decltype(kind)>(weight, rows[i], to + i * weight.columns);
        });
    });
}
