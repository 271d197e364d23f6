// The choice of a token from the logits of one text: openelm/kernels/choice.py.
#include "vector.h"

using namespace openelm;

namespace {

constexpr long BLOCK = 512;  // numbers whose weights are added up before they are compared with what was drawn

}  // namespace

// found: the id, its log-probability by the logits alone. Temperature 0 takes the first of the largest.
extern "C" void openelm_choose(
    const float* logits, const float* bias, long count, float temperature, float uniform, float* found, long
) {
    vec largest_plain = splat(-INFINITY), largest_biased = splat(-INFINITY);
    by_vectors(count, [&](long i, long n) {
        vec x = load_some(logits + i, n), y = bias ? x + load_some(bias + i, n) : x;
        for (long lane = n; lane < WIDTH; lane++) x[lane] = y[lane] = -INFINITY;
        largest_plain = larger(largest_plain, x), largest_biased = larger(largest_biased, y);
    });
    float most = largest(largest_plain), best = largest(largest_biased);
    static thread_local Scratch own_sums, own_weights;
    long blocks = (count + BLOCK - 1) / BLOCK;
    float *sums = own_sums.floats(blocks), *weights = own_weights.floats(BLOCK);
    float inverse = temperature > 0 ? 1 / temperature : 0;
    double all = 0, drawn_from = 0;
    auto weigh = [&](long i, long n) {
        vec x = load_some(logits + i, n);
        vec weight = exp(((bias ? x + load_some(bias + i, n) : x) - best) * inverse);
        for (long lane = n; lane < WIDTH; lane++) weight[lane] = 0;
        return weight;
    };
    for (long block = 0; block < blocks; block++) {
        vec plain = {}, weighted = {};
        long start = block * BLOCK;
        by_vectors(std::min(BLOCK, count - start), [&](long i, long n) {
            vec part = exp(load_some(logits + start + i, n) - most);
            for (long lane = n; lane < WIDTH; lane++) part[lane] = 0;
            plain += part;
            if (temperature > 0) weighted += weigh(start + i, n);
        });
        all += sum(plain), drawn_from += sums[block] = sum(weighted);
    }
    long id = 0;
    if (temperature > 0) {
        double threshold = uniform * drawn_from, reached = 0;
        long block = 0;
        while (block + 1 < blocks && reached + sums[block] < threshold) reached += sums[block++];
        long start = block * BLOCK, here = std::min(BLOCK, count - start);
        by_vectors(here, [&](long i, long n) { store(weights + i, weigh(start + i, n)); });
        id = start;  // of what rounding leaves beyond the end the last one with a weight
        for (long i = 0; i < here; i++)
            if (weights[i] > 0) {
                id = start + i;
                if ((reached += weights[i]) >= threshold) break;
            }
    } else {
        while (id + 1 < count && !(logits[id] + (bias ? bias[id] : 0.f) == best)) id++;
    }
    found[0] = float(id);
    found[1] = float(double(logits[id]) - most - std::log(all));
}
