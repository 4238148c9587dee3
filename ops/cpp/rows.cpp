// Losses and norms of bf16 rows on a CPU with AVX512-BF16. No sum depends on the number of threads.
//
// Legend: T tokens, V vocabulary (this rank's slice), R rows, D hidden, P parts of the rows.

#include "tiles.h"

#include <cmath>

namespace switchyard {

void cross_entropy_sums(Index T, Index V, const Bf16 *logits, const Index *label, float *largest, float *sum,
                        float *label_logit, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index t = 0; t < T; ++t) {
        const Bf16 *row = logits + t * V;
        __m512 top = all(-INFINITY), total = all(0);
        for (Index v = 0; v < V; v += 16) top = _mm512_mask_max_ps(top, first(V - v), wide(row + v, first(V - v)), top);
        largest[t] = _mm512_reduce_max_ps(top);
        const __m512 from = all(largest[t] == -INFINITY ? 0 : largest[t]);
        for (Index v = 0; v < V; v += 16) {
            const __m512 e = exponential(_mm512_sub_ps(wide(row + v, first(V - v)), from));
            total = _mm512_mask_add_ps(total, first(V - v), total, e);
        }
        sum[t] = _mm512_reduce_add_ps(total);
        label_logit[t] = label[t] >= 0 && label[t] < V ? _mm512_cvtss_f32(wide(row + label[t], 1)) : 0;
    }
}

void cross_entropy_gradient(Index T, Index V, Bf16 *logits, const Index *label, const float *largest, const float *sum,
                            const float *grad, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index t = 0; t < T; ++t) {
        Bf16 *row = logits + t * V;
        const __m512 share = all(1 / sum[t]), above = all(grad[t]);
        const auto gradient = [&](Index v, __mmask16 there, float less) {
            const __m512 e = exponential(_mm512_sub_ps(wide(row + v, there), all(largest[t])));
            return _mm512_mul_ps(_mm512_fmsub_ps(e, share, all(less)), above);
        };
        const bool mine = label[t] >= 0 && label[t] < V;
        const __m512 at_label = mine ? gradient(label[t], 1, 1) : all(0);
        for (Index v = 0; v < V; v += 16) store(row + v, first(V - v), gradient(v, first(V - v), 0));
        if (mine) store(row + label[t], 1, at_label);
    }
}

void rms_norm(Index R, Index D, const Bf16 *x, const Bf16 *weight, float eps, Bf16 *y, float *scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index r = 0; r < R; ++r) {
        __m512 squares = all(0);
        for (Index d = 0; d < D; d += 16) {
            const __m512 value = wide(x + r * D + d, first(D - d));
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        scale[r] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + eps);
        for (Index d = 0; d < D; d += 16) {
            const __m512 normed = _mm512_mul_ps(wide(x + r * D + d, first(D - d)), all(scale[r]));
            store(y + r * D + d, first(D - d), _mm512_mul_ps(normed, wide(weight + d, first(D - d))));
        }
    }
}

void rms_norm_backward(Index R, Index D, const Bf16 *x, const Bf16 *weight, const float *scale, const Bf16 *dy,
                       Bf16 *dx, float *dweight, Index rows, int threads) {
#pragma omp parallel for num_threads(threads)
    for (Index part = 0; part < (R + rows - 1) / rows; ++part) {
        float *share = dweight + part * D;
        std::fill_n(share, D, 0.f);
        for (Index r = part * rows; r < std::min(R, (part + 1) * rows); ++r) {
            __m512 sum = all(0);
            for (Index d = 0; d < D; d += 16) {
                const __mmask16 there = first(D - d);
                const __m512 n = _mm512_mul_ps(wide(x + r * D + d, there), all(scale[r]));
                const __m512 dy_n = _mm512_mul_ps(wide(dy + r * D + d, there), n);
                _mm512_mask_storeu_ps(share + d, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, share + d), dy_n));
                sum = _mm512_fmadd_ps(dy_n, wide(weight + d, there), sum);
            }
            const __m512 mean = all(_mm512_reduce_add_ps(sum) / D);
            for (Index d = 0; d < D; d += 16) {
                const __mmask16 there = first(D - d);
                const __m512 n = _mm512_mul_ps(wide(x + r * D + d, there), all(scale[r]));
                const __m512 g = _mm512_mul_ps(wide(dy + r * D + d, there), wide(weight + d, there));
                store(dx + r * D + d, there, _mm512_mul_ps(_mm512_fnmadd_ps(n, mean, g), all(scale[r])));
            }
        }
    }
}

}  // namespace switchyard
