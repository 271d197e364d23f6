#include "gemm.h"

namespace openelm {

static thread_local Scratch shared_copy, own_copy;

template <class T, long STRIP>
static void copy_strips(float* to, Matrix<T> lines, long first, long count, long start, long depth) {
    for (long i = 0; i < count; i += STRIP)
        copy_strip<STRIP>(
            to + i * depth, lines.at(first + i, start), lines.row, lines.column, std::min(STRIP, count - i), depth
        );
}

// The larger operand is copied piece by piece into each thread's cache, the other one as a whole and shared.
template <class A, class B>
void multiply(long m, long n, long k, Matrix<A> a, Matrix<B> b, float* c, long c_row, bool add, int threads) {
    bool by_rows = m >= n;
    Matrix<B> b_lines{b.data, b.column, b.row};  // a line of B is a column
    long blocks = std::max(1L, strips(k, DEPTH)), block = std::max(1L, strips(k, blocks));
    long strip = by_rows ? STRIP_M : STRIP_N, count = by_rows ? m : n;
    long pieces = std::max(strips(count, by_rows ? ROWS : 8 * STRIP_N), std::min(8L * threads, strips(count, strip)));
    pieces = strips(pieces, threads) * threads;
    long piece = strips(strips(count, pieces), strip) * strip;
    long other = by_rows ? strips(n, STRIP_N) * STRIP_N : strips(m, STRIP_M) * STRIP_M;
    float* whole = shared_copy.floats(other * block + 8);
#pragma omp parallel num_threads(threads)
    {
        float* own = own_copy.floats(piece * block + 8);
        for (long start = 0; start < std::max(1L, k); start += block) {
            long depth = std::min(block, k - start);
            bool adds = add || start > 0;
            if (by_rows) {
#pragma omp for schedule(static)
                for (long j = 0; j < n; j += STRIP_N)
                    copy_strips<B, STRIP_N>(whole + j * depth, b_lines, j, std::min(STRIP_N, n - j), start, depth);
            } else {
#pragma omp for schedule(static)
                for (long i = 0; i < m; i += STRIP_M)
                    copy_strips<A, STRIP_M>(whole + i * depth, a, i, std::min(STRIP_M, m - i), start, depth);
            }
#pragma omp for schedule(dynamic, 1)
            for (long first = 0; first < count; first += piece) {
                long here = std::min(piece, count - first);
                if (by_rows) {
                    copy_strips<A, STRIP_M>(own, a, first, here, start, depth);
                    for (long j = 0; j < n; j += STRIP_N)
                        for (long i = 0; i < here; i += STRIP_M)
                            multiply_strips(
                                std::min(STRIP_M, here - i), std::min(STRIP_N, n - j), depth, own + i * depth,
                                whole + j * depth, c + (first + i) * c_row + j, c_row, adds
                            );
                } else {
                    copy_strips<B, STRIP_N>(own, b_lines, first, here, start, depth);
                    for (long j = 0; j < here; j += STRIP_N)
                        for (long i = 0; i < m; i += STRIP_M)
                            multiply_strips(
                                std::min(STRIP_M, m - i), std::min(STRIP_N, here - j), depth, whole + i * depth,
                                own + j * depth, c + i * c_row + first + j, c_row, adds
                            );
                }
            }
        }
    }
}

}  // namespace openelm

using namespace openelm;

extern "C" void openelm_gemm(
    long m, long n, long k, const void* a, long a_row, long a_column, long a_is_bf16, const void* b, long b_row,
    long b_column, long b_is_bf16, float* c, long c_row, long add, long threads
) {
    by_dtype(a_is_bf16, [=](auto kind_of_a) {
        by_dtype(b_is_bf16, [=](auto kind_of_b) {
            using A = decltype(kind_of_a);
            using B = decltype(kind_of_b);
            Matrix<A> left{(const A*)a, a_row, a_column};
            Matrix<B> right{(const B*)b, b_row, b_column};
            multiply(m, n, k, left, right, c, c_row, bool(add), int(threads));
        });
    });
}
