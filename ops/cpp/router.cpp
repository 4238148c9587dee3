// The router's product with its gradients, fp32 of bf16 tokens, on a CPU with AVX512-BF16. A token's logits do not
// depend on the tokens beside it, and no sum on the number of threads.
//
// Legend: T tokens, D hidden, E experts.

#include "tiles.h"

namespace switchyard {
namespace {

constexpr Index TOGETHER = 4;   // tokens, experts or vectors whose sums are in registers at once
constexpr Index STRETCH = 256;  // tokens whose weight gradient is added up in registers

template <int TOKENS, int EXPERTS>
void logits_of(Index D, const Bf16 *x, const float *weight, float *logits, Index E) {
    __m512 sum[TOKENS][EXPERTS];
    for (auto &row : sum)
        for (__m512 &one : row) one = all(0);
    for (Index d = 0; d < D; d += 16) {
        const __mmask16 there = first(D - d);
        __m512 token[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) token[t] = wide(x + t * D + d, there);
#pragma GCC unroll 4
        for (int e = 0; e < EXPERTS; ++e) {
            const __m512 w = _mm512_maskz_loadu_ps(there, weight + e * D + d);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sum[t][e] = _mm512_fmadd_ps(token[t], w, sum[t][e]);
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
        for (int e = 0; e < EXPERTS; ++e) logits[t * E + e] = _mm512_reduce_add_ps(sum[t][e]);
}

template <int TOKENS>
void logits_of_all(Index D, Index E, const Bf16 *x, const float *weight, float *logits) {
    Index e = 0;
    for (; e + TOGETHER <= E; e += TOGETHER) logits_of<TOKENS, TOGETHER>(D, x, weight + e * D, logits + e, E);
    for (; e < E; ++e) logits_of<TOKENS, 1>(D, x, weight + e * D, logits + e, E);
}

template <int TOKENS>
void input_gradient(Index D, Index E, const float *dlogits, const float *weight, Bf16 *dx) {
    for (Index begin = 0; begin < D; begin += 16 * TOGETHER) {
        __m512 sum[TOKENS][TOGETHER];
        for (auto &row : sum)
            for (__m512 &one : row) one = all(0);
        for (Index e = 0; e < E; ++e)
#pragma GCC unroll 4
            for (int v = 0; v < TOGETHER; ++v) {
                const Index d = begin + 16 * v;
                const __m512 w = _mm512_maskz_loadu_ps(first(D - d), weight + e * D + d);
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; ++t) sum[t][v] = _mm512_fmadd_ps(all(dlogits[t * E + e]), w, sum[t][v]);
            }
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < TOGETHER; ++v) {
                const Index d = begin + 16 * v;
                store(dx + t * D + d, first(D - d), sum[t][v]);
            }
    }
}

// EXPERTS rows of dweight [E, D], the columns from `from` on that are added up at once.
template <int EXPERTS>
void weight_gradient(Index T, Index D, Index E, Index from, const float *dlogits, const Bf16 *x, float *dweight) {
    for (Index begin = 0; begin == 0 || begin < T; begin += STRETCH) {
        __m512 sum[EXPERTS][TOGETHER];
        for (auto &row : sum)
            for (__m512 &one : row) one = all(0);
        for (Index t = begin; t < std::min(T, begin + STRETCH); ++t)
#pragma GCC unroll 4
            for (Index v = 0, d = from; v < TOGETHER; ++v, d += 16) {
                const __m512 token = wide(x + t * D + d, first(D - d));
#pragma GCC unroll 4
                for (int e = 0; e < EXPERTS; ++e)
                    sum[e][v] = _mm512_fmadd_ps(all(dlogits[t * E + e]), token, sum[e][v]);
            }
#pragma GCC unroll 4
        for (int e = 0; e < EXPERTS; ++e)
#pragma GCC unroll 4
            for (Index v = 0, d = from; v < TOGETHER; ++v, d += 16) {
                float *to = dweight + e * D + d;
                const __m512 before = begin ? _mm512_maskz_loadu_ps(first(D - d), to) : all(0);
                _mm512_mask_storeu_ps(to, first(D - d), _mm512_add_ps(before, sum[e][v]));
            }
    }
}

// several(i) for TOGETHER indices from i on, as long as there are so many, and one(i) for each that is left.
template <class Several, class One>
void together(Index count, int threads, Several several, One one) {
#pragma omp parallel for num_threads(threads)
    for (Index begin = 0; begin < count; begin += TOGETHER) {
        if (begin + TOGETHER <= count)
            several(begin);
        else
            for (Index i = begin; i < count; ++i) one(i);
    }
}

}  // namespace

void router_logits(Index T, Index D, Index E, const Bf16 *x, const float *weight, float *logits, int threads) {
    together(
        T, threads, [&](Index t) { logits_of_all<TOGETHER>(D, E, x + t * D, weight, logits + t * E); },
        [&](Index t) { logits_of_all<1>(D, E, x + t * D, weight, logits + t * E); });
}

void router_logits_backward(Index T, Index D, Index E, const float *dlogits, const Bf16 *x, const float *weight,
                            Bf16 *dx, float *dweight, int threads) {
    together(
        T, threads, [&](Index t) { input_gradient<TOGETHER>(D, E, dlogits + t * E, weight, dx + t * D); },
        [&](Index t) { input_gradient<1>(D, E, dlogits + t * E, weight, dx + t * D); });
    const Index columns = 16 * TOGETHER;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (Index from = 0; from < D; from += columns)
        for (Index block = 0; block < (E + TOGETHER - 1) / TOGETHER; ++block) {
            const Index e = block * TOGETHER;
            if (e + TOGETHER <= E)
                weight_gradient<TOGETHER>(T, D, E, from, dlogits + e, x, dweight + e * D);
            else
                for (Index last = e; last < E; ++last)
                    weight_gradient<1>(T, D, E, from, dlogits + last, x, dweight + last * D);
        }
}

}  // namespace switchyard
