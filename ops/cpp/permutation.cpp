// Rows of tokens gathered, added up and weighed in bf16 on a CPU with AVX512-BF16. Sums are in fp32 and in the order of
// a token's choices.
//
// Legend: T tokens, D hidden, K choices per token, R routed rows.

#include "tiles.h"

#include <cstring>

namespace switchyard {
namespace {

__m512 weighed(const Bf16 *x, __mmask16 there, const float *gate) {
    return gate ? _mm512_mul_ps(wide(x, there), all(*gate)) : wide(x, there);
}

}  // namespace

void gather_rows(Index R, Index T, Index K, Index D, const Bf16 *source, const Index *choice, const float *gates,
                 Bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index r = 0; r < R; ++r) {
        const Bf16 *from = source + choice[r] / K * D;
        Bf16 *to = out + r * D;
        if (choice[r] >= T * K)
            std::memset(to, 0, D * sizeof(Bf16));
        else if (!gates)
            std::memcpy(to, from, D * sizeof(Bf16));
        else
            for (Index d = 0; d < D; d += 16)
                store(to + d, first(D - d), weighed(from + d, first(D - d), gates + choice[r]));
    }
}

void add_rows(Index T, Index K, Index D, const Bf16 *rows, const Index *slot, const float *gates, Bf16 *out,
              int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index t = 0; t < T; ++t)
        for (Index d = 0; d < D; d += 16) {
            __m512 sum = all(0);
            for (Index c = t * K; c < (t + 1) * K; ++c)
                if (const float *gate = gates ? gates + c : nullptr; slot[c] >= 0)
                    sum = _mm512_add_ps(sum, weighed(rows + slot[c] * D + d, first(D - d), gate));
            store(out + t * D + d, first(D - d), sum);
        }
}

void gate_gradient(Index T, Index K, Index D, const Bf16 *rows, const Index *slot, const Bf16 *grad, float *out,
                   int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index c = 0; c < T * K; ++c) {
        __m512 sum = all(0);
        for (Index d = 0; slot[c] >= 0 && d < D; d += 16)
            sum = _mm512_fmadd_ps(wide(rows + slot[c] * D + d, first(D - d)), wide(grad + c / K * D + d, first(D - d)),
                                  sum);
        out[c] = _mm512_reduce_add_ps(sum);
    }
}

}  // namespace switchyard
